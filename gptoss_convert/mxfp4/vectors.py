"""Vector instructions that LLVM does not find by itself: MXFP4 blocks and 8x8 transposes.

Each function emits portable LLVM IR (shuffles and integer lanes, no instruction of one machine)
where a kernel calls it. Arrays are flat; indices count elements and are not checked.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

SIDE = 8
"""Rows and columns of a transpose."""

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

    def codes(self, values: Any, origin: Any) -> Any:
        """E2M1 codes 0..15 of BF16 bits in 16-bit lanes; origin is scale << 7, the bits of 1."""
        b, number = self.builder, self.number
        distance = b.sub(b.and_(values, number(0x7FFF, values)), origin)
        code = b.and_(b.lshr(values, number(12, values)), number(8, values))
        # Midpoints of the E2M1 grid as bits relative to 1.0; a tie goes to the even code.
        for predicate, midpoint in zip("> >= > >= > >= >".split(), MIDPOINTS, strict=True):
            above = b.icmp_signed(predicate, distance, number(midpoint, distance))
            code = b.sub(code, b.sext(above, code.type))
        return code


MIDPOINTS = (-256, -64, 32, 96, 160, 224, 288)
"""0.25, 0.75, 1.25, 1.75, 2.5, 3.5 and 5 as BF16 bits, less the bits of 1."""


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
def encode_block(typingctx, values, v, blocks, b, origin):
    """Write values[v:v+32] as a block to blocks[b:b+16]; returns whether all values are exact."""

    def emit(context, builder, signature, arguments):
        e = _Emitter(context, builder, signature, arguments)
        bits = e.load(0, e.scalar(1), 32, _I16)
        origins = e.spread(e.scalar(4), 32)
        codes = e.codes(bits, origins)
        low = e.shuffle(codes, codes, range(0, 32, 2))
        high = e.shuffle(codes, codes, range(1, 32, 2))
        pairs = builder.or_(low, builder.shl(high, e.number(4, high)))
        e.store(builder.trunc(pairs, ir.VectorType(_I8, 16)), 2, e.scalar(3))
        back = e.values(codes, builder.sub(origins, e.number(128, origins)))
        wrong = builder.bitcast(builder.icmp_unsigned("!=", back, bits), ir.IntType(32))
        return builder.icmp_unsigned("==", wrong, ir.Constant(wrong.type, 0))

    return types.boolean(values, types.int64, blocks, types.int64, types.uint16), emit


@intrinsic
def transpose(typingctx, source, s, source_step, target, t, target_step):
    """target[t + j * target_step + i] = source[s + i * source_step + j], for i, j < 8; uint16."""

    def emit(context, builder, signature, arguments):
        e = _Emitter(context, builder, signature, arguments)

        def index(start: int, i: int) -> Any:
            offset = builder.mul(e.scalar(start + 1), ir.Constant(e.scalar(start).type, i))
            return builder.add(e.scalar(start), offset)

        rows = [e.load(0, index(1, i), SIDE, _I16) for i in range(SIDE)]
        # Each pass moves one bit of the row number into the column number, and back around.
        for _ in range(3):
            rows = [
                e.interleave(rows[i], rows[i + 4], start, start + 4)
                for i in range(4)
                for start in (0, 4)
            ]
        for i, row in enumerate(rows):
            e.store(row, 3, index(4, i))
        return context.get_dummy_value()

    step = types.int64
    return types.void(source, step, step, target, step, step), emit
