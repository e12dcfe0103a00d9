"""Triton kernels of the forward pass on NVIDIA GPUs; `products` says what they compute.

Every row of a product, and every query, is computed by the same instructions in the same order,
whatever stands beside it: its bits depend on nothing but itself and the weights.

Letters as in `forward`; P parts of a float32 number, R rows (a token at one of its experts).
"""

# pyright: reportMissingImports=false, reportIndexIssue=false

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from gptoss_convert.witness.rows import TILE, Rows

_LARGE = 200_000
"""Bytes of shared memory for a block of threads from which the deep pipelines fit."""


def _shared_memory(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).shared_memory_per_block_optin


@triton.jit
def _split_kernel(x_ptr, out_ptr, count, PARTS: tl.constexpr, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < count
    _store_parts(tl.load(x_ptr + at, mask=inside, other=0.0), out_ptr + at, inside, count, PARTS)


@triton.jit
def _store_parts(x, out, mask, apart, PARTS: tl.constexpr):
    """Store float32 numbers as BF16 parts, each the rounded rest of those before."""
    for _ in tl.static_range(PARTS):
        part = x.to(tl.bfloat16)
        tl.store(out, part, mask=mask)
        x -= part.to(tl.float32)
        out += apart


def split(x: Tensor, parts: int) -> Tensor:
    """`x` float32 as BF16 parts `[P, ...]`, the largest first."""
    out = torch.empty((parts, *x.shape), dtype=torch.bfloat16, device=x.device)
    block = 4096
    grid = (triton.cdiv(x.numel(), block),)
    _split_kernel[grid](x, out, x.numel(), PARTS=parts, BLOCK=block, num_warps=8)
    return out


@triton.jit
def _step(
    x, weight, x_part, seen,
    BM: tl.constexpr, BN: tl.constexpr, PARTS: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """One step along K of `x @ weight.T`, summed alone.

    Tensor cores cut off what a sum cannot hold, so a long sum is made of short ones, which are
    added with rounding. The smallest parts come first.
    """
    w = tl.load(weight) if WHOLE else tl.load(weight, mask=seen, other=0.0)
    found = tl.zeros((BM, BN), tl.float32)
    for p in tl.static_range(PARTS):
        at = x + (PARTS - 1 - p) * x_part
        part = tl.load(at) if WHOLE else tl.load(at, mask=seen, other=0.0)
        found = tl.dot(part, w.T, found)
    return found


@triton.jit
def _product_kernel(
    x_ptr, weight_ptr, bias_ptr, up_ptr, up_bias_ptr, share_ptr, out_ptr,
    token_ptr, end_ptr, tile_end_ptr,
    tiles, n_size, k_size, experts, x_part, out_part, alpha, limit, offset,
    PARTS: tl.constexpr, OUT_PARTS: tl.constexpr, GATHER: tl.constexpr, BIAS: tl.constexpr,
    GATED: tl.constexpr, SHARE: tl.constexpr, WHOLE: tl.constexpr, EXPERTS: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """Rows of `x @ weight[expert].T + bias[expert]`, rows sorted by expert; GATED: SwiGLU of two.

    Tiles that share rows and weights are computed near one another, which the cache likes.
    """
    columns = tl.cdiv(n_size, BN)
    band = tl.program_id(0) // (8 * columns)
    height = min(tiles - band * 8, 8)
    inside_band = tl.program_id(0) % (8 * columns)
    tile, column = band * 8 + inside_band % height, inside_band // height
    e_E = tl.arange(0, EXPERTS)
    tile_ends = tl.load(tile_end_ptr + e_E, mask=e_E < experts, other=2147483647)
    expert = tl.sum((tile_ends <= tile).to(tl.int32))
    if expert >= experts:
        return
    before = tl.maximum(expert - 1, 0)
    first_tile = tl.where(expert > 0, tl.load(tile_end_ptr + before), 0)
    first_row = tl.where(expert > 0, tl.load(end_ptr + before), 0)
    rows = first_row + (tile - first_tile) * BM + tl.arange(0, BM)
    real = rows < tl.load(end_ptr + expert)
    if GATHER:
        held = tl.load(token_ptr + rows, mask=real, other=0)
    else:
        held = tl.where(real, rows, first_row)
    n = column * BN + tl.arange(0, BN)
    known = n < n_size
    k = tl.arange(0, BK)
    x = x_ptr + held.to(tl.int64)[:, None] * k_size + k[None, :]
    w_at = (expert.to(tl.int64) * n_size + tl.where(known, n, 0))[:, None] * k_size + k[None, :]
    total = tl.zeros((BM, BN), tl.float32)
    total_up = total
    for start in range(0, k_size, BK):
        seen = k[None, :] < k_size - start
        total += _step(x, weight_ptr + w_at, x_part, seen, BM, BN, PARTS, WHOLE)
        if GATED:
            total_up += _step(x, up_ptr + w_at, x_part, seen, BM, BN, PARTS, WHOLE)
        x += BK
        w_at += BK
    if BIAS:
        at = expert * n_size + n
        total += tl.load(bias_ptr + at, mask=known, other=0.0).to(tl.float32)[None, :]
        if GATED:
            total_up += tl.load(up_bias_ptr + at, mask=known, other=0.0).to(tl.float32)[None, :]
    if GATED:
        gate = tl.minimum(total, limit, propagate_nan=tl.PropagateNan.ALL)
        up = tl.clamp(total_up, -limit, limit, propagate_nan=tl.PropagateNan.ALL)
        total = gate / (1.0 + tl.exp(-alpha * gate)) * (up + offset)
    if SHARE:
        total *= tl.load(share_ptr + rows, mask=real, other=0.0).to(tl.float32)[:, None]
    out = out_ptr + rows.to(tl.int64)[:, None] * n_size + n[None, :]
    stored = real[:, None] & known[None, :]
    if OUT_PARTS == 0:
        tl.store(out, total, mask=stored)
    else:
        _store_parts(total, out, stored, out_part, OUT_PARTS)


def product(
    parts: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    out: Tensor,
    rows: Rows,
    *,
    tokens: Tensor | None = None,
    up: tuple[Tensor, Tensor] | None = None,
    swiglu: tuple[float, float, float] = (0.0, 0.0, 0.0),
    shares: Tensor | None = None,
) -> Tensor:
    """Fill `out` with rows of `x @ weight[e].T + bias[e]`, sorted by expert, and return it.

    `parts` is x `[P, T, K]`, `weight` BF16 `[E, N, K]`, `out` `[R, N]`, or BF16 parts `[P, R, N]`.
    The rows are those of x, or of x at `tokens`. With `up`, another weight and bias, it is SwiGLU
    of both, with alpha, limit and offset. `shares` `[R]` multiply the rows.
    """
    count, held, k_size = parts.shape
    experts, n_size, _ = weight.shape
    length = out.shape[-2]
    large = _shared_memory(parts.device) >= _LARGE
    columns, deep, stages = (128, 32, 4) if up or not large else (128, 64, 3)
    if not large:
        stages = 2
    unused = rows.ends
    tiles = triton.cdiv(length, TILE) + experts - 1
    _product_kernel[(tiles * triton.cdiv(n_size, columns),)](
        parts, weight, unused if bias is None else bias, up[0] if up else unused,
        up[1] if up else unused, unused if shares is None else shares, out,
        unused if tokens is None else tokens, rows.ends, rows.tile_ends,
        tiles, n_size, k_size, experts, held * k_size, length * n_size, *swiglu,
        PARTS=count, OUT_PARTS=out.shape[0] if out.ndim == 3 else 0, GATHER=tokens is not None,
        BIAS=bias is not None, GATED=up is not None, SHARE=shares is not None,
        WHOLE=k_size % deep == 0, EXPERTS=triton.next_power_of_2(experts),
        BM=TILE, BN=columns, BK=deep, num_warps=8, num_stages=stages,
    )  # fmt: skip
    return out


@triton.jit
def _parts_of(x):
    first = x.to(tl.bfloat16)
    rest = x - first.to(tl.float32)
    second = rest.to(tl.bfloat16)
    return first, second, (rest - second.to(tl.float32)).to(tl.bfloat16)


@triton.jit
def _dot_of_parts(a0, a1, a2, b0, b1, b2, sums, PARTS: tl.constexpr):
    """`a @ b + sums` without what is below float32, the smallest products first."""
    if PARTS > 1:
        sums = tl.dot(a2, b0, sums)
        sums = tl.dot(a1, b1, sums)
        sums = tl.dot(a0, b2, sums)
        sums = tl.dot(a1, b0, sums)
        sums = tl.dot(a0, b1, sums)
    return tl.dot(a0, b0, sums)


@triton.jit
def _load_parts(at, apart, mask, PARTS: tl.constexpr):
    first = tl.load(at, mask=mask, other=0.0)
    if PARTS > 1:
        second = tl.load(at + apart, mask=mask, other=0.0)
        third = tl.load(at + 2 * apart, mask=mask, other=0.0)
    else:
        second, third = first, first
    return first, second, third


@triton.jit
def _attend_kernel(
    q_ptr, k_ptr, v_ptr, sink_ptr, out_ptr,
    length, heads, group, window, scale, kv_part,
    PARTS: tl.constexpr, WINDOW: tl.constexpr, H: tl.constexpr, HP: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """One block of queries of one head, over the keys it may see, in ascending order.

    The sink opens the softmax: one more logit, without a value.
    """
    block = tl.num_programs(0) - 1 - tl.program_id(0)  # the longest first
    head = tl.program_id(1)
    rows = block * BM + tl.arange(0, BM)
    h = tl.arange(0, HP)
    at = rows.to(tl.int64)[:, None] * (heads * H) + head * H + h[None, :]
    real = (rows[:, None] < length) & (h[None, :] < H)
    q0, q1, q2 = _parts_of(tl.load(q_ptr + at, mask=real, other=0.0).to(tl.float32) * scale)
    sink = tl.load(sink_ptr + head).to(tl.float32)
    peak = tl.zeros((BM,), tl.float32) + tl.maximum(sink, -1e30)  # a sink may be -inf
    total = tl.exp(sink - peak)
    mixed = tl.zeros((BM, HP), tl.float32)
    first = 0
    if WINDOW:
        first = tl.maximum(block * BM - window + 1, 0) // BN * BN
    keys = tl.arange(0, BN)
    kv_width = heads // group * H
    for start in range(first, tl.minimum((block + 1) * BM, length), BN):
        c = start + keys
        kv_at = c.to(tl.int64)[:, None] * kv_width + head // group * H + h[None, :]
        seen = (c[:, None] < length) & (h[None, :] < H)
        k0, k1, k2 = _load_parts(k_ptr + kv_at, kv_part, seen, PARTS)
        v0, v1, v2 = _load_parts(v_ptr + kv_at, kv_part, seen, PARTS)
        scores = tl.zeros((BM, BN), tl.float32)
        scores = _dot_of_parts(q0, q1, q2, k0.T, k1.T, k2.T, scores, PARTS)
        away = rows[:, None] - c[None, :]
        visible = away >= 0
        if WINDOW:
            visible &= away < window
        scores = tl.where(visible, scores, float("-inf"))
        higher = tl.maximum(peak, tl.max(scores, 1))
        p = tl.exp(scores - higher[:, None])
        shrunk = tl.exp(peak - higher)
        total = total * shrunk + tl.sum(p, 1)
        p0, p1, p2 = _parts_of(p)
        some = tl.zeros((BM, HP), tl.float32)  # summed alone, as in `_step`
        some = _dot_of_parts(p0, p1, p2, v0, v1, v2, some, PARTS)
        mixed = mixed * shrunk[:, None] + some
        peak = higher
    tl.store(out_ptr + at, mixed / total[:, None], mask=real)


def attend(q_SNH: Tensor, k: Tensor, v: Tensor, sinks_N: Tensor, window: int | None) -> Tensor:
    """Causal attention with sinks, `[S, N, H]` like q; keys and values are parts `[P, C, K, H]`."""
    length, heads, head_dim = q_SNH.shape
    count, _, kv_heads, _ = k.shape
    out_SNH = torch.empty_like(q_SNH)
    large = _shared_memory(q_SNH.device) >= _LARGE
    keys, stages = (64, 3) if large else (32, 2)
    _attend_kernel[(triton.cdiv(length, TILE), heads)](
        q_SNH, k, v, sinks_N, out_SNH,
        length, heads, heads // kv_heads, window or 0, head_dim**-0.5, k[0].numel(),
        PARTS=count, WINDOW=window is not None, H=head_dim,
        HP=max(16, triton.next_power_of_2(head_dim)),
        BM=TILE, BN=keys, num_warps=8, num_stages=stages,
    )  # fmt: skip
    return out_SNH


@triton.jit
def _score_kernel(a_ptr, b_ptr, out_ptr, vocab, count, BLOCK: tl.constexpr):
    """All that one position needs of its two rows of logits, in float64, without copying them."""
    t = tl.program_id(0)
    a_at, b_at = a_ptr + t.to(tl.int64) * vocab, b_ptr + t.to(tl.int64) * vocab
    lane = tl.arange(0, BLOCK)
    a_peak = tl.full((BLOCK,), float("-inf"), tl.float32)
    b_peak = a_peak
    for start in range(0, vocab, BLOCK):
        v = start + lane
        known = v < vocab
        a = tl.load(a_at + v, mask=known, other=float("-inf")).to(tl.float32)
        b = tl.load(b_at + v, mask=known, other=float("-inf")).to(tl.float32)
        a_peak, b_peak = tl.maximum(a_peak, a), tl.maximum(b_peak, b)
    a_max, b_max = tl.max(a_peak).to(tl.float64), tl.max(b_peak).to(tl.float64)
    a_sum = tl.zeros((BLOCK,), tl.float64)
    b_sum, crossed, apart, largest = a_sum, a_sum, a_sum, a_sum
    for start in range(0, vocab, BLOCK):
        v = start + lane
        known = v < vocab
        a = tl.load(a_at + v, mask=known, other=0.0).to(tl.float64)
        b = tl.load(b_at + v, mask=known, other=0.0).to(tl.float64)
        p = tl.where(known, tl.exp(a - a_max), 0.0)
        a_sum += p
        b_sum += tl.where(known, tl.exp(b - b_max), 0.0)
        crossed += p * (a - b)
        delta = tl.abs(a - b)
        apart += delta
        largest = tl.maximum(largest, delta)
    a_total, all_apart = tl.sum(a_sum), tl.sum(apart)
    a_lse, b_lse = a_max + tl.log(a_total), b_max + tl.log(tl.sum(b_sum))
    tl.store(out_ptr + t, tl.sum(crossed) / a_total - a_lse + b_lse)
    # A maximum passes over NaN, a sum does not.
    tl.store(out_ptr + count + t, tl.where(all_apart == all_apart, tl.max(largest), all_apart))
    tl.store(out_ptr + 2 * count + t, all_apart / vocab)
    tl.store(out_ptr + 3 * count + t, a_lse)
    tl.store(out_ptr + 4 * count + t, b_lse)


def score(source_TV: Tensor, target_TV: Tensor) -> Tensor:
    """KL, largest and mean |Δlogit|, both log-sum-exps of each position, float64 `[5, T]`."""
    count, vocab = source_TV.shape
    out = torch.empty((5, count), dtype=torch.float64, device=source_TV.device)
    _score_kernel[(count,)](source_TV, target_TV, out, vocab, count, BLOCK=1024, num_warps=4)
    return out
