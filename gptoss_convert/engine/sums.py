"""W + s·P·Q on BF16 matrices in place, where P and Q are narrow: the arithmetic of a merge.

`add_exact` gives the exact sum, rounded once to nearest, ties to even. It is computed in float64
with a bound on the error. Where rounding could go either way within that bound, the element is
computed anew: first it is asked whether float64 happened to be exact, as it is for true ties; the
rest, about one in 10^12, is done in rational numbers.

`add_as_peft` gives the bits of PEFT's merge: a float32 product, summed in the order of the rank
with fused multiply-adds, as torch multiplies on CPUs up to rank 192, then one rounding or two.
"""

from __future__ import annotations

from fractions import Fraction

import numpy as np
from numpy.typing import NDArray

from gptoss_convert.codecs.mxfp4 import library
from gptoss_convert.codecs.mxfp4.library import Kernels, address, numbers

U16 = NDArray[np.uint16]
F32 = NDArray[np.float32]
F64 = NDArray[np.float64]

_PIECE = 1 << 16
"""Elements computed at once: their float64 intermediates stay in the cache."""
_AT_ONCE = 1 << 18
"""Elements of one call of a kernel: as many places for those in doubt."""
_SPAN = 256
"""Columns that a kernel sums together."""
_LINE = 16
"""Floats in a cache line."""
_HALF = np.int64(1 << 44)
"""Half of BF16's last place in the bits of a float64, whose fraction is 45 bits longer."""
_BELOW = np.int64((1 << 45) - 1)
_SMALLEST = 2.0**-126
"""Below it BF16 has fewer bits: such sums are rare, and left to the rational numbers."""


def add_exact(values: U16, p: F32, q: F32, scale: Fraction) -> None:
    """`values` (rows, columns), any strides, plus scale · p (rows, rank) · q (rank, columns).

    A sum of which nothing is added keeps its bits, the sign of zero included.
    """
    if kernels := library.load():
        _add_by_kernel(kernels, values, p, q, scale)
        return
    p64, q64, factor = p.astype(np.float64), q.astype(np.float64), float(scale)
    # No sum of products is larger than the product of the lengths (Cauchy and Schwarz).
    largest = np.sqrt(np.einsum("xk,xk->x", p64, p64)) * abs(factor)
    columns = np.sqrt(np.einsum("ky,ky->y", q64, q64))
    step = max(1, _PIECE // values.shape[1])
    for start in range(0, len(values), step):
        rows = slice(start, start + step)
        part = values[rows]
        before = widened(part)
        sums = before + (p64[rows] @ q64) * factor
        bound = largest[rows, None] * columns
        rounded, unsure = _rounded(sums, bound, q.shape[0])
        kept = bound == 0
        if unsure[~kept].any():
            x, y = np.nonzero(unsure & ~kept)
            rounded[x, y] = _settled(part[x, y], p64[rows][x], q64[:, y].T, scale)
        np.copyto(part, rounded, where=~kept)


def _add_by_kernel(kernels: Kernels, values: U16, p: F32, q: F32, scale: Fraction) -> None:
    """The same by the compiled loop, which lists the elements that are in doubt.

    It computes in float32, and anew in float64 where that leaves a doubt.
    """
    own, other = np.ascontiguousarray(p, np.float32), _padded(q)
    lengths = [_lengths(own), _lengths(other.T)]
    step = max(1, _AT_ONCE // values.shape[1])
    unsure = np.empty(min(step, len(values)) * values.shape[1], np.int64)
    for start in range(0, len(values), step):
        part, some = values[start : start + step], own[start : start + step]
        count = kernels.add_exact(
            address(part),
            numbers(part.strides),
            *part.shape,
            address(some),
            address(other),
            other.shape[1],
            q.shape[0],
            float(scale),
            address(lengths[0], 4 * start),
            address(lengths[1]),
            address(unsure),
        )
        if count:
            x, y = np.divmod(unsure[:count], part.shape[1])
            sides = some[x].astype(np.float64), other[:, y].T.astype(np.float64)
            part[x, y] = _settled(part[x, y], *sides, scale)


def _lengths(rows: F32) -> F32:
    """The length of each row."""
    wide = rows.astype(np.float64)
    return np.sqrt(np.einsum("xk,xk->x", wide, wide)).astype(np.float32)


def _padded(q: F32) -> F32:
    """Rows of whole spans of columns, zeros at their ends.

    A cache line more keeps rows from the distance of pages, at which they drive one another out of
    the cache.
    """
    width = -(-q.shape[1] // _SPAN) * _SPAN + _LINE
    padded = np.zeros((len(q), width), np.float32)
    padded[:, : q.shape[1]] = q
    return padded


def widened(bits: U16) -> F64:
    """BF16 bits as float64."""
    return (bits.astype(np.uint32) << 16).view(np.float32).astype(np.float64)


def _rounded(sums: F64, bound: F64, rank: int) -> tuple[U16, NDArray[np.bool_]]:
    """(the BF16 nearest to each sum, which of them could be another within the error)."""
    bits = sums.view(np.int64)
    # The rank's additions, the scale, the scaling and the last addition err by at most 2^-53 of
    # what they give. Twice that leaves room for the errors of the bound itself, and twice again
    # for the next middle below a power of two, which is half as far.
    error = ((rank + 1) * bound + np.abs(sums)) * 2.0**-51
    middle = ((bits & ~_BELOW) | _HALF).view(np.float64)
    unsure = (np.abs(sums - middle) <= error) | (np.abs(sums) < _SMALLEST)
    return nearest(sums), unsure


def nearest(sums: F64) -> U16:
    """The BF16 bits nearest to float64 values of BF16's normal range; larger ones are infinite."""
    bits = sums.view(np.int64)
    even = bits + (_HALF - 1) + ((bits >> 45) & 1)
    with np.errstate(over="ignore"):
        exact = (even & ~_BELOW).view(np.float64).astype(np.float32)
    return (exact.view(np.uint32) >> 16).astype(np.uint16)


def nearest_of_any(values: F64) -> U16:
    """The BF16 bits nearest to float64 values of any size."""
    result = nearest(values)
    for index in zip(*np.nonzero(np.abs(values) < _SMALLEST), strict=True):
        result[index] = _bits_of(np.uint16(0), Fraction(float(values[index])))
    return result


def _settled(before: U16, p: F64, q: F64, scale: Fraction) -> U16:
    """The sums of some elements, p and q (elements, rank), rounded without doubt.

    Where every operation happens to be exact, so is its float64 sum, and rounding that is all.
    """
    w = widened(before)
    total = np.zeros(len(p))
    lost = np.zeros(len(p), np.bool_)
    for k in range(p.shape[1]):
        total, rest = _two_sum(total, p[:, k] * q[:, k])
        lost |= rest != 0
    scaled, inexact = _scaled(total, scale)
    sums, rest = _two_sum(w, scaled)
    lost |= inexact | (rest != 0) | (np.abs(sums) < _SMALLEST)
    result = nearest(sums)
    for i in np.flatnonzero(lost):
        products = (Fraction(a) * Fraction(b) for a, b in zip(p[i], q[i], strict=True))
        result[i] = _bits_of(before[i], Fraction(w[i]) + scale * sum(products))
    return result


def _scaled(total: F64, scale: Fraction) -> tuple[F64, NDArray[np.bool_]]:
    """(total times scale, where that is not exact), numerator and denominator one after another."""
    if max(abs(scale.numerator), scale.denominator) >= 1 << 53:
        return total * float(scale), total != 0
    times, rest = _two_product(total, float(scale.numerator))
    scaled = times / scale.denominator
    back, more = _two_product(scaled, float(scale.denominator))
    return scaled, (rest != 0) | (back != times) | (more != 0)


def _two_product(a: F64, b: float) -> tuple[F64, F64]:
    """a · b as the float64 product and its error, exactly (Dekker)."""

    def halves(x: F64) -> tuple[F64, F64]:
        shifted = x * 134217729.0
        high = shifted - (shifted - x)
        return high, x - high

    result = a * b
    (ah, al), (bh, bl) = halves(a), halves(np.array(b))
    return result, ((ah * bh - result) + ah * bl + al * bh) + al * bl


def _two_sum(a: F64, b: F64) -> tuple[F64, F64]:
    """a + b as the float64 sum and its error, exactly (Knuth)."""
    total = a + b
    over = total - a
    return total, (a - (total - over)) + (b - over)


def _bits_of(before: np.uint16, value: Fraction) -> int:
    """The BF16 bits nearest to a number, ties to even; `before` if nothing was added."""
    w = float(widened(np.array([before]))[0])
    if value == w:
        return int(before)
    sign, value = (0x8000, -value) if value < 0 else (0, value)
    # Positions in BF16's order are the bits themselves: count units of the smallest step.
    low, high = 0, 0x7F80
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if _of_bits(middle) <= value else (low, middle)
    below, above = value - _of_bits(low), _of_bits(high) - value
    return sign | (high if above < below or (above == below and low & 1) else low)


def _of_bits(bits: int) -> Fraction:
    """The number of positive BF16 bits; infinity counts as the step beyond the largest."""
    exponent, fraction = bits >> 7, bits & 127
    scale = Fraction(2) ** (max(exponent, 1) - 134)
    return (fraction + 128 * (exponent > 0)) * scale


def add_as_peft(values: U16, p: F32, q: F32, scale: Fraction, twice: bool) -> None:
    """The same in PEFT's float32 arithmetic; `twice` rounds the update to BF16 before adding it."""
    if kernels := library.load():
        own, other = np.ascontiguousarray(p, np.float32), _padded(q)
        sides = address(own), address(other), other.shape[1], q.shape[0]
        factor = float(np.float32(float(scale)))
        steps = numbers(values.strides)
        kernels.add_as_peft(address(values), steps, *values.shape, *sides, factor, twice)
        return
    step = max(1, _PIECE // values.shape[1])
    for start in range(0, len(values), step):
        rows = slice(start, start + step)
        part = values[rows]
        update = product(p[rows], q) * np.float32(float(scale))
        if twice:
            update = narrowed(to_bf16(update))
        part[...] = to_bf16(narrowed(part) + update)


def product(p: F32, q: F32) -> F32:
    """p · q, each element a chain of fused multiply-adds in the order of the rank."""
    total = np.zeros((len(p), q.shape[1]), np.float32)
    p64, q64 = p.astype(np.float64), q.astype(np.float64)
    for k in range(p.shape[1]):
        exact = p64[:, k, None] * q64[k]
        sums, rest = _two_sum(total.astype(np.float64), exact)
        # Rounded to odd: what float64 lost keeps its last bit set, so that float32 rounds as if
        # nothing had been lost.
        bits = sums.view(np.int64)
        away = np.where((rest > 0) == (sums > 0), 1, -1)
        odd = np.where((rest != 0) & (bits & 1 == 0), bits + np.minimum(away, 0) | 1, bits)
        total = odd.view(np.float64).astype(np.float32)
    return total


def narrowed(bits: U16) -> F32:
    """BF16 bits as float32."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


def to_bf16(values: F32) -> U16:
    """The BF16 bits nearest to float32 values, ties to even."""
    bits = values.view(np.uint32)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    return np.where(np.isnan(values), 0x7FC0, rounded).astype(np.uint16)
