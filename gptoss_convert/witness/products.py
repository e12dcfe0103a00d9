"""Products with BF16 weights that are as exact as float32 ones, on hardware for BF16.

A float32 activation is the sum of three BF16 numbers, each the rounded rest of those before; a
product of two BF16 numbers is exact in float32. So three BF16 products, summed in float32, are one
float32 product. Activations that are BF16 themselves are their only part.

On a GPU `kernels` computes this; anywhere else torch does, as a model of it that tests can run.

Letters as in `forward`; P parts, R rows: a token at one of its experts.
"""

from __future__ import annotations

from importlib.util import find_spec

import torch
from torch import Tensor
from torch.nn import functional

from gptoss_convert.witness.activation import swiglu
from gptoss_convert.witness.model import ModelConfig
from gptoss_convert.witness.rows import Rows

TOKENS = 8192
"""Tokens whose rows are held at once."""


def usable(device: torch.device) -> bool:
    """Whether `device` has BF16 tensor cores and torch brought the compiler for them."""
    if device.type != "cuda" or torch.version.hip or find_spec("triton") is None:
        return False
    return torch.cuda.get_device_capability(device) >= (8, 0)


def split(x: Tensor) -> Tensor:
    """`x` as BF16 parts `[P, ...]`, the largest first: one if it is BF16, three if float32."""
    if x.dtype == torch.bfloat16:
        return x.unsqueeze(0)
    if x.is_cuda:
        from gptoss_convert.witness import kernels

        return kernels.split(x, 3)
    parts: list[Tensor] = []
    for _ in range(3):
        parts.append(x.to(torch.bfloat16))
        x = x - parts[-1].float()
    return torch.stack(parts)


def exact(weight: Tensor) -> bool:
    """Whether BF16 holds every value."""
    return weight.dtype == torch.bfloat16 or bool(
        (weight.to(torch.bfloat16).to(weight.dtype) == weight).all()
    )


def linear(x_TD: Tensor, weight_ND: Tensor, bias_N: Tensor | None) -> Tensor:
    """`x @ weight.T + bias`, `[T, N]` in the dtype of x; the weight is BF16."""
    parts = split(x_TD)
    if not x_TD.is_cuda:
        return _summed(parts, weight_ND, bias_N).to(x_TD.dtype)
    from gptoss_convert.witness import kernels

    count = len(x_TD)
    ends = torch.full((1,), count, dtype=torch.int32, device=x_TD.device)
    out_TN = x_TD.new_empty(count, len(weight_ND))
    return kernels.product(parts, weight_ND[None], bias_N, out_TN, Rows.of(ends))


def gated(
    x_TD: Tensor,
    tokens_R: Tensor,
    rows: Rows,
    gate: tuple[Tensor, Tensor],
    up: tuple[Tensor, Tensor],
    config: ModelConfig,
) -> Tensor:
    """SwiGLU of each row's expert, as parts `[P, R, F]`; `gate` and `up` are weight and bias."""
    parts = split(x_TD)
    if not x_TD.is_cuda:
        held = parts[:, tokens_R]
        inner = swiglu(_by_expert(held, rows, *gate), _by_expert(held, rows, *up), config)
        return split(inner.to(x_TD.dtype))
    from gptoss_convert.witness import kernels

    out_PRF = parts.new_empty(len(parts), len(tokens_R), gate[0].shape[1])
    numbers = config.swiglu_alpha, config.swiglu_limit, config.swiglu_offset
    return kernels.product(parts, *gate, out_PRF, rows, tokens=tokens_R, up=up, swiglu=numbers)


def down(
    inner_PRF: Tensor, rows: Rows, weight_EDF: Tensor, bias_ED: Tensor, shares_R: Tensor
) -> Tensor:
    """What each row's expert adds to its token, `[R, D]` in the dtype of `shares_R`."""
    if not inner_PRF.is_cuda:
        added = _by_expert(inner_PRF, rows, weight_EDF, bias_ED) * shares_R.float().unsqueeze(1)
        return added.to(shares_R.dtype)
    from gptoss_convert.witness import kernels

    out_RD = shares_R.new_empty(len(shares_R), weight_EDF.shape[1])
    return kernels.product(inner_PRF, weight_EDF, bias_ED, out_RD, rows, shares=shares_R)


def _by_expert(parts: Tensor, rows: Rows, weight: Tensor, bias: Tensor) -> Tensor:
    each = enumerate(rows.each())
    return torch.cat([_summed(parts[:, held], weight[e], bias[e]) for e, held in each])


def _summed(parts: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """The product in float32, the smallest parts first."""
    products = [functional.linear(part.float(), weight.float()) for part in parts.flip(0)]
    total = torch.stack(products).sum(0)
    return total if bias is None else total + bias.float()
