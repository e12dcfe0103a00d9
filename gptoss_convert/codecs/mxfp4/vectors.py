"""Vector instructions that LLVM does not find by itself: MXFP4 blocks, and transposes.

Each function emits its LLVM IR where a kernel calls it. Arrays are flat; indices count elements and
are not checked. A block's bytes are also read as 8 words of 16 bits, little-endian, of 4 codes.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from llvmlite import ir
from numba import extending, types
from numba.core import cgutils

from gptoss_convert.codecs.mxfp4.emitter import I8, I16, I32, I64, Emitter

SIDE = 8
"""Columns of a transpose."""
WIDE = 32
"""Rows of a transpose, and of the blocks that are treated side by side: their values fill a cache
line."""


def intrinsic(emitter: Callable[..., Any]) -> Callable[..., Any]:
    """numba's decorator, with the types of what it returns: a function for compiled code."""
    return extending.intrinsic(emitter)


@intrinsic
def decode_block(typingctx, blocks, b, values, v, bias):
    """Write the 32 values of the block at `b` to values[v:v+32]; bias: (scale << 7) - 128."""

    def emit(context, builder, signature, arguments):
        e = Emitter(context, builder, signature, arguments)
        pairs = builder.zext(e.load(0, e.scalar(1), 16, I8), ir.VectorType(I32, 16))
        codes = builder.or_(e.moved(pairs, 6), e.moved(pairs, 18))
        codes = builder.bitcast(codes, ir.VectorType(I16, 32))
        e.store(e.values(codes, e.spread(e.scalar(4), 32)), 2, e.scalar(3))
        return context.get_dummy_value()

    return types.void(blocks, types.int64, values, types.int64, types.uint16), emit


@intrinsic
def largest(typingctx, values, v):
    """The largest of values[v:v+32] without their signs, as uint16."""

    def emit(context, builder, signature, arguments):
        e = Emitter(context, builder, signature, arguments)
        bits = e.load(0, e.scalar(1), 32, I16)
        return e.reduced("umax", e.magnitudes(bits))

    return types.uint16(values, types.int64), emit


@intrinsic
def prefetch(typingctx, array, index):
    """Ask for the cache line of array[index]; the element may lie beyond the array's end."""

    def emit(context, builder, signature, arguments):
        e = Emitter(context, builder, signature, arguments)
        e.prefetch(0, e.scalar(1))
        return context.get_dummy_value()

    return types.void(array, types.int64), emit


@intrinsic
def encode_block(typingctx, values, v, blocks, b, bias):
    """Write values[v:v+32] as a block to blocks[b:b+16]; returns whether all values are exact."""

    def emit(context, builder, signature, arguments):
        e = Emitter(context, builder, signature, arguments)
        bits = e.load(0, e.scalar(1), 32, I16)
        codes, differ = e.encoded(bits, e.spread(e.scalar(4), 32))
        signs = builder.and_(e.moved(bits, -6), e.number(8 << 6, bits))
        pairs = builder.bitcast(builder.or_(codes, signs), ir.VectorType(I32, 16))
        pairs = builder.or_(e.moved(pairs, -6), e.moved(pairs, -18))
        e.store(builder.trunc(pairs, ir.VectorType(I8, 16)), 2, e.scalar(3))
        inexact = builder.icmp_unsigned("!=", differ, e.number(0, differ))
        wrong = builder.bitcast(inexact, I32)
        return builder.icmp_unsigned("==", wrong, ir.Constant(wrong.type, 0))

    return types.boolean(values, types.int64, blocks, types.int64, types.uint16), emit


@intrinsic
def decode_columns(typingctx, blocks, b, block_step, biases, a, values, v, step):
    """Decode WIDE blocks, `block_step` apart, side by side: value k of block i to values[v + k *
    step + i], with biases[a + i]; and prefetch the 32 lines of values that follow."""

    def emit(context, builder, signature, arguments):
        e = Emitter(context, builder, signature, arguments)
        blocks_of = [e.load(0, e.line(1, i), 8, I16) for i in range(WIDE)]
        bias = e.load(3, e.scalar(4), WIDE, I16)
        for j, word in enumerate(e.transposed([e.joined(*blocks_of[i::8]) for i in range(8)])):
            for k in range(4):
                e.store(e.values(e.moved(word, 6 - 4 * k), bias), 5, e.line(6, 4 * j + k))
                e.prefetch(5, e.line(6, 32 + 4 * j + k))
        return context.get_dummy_value()

    return types.void(
        blocks, types.int64, types.int64, biases, types.int64, values, types.int64, types.int64
    ), emit


@intrinsic
def largest_of_columns(typingctx, values, v, step, maxima, a):
    """maxima[a + i] = the largest of values[v + k * step + i], k < 32, without sign; i < WIDE."""

    def emit(context, builder, signature, arguments):
        e = Emitter(context, builder, signature, arguments)
        lines = [e.load(0, e.line(1, k), WIDE, I16) for k in range(32)]
        e.store(functools.reduce(e.larger, map(e.magnitudes, lines)), 3, e.scalar(4))
        return context.get_dummy_value()

    return types.void(values, types.int64, types.int64, maxima, types.int64), emit


@intrinsic
def encode_columns(typingctx, values, v, step, biases, a, blocks, b, block_step, differ, d):
    """The way back of `decode_columns`; differ[d + i] is 0 iff all values of block i are exact."""

    def emit(context, builder, signature, arguments):
        e = Emitter(context, builder, signature, arguments)
        bias = e.load(3, e.scalar(4), WIDE, I16)
        words, differ_of = [], e.number(0, bias)
        for k in range(0, 32, 4):
            lines = [e.load(0, e.line(1, k + i), WIDE, I16) for i in range(4)]
            codes, differs = zip(*(e.encoded(line, bias) for line in lines), strict=True)
            words.append(e.word(codes, lines))
            for i in range(4):
                e.prefetch(0, e.line(1, 32 + k + i))
            differ_of = functools.reduce(builder.or_, differs, differ_of)
        for j, blocks_of in enumerate(e.transposed(words)):
            for i in range(0, WIDE, 8):
                e.store(e.shuffle(blocks_of, blocks_of, range(i, i + 8)), 5, e.line(6, i + j))
        e.store(differ_of, 8, e.scalar(9))
        return context.get_dummy_value()

    index = types.int64
    return types.void(
        values, index, index, biases, index, blocks, index, index, differ, index
    ), emit


@intrinsic
def dot_blocks(typingctx, blocks, b, block_step, scales, s, scale_step, limbs, w, w_step, count):
    """The sum of the BF16 bits of `count` blocks, at most 32, each times a weight, modulo 2^64.

    A weight is the sum of its four signed limbs times 1, 2^16, 2^32, 2^48: `limbs` has 32 of each
    a block. Blocks whose scale is not 2..252 count as zeros.
    """

    def emit(context, builder, signature, arguments):
        e = Emitter(context, builder, signature, arguments)
        sums = [e.total(16, I32) for _ in range(4)]
        with cgutils.for_range(builder, e.scalar(9)) as loop:
            scale = builder.load(e.pointer(3, e.line(4, loop.index), I8))
            above = builder.sub(scale, ir.Constant(I8, 2))
            usual = builder.icmp_unsigned("<=", above, ir.Constant(I8, 250))
            with builder.if_then(usual, likely=True):
                bits = _bits_over_64(e, e.line(1, loop.index), scale)
                for i, total in enumerate(sums):
                    at = builder.add(e.line(7, loop.index), ir.Constant(I64, 32 * i))
                    pairs = e.dot(bits, e.load(6, at, 32, I16))
                    builder.store(builder.add(builder.load(total), pairs), total)
        line = ir.Constant(I64, 0)
        for i, total in enumerate(sums):
            limb_sum = e.reduced("add", builder.sext(builder.load(total), ir.VectorType(I64, 16)))
            line = builder.add(line, builder.shl(limb_sum, ir.Constant(I64, 16 * i + 6)))
        return line

    i = types.int64
    return types.uint64(blocks, i, i, scales, i, i, limbs, i, i, i), emit


def _bits_over_64(e: Emitter, index: Any, scale: Any) -> Any:
    """The BF16 bits of the first argument's block at `index` over 64: at most 1021.

    So 2 * 32 products with 16-bit limbs add up to less than 2^31.
    """
    b = e.builder
    pairs = b.zext(e.load(0, index, 16, I8), ir.VectorType(I32, 16))
    codes = b.bitcast(b.or_(pairs, e.moved(pairs, 12)), ir.VectorType(I16, 32))
    bias = b.sub(b.shl(b.zext(scale, I16), ir.Constant(I16, 1)), ir.Constant(I16, 2))
    return e.values(codes, e.spread(bias, 32), unit=0)


@intrinsic
def measure_blocks(typingctx, values, v, step, biases, masks, a, count, counts, sums, largest_of):
    """Add up what encoding `count` blocks of values, `step` apart, did: block k by biases[a + k].

    The values are seen through masks[a + k]. Of 32 lanes each, `counts` gets the values changed,
    clipped and flushed, `sums` the squares and squared errors; `largest_of` the largest error, as
    float32 bits. At most 65535 blocks.
    """

    def emit(context, builder, signature, arguments):
        e = Emitter(context, builder, signature, arguments)

        def of_block(argument: int, k: Any) -> Any:
            pointer = e.pointer(argument, builder.add(e.scalar(5), k), I16)
            return e.spread(builder.load(pointer), 32)

        _measure(e, lambda k: (of_block(3, k), of_block(4, k)))
        return context.get_dummy_value()

    i = types.int64
    return types.void(values, i, i, biases, masks, i, i, counts, sums, largest_of), emit


@intrinsic
def measure_columns(typingctx, values, v, step, biases, masks, a, count, counts, sums, largest_of):
    """The same of `count` values each of WIDE blocks side by side: block i by biases[a + i]."""

    def emit(context, builder, signature, arguments):
        e = Emitter(context, builder, signature, arguments)
        bias, mask = (e.load(argument, e.scalar(5), WIDE, I16) for argument in (3, 4))
        _measure(e, lambda k: (bias, mask))
        return context.get_dummy_value()

    i = types.int64
    return types.void(values, i, i, biases, masks, i, i, counts, sums, largest_of), emit


def _measure(e: Emitter, seen_by: Callable[[Any], tuple[Any, Any]]) -> None:
    """Emit the loop over lines of 32 values, of which `seen_by` returns bias and mask."""
    b, double = e.builder, ir.DoubleType()
    counts, sums = [e.total(32, I16) for _ in range(3)], [e.total(32, double) for _ in range(2)]
    largest_error = e.total(32, I32)
    with cgutils.for_range(b, e.scalar(6)) as loop:
        bias, mask = seen_by(loop.index)
        bits = b.and_(e.load(0, e.line(1, loop.index), 32, I16), mask)
        _, differ = e.encoded(bits, bias)
        magnitudes = e.magnitudes(bits)
        back = b.xor(differ, magnitudes)
        clipped = b.icmp_unsigned(">", magnitudes, b.add(bias, e.number(7 << 6, bias)))
        flushed = b.and_(e.nonzero(magnitudes), b.not_(e.nonzero(back)))
        for total, found in zip(counts, (e.nonzero(differ), clipped, flushed), strict=True):
            b.store(b.add(b.load(total), b.zext(found, bits.type)), total)
        exact, error = e.floats(magnitudes), b.fsub(e.floats(magnitudes), e.floats(back))
        for total, number in zip(sums, (exact, error), strict=True):
            wide = b.fpext(number, ir.VectorType(double, 32))
            b.store(b.fadd(b.load(total), b.fmul(wide, wide)), total)
        absolute = b.bitcast(error, ir.VectorType(I32, 32))
        absolute = b.and_(absolute, e.number(0x7FFFFFFF, absolute))
        b.store(e.larger(b.load(largest_error), absolute), largest_error)
    for i, total in enumerate(counts):
        wide = b.zext(b.load(total), ir.VectorType(I64, 32))
        e.update(b.add, wide, 7, 32 * i)
    for i, total in enumerate(sums):
        e.update(b.fadd, b.load(total), 8, 32 * i)
    e.update(e.larger, b.load(largest_error), 9, 0)


@intrinsic
def transpose(typingctx, source, s, source_pair, source_step, target, t, target_pair, target_step):
    """target[t + at(j) + i] = source[s + from(i) + j], for i < WIDE, j < SIDE; uint16.

    Rows come in pairs: at(j) is (j // 2) * target_pair + (j % 2) * target_step, from(i) alike.
    """

    def emit(context, builder, signature, arguments):
        e = Emitter(context, builder, signature, arguments)
        rows = [e.load(0, e.row(1, i), SIDE, I16) for i in range(WIDE)]
        lines = e.transposed([e.joined(*rows[i::SIDE]) for i in range(SIDE)])
        for j, line in enumerate(lines):
            e.store(line, 4, e.row(5, j))
        return context.get_dummy_value()

    step = types.int64
    return types.void(source, step, step, step, target, step, step, step), emit
