"""Calibrated rounding of matrices: errors are random, unbiased, and fed back along the columns.

Column by column, the error that rounding made so far is spread over the columns to come, weighted
by the second moments of what the matrix will be multiplied with (GPTQ, Frantar et al. 2022, for
fixed block scales), so that errors cancel in the outputs. Rounding to nearest in that scheme still
pulls weights back to the base's codes: the smallest error of each output comes with a smaller
update, and the same pull in every layer adds up. So each column is rounded stochastically, except
where the errors fed into it already scatter it over more than a step.

Shapes: E experts, K columns (inputs), N rows (outputs), B blocks of 32 columns. Any float dtype;
the same inputs give the same bits on the same device.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from gptoss_convert.quantise.matrices import (
    BLOCK,
    MAX_BYTE,
    Rounded,
    codes_of,
    floor_bytes,
    nearest_points,
    scale_values,
    step_at,
)
from gptoss_convert.quantise.report import FEW_TOKENS

DAMPING = 0.3
"""Added to the moments' diagonal, as a share of its mean, times 1 + columns / tokens."""
FADE = 4.0
"""The dither of a column is gone where the mean square of the errors fed into it is 1/4 step²."""
_AT_ONCE = 64
"""Columns between two products with all errors so far."""


@dataclass(frozen=True)
class Moments:
    """What calibration knows of the inputs x of each expert's matrix, and of its outputs."""

    inputs: Tensor
    """[E, K, K]: Σ p² x xᵀ over the tokens that reach the expert; p is the router's weight."""
    outputs: Tensor
    """[E, K, N]: Σ p² x yᵀ, where y is what the outputs should be."""
    tokens: Tensor
    """[E]: how many tokens that were."""

    def usable(self) -> Tensor:
        """Which experts can be calibrated: enough tokens, finite and nonzero moments, bool [E]."""
        finite = self.inputs.isfinite().flatten(1).all(1)
        finite &= self.outputs.isfinite().flatten(1).all(1)
        return finite & (self.tokens >= FEW_TOKENS) & (_diagonal(self.inputs).sum(1) > 0)


def round_matrices(
    weights_EKN: Tensor, moments: Moments, hints_EBN: Tensor | None, seeds_E: Tensor
) -> Rounded:
    """MXFP4 of `weights_EKN` whose outputs are, on average and nearly, those of the moments.

    `hints_EBN` are scale bytes that the matrices had before they were changed, 255 for none;
    `seeds_E` (int64) choose what is random. Experts that cannot be calibrated are rounded
    stochastically, each value for itself.
    """
    usable = moments.usable()
    damped = _damped(moments, usable)
    wanted = _corrected(weights_EKN, moments, damped, usable)
    bytes_EBN = choose_scales(wanted, _diagonal(damped), hints_EBN)
    return Rounded(_fed_back(wanted, damped, bytes_EBN, seeds_E), bytes_EBN)


def nearest(weights_EKN: Tensor, hints_EBN: Tensor | None) -> Tensor:
    """The values next to these, at the scales of `choose_scales`."""
    flat_EK = torch.ones_like(weights_EKN[..., 0])
    scale = scale_values(choose_scales(weights_EKN, flat_EK, hints_EBN), weights_EKN.dtype)
    scale = scale.repeat_interleave(BLOCK, 1)
    return nearest_points(weights_EKN / scale) * scale


def _diagonal(matrices: Tensor) -> Tensor:
    return matrices.diagonal(dim1=1, dim2=2)


def _damped(moments: Moments, usable_E: Tensor) -> Tensor:
    """The moments with a larger diagonal, positive definite; the identity where unusable.

    Fewer tokens than columns leave directions of which nothing is known: there errors must not
    seem to be free.
    """
    inputs = torch.where(usable_E[:, None, None], moments.inputs, 0)
    columns = inputs.shape[1]
    share = DAMPING * (1 + columns / moments.tokens.clamp(min=1).to(inputs.dtype))
    added = torch.where(usable_E, share * _diagonal(inputs).mean(1), 1)
    damped = inputs.clone()
    _diagonal(damped).add_(added[:, None])
    return damped


def _corrected(
    weights_EKN: Tensor, moments: Moments, damped_EKK: Tensor, usable_E: Tensor
) -> Tensor:
    """The weights that come nearest to the wanted outputs, held to the given ones by the damping.

    What the layers before have lost or added is made good here as far as it is linear.
    """
    wanted = weights_EKN.clone()
    for e in usable_E.nonzero().flatten().tolist():
        missing_KN = moments.outputs[e] - moments.inputs[e] @ weights_EKN[e]
        factor = torch.linalg.cholesky(damped_EKK[e].double()).to(missing_KN.dtype)
        wanted[e] += torch.cholesky_solve(missing_KN, factor)
    return wanted


def choose_scales(wanted_EKN: Tensor, weight_EK: Tensor, hints_EBN: Tensor | None) -> Tensor:
    """Scale bytes [E, B, N]: of the hint, the OCP rule's and the next larger one the one with the
    smallest expected error in the outputs, the first among equals.

    Errors of stochastic rounding are independent, so that moments count by their diagonal alone.
    """
    found: list[Tensor] = []
    for e, wanted_KN in enumerate(wanted_EKN):
        blocks_BCN = wanted_KN.unflatten(0, (-1, BLOCK)).abs()
        weight_BC1 = weight_EK[e].unflatten(0, (-1, BLOCK)).unsqueeze(-1)
        floor_BN = floor_bytes(blocks_BCN.amax(1))
        hint_BN = floor_BN if hints_EBN is None else hints_EBN[e].int()
        candidates = [torch.where(hint_BN <= MAX_BYTE, hint_BN, floor_BN), floor_BN, floor_BN + 1]
        candidates = [one.clamp(0, MAX_BYTE) for one in candidates]
        costs = [(_expected_error(blocks_BCN, byte) * weight_BC1).sum(1) for byte in candidates]
        best_BN = torch.stack(costs).min(0).indices
        found.append(torch.stack(candidates).gather(0, best_BN.unsqueeze(0))[0].to(torch.uint8))
    return torch.stack(found)


def _expected_error(magnitudes_BCN: Tensor, bytes_BN: Tensor) -> Tensor:
    """E (value - rounded)² of stochastic rounding, clipping included."""
    scale_B1N = scale_values(bytes_BN, magnitudes_BCN.dtype).unsqueeze(1)
    ratio = magnitudes_BCN / scale_B1N
    inside = ratio.clamp(max=6)
    step = step_at(inside)
    share = (inside / step).frac()
    error = step.square() * share * (1 - share) + (ratio - inside).square()
    return error * scale_B1N.square()


def _fed_back(
    wanted_EKN: Tensor, moments_EKK: Tensor, bytes_EBN: Tensor, seeds_E: Tensor
) -> Tensor:
    """Codes of `wanted_EKN`: columns in falling order of their moments, errors fed forward.

    With the moments R·Rᵀ, R upper triangular, the outputs' squared error is ‖Rᵀ·error‖²: a column
    can undo what those before it contributed to its row of Rᵀ, by their errors times its column of
    R over R's diagonal.
    """
    columns, rows = wanted_EKN.shape[1:]
    order_EK = _diagonal(moments_EKK).argsort(dim=1, descending=True, stable=True)
    shares_EKK = _feedback(moments_EKK, order_EK)
    scales_EBN = scale_values(bytes_EBN, wanted_EKN.dtype)
    errors_EKN = torch.empty_like(wanted_EKN)
    codes_EKN = torch.empty_like(wanted_EKN, dtype=torch.uint8)
    for start in range(0, columns, _AT_ONCE):
        stop = min(start + _AT_ONCE, columns)
        order = order_EK[:, start:stop]
        scales = _pick(scales_EBN, order // BLOCK)
        ratios = _pick(wanted_EKN, order) / scales
        noise = draw(seeds_E, order, rows).to(ratios.dtype) - 0.5
        fed = shares_EKK[:, :start, start:stop].transpose(1, 2) @ errors_EKN[:, :start]
        rounded = torch.empty_like(ratios)
        for j in range(stop - start):
            rounded[:, j] = _round_column(ratios[:, j], fed[:, j] / scales[:, j], noise[:, j])
            error = (ratios[:, j] - rounded[:, j]) * scales[:, j]
            errors_EKN[:, start + j] = error
            later = shares_EKK[:, start + j, start + j + 1 : stop]
            fed[:, j + 1 :] += later.unsqueeze(-1) * error.unsqueeze(1)
        codes_EKN.scatter_(1, order.unsqueeze(-1).expand(-1, -1, rows), codes_of(rounded))
    return codes_EKN


def _feedback(moments_EKK: Tensor, order_EK: Tensor) -> Tensor:
    """R over its diagonal, column by column, for the columns in order; float64."""
    found: list[Tensor] = []
    for moments_KK, order_K in zip(moments_EKK, order_EK, strict=True):
        ordered = moments_KK[order_K][:, order_K].double()
        # Cholesky's lower triangle, turned by half, is the upper one.
        upper = torch.linalg.cholesky(ordered.flip(0, 1)).flip(0, 1)
        found.append((upper / upper.diagonal()).to(moments_EKK.dtype))
    return torch.stack(found)


def _pick(matrices: Tensor, order: Tensor) -> Tensor:
    """Of each expert's matrix these rows, [E, rows, N]."""
    return matrices.gather(1, order.unsqueeze(-1).expand(-1, -1, matrices.shape[2]))


def _round_column(ratios_EN: Tensor, fed_EN: Tensor, noise_EN: Tensor) -> Tensor:
    """Grid points for one column of each expert, in units of the scale.

    Up with a probability of the share of the way up, where it exceeds a uniform draw; the dither
    fades out as the errors fed in scatter the column by themselves.
    """
    ratios = ratios_EN + fed_EN
    magnitude = ratios.abs().clamp_(max=6)
    step = step_at(magnitude)
    scatter_E1 = (fed_EN / step).square().mean(1, keepdim=True)
    dither_E1 = (1 - FADE * scatter_E1).clamp_(min=0).sqrt_()
    up = torch.floor((magnitude / step).add_(0.5).add_(dither_E1 * noise_EN))
    return (up * step).copysign_(ratios)


def draw(seeds_E: Tensor, columns_EC: Tensor, rows: int) -> Tensor:
    """Uniform numbers in (0, 1), float32 [E, C, rows]: a hash of seed, column and row.

    Steps of 2^-24. The same number for the same place, in whatever order columns are rounded.
    """
    row_N = torch.arange(rows, device=seeds_E.device)
    key_EC = _mixed(_mixed(seeds_E & _MASK)[:, None] ^ columns_EC)
    drawn = _mixed(key_EC.unsqueeze(-1) ^ row_N) >> 8
    return (drawn.float() + 0.5) * 2.0**-24


_MASK = 0xFFFFFFFF


def _mixed(bits: Tensor) -> Tensor:
    """Every bit of 32 spread over all: murmur3's 32-bit finalizer (Appleby 2011), in int64."""
    bits = ((bits ^ (bits >> 16)) * 0x85EBCA6B) & _MASK
    bits = ((bits ^ (bits >> 13)) * 0xC2B2AE35) & _MASK
    return bits ^ (bits >> 16)
