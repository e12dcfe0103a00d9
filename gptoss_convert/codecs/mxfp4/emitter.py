"""Writes the LLVM IR of vector operations: portable, no instruction of one machine."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

from llvmlite import ir
from numba.core import cgutils

I8, I16, I32, I64 = (ir.IntType(width) for width in (8, 16, 32, 64))


class Emitter:
    """Writes IR for one call of an intrinsic: its arguments and the vector operations on them."""

    def __init__(self, context: Any, builder: Any, signature: Any, arguments: Sequence[Any]):
        self.context, self.builder = context, builder
        self.arguments = list(zip(signature.args, arguments, strict=True))

    def scalar(self, argument: int) -> Any:
        """The value of an argument that is no array."""
        return self.arguments[argument][1]

    def pointer(self, argument: int, index: Any, kind: ir.Type) -> Any:
        """The address of an array's element, as that of a vector or an integer."""
        array_type, value = self.arguments[argument]
        array = self.context.make_array(array_type)(self.context, self.builder, value)
        return self.builder.bitcast(self.builder.gep(array.data, [index]), ir.PointerType(kind))

    def load(self, argument: int, index: Any, lanes: int, lane: ir.Type) -> Any:
        """A vector from an array, from the element at `index` on."""
        pointer = self.pointer(argument, index, ir.VectorType(lane, lanes))
        return self.builder.load(pointer, align=self.arguments[argument][0].dtype.bitwidth // 8)

    def store(self, value: Any, argument: int, index: Any) -> None:
        """Write a vector to an array."""
        pointer = self.pointer(argument, index, value.type)
        self.builder.store(value, pointer, align=self.arguments[argument][0].dtype.bitwidth // 8)

    def update(self, operation: Callable, value: Any, argument: int, at: int) -> None:
        """Replace a vector in an array by the result of an operation on it and `value`."""
        index = ir.Constant(I64, at)
        now = self.load(argument, index, value.type.count, value.type.element)
        self.store(operation(now, value), argument, index)

    def total(self, lanes: int, lane: ir.Type) -> Any:
        """The address of a variable vector for a loop, of zeros."""
        zeros = ir.Constant(ir.VectorType(lane, lanes), [0] * lanes)
        return cgutils.alloca_once_value(self.builder, zeros)

    def prefetch(self, argument: int, index: Any) -> None:
        """Ask for an element's cache line; the element may lie beyond the array's end."""
        byte = ir.PointerType(I8)
        kind = ir.FunctionType(ir.VoidType(), [byte, I32, I32, I32])
        function = self.builder.module.declare_intrinsic("llvm.prefetch", [byte], kind)
        options = (ir.Constant(I32, option) for option in (0, 3, 1))
        self.builder.call(function, [self.pointer(argument, index, I8), *options])

    def number(self, value: int, like: Any) -> Any:
        """`value` in every lane of the type of `like`."""
        return ir.Constant(like.type, [value] * like.type.count)

    def spread(self, value: Any, lanes: int) -> Any:
        """A scalar in every lane."""
        vector = ir.VectorType(value.type, lanes)
        first = self.builder.insert_element(
            ir.Constant(vector, ir.Undefined), value, ir.Constant(I32, 0)
        )
        return self.shuffle(first, first, [0] * lanes)

    def line(self, argument: int, i: Any) -> Any:
        """Index of line `i`, from two arguments: start, step."""
        start, step = self.scalar(argument), self.scalar(argument + 1)
        i = ir.Constant(I64, i) if isinstance(i, int) else i
        return self.builder.add(start, self.builder.mul(step, i))

    def row(self, argument: int, i: int) -> Any:
        """Index of row `i`, from three arguments: start, step of a pair of rows, step within."""
        start, pair, step = (self.scalar(argument + k) for k in range(3))
        index = self.builder.add(start, self.builder.mul(pair, ir.Constant(pair.type, i // 2)))
        return self.builder.add(index, step) if i % 2 else index

    def shuffle(self, left: Any, right: Any, lanes: Sequence[int]) -> Any:
        """The lanes of these numbers, of `left` and then `right`."""
        mask = ir.Constant(ir.VectorType(I32, len(lanes)), list(lanes))
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

    def nonzero(self, lanes: Any) -> Any:
        """Truth values of the lanes."""
        return self.builder.icmp_unsigned("!=", lanes, self.number(0, lanes))

    def floats(self, bits: Any) -> Any:
        """The float32 values of BF16 bits."""
        count = bits.type.count
        wide = self.builder.zext(bits, ir.VectorType(I32, count))
        return self.builder.bitcast(self.moved(wide, 16), ir.VectorType(ir.FloatType(), count))

    def where(self, lanes: Any, comparison: str, limit: int, chosen: Any) -> Any:
        """`chosen` where the comparison with a number holds, 0 elsewhere."""
        holds = self.builder.icmp_unsigned(comparison, lanes, self.number(limit, lanes))
        return self.builder.select(holds, chosen, self.number(0, chosen))

    def larger(self, left: Any, right: Any) -> Any:
        """The larger one in each lane."""
        return self.builder.select(self.builder.icmp_unsigned(">", left, right), left, right)

    def saturating_sum(self, left: Any, right: Any) -> Any:
        """The sum in each lane, at most all ones."""
        return self._intrinsic("llvm.uadd.sat", left.type, left, right)

    def reduced(self, operation: str, lanes: Any) -> Any:
        """All lanes in one by "add", "umax" or the like."""
        return self._intrinsic(f"llvm.vector.reduce.{operation}", lanes.type.element, lanes)

    def _intrinsic(self, name: str, result: ir.Type, *vectors: Any) -> Any:
        kind = vectors[0].type
        function = cgutils.get_or_insert_function(
            self.builder.module,
            ir.FunctionType(result, [vector.type for vector in vectors]),
            f"{name}.v{kind.count}i{kind.element.width}",
        )
        return self.builder.call(function, vectors)

    def dot(self, left: Any, right: Any) -> Any:
        """Sums of two products each, in lanes of twice the width, of signed lanes."""
        double = ir.VectorType(ir.IntType(2 * left.type.element.width), left.type.count)
        products = self.builder.mul(*(self.builder.sext(x, double) for x in (left, right)))
        even, odd = (range(first, double.count, 2) for first in (0, 1))
        return self.builder.add(
            self.shuffle(products, products, even), self.shuffle(products, products, odd)
        )

    def moved(self, bits: Any, up: int) -> Any:
        """Shifted by `up` places, down if negative."""
        shift = self.builder.shl if up > 0 else self.builder.lshr
        return shift(bits, self.number(abs(up), bits)) if up else bits

    def picked(self, mask: int, left: Any, right: Any) -> Any:
        """The bits of `left` in `mask`, of `right` elsewhere."""
        b = self.builder
        mask_, rest = self.number(mask, left), self.number(mask ^ 0xFFFF, left)
        return b.or_(b.and_(left, mask_), b.and_(right, rest))

    def magnitudes(self, bits: Any) -> Any:
        """BF16 bits without their signs."""
        return self.builder.and_(bits, self.number(0x7FFF, bits))

    def values(self, codes: Any, bias: Any, unit: int = 6) -> Any:
        """BF16 bits of codes in bits `unit`.. of 16-bit lanes; bias is (scale << 7) - 128.

        Both the bits and the bias are shifted down by 6 - unit: the lowest six are always 0.
        """
        b, number = self.builder, self.number
        large = b.and_(codes, number(7 << unit, codes))
        # 64 bits of BF16 make a code from 1.0 (code 2) on; 0.5 (code 1) is the bias itself.
        steps = self.where(large, ">", 1 << unit, large)
        magnitudes = self.where(large, "!=", 0, b.add(steps, bias))
        return self.picked(1 << (unit + 9), self.moved(codes, 6), magnitudes)

    def encoded(self, bits: Any, bias: Any) -> tuple[Any, Any]:
        """(E2M1 codes of BF16 bits, nearest even and saturated; not 0 where that is not exact).

        The codes are in bits 6..8 and lack their signs; bias as in `values`, for scales from 3 on.
        """
        b, number = self.builder, self.number
        magnitudes = self.magnitudes(bits)
        odd = b.and_(self.moved(bits, -6), number(1, bits))
        # Bits above 0.5: from 1.0 on (128), 64 of them make a code, of which 7 is the last below
        # 2^16; 0.75 (64) rounds up to 1.0 and 0.25 (-128) down to 0.
        base = 0x10000 - 512
        up = b.sub(number(base + 31, bias), bias)
        above = self.saturating_sum(b.add(magnitudes, odd), up)
        large = b.and_(self.larger(above, number(base + 128, above)), number(7 << 6, above))
        large = self.where(above, ">=", base + 96, large)
        back = self.where(above, ">=", base - 96, b.add(large, bias))
        codes = self.where(above, ">=", base - 96, self.larger(large, number(1 << 6, large)))
        return codes, b.xor(back, magnitudes)

    def word(self, codes: Sequence[Any], bits: Sequence[Any]) -> Any:
        """Four codes as `encoded` returns them, with the signs of their values, in 16 bits."""
        b = self.builder
        magnitudes = functools.reduce(
            b.or_, (self.moved(code, 4 * i - 6) for i, code in enumerate(codes))
        )
        signs = [self.moved(value, 4 * i - 12) for i, value in enumerate(bits)]
        low, high = self.picked(8, *signs[:2]), self.picked(8 << 8, *signs[2:])
        return self.picked(0x8888, self.picked(0x00FF, low, high), magnitudes)
