"""Matrices in MXFP4 as tensors: codes, scales, values. Shapes as in `calibrated`."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from gptoss_convert.witness.fp4 import Packed

BLOCK = 32
MAX_BYTE, BIAS = 252, 127


@dataclass(frozen=True)
class Rounded:
    """Matrices in MXFP4: `codes` u8 [E, K, N], sign in bit 3, and `scales` u8 [E, B, N]."""

    codes: Tensor
    scales: Tensor

    def values(self, dtype: torch.dtype) -> Tensor:
        """What they decode to, [E, K, N]."""
        scale = scale_values(self.scales, dtype).repeat_interleave(BLOCK, 1)
        return _grid(self.codes.device, dtype)[self.codes.int()] * scale


def exact_form(weights_EKN: Tensor, hints_EBN: Tensor | None) -> tuple[Rounded, Tensor]:
    """Codes and scales as the codec would choose them, and which experts they hold exactly, [E].

    The codec takes a hint if all values of the block are exact under it, else the OCP rule's scale.
    """
    parts = [
        _exact_form(matrix, None if hints_EBN is None else hints_EBN[e])
        for e, matrix in enumerate(weights_EKN)
    ]
    codes, scales, exact = zip(*parts, strict=True)
    return Rounded(torch.stack(codes), torch.stack(scales)), torch.stack(exact)


def _exact_form(weights_KN: Tensor, hints_BN: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    blocks_BCN = weights_KN.unflatten(0, (-1, BLOCK))
    largest_BN = blocks_BCN.abs().amax(1)
    bytes_BN = floor_bytes(largest_BN)
    if hints_BN is not None:
        highest = torch.where(largest_BN == 0, MAX_BYTE, 254)
        hinted = (hints_BN <= highest) & _is_exact(blocks_BCN, hints_BN)
        bytes_BN = torch.where(hinted, hints_BN.int(), bytes_BN)
    ratios = blocks_BCN / scale_values(bytes_BN, blocks_BCN.dtype).unsqueeze(1)
    points = nearest_points(ratios)
    codes_KN = codes_of(points).flatten(0, 1)
    return codes_KN, bytes_BN.to(torch.uint8), (points == ratios).all()


def _is_exact(blocks_BCN: Tensor, bytes_BN: Tensor) -> Tensor:
    """Which blocks a scale holds exactly, [B, N]."""
    ratios = blocks_BCN / scale_values(bytes_BN, blocks_BCN.dtype).unsqueeze(1)
    return (nearest_points(ratios) == ratios).all(1)


def nearest_points(ratios: Tensor) -> Tensor:
    """The grid points next to values in units of the scale."""
    magnitude = ratios.abs().clamp(max=6)
    step = step_at(magnitude)
    return ((magnitude / step).round() * step).copysign(ratios)


def floor_bytes(largest: Tensor) -> Tensor:
    """OCP MX 1.0's scale bytes for the largest magnitudes of blocks: ⌊log2⌋ - 2, int32."""
    exponent = torch.frexp(largest).exponent.int() - 3 + BIAS
    return torch.where(largest == 0, 0, exponent).clamp(0, MAX_BYTE)


def step_at(magnitudes: Tensor) -> Tensor:
    """From each magnitude's grid point at or below to the next, in units of the scale."""
    return torch.where(magnitudes < 2, 0.5, torch.where(magnitudes < 4, 1.0, 2.0)).to(
        magnitudes.dtype
    )


def codes_of(values: Tensor) -> Tensor:
    """E2M1 codes of grid points, the sign in bit 3."""
    size = values.abs()
    code = torch.where(size < 2, size * 2, torch.where(size < 4, size + 2, size / 2 + 4))
    return code.to(torch.uint8) | (values.signbit().to(torch.uint8) << 3)


def scale_values(scale_bytes: Tensor, dtype: torch.dtype) -> Tensor:
    """2^(byte - 127) of bytes 0..252, exact: powers from a table, as no device's exp2 need be."""
    powers = [2.0 ** (byte - BIAS) for byte in range(256)]
    table = torch.tensor(powers, dtype=torch.float64, device=scale_bytes.device).to(dtype)
    return table[scale_bytes.int()]


def _grid(device: torch.device, dtype: torch.dtype) -> Tensor:
    magnitudes = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]
    return torch.tensor([*magnitudes, *(-m for m in magnitudes)], dtype=dtype, device=device)


def packed(rounded: Rounded) -> Packed:
    """The matrices as MXFP4 is stored: blocks [E, N, B, 16], low nibble first; scales [E, N, B]."""
    pairs = rounded.codes.transpose(1, 2).unflatten(-1, (-1, BLOCK // 2, 2))
    blocks = (pairs[..., 0] | (pairs[..., 1] << 4)).contiguous()
    return Packed(blocks, rounded.scales.transpose(1, 2).contiguous())


def unpacked(stored: Packed) -> Rounded:
    """The opposite of `packed`."""
    codes = torch.stack((stored.blocks & 15, stored.blocks >> 4), -1).flatten(-3)
    return Rounded(codes.transpose(1, 2).contiguous(), stored.scales.transpose(1, 2).contiguous())
