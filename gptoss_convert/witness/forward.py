"""The whole GPT-OSS model as one deterministic forward pass, a layer at a time.

`walk` owns the loop over layers and hands in one layer's weights at a time, so that two
checkpoints walk side by side with one layer each on the device. Identical weights give
bit-identical outputs. In float32 it agrees with transformers and megatron-core up to rounding.

Shape suffixes: T tokens of all sequences, one after another; S tokens of one sequence (queries),
C keys of that sequence, D hidden, N query heads, K kv heads, G query heads per kv head, H head_dim,
h half of head_dim, E experts, A experts per token, F inter, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional

from gptoss_convert.witness import products
from gptoss_convert.witness.activation import swiglu
from gptoss_convert.witness.first_calls import settle_kernels
from gptoss_convert.witness.fp4 import Packed
from gptoss_convert.witness.fp8 import rounded
from gptoss_convert.witness.model import ExpertMatrices, LayerWeights, ModelConfig, fresh
from gptoss_convert.witness.rotary import rotary_tables, rotate, rotate_interleaved
from gptoss_convert.witness.rows import Rows, rows_by_expert


@dataclass(frozen=True)
class Numerics:
    """How to compute: the dtype of activations, how products, the memory attention may take."""

    dtype: torch.dtype = torch.float32
    score_elements: int = 1 << 24
    """Attention scores held at once, in elements; bounds memory, changes only rounding."""
    split: bool = False
    """Products with weights that BF16 holds exactly are sums of BF16 products (`products`)."""

    @classmethod
    def on(cls, device: torch.device, dtype: torch.dtype = torch.float32) -> Numerics:
        """What suits a device: 64 MiB of scores on a CPU, 2 GiB and split products on a GPU."""
        scores = 1 << 24 if device.type == "cpu" else 1 << 29
        return cls(dtype, scores, products.usable(device))


@contextmanager
def exact_products() -> Iterator[None]:
    """Switch off TF32 and reduced bf16 accumulation inside the block, and autograd with them."""
    settle_kernels()
    precision = torch.get_float32_matmul_precision()
    reduced = torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction
    torch.set_float32_matmul_precision("highest")
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
    try:
        with torch.inference_mode():
            yield
    finally:
        torch.set_float32_matmul_precision(precision)
        torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = reduced


def embed(tokens_T: Tensor, embedding_VD: Tensor, numerics: Numerics) -> Tensor:
    """The residual stream that enters layer 0, `[T, D]`."""
    return embedding_VD[tokens_T].to(numerics.dtype)


def logits(x_TD: Tensor, norm_D: Tensor, unembedding_VD: Tensor, config: ModelConfig) -> Tensor:
    """Logits `[T, V]` of the residual stream that leaves the last layer.

    `unembedding_VD` comes from `operand`, once for all calls.
    """
    return linear(rms_norm(x_TD, norm_D, config.norm_eps), unembedding_VD, None)


def rms_norm(x_TD: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    """RMSNorm in float32; the weight is applied before the cast back to the dtype of `x_TD`."""
    x = x_TD.float()
    x = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)
    return (x * weight_D.float()).to(x_TD.dtype)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """`x @ weight.T + bias`, in the dtype of x; the weight is an `operand`."""
    if weight.dtype == x.dtype:
        return functional.linear(x, weight, bias)
    return products.linear(x, weight, bias)


def operand(matrix: ExpertMatrices, numerics: Numerics) -> Tensor:
    """A weight as products take it: in BF16 where they are split and it is exact, else `dense`."""
    held = isinstance(matrix, Packed) or (numerics.split and products.exact(matrix))
    return dense(matrix, torch.bfloat16 if numerics.split and held else numerics.dtype)


def dense(matrix: ExpertMatrices, dtype: torch.dtype) -> Tensor:
    """The values in `dtype`, fresh, whatever they were stored as."""
    return fresh(matrix.decode(dtype) if isinstance(matrix, Packed) else matrix.to(dtype))


def attention(
    x_SD: Tensor,
    weights: LayerWeights,
    config: ModelConfig,
    window: int | None,
    numerics: Numerics,
) -> Tensor:
    """Causal grouped-query attention with learnable sinks over one sequence, `[S, D]`.

    Matrices of `weights` are operands, biases `dense`.
    """
    q = linear(x_SD, weights.q_weight, weights.q_bias).unflatten(-1, (-1, config.head_dim))
    k = linear(x_SD, weights.k_weight, weights.k_bias).unflatten(-1, (-1, config.head_dim))
    v = linear(x_SD, weights.v_weight, weights.v_bias).unflatten(-1, (-1, config.head_dim))
    cos_Sh, sin_Sh = rotary_tables(config, len(x_SD), x_SD.device)
    turned = rotate_interleaved if config.rope_interleaved else rotate
    q_SNH, k_SKH = turned(q, cos_Sh, sin_Sh), turned(k, cos_Sh, sin_Sh)
    if numerics.split and q.is_cuda:
        from gptoss_convert.witness import kernels

        k, v = products.split(k_SKH), products.split(v)
        mixed_SNH = kernels.attend(q_SNH, k, v, weights.sinks, window)
    else:
        mixed_SNH = attend(q_SNH, k_SKH, v, weights.sinks, window, numerics.score_elements)
    return linear(mixed_SNH.flatten(1), weights.o_weight, weights.o_bias)


def attend(
    q_SNH: Tensor,
    k_CKH: Tensor,
    v_CKH: Tensor,
    sinks_N: Tensor,
    window: int | None,
    score_elements: int,
) -> Tensor:
    """Softmax attention `[S, N, H]`, exact, in query blocks that see only the keys they may see.

    A sink is one more logit per head that takes probability and gives no value. Scores and
    probabilities are float32.
    """
    if q_SNH.is_cuda and window is None:
        return attend_fused(q_SNH, k_CKH, v_CKH, sinks_N)
    length, heads, head_dim = q_SNH.shape
    # A window that reaches further sees no more, and would only cut the queries finer.
    window = None if window is None else min(window, length)
    kv_heads = k_CKH.shape[1]
    q_KGSH = (q_SNH * head_dim**-0.5).unflatten(1, (kv_heads, -1)).permute(1, 2, 0, 3)
    k_KHC, v_KCH = k_CKH.permute(1, 2, 0), v_CKH.transpose(0, 1)
    sinks_KG1, blocks = sinks_N.float().view(kv_heads, -1, 1), []
    for start, stop in query_blocks(length, heads, window, score_elements):
        first = 0 if window is None else max(0, start - window + 1)
        scores = _masked_scores(
            q_KGSH[:, :, start:stop], k_KHC[:, :, first:stop], start - first, window
        )
        peak_KGS = torch.maximum(scores.amax(-1), sinks_KG1)
        scores.sub_(peak_KGS.unsqueeze(-1)).exp_()
        total_KGS = scores.sum(-1) + torch.exp(sinks_KG1 - peak_KGS)
        scores.div_(total_KGS.unsqueeze(-1))
        mixed = torch.matmul(scores.to(v_KCH.dtype).flatten(1, 2), v_KCH[:, first:stop])
        blocks.append(mixed.unflatten(1, (-1, stop - start)).permute(2, 0, 1, 3).flatten(1, 2))
    return torch.cat(blocks)


def attend_fused(q_SNH: Tensor, k_CKH: Tensor, v_CKH: Tensor, sinks_N: Tensor) -> Tensor:
    """Causal attention `[S, N, H]` by torch's fused kernel: memory is linear in the sequence.

    The kernel knows no sinks; its log-sum-exp says which share of the probability they take.
    Its float32 products are three TF32 ones each, as exact as float32 up to rounding.
    """
    length, heads, _ = q_SNH.shape
    group = heads // k_CKH.shape[1]
    k_CNH, v_CNH = (x.repeat_interleave(group, dim=1) for x in (k_CKH, v_CKH))
    q_NSH, k_NCH, v_NCH = (x.transpose(0, 1).unsqueeze(0) for x in (q_SNH, k_CNH, v_CNH))
    mixed_NSH, total_NS, *_ = torch.ops.aten._scaled_dot_product_efficient_attention(
        q_NSH, k_NCH, v_NCH, None, True, 0.0, True
    )
    kept_NS = torch.sigmoid(total_NS[0, :, :length] - sinks_N.float().unsqueeze(1))
    return (mixed_NSH[0] * kept_NS.unsqueeze(-1)).to(q_SNH.dtype).transpose(0, 1)


def _masked_scores(q_KGSH: Tensor, k_KHC: Tensor, offset: int, window: int | None) -> Tensor:
    """Scores `[K, G, S, C]` in float32, -inf where unseen; query 0 stands at key `offset`."""
    products = torch.matmul(q_KGSH.flatten(1, 2), k_KHC).float()
    scores_KGSC = products.unflatten(1, (q_KGSH.shape[1], -1))
    queries = torch.arange(q_KGSH.shape[2], device=k_KHC.device) + offset
    distance_SC = queries.unsqueeze(1) - torch.arange(k_KHC.shape[2], device=k_KHC.device)
    unseen_SC = distance_SC < 0
    if window is not None:
        unseen_SC |= distance_SC >= window
    return scores_KGSC.masked_fill_(unseen_SC, -math.inf)


def query_blocks(
    length: int, heads: int, window: int | None, score_elements: int
) -> Iterator[tuple[int, int]]:
    """`[start, stop)` of each query block, so that its scores stay within `score_elements`."""
    if window is None:
        size = score_elements // (heads * length)
    else:
        # heads * size * (size + window) scores, solved for size; of longer blocks most is masked.
        size = int(math.sqrt(score_elements / heads + window**2 / 4) - window / 2)
        size = min(size, max(4 * window, 64))
    size = max(1, size)
    for start in range(0, length, size):
        yield start, min(start + size, length)


@dataclass(frozen=True)
class Routing:
    """Where a router sends each token of a batch."""

    logits: Tensor
    """`[T, E]`."""
    chosen: Tensor
    """Experts of each token, `[T, A]`, strongest first."""
    shares: Tensor
    """Their weights `[T, A]`: a softmax over the chosen logits only."""


def router(x_TD: Tensor, weights: LayerWeights, config: ModelConfig) -> Routing:
    """The routing of a residual stream that comes from attention; its matrix is an operand."""
    normed_TD = rms_norm(x_TD, weights.mlp_norm, config.norm_eps)
    router_TE = linear(normed_TD, weights.router_weight, weights.router_bias)
    return Routing(router_TE, *route(router_TE, config))


def route(router_TE: Tensor, config: ModelConfig) -> tuple[Tensor, Tensor]:
    """The chosen experts `[T, A]` and their weights: a softmax over the chosen logits only."""
    top_TA, chosen_TA = router_TE.topk(config.experts_per_token, dim=-1)
    if config.softmax_before_choice:
        return chosen_TA, router_TE.softmax(-1, torch.float32).gather(1, chosen_TA).to(top_TA.dtype)
    return chosen_TA, top_TA.float().softmax(-1).to(router_TE.dtype)


def experts(
    batches: Iterable[Tensor],
    routings: Sequence[Routing],
    weights: LayerWeights,
    config: ModelConfig,
    numerics: Numerics,
) -> Iterator[Tensor]:
    """Sum over each token's experts, `[T, D]` by batch; its share multiplies after down's bias.

    The order of each sum is fixed and there are no atomics: it is deterministic on every device.
    """
    # Engines that round an expert's inputs are followed expert by expert.
    if numerics.split and config.expert_inputs is None:
        matrices = (weights.gate_weight, weights.up_weight, weights.down_weight)
        gate, up, down = (operand(one, numerics) for one in matrices)
        if gate.dtype == up.dtype == down.dtype == torch.bfloat16:
            ready = replace(weights, gate_weight=gate, up_weight=up, down_weight=down)
            for x_TD, routing in zip(batches, routings, strict=True):
                yield _all_experts(x_TD, routing, ready, config)
            return
    yield from _expert_by_expert([*batches], routings, weights, config)


def _all_experts(
    x_TD: Tensor, routing: Routing, weights: LayerWeights, config: ModelConfig
) -> Tensor:
    """All experts of a batch in one product, a bounded number of tokens at a time."""
    down: list[Tensor] = []
    chunks = (x.split(products.TOKENS) for x in (x_TD, routing.chosen, routing.shares))
    matrices = (weights.gate_weight, weights.up_weight, weights.down_weight)
    gate_EFD, up_EFD, down_EDF = (one for one in matrices if isinstance(one, Tensor))
    gate, up = (gate_EFD, weights.gate_bias), (up_EFD, weights.up_bias)
    for x, chosen_TA, shares_TA in zip(*chunks, strict=True):
        rows, choice_R = Rows.of_choices(chosen_TA, config.experts)
        tokens_R = choice_R // config.experts_per_token
        inner_PRF = products.gated(x, tokens_R, rows, gate, up, config)
        shares_R = shares_TA.flatten()[choice_R]
        added_RD = products.down(inner_PRF, rows, down_EDF, weights.down_bias, shares_R)
        row_R = torch.empty_like(choice_R)
        row_R[choice_R] = torch.arange(len(choice_R), device=x.device)
        down.append(added_RD[row_R].unflatten(0, chosen_TA.shape).sum(1))
    return torch.cat(down)


def _expert_by_expert(
    batches: Sequence[Tensor],
    routings: Sequence[Routing],
    weights: LayerWeights,
    config: ModelConfig,
) -> list[Tensor]:
    """One expert's weights decoded at a time, for all batches; a token meets each at most once."""
    sums = [torch.zeros_like(x_TD) for x_TD in batches]
    rows = [rows_by_expert(routing.chosen, config.experts) for routing in routings]
    for e in range(config.experts):
        met = [n for n, by_expert in enumerate(rows) if len(by_expert[e])]
        if not met:
            continue
        gate_FD, up_FD, down_DF = (
            dense(matrices[e], batches[0].dtype)
            for matrices in (weights.gate_weight, weights.up_weight, weights.down_weight)
        )
        for n in met:
            tokens = rows[n][e] // config.experts_per_token
            x = rounded(batches[n][tokens], config.expert_inputs)
            gate = linear(x, gate_FD, weights.gate_bias[e])
            up = linear(x, up_FD, weights.up_bias[e])
            inner = rounded(swiglu(gate, up, config), config.expert_inputs)
            down = linear(inner, down_DF, weights.down_bias[e])
            sums[n][tokens] += down * routings[n].shares.flatten()[rows[n][e]].unsqueeze(1)
    return sums
