/* The loops that touch every byte of a conversion. No library, no state, nothing of Python's.

   Python passes addresses, lengths and strides of numpy views: nothing beyond these is read or
   written. Strides count bytes, of either sign; values are BF16 as their bits, at any address.
   The results are those of reference.py, bit by bit. Loops over 16 or 32 elements are written so
   that compilers turn each into a few vector operations: hence the small types, `?:` for `if`, and
   unions for bytes seen as words. Little-endian machines. */

#include <stdint.h>
#include <string.h>

typedef uint8_t u8;
typedef int16_t i16;
typedef uint16_t u16;
typedef uint32_t u32;
typedef int64_t i64;
typedef uint64_t u64;
typedef u16 bf16 __attribute__((aligned(1), may_alias)); /* bits of a value, at any address */

/* Whatever a kernel calls becomes part of it, so that it is compiled for the kernel's processor. */
#define INLINE static inline __attribute__((always_inline))

/* Each kernel is compiled for three kinds of processors; library.py chooses by `level`. On others
   than x86-64 the vectors of the baseline, such as ARM's NEON, have to do. */
#ifdef __x86_64__
#define KERNEL(kind, name, parameters, arguments)                                               \
    kind name##_baseline parameters { return name arguments; }                                  \
    __attribute__((target("avx2,fma"))) kind name##_avx2 parameters { return name arguments; }  \
    __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl")))                               \
    kind name##_avx512 parameters { return name arguments; }
#else
#define KERNEL(kind, name, parameters, arguments)                                               \
    kind name##_baseline parameters { return name arguments; }
#endif

/* How many of the names after `baseline` this processor has. */
int level(void)
{
#ifdef __x86_64__
    if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma")) return 0;
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw")
        && __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") ? 2 : 1;
#else
    return 0;
#endif
}

enum {
    GROUP = 32,   /* values that share a scale */
    LANES = 32,   /* blocks that are treated side by side: their values fill a cache line */
    PARTS = 8,    /* of a sum of floating-point numbers: those of a vector */
    RUN = 32,     /* blocks that are decoded before they are summed, in the nearest cache */
    STRIP = 384,  /* rows treated together: long runs, and all they touch fits in a cache */
    TILE = 512,   /* rows and columns that are transposed together, likewise */
    AHEAD = 2048, /* bytes: what is read next is asked for so long before */
    NEAR = sizeof(u16), /* the step of values that lie side by side */
    MAGNITUDE = 0x7FFF,
    INFINITE = 0x7F80,
    NO_HINT = 255, /* the scale byte that stands for NaN */
};

INLINE i64 least(i64 a, i64 b) { return a < b ? a : b; }

/* Ask for the cache line at an offset, which may lie beyond the view: nothing is read. */
INLINE void prefetch(const u8 *from, i64 offset)
{
    __builtin_prefetch((const void *)((uintptr_t)from + (uintptr_t)offset));
}

/* A group's values: where they lie, or copied to `tile` if they lie apart. */
INLINE const bf16 *gather(const u8 *values, i64 step, bf16 *tile)
{
    if (step == NEAR) return (const bf16 *)values;
    for (int k = 0; k < GROUP; k++) tile[k] = *(const bf16 *)(values + k * step);
    return tile;
}

/* Every second element, then the others; done three times, it makes rows of 8 columns. */
INLINE void unzip(const u16 *restrict from, u16 *restrict to, int half)
{
    for (int n = 0; n < half; n++) to[n] = from[2 * n], to[n + half] = from[2 * n + 1];
}

/* --- One block ------------------------------------------------------------------------------- */

static const u8 QUARTERS[8] = {0, 2, 4, 6, 8, 12, 16, 24}; /* the codes' magnitudes, times 4 */

/* The bits of quarters / 4 * 2^(scale - 127): exact, and beyond INFINITE where BF16 ends. */
static unsigned scaled(unsigned quarters, int scale)
{
    unsigned fraction = quarters << 4; /* of 2^scale * 2^-133, the smallest number of BF16 */
    for (; fraction >= 256; scale++) fraction >>= 1;
    for (; fraction && fraction < 128 && scale > 0; scale--) fraction <<= 1;
    return quarters ? (scale << 7) + fraction : 0;
}

/* The bits of half the scale, which the codes' values follow at fixed distances from scale 2 on. */
INLINE u16 bias_of(unsigned scale) { return (scale << 7) - 128; }

/* The bits of a code whose lowest bit is 64: as many as BF16 has from 1.0 (code 2) to 1.5 (3). */
INLINE u16 value(u16 code, u16 bias)
{
    u16 large = code & 7 << 6, steps = large > 1 << 6 ? large : 0;
    u16 magnitude = large ? (u16)(steps + bias) : 0;
    return (u16)(code << 6 & 0x8000) | magnitude;
}

static void decode_small(const u8 *block, int scale, bf16 *values)
{
    for (int k = 0; k < GROUP; k++) {
        unsigned code = block[k / 2] >> k % 2 * 4;
        values[k] = (code & 8) << 12 | scaled(QUARTERS[code & 7], scale);
    }
}

INLINE void decode_block(const u8 *block, int scale, bf16 *restrict values)
{
    union { u32 pairs[GROUP / 2]; u16 codes[GROUP]; } two;
    if (scale < 2) {
        decode_small(block, scale, values);
        return;
    }
    for (int k = 0; k < GROUP / 2; k++) two.pairs[k] = (u32)block[k] << 6 | (u32)block[k] << 18;
    for (int k = 0; k < GROUP; k++) values[k] = value(two.codes[k], bias_of(scale));
}

/* The code, its lowest bit 64, that is nearest to a magnitude, the even one on ties; for scales
   from 3 on, so that half the smallest value is not subnormal. */
INLINE u16 nearest(i16 magnitude, i16 bias)
{
    i16 above = magnitude - bias; /* 128 at 1.0, from where on codes are 64 apart */
    i16 code = (above + 31 + (above >> 6 & 1)) & ~63;
    code = code < 7 << 6 ? code : 7 << 6;
    code = code > 2 << 6 ? code : 2 << 6;
    code = above >= 64 ? code : 1 << 6; /* 0.75 */
    return above > -128 ? code : 0;     /* 0.25 */
}

enum { ZERO = 1, HINTED = 2, RARE = 4, INEXACT = 8 };

/* The scale for a largest magnitude, and what is to be said of the block. */
INLINE u16 choose(u16 largest, u16 hint, u16 *scale)
{
    u16 exponent = largest >> 7, rule = exponent - 2, zero = largest == 0;
    /* Differences wrap: what is below a range is far above it. */
    u16 usual = (u16)(exponent - 5) <= 254 - 5;
    /* Under a hint more than 3 above the rule's scale, the largest value has no code. */
    u16 hinted = zero ? (u16)(hint - 1) <= 251 : (u16)(hint - rule - 1) <= 2 && hint != NO_HINT;
    u16 rare = !zero && !usual;
    *scale = hinted ? hint : zero ? 0 : rule;
    return (zero ? ZERO : 0) | (hinted ? HINTED : 0) | (rare ? RARE : 0);
}

/* Encode under the bias of a scale from 3 on; 0 if all values are exact. */
INLINE u16 encode_under(const bf16 *values, u16 bias, u8 *block)
{
    union { u32 pairs[GROUP / 2]; u16 codes[GROUP]; } two;
    u16 differ = 0;
    for (int k = 0; k < GROUP; k++) {
        u16 code = nearest(values[k] & MAGNITUDE, bias);
        differ |= value(code, bias) ^ (values[k] & MAGNITUDE);
        two.codes[k] = code | (values[k] >> 6 & 8 << 6);
    }
    for (int k = 0; k < GROUP / 2; k++) block[k] = two.pairs[k] >> 6 | two.pairs[k] >> 18;
    return differ;
}

/* The same under any scale, of any values. */
static u16 encode_rare(const bf16 *values, int scale, u8 *block)
{
    u16 differ = 0;
    memset(block, 0, GROUP / 2);
    for (int k = 0; k < GROUP; k++) {
        unsigned magnitude = values[k] & MAGNITUDE, code = 0;
        for (int c = 1; c < 8; c++) {
            unsigned midpoint = scaled((QUARTERS[c - 1] + QUARTERS[c]) / 2, scale);
            code += magnitude > midpoint || (magnitude == midpoint && c % 2 == 0);
        }
        differ |= magnitude != scaled(QUARTERS[code], scale) || magnitude >= INFINITE;
        block[k / 2] |= (code | (values[k] >> 12 & 8)) << k % 2 * 4;
    }
    return differ;
}

/* Encode any block; returns what is to be said of it. */
INLINE u16 encode_any(const bf16 *values, u16 hint, u8 *block, u16 *scale)
{
    u16 largest = 0, finite = 1;
    for (int k = 0; k < GROUP; k++) {
        u16 magnitude = values[k] & MAGNITUDE, odd = magnitude >= INFINITE;
        finite &= !odd;
        largest = !odd && magnitude > largest ? magnitude : largest;
    }
    u16 rule = largest >> 7 > 2 ? (largest >> 7) - 2 : 0;
    *scale = hint;
    if (hint != NO_HINT && hint != rule && !encode_rare(values, hint, block)) return HINTED;
    *scale = rule;
    u16 differ = finite && rule >= 3 ? encode_under(values, bias_of(rule), block)
                                     : encode_rare(values, rule, block);
    return (finite && !largest ? ZERO : 0) | (differ ? INEXACT : 0);
}

/* --- Batches of blocks ----------------------------------------------------------------------- */

/* A batch is up to LANES blocks that follow each other along one axis. Where their values lie side
   by side, it is treated line by line, a line being one value of each; else block by block. */

INLINE int in_lines(i64 value_step, i64 count) { return value_step == NEAR && count == LANES; }

/* `steps` are those from block to block, of values, blocks and scales. The next row's blocks may
   lie `next` bytes on: after a gap, the processor does not foresee them. */
INLINE void decode_batch(u8 *values, i64 step, const u8 *blocks, const u8 *scales,
                         const i64 *steps, i64 count, i64 next)
{
    u16 words[8 * LANES], room[8 * LANES], biases[LANES], smallest = 255; /* a word: four codes */
    for (i64 i = 0; i < count; i++) {
        u16 scale = scales[i * steps[2]];
        smallest = scale < smallest ? scale : smallest;
        biases[i] = bias_of(scale);
    }
    if (!in_lines(steps[0], count) || smallest < 2) {
        for (i64 i = 0; i < count; i++) {
            bf16 tile[GROUP];
            u8 *v = values + i * steps[0];
            const u8 *block = blocks + i * steps[1];
            prefetch(block, next);
            decode_block(block, scales[i * steps[2]], step == NEAR ? (bf16 *)v : tile);
            for (int k = 0; step != NEAR && k < GROUP; k++) *(bf16 *)(v + k * step) = tile[k];
        }
        return;
    }
    for (int i = 0; i < LANES; i++) memcpy(room + 8 * i, blocks + i * steps[1], GROUP / 2);
    unzip(room, words, 4 * LANES), unzip(words, room, 4 * LANES), unzip(room, words, 4 * LANES);
    for (int k = 0; k < GROUP; k++) {
        const u16 *word = words + k / 4 * LANES;
        bf16 *line = (bf16 *)(values + k * step);
        prefetch(values, (GROUP + k) * step);
        for (int i = 0; i < LANES; i++) line[i] = value(word[i] >> k % 4 * 4 << 6, biases[i]);
    }
}

/* Sums over pairs of values, in several parts each, so that vectors need not be added across. */
struct moments {
    double squares[PARTS], squared_error[PARTS], largest_error[PARTS];
};

INLINE double number(u32 bits)
{
    union { u32 bits; float number; } two = {bits << 16};
    return two.number;
}

INLINE double larger(double a, double b) { return a > b ? a : b; }

INLINE void add_squares(double *sums, const double *x)
{
    double y[GROUP];
    for (int k = 0; k < GROUP; k++) y[k] = x[k] * x[k];
    for (int i = 0; i < PARTS; i++)
        sums[i] += (y[i] + y[i + PARTS]) + (y[i + 2 * PARTS] + y[i + 3 * PARTS]);
}

INLINE void add_moments(struct moments *sums, const u16 *exact, const u16 *other)
{
    double x[GROUP], error[GROUP], *largest = sums->largest_error;
    for (int k = 0; k < GROUP; k++) x[k] = number(exact[k]);
    for (int k = 0; k < GROUP; k++) error[k] = __builtin_fabs(x[k] - number(other[k]));
    for (int i = 0; i < PARTS; i++) {
        double found = larger(larger(error[i], error[i + PARTS]),
                              larger(error[i + 2 * PARTS], error[i + 3 * PARTS]));
        largest[i] = larger(found, largest[i]);
    }
    add_squares(sums->squares, x);
    add_squares(sums->squared_error, error);
}

/* What an encoding did; codec.py reads it. */
struct encoded {
    i64 zero_blocks, hinted_blocks, min_scale, max_scale, inexact_blocks;
    i64 first_inexact, inexact_values, nonfinite, clipped, flushed;
    struct moments moments;
};

struct counts {
    u16 changed[GROUP], nonfinite[GROUP], clipped[GROUP], flushed[GROUP];
};

/* Add up what rounding did to the values of a block. */
INLINE void measure(struct counts *counts, struct moments *moments, const bf16 *values,
                    const u8 *block, int scale)
{
    u16 top = scale < 2 ? scaled(QUARTERS[7], scale) : value(7 << 6, bias_of(scale));
    u16 exact[GROUP], back[GROUP];
    decode_block(block, scale, back);
    for (int k = 0; k < GROUP; k++) {
        u16 magnitude = values[k] & MAGNITUDE, decoded = back[k] & MAGNITUDE;
        u16 odd = magnitude >= INFINITE;
        counts->changed[k] += magnitude != decoded;
        counts->nonfinite[k] += odd;
        counts->clipped[k] += !odd & (magnitude > top);
        counts->flushed[k] += !decoded & (magnitude != 0);
        exact[k] = odd ? 0 : magnitude;
        back[k] = odd ? 0 : decoded;
    }
    add_moments(moments, exact, back);
}

INLINE u16 total(const u16 *counts)
{
    u16 sum = 0;
    for (int k = 0; k < GROUP; k++) sum += counts[k];
    return sum;
}

/* Largest magnitude of each block of a batch. */
INLINE void find_largest(const u8 *values, i64 value_step, i64 step, u16 *largest, i64 count)
{
    if (in_lines(value_step, count)) {
        memset(largest, 0, LANES * sizeof *largest);
        for (int k = 0; k < GROUP; k++) {
            const bf16 *line = (const bf16 *)(values + k * step);
            for (int i = 0; i < LANES; i++) {
                u16 magnitude = line[i] & MAGNITUDE;
                largest[i] = magnitude > largest[i] ? magnitude : largest[i];
            }
        }
        return;
    }
    for (i64 i = 0; i < count; i++) {
        bf16 tile[GROUP];
        const bf16 *bits = gather(values + i * value_step, step, tile);
        u16 found = 0;
        for (int k = 0; k < GROUP; k++) {
            u16 magnitude = bits[k] & MAGNITUDE;
            found = magnitude > found ? magnitude : found;
        }
        largest[i] = found;
    }
}

/* `encode_under` for LANES blocks, line by line. */
INLINE void encode_lines(const u8 *values, i64 step, u8 *blocks, i64 block_step,
                         const u16 *biases, u16 *differ)
{
    u16 words[8][LANES];
    memset(differ, 0, LANES * sizeof *differ);
    for (int j = 0; j < 8; j++) {
        const u8 *lines = values + 4 * j * step;
        for (int k = 0; k < 4; k++) prefetch(lines, (GROUP + k) * step);
        for (int i = 0; i < LANES; i++) {
            u16 word = 0, wrong = 0;
            for (int k = 0; k < 4; k++) {
                u16 bits = ((const bf16 *)(lines + k * step))[i];
                u16 code = nearest(bits & MAGNITUDE, biases[i]);
                wrong |= value(code, biases[i]) ^ (bits & MAGNITUDE);
                word |= (code >> 6 | (bits >> 12 & 8)) << 4 * k;
            }
            words[j][i] = word;
            differ[i] |= wrong;
        }
    }
    for (int i = 0; i < LANES; i++)
        for (int j = 0; j < 8; j++) ((bf16 *)(blocks + i * block_step))[j] = words[j][i];
}

/* Add up what was said of a batch's blocks. */
INLINE void note(struct encoded *made, const u16 *status, const u16 *scale, i64 count)
{
    u16 zero = 0, hinted = 0, lowest = 255, highest = 0;
    for (i64 i = 0; i < count; i++) {
        u16 empty = (status[i] & ZERO) != 0;
        zero += empty;
        hinted += (status[i] & HINTED) != 0;
        lowest = !empty && scale[i] < lowest ? scale[i] : lowest;
        highest = !empty && scale[i] > highest ? scale[i] : highest;
    }
    made->zero_blocks += zero;
    made->hinted_blocks += hinted;
    made->min_scale = lowest < made->min_scale ? lowest : made->min_scale;
    made->max_scale = highest > made->max_scale ? highest : made->max_scale;
}

/* `steps` are those from block to block, of values, blocks, scales, hints and the blocks' numbers,
   which begin at `number`. */
INLINE void encode_batch(const u8 *values, i64 step, u8 *blocks, u8 *scales, const u8 *hints,
                         i64 number, const i64 *steps, i64 count, struct encoded *made)
{
    u16 largest[LANES], hint[LANES], scale[LANES], status[LANES], biases[LANES], differ[LANES];
    u16 seen = 0, again = 0;
    bf16 tile[GROUP];
    find_largest(values, steps[0], step, largest, count);
    for (i64 i = 0; i < count; i++) hint[i] = hints[i * steps[3]];
    for (i64 i = 0; i < count; i++) {
        status[i] = choose(largest[i], hint[i], &scale[i]);
        biases[i] = bias_of(scale[i] > 3 ? scale[i] : 3); /* zeros are zeros under any */
    }
    if (in_lines(steps[0], count))
        encode_lines(values, step, blocks, steps[1], biases, differ);
    else
        for (i64 i = 0; i < count; i++) {
            const u8 *v = values + i * steps[0];
            prefetch(v, AHEAD);
            differ[i] = encode_under(gather(v, step, tile), biases[i], blocks + i * steps[1]);
        }
    for (i64 i = 0; i < count; i++) {
        u16 wrong_hint = differ[i] && (status[i] & (HINTED | RARE)) == HINTED;
        hint[i] = wrong_hint ? NO_HINT : hint[i];
        status[i] = wrong_hint ? RARE : status[i] | (differ[i] ? INEXACT : 0);
        again |= status[i] & RARE;
    }
    for (i64 i = 0; again && i < count; i++)
        if (status[i] & RARE) {
            const bf16 *bits = gather(values + i * steps[0], step, tile);
            status[i] = encode_any(bits, hint[i], blocks + i * steps[1], &scale[i]);
        }
    for (i64 i = 0; i < count; i++) {
        scales[i * steps[2]] = scale[i];
        seen |= status[i];
    }
    note(made, status, scale, count);
    if (!(seen & INEXACT)) return;
    struct counts counts = {0};
    struct moments moments = made->moments; /* a copy: bytes that are written alias nothing here */
    for (i64 i = 0; i < count; i++)
        if (status[i] & INEXACT) {
            i64 at = number + i * steps[4];
            if (!made->inexact_blocks++ || at < made->first_inexact) made->first_inexact = at;
            const bf16 *bits = gather(values + i * steps[0], step, tile);
            measure(&counts, &moments, bits, blocks + i * steps[1], scale[i]);
        }
    made->moments = moments;
    made->inexact_values += total(counts.changed);
    made->nonfinite += total(counts.nonfinite);
    made->clipped += total(counts.clipped);
    made->flushed += total(counts.flushed);
}

/* --- Decode and encode ----------------------------------------------------------------------- */

/* Both go over rows and groups of blocks. Each array has a step from row to row and one from group
   to group, in the order of the arguments; `step` is that of the values along a group. Batches lie
   along groups or, where the values of neighbouring rows lie side by side, in strips of rows. */

INLINE void decode(u8 *values, const u8 *blocks, const u8 *scales, i64 rows, i64 groups,
                   const i64 *row, const i64 *group, i64 step)
{
    int along = row[0] == NEAR;
    const i64 *in = along ? row : group, *out = along ? group : row;
    i64 inner = along ? rows : groups, outer = along ? groups : rows, strip = along ? STRIP : inner;
    for (i64 first = 0; first < inner; first += strip)
        for (i64 o = 0; o < outer; o++)
            for (i64 i = first, end = least(first + strip, inner); i < end; i += LANES)
                decode_batch(values + o * out[0] + i * in[0], step, blocks + o * out[1] + i * in[1],
                             scales + o * out[2] + i * in[2], in, least(LANES, end - i), out[1]);
}
KERNEL(void, decode, (u8 *v, const u8 *b, const u8 *s, i64 rows, i64 groups, const i64 *row,
                      const i64 *group, i64 step), (v, b, s, rows, groups, row, group, step))

INLINE void encode(const u8 *values, u8 *blocks, u8 *scales, const u8 *hints, i64 number, i64 rows,
                   i64 groups, const i64 *row, const i64 *group, i64 step, struct encoded *made)
{
    int along = row[0] == NEAR;
    const i64 *in = along ? row : group, *out = along ? group : row;
    i64 inner = along ? rows : groups, outer = along ? groups : rows, strip = along ? STRIP : inner;
    for (i64 first = 0; first < inner; first += strip)
        for (i64 o = 0; o < outer; o++)
            for (i64 i = first, end = least(first + strip, inner); i < end; i += LANES)
                encode_batch(values + o * out[0] + i * in[0], step, blocks + o * out[1] + i * in[1],
                             scales + o * out[2] + i * in[2], hints + o * out[3] + i * in[3],
                             number + o * out[4] + i * in[4], in, least(LANES, end - i), made);
}
KERNEL(void, encode, (const u8 *v, u8 *b, u8 *s, const u8 *h, i64 number, i64 rows, i64 groups,
                      const i64 *row, const i64 *group, i64 step, struct encoded *made),
       (v, b, s, h, number, rows, groups, row, group, step, made))

/* --- Copies ---------------------------------------------------------------------------------- */

/* Where a row lies: rows come in pairs, and steps are those of a pair and within a pair. */
INLINE i64 at(i64 row, const i64 *steps) { return row / 2 * steps[0] + row % 2 * steps[1]; }

/* target[q][p] = source[p][q], p < rows, q < columns. */
INLINE void transpose(const u8 *source, u8 *target, i64 rows, i64 columns, const i64 *from,
                      const i64 *to)
{
    for (i64 p0 = 0; p0 < rows; p0 += TILE)
        for (i64 q0 = 0; q0 < columns; q0 += TILE)
            for (i64 p = p0; p < least(p0 + TILE, rows); p += 8)
                for (i64 q = q0; q < least(q0 + TILE, columns); q += 8) {
                    i64 height = least(8, rows - p), width = least(8, columns - q);
                    u16 a[64], b[64];
                    if (height < 8 || width < 8) {
                        for (i64 i = p; i < p + height; i++)
                            for (i64 j = q; j < q + width; j++)
                                memcpy(target + at(j, to) + NEAR * i,
                                       source + at(i, from) + NEAR * j, NEAR);
                        continue;
                    }
                    for (int i = 0; i < 8; i++)
                        memcpy(a + 8 * i, source + at(p + i, from) + NEAR * q, 8 * NEAR);
                    unzip(a, b, 32), unzip(b, a, 32), unzip(a, b, 32);
                    for (int j = 0; j < 8; j++)
                        memcpy(target + at(q + j, to) + NEAR * p, b + 8 * j, 8 * NEAR);
                }
}
KERNEL(void, transpose, (const u8 *source, u8 *target, i64 rows, i64 columns, const i64 *from,
                         const i64 *to), (source, target, rows, columns, from, to))

/* --- Sums ------------------------------------------------------------------------------------ */

/* Sums modulo 2^64 in several parts, so that vectors need not be added across. */
INLINE void add_weighted(u64 *sums, const bf16 *values, const u64 *weights)
{
    for (int k = 0; k < GROUP; k += PARTS)
        for (int i = 0; i < PARTS; i++) sums[i] += values[k + i] * weights[k + i];
}

INLINE u64 total_of(const u64 *sums)
{
    u64 sum = 0;
    for (int i = 0; i < PARTS; i++) sum += sums[i];
    return sum;
}

/* The sum over rows and columns of bits * row weight * column weight, modulo 2^64; `odd` is set if
   any are an infinity or NaN. Rows lie at these offsets, their elements `step` apart. */
INLINE u64 weighted_sum(const u8 *values, const i64 *offsets, const u64 *rows, i64 row_count,
                        i64 step, const u64 *columns, i64 column_count, u8 *odd)
{
    u64 sum = 0;
    u16 carries[GROUP] = {0}; /* 1 more than an exponent of all ones carries to the sign's place */
    for (i64 r = 0; r < row_count; r++) {
        u64 line[PARTS] = {0};
        i64 k = 0;
        for (; k + GROUP <= column_count; k += GROUP) {
            bf16 tile[GROUP];
            const bf16 *bits = gather(values + offsets[r] + k * step, step, tile);
            prefetch((const u8 *)bits, AHEAD);
            add_weighted(line, bits, columns + k);
            for (int i = 0; i < GROUP; i++) carries[i] |= (bits[i] & INFINITE) + 0x80;
        }
        for (; k < column_count; k++) {
            u16 bits = *(const bf16 *)(values + offsets[r] + k * step);
            line[0] += bits * columns[k];
            carries[0] |= (bits & INFINITE) + 0x80;
        }
        sum += total_of(line) * rows[r];
    }
    for (int i = 1; i < GROUP; i++) carries[0] |= carries[i];
    *odd = carries[0] >> 15;
    return sum;
}
KERNEL(u64, weighted_sum, (const u8 *v, const i64 *offsets, const u64 *rows, i64 row_count,
                           i64 step, const u64 *columns, i64 column_count, u8 *odd),
       (v, offsets, rows, row_count, step, columns, column_count, odd))

/* One long loop, which keeps its sum in a vector until the end. */
INLINE u64 weighted(const bf16 *values, const u64 *weights, i64 count)
{
    u64 sum = 0;
    for (i64 k = 0; k < count; k++) sum += values[k] * weights[k];
    return sum;
}

/* The same sum over the values of blocks; `group` has the steps of blocks and scales in a row. */
INLINE u64 packed_sum(const u8 *blocks, const u8 *scales, const i64 *block_rows,
                      const i64 *scale_rows, const u64 *rows, i64 row_count, const i64 *group,
                      const u64 *columns, i64 groups)
{
    u64 sum = 0;
    for (i64 r = 0; r < row_count; r++) {
        u64 line = 0;
        for (i64 first = 0; first < groups; first += RUN) {
            bf16 values[RUN * GROUP];
            i64 count = least(RUN, groups - first);
            const u8 *b = blocks + block_rows[r] + first * group[0];
            const u8 *s = scales + scale_rows[r] + first * group[1];
            for (i64 g = 0; g < count; g++)
                decode_block(b + g * group[0], s[g * group[1]], values + g * GROUP);
            line += weighted(values, columns + first * GROUP, count * GROUP);
        }
        sum += line * rows[r];
    }
    return sum;
}
KERNEL(u64, packed_sum, (const u8 *b, const u8 *s, const i64 *block_rows, const i64 *scale_rows,
                         const u64 *rows, i64 row_count, const i64 *group, const u64 *columns,
                         i64 groups),
       (b, s, block_rows, scale_rows, rows, row_count, group, columns, groups))

/* Of blocks one after the other: how many are all zero, and how many others hold no 4 and no 6. */
INLINE void count_blocks(const u8 *blocks, i64 count, i64 *found)
{
    i64 zero = 0, low = 0;
    for (i64 k = 0; k < count; k++) {
        u64 a, b;
        memcpy(&a, blocks + 16 * k, 8), memcpy(&b, blocks + 16 * k + 8, 8);
        u64 any = (a | b) & 0x7777777777777777;
        u64 high = ((a >> 1 & a >> 2) | (b >> 1 & b >> 2)) & 0x1111111111111111;
        zero += !any;
        low += any && !high;
    }
    found[0] = zero, found[1] = low;
}
KERNEL(void, count_blocks, (const u8 *blocks, i64 count, i64 *found), (blocks, count, found))

/* How often each byte occurs; in four tables, as equal neighbours would wait for one another. */
INLINE void count_bytes(const u8 *bytes, i64 count, i64 *found)
{
    u32 tables[4][256] = {0};
    i64 k = 0;
    for (; k + 4 <= count; k += 4)
        for (int i = 0; i < 4; i++) tables[i][bytes[k + i]]++;
    for (; k < count; k++) tables[0][bytes[k]]++;
    for (int b = 0; b < 256; b++)
        found[b] = (i64)tables[0][b] + tables[1][b] + tables[2][b] + tables[3][b];
}
KERNEL(void, count_bytes, (const u8 *bytes, i64 count, i64 *found), (bytes, count, found))

/* --- Comparisons ----------------------------------------------------------------------------- */

/* Whether two runs of bytes are equal. */
INLINE i64 same_bytes(const u8 *ours, const u8 *theirs, i64 count)
{
    return !memcmp(ours, theirs, count);
}
KERNEL(i64, same_bytes, (const u8 *ours, const u8 *theirs, i64 count), (ours, theirs, count))

/* Whether a group's values are these, which lie `step` apart. */
INLINE u16 differ(const bf16 *group, const u8 *values, i64 step)
{
    bf16 tile[GROUP];
    const bf16 *bits = gather(values, step, tile);
    u16 found = 0;
    for (int k = 0; k < GROUP; k++) found |= group[k] ^ bits[k];
    return found;
}

/* Whether the values of blocks are these; the arguments are those of `decode`. In strips of rows
   whose values lie side by side, a strip's part of a group is decoded, then compared. */
INLINE i64 same_decoded(const u8 *values, const u8 *blocks, const u8 *scales, i64 rows, i64 groups,
                        const i64 *row, const i64 *group, i64 step)
{
    if (row[0] != NEAR) {
        for (i64 r = 0; r < rows; r++) {
            u16 found = 0;
            for (i64 g = 0; g < groups; g++) {
                bf16 tile[GROUP];
                const u8 *block = blocks + r * row[1] + g * group[1];
                const u8 *other = values + r * row[0] + g * group[0];
                prefetch(block, row[1]), prefetch(other, AHEAD);
                decode_block(block, scales[r * row[2] + g * group[2]], tile);
                found |= differ(tile, other, step);
            }
            if (found) return 0;
        }
        return 1;
    }
    for (i64 first = 0; first < rows; first += STRIP)
        for (i64 g = 0; g < groups; g++) {
            bf16 strip[GROUP * STRIP];
            const u8 *other = values + first * row[0] + g * group[0];
            i64 width = least(STRIP, rows - first), apart = 0;
            for (i64 i = 0; i < width; i += LANES) {
                for (int k = 0; k < GROUP; k++) prefetch(other + NEAR * i, (GROUP + k) * step);
                decode_batch((u8 *)(strip + i), NEAR * STRIP,
                             blocks + (first + i) * row[1] + g * group[1],
                             scales + (first + i) * row[2] + g * group[2], row,
                             least(LANES, width - i), group[1]);
            }
            for (int k = 0; k < GROUP; k++)
                apart |= memcmp(strip + k * STRIP, other + k * step, NEAR * width);
            if (apart) return 0;
        }
    return 1;
}
KERNEL(i64, same_decoded, (const u8 *v, const u8 *b, const u8 *s, i64 rows, i64 groups,
                           const i64 *row, const i64 *group, i64 step),
       (v, b, s, rows, groups, row, group, step))

/* Whether target[q][p] == source[p][q]; the arguments are those of `transpose`. */
INLINE i64 same_transposed(const u8 *source, const u8 *target, i64 rows, i64 columns,
                           const i64 *from, const i64 *to)
{
    for (i64 p0 = 0; p0 < rows; p0 += TILE)
        for (i64 q0 = 0; q0 < columns; q0 += TILE) {
            u16 found[64] = {0};
            for (i64 p = p0; p < least(p0 + TILE, rows); p += 8)
                for (i64 q = q0; q < least(q0 + TILE, columns); q += 8) {
                    i64 height = least(8, rows - p), width = least(8, columns - q);
                    u16 a[64], b[64], c[64];
                    if (height < 8 || width < 8) {
                        memset(a, 0, sizeof a), memset(c, 0, sizeof c);
                        for (int i = 0; i < height; i++)
                            memcpy(a + 8 * i, source + at(p + i, from) + NEAR * q, NEAR * width);
                        for (int j = 0; j < width; j++)
                            memcpy(c + 8 * j, target + at(q + j, to) + NEAR * p, NEAR * height);
                    } else {
                        for (int i = 0; i < 8; i++)
                            memcpy(a + 8 * i, source + at(p + i, from) + NEAR * q, 8 * NEAR);
                        for (int j = 0; j < 8; j++)
                            memcpy(c + 8 * j, target + at(q + j, to) + NEAR * p, 8 * NEAR);
                    }
                    unzip(a, b, 32), unzip(b, a, 32), unzip(a, b, 32);
                    for (int k = 0; k < 64; k++) found[k] |= b[k] ^ c[k];
                }
            for (int k = 1; k < 64; k++) found[0] |= found[k];
            if (found[0]) return 0;
        }
    return 1;
}
KERNEL(i64, same_transposed, (const u8 *source, const u8 *target, i64 rows, i64 columns,
                              const i64 *from, const i64 *to),
       (source, target, rows, columns, from, to))

/* How two arrays of values differ; arrays.py reads it. */
struct change {
    i64 changed, nonfinite;
    struct moments moments; /* without what is infinite or NaN on either side */
};

/* Whether a group is equal on both sides and finite: then its squares are added. */
INLINE int add_equal(double *squares, const u16 *a, const u16 *b)
{
    u16 differ = 0, nonfinite = 0;
    for (int k = 0; k < GROUP; k++) differ |= a[k] ^ b[k];
    for (int k = 0; k < GROUP; k++) nonfinite |= (a[k] & INFINITE) == INFINITE;
    if (differ | nonfinite) return 0;
    for (int k = 0; k < GROUP; k += PARTS)
        for (int i = 0; i < PARTS; i++) squares[i] += number(a[k + i]) * number(a[k + i]);
    return 1;
}

INLINE void compare(const u8 *ours, const u8 *theirs, i64 count, struct change *found)
{
    for (i64 first = 0; first < count; first += GROUP) {
        u16 a[GROUP] = {0}, b[GROUP] = {0}, changed = 0, nonfinite = 0;
        memcpy(a, ours + NEAR * first, NEAR * least(GROUP, count - first));
        memcpy(b, theirs + NEAR * first, NEAR * least(GROUP, count - first));
        if (add_equal(found->moments.squares, a, b)) continue;
        for (int k = 0; k < GROUP; k++) {
            u16 odd = ((a[k] & INFINITE) == INFINITE) | ((b[k] & INFINITE) == INFINITE);
            changed += a[k] != b[k];
            nonfinite += odd;
            a[k] = odd ? 0 : a[k], b[k] = odd ? 0 : b[k];
        }
        found->changed += changed, found->nonfinite += nonfinite;
        add_moments(&found->moments, a, b);
    }
}
KERNEL(void, compare, (const u8 *ours, const u8 *theirs, i64 count, struct change *found),
       (ours, theirs, count, found))

/* --- Merging --------------------------------------------------------------------------------- */

enum {
    SPAN = 256,    /* columns summed together: their factors fit in the nearest cache */
    TOGETHER = 16, /* rows summed while these are there: each row's own bytes come in long runs */
    WIDTH = 16,    /* sums in one vector */
    BESIDE = 8,    /* vectors that are summed side by side, in registers */
};
typedef float lanes __attribute__((vector_size(4 * WIDTH)));
#define HALF ((u64)1 << 44)        /* half of BF16's last place in the bits of a double */
#define BELOW (((u64)1 << 45) - 1) /* the bits that BF16 has not */

union real { double value; u64 bits; };
union single { float value; u32 bits; };

INLINE float widened(u16 bits) { return ((union single){.bits = (u32)bits << 16}).value; }
INLINE double size_of(double value) { return value < 0 ? -value : value; }
INLINE u32 even(u32 bits) { return bits + 0x7FFF + (bits >> 16 & 1); }

/* SPAN values of a row, side by side, zeros behind its end; and back to where they lie. */
INLINE void load(const u8 *row, i64 step, i64 count, u16 *into)
{
    if (step == NEAR && count == SPAN) memcpy(into, row, NEAR * SPAN);
    else for (i64 j = 0; j < SPAN; j++) into[j] = j < count ? *(const bf16 *)(row + j * step) : 0;
}
INLINE void store(u8 *row, i64 step, i64 count, const u16 *from)
{
    if (step == NEAR && count == SPAN) memcpy(row, from, NEAR * SPAN);
    else for (i64 j = 0; j < count; j++) *(bf16 *)(row + j * step) = from[j];
}

/* sums[j]: over k, p[k] times row k of q. */
INLINE void products(float *restrict sums, const float *p, const float *q, i64 rank, i64 columns)
{
    for (int first = 0; first < SPAN; first += BESIDE * WIDTH) {
        lanes held[BESIDE] = {0};
        for (i64 k = 0; k < rank; k++)
            for (int i = 0; i < BESIDE; i++) {
                lanes some;
                memcpy(&some, q + k * columns + first + i * WIDTH, sizeof some);
                held[i] += p[k] * some;
            }
        memcpy(sums + first, held, sizeof held);
    }
}

/* Add and round where the error, at most `floor` and margin times length, leaves no doubt; is
   there any? What is no number is in doubt, too. */
INLINE int settle(u16 *restrict values, const float *restrict sums, float scale, float margin,
                  float floor, const float *restrict lengths, u8 *restrict doubt)
{
    int any = 0;
    for (int j = 0; j < SPAN; j++) {
        union single sum = {widened(values[j]) + sums[j] * scale}, middle;
        middle.bits = (sum.bits & 0xFFFF0000) | 0x8000;
        float size = __builtin_fabsf(sum.value), away = __builtin_fabsf(sum.value - middle.value);
        int sure = (away > margin * lengths[j] + (size * 0x1p-22f + floor))
                 & (size >= 0x1p-126f) & (size < 0x1p126f);
        int added = lengths[j] != 0, unsure = added & (sure ^ 1);
        values[j] = sure & added ? even(sum.bits) >> 16 : values[j];
        doubt[j] = unsure;
        any |= unsure;
    }
    return any;
}

/* The same for one value whose products are summed in double; is it settled? */
INLINE int settle_one(bf16 *value, const float *p, const float *q, i64 rank, i64 columns,
                      double scale, double length)
{
    double total = 0;
    for (i64 k = 0; k < rank; k++) total += (double)p[k] * q[k * columns];
    union real sum = {widened(*value) + total * scale}, middle, kept;
    double size = size_of(sum.value), bound = (rank + 1) * size_of(scale) * length;
    middle.bits = (sum.bits & ~BELOW) | HALF;
    kept.bits = (sum.bits + (HALF - 1) + (sum.bits >> 45 & 1)) & ~BELOW;
    if (!(size_of(sum.value - middle.value) > (bound + size) * 0x1p-51) | !(size >= 0x1p-126))
        return 0;
    *value = ((union single){(float)kept.value}).bits >> 16;
    return 1;
}

/* values += scale * p q, each exact sum rounded once: in float, where that leaves a doubt in
   double, and where that does, too, the value stays and its place, row times columns plus column,
   is listed; returns how many. Rows of q are padded with zeros. */
INLINE i64 add_exact(u8 *values, const i64 *steps, i64 rows, i64 columns, const float *p,
                     const float *q, i64 padded, i64 rank, double scale,
                     const float *row_lengths, const float *lengths, i64 *unsure)
{
    i64 count = 0;
    double size = size_of(scale);
    /* Each operation errs by at most 2^-24 of its result, or by 2^-150; a doubt begins at four
       times the sum of all errors, since below a power of two the next middle is half as far. */
    double margin = (rank + 2) * size * 0x1p-22, floor = (rank + 2) * (1 + size) * 0x1p-147;
    if (!(size >= 0x1p-100) | !(size < 0x1p100)) floor = 1e38; /* no factor for floats */
    for (i64 top = 0; top < rows; top += TOGETHER)
        for (i64 first = 0; first < columns; first += SPAN)
            for (i64 row = top; row < least(top + TOGETHER, rows); row++) {
                i64 width = least(SPAN, columns - first);
                float sums[SPAN];
                u16 held[SPAN];
                u8 doubt[SPAN], *place = values + row * steps[0] + first * steps[1];
                if (row_lengths[row] == 0) continue;
                load(place, steps[1], width, held);
                products(sums, p + row * rank, q + first, rank, padded);
                int any = settle(held, sums, scale, margin * row_lengths[row], floor,
                                 lengths + first, doubt);
                for (i64 start = 0; any && start < width; start += sizeof(u64)) {
                    u64 some; /* a byte for each doubt: eight at a time, as few have any */
                    memcpy(&some, doubt + start, sizeof some);
                    for (; some; some &= some - 1) {
                        i64 j = start + __builtin_ctzll(some) / 8;
                        double length = (double)row_lengths[row] * lengths[first + j];
                        if (!settle_one(held + j, p + row * rank, q + first + j, rank, padded,
                                        scale, length))
                            unsure[count++] = row * columns + first + j;
                    }
                }
                store(place, steps[1], width, held);
            }
    return count;
}
KERNEL(i64, add_exact, (u8 *v, const i64 *steps, i64 rows, i64 columns, const float *p,
                        const float *q, i64 padded, i64 rank, double scale, const float *pl,
                        const float *ql, i64 *unsure),
       (v, steps, rows, columns, p, q, padded, rank, scale, pl, ql, unsure))

/* The same in float32, a fused multiply-add for each rank; `twice` rounds the update first. */
INLINE void add_as_peft(u8 *values, const i64 *steps, i64 rows, i64 columns, const float *p,
                        const float *q, i64 padded, i64 rank, float scale, i64 twice)
{
    for (i64 first = 0; first < columns; first += SPAN) {
        i64 width = least(SPAN, columns - first);
        for (i64 row = 0; row < rows; row++) {
            float sums[SPAN] = {0};
            u16 held[SPAN];
            u8 *place = values + row * steps[0] + first * steps[1];
            for (i64 k = 0; k < rank; k++) {
                const float *other = q + k * padded + first;
                float one = p[row * rank + k];
                for (int j = 0; j < SPAN; j++) sums[j] = __builtin_fmaf(one, other[j], sums[j]);
            }
            load(place, steps[1], width, held);
            for (int j = 0; j < SPAN; j++) {
                union single update = {sums[j] * scale}, total;
                update.bits = twice ? even(update.bits) & 0xFFFF0000 : update.bits;
                total.value = widened(held[j]) + update.value;
                held[j] = even(total.bits) >> 16;
            }
            store(place, steps[1], width, held);
        }
    }
}
KERNEL(void, add_as_peft, (u8 *v, const i64 *steps, i64 rows, i64 columns, const float *p,
                           const float *q, i64 padded, i64 rank, float scale, i64 twice),
       (v, steps, rows, columns, p, q, padded, rank, scale, twice))
