"""Vector instructions that LLVM does not find by itself: MXFP4 blocks and 8x8 transposes.

Each function emits portable LLVM IR (shuffles and integer lanes, no instruction of one machine)
where a kernel calls it. Arrays are flat; indices count elements and are not checked.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from llvmlite import ir
from numba import extending, types
from numba.core import cgutils

SIDE = 8
"""Rows and columns of a transpose."""


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

    def row(self, argument: int, i: int) -> Any:
        """Index of row `i`, from three arguments: start, step of a pair of rows, step within."""
        start, pair, step = (self.scalar(argument + k) for k in range(3))
        index = self.builder.add(start, self.builder.mul(pair, ir.Constant(pair.type, i // 2)))
        return self.builder.add(index, step) if i % 2 else index

    def shuffle(self, left: Any, right: Any, lanes: Sequence[int]) -> Any:
        mask = ir.Constant(ir.VectorType(ir.IntType(32), len(lanes)), list(lanes))
        return self.builder.shuffle_vector(left, right, mask)

    def interleave(self, left: Any, right: Any, start: int, stop: int) -> Any:
        """Lanes start..stop of both, alternating."""
        count = left.type.count
        return self.shuffle(
            left, right, [lane for i in range(start, stop) for lane in (i, count + i)]
        )

    def values(self, codes: Any, bias: Any) -> Any:
        """BF16 bits of codes 0..15 in 16-bit lanes; bias is (scale << 7) - 128."""
        b, number = self.builder, self.number
        low = b.and_(codes, number(7, codes))
        half = b.zext(b.icmp_unsigned("==", low, number(1, low)), low.type)
        steps = b.sub(b.shl(low, number(6, low)), b.shl(half, number(6, low)))
        zero = b.icmp_unsigned("==", low, number(0, low))
        magnitude = b.select(zero, number(0, low), b.add(bias, steps))
        return b.or_(magnitude, b.shl(b.and_(codes, number(8, codes)), number(12, codes)))

    def codes(self, magnitudes: Any, bias: Any) -> tuple[Any, Any]:
        """(E2M1 codes 0..7, nearest even and saturated; BF16 bits that they stand for)."""
        b, number = self.builder, self.number
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
        small = b.zext(is_half, above.type)
        half_or_zero = b.select(is_half, bias, number(0, above))
        bits = b.select(is_large, b.add(bias, b.shl(large, number(6, large))), half_or_zero)
        return b.select(is_large, large, small), bits


@intrinsic
def decode_block(typingctx, blocks, b, values, v, bias):
    """Write the 32 values of the block at `b` to values[v:v+32]; bias: (scale << 7) - 128."""

    def emit(context, builder, signature, arguments):
        e = _Emitter(context, builder, signature, arguments)
        pairs = e.load(0, e.scalar(1), 16, _I8)
        low = builder.and_(pairs, e.number(15, pairs))
        high = builder.lshr(pairs, e.number(4, pairs))
        codes = builder.zext(e.interleave(low, high, 0, 16), ir.VectorType(_I16, 32))
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
        return builder.call(function, [builder.and_(bits, e.number(0x7FFF, bits))])

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
        magnitudes = builder.and_(bits, e.number(0x7FFF, bits))
        codes, back = e.codes(magnitudes, e.spread(e.scalar(4), 32))
        signs = builder.and_(builder.lshr(bits, e.number(12, bits)), e.number(8, bits))
        codes = builder.or_(codes, signs)
        low = e.shuffle(codes, codes, range(0, 32, 2))
        high = e.shuffle(codes, codes, range(1, 32, 2))
        pairs = builder.or_(low, builder.shl(high, e.number(4, high)))
        e.store(builder.trunc(pairs, ir.VectorType(_I8, 16)), 2, e.scalar(3))
        differ = builder.icmp_unsigned("!=", back, magnitudes)
        wrong = builder.bitcast(differ, ir.IntType(32))
        return builder.icmp_unsigned("==", wrong, ir.Constant(wrong.type, 0))

    return types.boolean(values, types.int64, blocks, types.int64, types.uint16), emit


@intrinsic
def transpose(typingctx, source, s, source_pair, source_step, target, t, target_pair, target_step):
    """target[t + at(j) + i] = source[s + from(i) + j], for i, j < 8; uint16.

    Rows come in pairs: at(j) is (j // 2) * target_pair + (j % 2) * target_step, from(i) alike.
    """

    def emit(context, builder, signature, arguments):
        e = _Emitter(context, builder, signature, arguments)
        rows = [e.load(0, e.row(1, i), SIDE, _I16) for i in range(SIDE)]
        # Each pass moves one bit of the row number into the column number, and back around.
        for _ in range(3):
            rows = [
                e.interleave(rows[i], rows[i + 4], start, start + 4)
                for i in range(4)
                for start in (0, 4)
            ]
        for i, row in enumerate(rows):
            e.store(row, 4, e.row(5, i))
        return context.get_dummy_value()

    step = types.int64
    return types.void(source, step, step, step, target, step, step, step), emit
