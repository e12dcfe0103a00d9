"""Vector instructions that LLVM does not find by itself: MXFP4 blocks, and transposes.

Each function emits portable LLVM IR (shuffles and integer lanes, no instruction of one machine)
where a kernel calls it. Arrays are flat; indices count elements and are not checked.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

from llvmlite import ir
from numba import extending, types
from numba.core import cgutils

SIDE = 8
"""Columns of a transpose."""
WIDE = 32
"""Rows of a transpose, and of the blocks that are treated side by side: their values fill a cache
line."""


def intrinsic(emitter: Callable[..., Any]) -> Callable[..., Any]:
    """numba's decorator, with the types of what it returns: a function for compiled code."""
    return extending.intrinsic(emitter)


_I8, _I16 = ir.IntType(8), ir.IntType(16)


class _Emitter:
    """Writes IR for one call of an intrinsic: its arguments and the vector operations on them."""

    def __init__(self, context: Any, builder: Any, signature: Any, arguments: Sequence[Any]):
        self.context, self.builder = context, builder
        self.arguments = list(zip(signature.args, arguments, strict=True))

    def scalar(self, argument: int) -> Any:
        return self.arguments[argument][1]

    def pointer(self, argument: int, index: Any, vector: ir.VectorType) -> Any:
        kind, value = self.arguments[argument]
        array = self.context.make_array(kind)(self.context, self.builder, value)
        return self.builder.bitcast(self.builder.gep(array.data, [index]), ir.PointerType(vector))

    def load(self, argument: int, index: Any, lanes: int, lane: ir.IntType) -> Any:
        pointer = self.pointer(argument, index, ir.VectorType(lane, lanes))
        return self.builder.load(pointer, align=lane.width // 8)

    def store(self, value: Any, argument: int, index: Any) -> None:
        pointer = self.pointer(argument, index, value.type)
        self.builder.store(value, pointer, align=value.type.element.width // 8)

    def number(self, value: int, like: Any) -> Any:
        """`value` in every lane of the type of `like`."""
        return ir.Constant(like.type, [value] * like.type.count)

    def spread(self, value: Any, lanes: int) -> Any:
        """A scalar in every lane."""
        vector = ir.VectorType(value.type, lanes)
        first = self.builder.insert_element(
            ir.Constant(vector, ir.Undefined), value, ir.Constant(ir.IntType(32), 0)
        )
        return self.shuffle(first, first, [0] * lanes)

    def line(self, argument: int, i: int) -> Any:
        """Index of line `i`, from two arguments: start, step."""
        start, step = self.scalar(argument), self.scalar(argument + 1)
        return self.builder.add(start, self.builder.mul(step, ir.Constant(step.type, i)))

    def row(self, argument: int, i: int) -> Any:
        """Index of row `i`, from three arguments: start, step of a pair of rows, step within."""
        start, pair, step = (self.scalar(argument + k) for k in range(3))
        index = self.builder.add(start, self.builder.mul(pair, ir.Constant(pair.type, i // 2)))
        return self.builder.add(index, step) if i % 2 else index

    def shuffle(self, left: Any, right: Any, lanes: Sequence[int]) -> Any:
        mask = ir.Constant(ir.VectorType(ir.IntType(32), len(lanes)), list(lanes))
        return self.builder.shuffle_vector(left, right, mask)

    def joined(self, *parts: Any) -> Any:
        """The lanes of all, one after the other; a power of two of them."""
        if len(parts) == 1:
            return parts[0]
        middle = len(parts) // 2
        left, right = self.joined(*parts[:middle]), self.joined(*parts[middle:])
        return self.shuffle(left, right, range(2 * left.type.count))

    def interleave(self, left: Any, right: Any, half: int, group: int) -> Any:
        """One half (0 or 1) of each group of lanes of both, alternating."""
        count = left.type.count
        start, stop = half * group // 2, (half + 1) * group // 2
        lanes = [g + i for g in range(0, count, group) for i in range(start, stop)]
        return self.shuffle(left, right, [lane for i in lanes for lane in (i, count + i)])

    def transposed(self, rows: Sequence[Any]) -> Sequence[Any]:
        """As many vectors as there are rows, in whose groups of as many lanes rows and lanes have
        changed places."""
        half = len(rows) // 2
        # Each pass moves one bit of the row number into the lane number, and back around.
        for _ in range(half.bit_length()):
            rows = [
                self.interleave(rows[i], rows[i + half], part, len(rows))
                for i in range(half)
                for part in (0, 1)
            ]
        return rows

    def magnitudes(self, bits: Any) -> Any:
        return self.builder.and_(bits, self.number(0x7FFF, bits))

    def values(self, codes: Any, bias: Any) -> Any:
        """BF16 bits of codes 0..15 in 16-bit lanes; bias is (scale << 7) - 128."""
        b, number = self.builder, self.number
        low = b.and_(codes, number(7, codes))
        half = b.zext(b.icmp_unsigned("==", low, number(1, low)), low.type)
        steps = b.sub(b.shl(low, number(6, low)), b.shl(half, number(6, low)))
        zero = b.icmp_unsigned("==", low, number(0, low))
        magnitude = b.select(zero, number(0, low), b.add(bias, steps))
        return b.or_(magnitude, b.shl(b.and_(codes, number(8, codes)), number(12, codes)))

    def encoded(self, bits: Any, bias: Any) -> tuple[Any, Any]:
        """(E2M1 codes of BF16 bits, nearest even and saturated; not 0 where that is not exact)."""
        b, number = self.builder, self.number
        magnitudes = self.magnitudes(bits)
        # Bits above 0.5: from 1.0 on (128), 64 of them make a code; below, 0.75 rounds to 1.0.
        above = b.sub(magnitudes, bias)
        base = number(128, above)
        grown = b.select(b.icmp_signed(">", above, base), above, base)
        odd = b.and_(b.lshr(grown, number(6, grown)), number(1, grown))
        rounded = b.lshr(b.add(b.add(grown, number(31, grown)), odd), number(6, grown))
        most = number(7, rounded)
        large = b.select(b.icmp_signed("<", rounded, most), rounded, most)
        is_large = b.icmp_signed(">", above, number(63, above))
        is_half = b.icmp_signed(">", above, number(-128, above))
        codes = b.select(is_large, large, b.zext(is_half, above.type))
        half_or_zero = b.select(is_half, bias, number(0, above))
        back = b.select(is_large, b.add(bias, b.shl(large, number(6, large))), half_or_zero)
        signs = b.and_(b.lshr(bits, number(12, bits)), number(8, bits))
        return b.or_(codes, signs), b.xor(back, magnitudes)

    def packed(self, low: Any, high: Any) -> Any:
        """Bytes of two codes each."""
        pairs = self.builder.or_(low, self.builder.shl(high, self.number(4, high)))
        return self.builder.trunc(pairs, ir.VectorType(_I8, pairs.type.count))

    def store_block(self, codes: Any, argument: int, index: Any) -> None:
        """Store a block from its 32 codes."""
        low = self.shuffle(codes, codes, range(0, 32, 2))
        high = self.shuffle(codes, codes, range(1, 32, 2))
        self.store(self.packed(low, high), argument, index)

    def store_columns(self, codes: Sequence[Any], argument: int) -> None:
        """Store WIDE blocks from 32 vectors, one of each block's codes; arguments: start, step."""
        pairs = [self.packed(codes[k], codes[k + 1]) for k in range(0, 32, 2)]
        for i, two in enumerate(self.transposed(pairs)):
            self.store(self.shuffle(two, two, range(16)), argument, self.line(argument + 1, i))
            high = self.shuffle(two, two, range(16, 32))
            self.store(high, argument, self.line(argument + 1, i + 16))


@intrinsic
def decode_block(typingctx, blocks, b, values, v, bias):
    """Write the 32 values of the block at `b` to values[v:v+32]; bias: (scale << 7) - 128."""

    def emit(context, builder, signature, arguments):
        e = _Emitter(context, builder, signature, arguments)
        pairs = e.load(0, e.scalar(1), 16, _I8)
        low = builder.and_(pairs, e.number(15, pairs))
        high = builder.lshr(pairs, e.number(4, pairs))
        pair = [e.interleave(low, high, half, 16) for half in (0, 1)]
        codes = builder.zext(e.joined(*pair), ir.VectorType(_I16, 32))
        e.store(e.values(codes, e.spread(e.scalar(4), 32)), 2, e.scalar(3))
        return context.get_dummy_value()

    return types.void(blocks, types.int64, values, types.int64, types.uint16), emit


@intrinsic
def largest(typingctx, values, v):
    """The largest of values[v:v+32] without their signs, as uint16."""

    def emit(context, builder, signature, arguments):
        e = _Emitter(context, builder, signature, arguments)
        bits = e.load(0, e.scalar(1), 32, _I16)
        function = cgutils.get_or_insert_function(
            builder.module, ir.FunctionType(_I16, [bits.type]), "llvm.vector.reduce.umax.v32i16"
        )
        return builder.call(function, [e.magnitudes(bits)])

    return types.uint16(values, types.int64), emit


@intrinsic
def prefetch(typingctx, array, index):
    """Ask for the cache line of array[index], which may lie beyond the array's end."""

    def emit(context, builder, signature, arguments):
        e = _Emitter(context, builder, signature, arguments)
        byte, flag = ir.PointerType(_I8), ir.IntType(32)
        kind = ir.FunctionType(ir.VoidType(), [byte, flag, flag, flag])
        function = builder.module.declare_intrinsic("llvm.prefetch", [byte], kind)
        line = builder.bitcast(e.pointer(0, e.scalar(1), ir.VectorType(_I8, 1)), byte)
        builder.call(function, [line, *(ir.Constant(flag, option) for option in (0, 3, 1))])
        return context.get_dummy_value()

    return types.void(array, types.int64), emit


@intrinsic
def encode_block(typingctx, values, v, blocks, b, bias):
    """Write values[v:v+32] as a block to blocks[b:b+16]; returns whether all values are exact."""

    def emit(context, builder, signature, arguments):
        e = _Emitter(context, builder, signature, arguments)
        bits = e.load(0, e.scalar(1), 32, _I16)
        codes, differ = e.encoded(bits, e.spread(e.scalar(4), 32))
        e.store_block(codes, 2, e.scalar(3))
        inexact = builder.icmp_unsigned("!=", differ, e.number(0, differ))
        wrong = builder.bitcast(inexact, ir.IntType(32))
        return builder.icmp_unsigned("==", wrong, ir.Constant(wrong.type, 0))

    return types.boolean(values, types.int64, blocks, types.int64, types.uint16), emit


@intrinsic
def decode_columns(typingctx, blocks, b, block_step, biases, a, values, v, step):
    """Decode WIDE blocks, `block_step` apart, side by side: value k of block i to values[v + k *
    step + i], with biases[a + i]."""

    def emit(context, builder, signature, arguments):
        e = _Emitter(context, builder, signature, arguments)
        blocks_of = [e.load(0, e.line(1, i), 16, _I8) for i in range(WIDE)]
        pairs = e.transposed([e.joined(blocks_of[i], blocks_of[i + 16]) for i in range(16)])
        bias = e.load(3, e.scalar(4), WIDE, _I16)
        for j, pair in enumerate(pairs):
            low, high = (
                builder.and_(pair, e.number(15, pair)),
                builder.lshr(pair, e.number(4, pair)),
            )
            for k, codes in ((2 * j, low), (2 * j + 1, high)):
                codes = builder.zext(codes, bias.type)
                e.store(e.values(codes, bias), 5, e.line(6, k))
        return context.get_dummy_value()

    return types.void(
        blocks, types.int64, types.int64, biases, types.int64, values, types.int64, types.int64
    ), emit


@intrinsic
def largest_of_columns(typingctx, values, v, step, maxima, a):
    """maxima[a + i] = the largest of values[v + k * step + i], k < 32, without sign; i < WIDE."""

    def emit(context, builder, signature, arguments):
        e = _Emitter(context, builder, signature, arguments)
        most = e.magnitudes(e.load(0, e.line(1, 0), WIDE, _I16))
        for k in range(1, 32):
            more = e.magnitudes(e.load(0, e.line(1, k), WIDE, _I16))
            most = builder.select(builder.icmp_unsigned(">", more, most), more, most)
        e.store(most, 3, e.scalar(4))
        return context.get_dummy_value()

    return types.void(values, types.int64, types.int64, maxima, types.int64), emit


@intrinsic
def encode_columns(typingctx, values, v, step, biases, a, blocks, b, block_step, differ, d):
    """The way back of `decode_columns`; differ[d + i] is 0 iff all values of block i are exact."""

    def emit(context, builder, signature, arguments):
        e = _Emitter(context, builder, signature, arguments)
        bias = e.load(3, e.scalar(4), WIDE, _I16)
        lines = (e.load(0, e.line(1, k), WIDE, _I16) for k in range(32))
        codes, differ_of = zip(*(e.encoded(line, bias) for line in lines), strict=True)
        e.store_columns(codes, 5)
        e.store(functools.reduce(builder.or_, differ_of), 8, e.scalar(9))
        return context.get_dummy_value()

    index = types.int64
    return types.void(
        values, index, index, biases, index, blocks, index, index, differ, index
    ), emit


@intrinsic
def transpose(typingctx, source, s, source_pair, source_step, target, t, target_pair, target_step):
    """target[t + at(j) + i] = source[s + from(i) + j], for i < WIDE, j < SIDE; uint16.

    Rows come in pairs: at(j) is (j // 2) * target_pair + (j % 2) * target_step, from(i) alike.
    """

    def emit(context, builder, signature, arguments):
        e = _Emitter(context, builder, signature, arguments)
        rows = [e.load(0, e.row(1, i), SIDE, _I16) for i in range(WIDE)]
        lines = e.transposed([e.joined(*rows[i::SIDE]) for i in range(SIDE)])
        for j, line in enumerate(lines):
            e.store(line, 4, e.row(5, j))
        return context.get_dummy_value()

    step = types.int64
    return types.void(source, step, step, step, target, step, step, step), emit
