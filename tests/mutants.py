"""Wrong conversions and wrong models, each of which the comparison must notice.

`python -m tests.test_verify_mutants` prints the table. A mutant changes the weights or numbers a
reader gives (compared side by side), or a function of the forward pass (compared by its logits).
Numbers M1 to M26 name the classes of error; those under HARMLESS must leave every bit alone.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, replace

import torch
from torch import Tensor

from gptoss_convert.witness import forward, rotary
from gptoss_convert.witness.fp4 import Packed
from gptoss_convert.witness.model import LayerWeights, ModelConfig
from gptoss_convert.witness.readers import ChangedReader, Reader

Weights = dict[str, Tensor]
EditLayer = Callable[[int, Weights, ModelConfig], Mapping[str, Tensor]]
EditPacked = Callable[[Packed], Packed]


def unchanged(layer: int, weights: Weights, config: ModelConfig) -> Mapping[str, Tensor]:
    return {}


@dataclass(frozen=True)
class Mutant:
    """One error: what it does to a layer, to a layer's blocks, to the config, or to the code."""

    name: str
    layer: EditLayer = unchanged
    """Layer index, all weights decoded to BF16, config: the weights that change."""
    packed: EditPacked | None = None
    """Applied to the gate blocks of layer 1."""
    config: Callable[[ModelConfig], ModelConfig] = field(default=lambda config: config)
    order: Callable[[int], int] = field(default=lambda index: index)
    """Which layer of the source stands at an index."""
    stale_from: int | None = None
    """From this layer on, weights and unembedding come from another model."""
    embedding: Callable[[Tensor, Tensor], Tensor] = field(default=lambda own, other: own)
    unembedding: Callable[[Tensor, Tensor], Tensor] = field(default=lambda own, other: own)
    norm: Callable[[Tensor], Tensor] = field(default=lambda norm: norm)
    code: tuple[str, Callable[..., object]] | None = None
    """Name of a function of the forward pass, and what replaces it."""


class MutantReader(ChangedReader):
    """A reader of `source` with one error; `stale` is a model of the same sizes."""

    def __init__(self, source: Reader, mutant: Mutant, stale: Reader):
        super().__init__(source, mutant.config(source.config))
        self.source, self.mutant, self.stale = source, mutant, stale

    def _embedding(self) -> Tensor:
        return self.mutant.embedding(self.source.embedding(), self.source.unembedding())

    def _unembedding(self) -> Tensor:
        last = self.stale if self.mutant.stale_from is not None else self.source
        return self.mutant.unembedding(last.unembedding(), self.source.embedding())

    def _norm(self) -> Tensor:
        return self.mutant.norm(self.source.norm())

    def prepare(self, index: int) -> None:
        """The source is prepared by itself."""

    def _layer(self, index: int) -> LayerWeights:
        stale = self.mutant.stale_from is not None and index >= self.mutant.stale_from
        weights = (self.stale if stale else self.source).layer(self.mutant.order(index))
        if self.mutant.packed and index == 1:
            assert isinstance(weights.gate_weight, Packed)
            return replace(weights, gate_weight=self.mutant.packed(weights.gate_weight))
        decoded = {
            f.name: forward.dense(getattr(weights, f.name), torch.bfloat16)
            for f in fields(LayerWeights)
        }
        return replace(weights, **self.mutant.layer(index, decoded, self.config))


def at(layer: int, edit: Callable[[Weights, ModelConfig], Mapping[str, Tensor]]) -> EditLayer:
    """An edit of one layer only: the least that has to be noticed."""

    def edited(index: int, weights: Weights, config: ModelConfig) -> Mapping[str, Tensor]:
        return edit(weights, config) if index == layer else {}

    return edited


def exchanged(first: str, second: str) -> EditLayer:
    return at(1, lambda w, c: {first: w[second], second: w[first]})


def mapped(names: str, edit: Callable[[Tensor], Tensor]) -> EditLayer:
    return at(1, lambda w, c: {name: edit(w[name]) for name in names.split()})


def not_deinterleaved(w: Weights, c: ModelConfig) -> Mapping[str, Tensor]:
    edited = {}
    for kind in ("weight", "bias"):
        stored = torch.stack((w[f"gate_{kind}"], w[f"up_{kind}"]), dim=2).flatten(1, 2)
        edited[f"gate_{kind}"], edited[f"up_{kind}"] = stored.chunk(2, dim=1)
    return edited


def regrouped(w: Weights, c: ModelConfig) -> Mapping[str, Tensor]:
    """Rows [q; k; v] taken for rows grouped by kv head."""
    grouped = torch.cat((w["q_weight"], w["k_weight"], w["v_weight"])).unflatten(
        0, (c.kv_heads, -1, c.head_dim)
    )
    q, k, v = grouped.split((c.heads // c.kv_heads, 1, 1), dim=1)
    return {"q_weight": q.flatten(0, 2), "k_weight": k.flatten(0, 2), "v_weight": v.flatten(0, 2)}


def shifted_kv(w: Weights, c: ModelConfig) -> Mapping[str, Tensor]:
    return {n: w[n].roll(c.head_dim, 0) for n in ("k_weight", "k_bias", "v_weight", "v_bias")}


def interleaved_rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    even, odd = x[..., 0::2], x[..., 1::2]
    c, s = cos.unsqueeze(1), sin.unsqueeze(1)
    return torch.stack((even * c - odd * s, odd * c + even * s), dim=-1).flatten(-2)


def presoftmax(router: Tensor, config: ModelConfig) -> tuple[Tensor, Tensor]:
    top, chosen = router.softmax(-1).topk(config.experts_per_token, dim=-1)
    return chosen, top


def swiglu_like(low: float, high: float, offset: float) -> Callable[..., Tensor]:
    def swiglu(gate: Tensor, up: Tensor, config: ModelConfig) -> Tensor:
        gate, up = gate.clamp(low, high), up.clamp(-high, high)
        return gate * torch.sigmoid(config.swiglu_alpha * gate) * (up + offset)

    return swiglu


def no_concentration(config: ModelConfig, length: int, device: torch.device):
    angles = torch.arange(length).float().unsqueeze(1) * rotary.inverse_frequencies(config)
    return angles.cos(), angles.sin()


def scales_up(rows: slice, blocks: slice, by: int = 1) -> EditPacked:
    def edit(packed: Packed) -> Packed:
        scales = packed.scales.int()
        scales[0 if rows.stop else slice(None), rows, blocks] += by
        return Packed(packed.blocks, scales.clamp(0, 252).to(torch.uint8))

    return edit


def flipped_bit(packed: Packed) -> Packed:
    blocks = packed.blocks.clone()
    blocks[0, 0, 0, 0] ^= 4
    return Packed(blocks, packed.scales)


def negated_zeros(packed: Packed) -> Packed:
    low, high = packed.blocks & 15, packed.blocks >> 4
    low, high = (torch.where(n & 7 == 0, n ^ 8, n) for n in (low, high))
    return Packed(low | high << 4, packed.scales)


def exchanged_nibbles(packed: Packed) -> Packed:
    return Packed(packed.blocks >> 4 | packed.blocks << 4, packed.scales)


def with_numbers(**numbers: object) -> Callable[[ModelConfig], ModelConfig]:
    return lambda config: replace(config, **numbers)  # pyright: ignore[reportArgumentType]


EXPERTS = "gate_weight gate_bias up_weight up_bias down_weight down_bias"
BIASES = "q_bias k_bias v_bias o_bias gate_bias up_bias down_bias router_bias"


def zeroed_expert(expert: int) -> EditLayer:
    def edit(w: Weights, c: ModelConfig) -> Mapping[str, Tensor]:
        kept = w["down_bias"].new_ones(c.experts)
        kept[expert] = 0
        return {
            "down_weight": w["down_weight"] * kept.view(-1, 1, 1),
            "down_bias": w["down_bias"] * kept.view(-1, 1),
        }

    return at(1, edit)


MUTANTS: tuple[Mutant, ...] = (
    Mutant(
        "M1 gate and up exchanged",
        at(
            1,
            lambda w, c: {
                "gate_weight": w["up_weight"],
                "up_weight": w["gate_weight"],
                "gate_bias": w["up_bias"],
                "up_bias": w["gate_bias"],
            },
        ),
    ),
    Mutant("M2 gate and up not de-interleaved", at(1, not_deinterleaved)),
    Mutant("M3 down_proj transposed", mapped("down_weight", lambda m: m.transpose(1, 2))),
    Mutant("M4 k and v exchanged", exchanged("k_weight", "v_weight")),
    Mutant("M4 q, k, v rows taken as grouped", at(1, regrouped)),
    Mutant("M5 kv heads shifted by one group", at(1, shifted_kv)),
    *(Mutant(f"M6 {name} dropped", mapped(name, torch.zeros_like)) for name in BIASES.split()),
    Mutant("M7 sinks missing", mapped("sinks", lambda s: s - torch.inf)),
    Mutant("M7 sinks zero", mapped("sinks", torch.zeros_like)),
    Mutant("M7 sinks permuted", mapped("sinks", lambda s: s.roll(1))),
    Mutant("M8 window one too small", config=lambda c: replace(c, window=c.window - 1)),
    Mutant("M8 window one too large", config=lambda c: replace(c, window=c.window + 1)),
    Mutant(
        "M8 parity of layers exchanged",
        config=lambda c: replace(c, sliding=tuple(not s for s in c.sliding)),
    ),
    Mutant("M8 all layers full", config=lambda c: replace(c, sliding=(False,) * len(c.sliding))),
    Mutant("M9 YaRN range truncated", config=with_numbers(rope_truncate=True)),
    Mutant("M10 YaRN absent", config=with_numbers(rope_factor=1.0)),
    Mutant("M10 YaRN factor 31", config=with_numbers(rope_factor=31.0)),
    Mutant("M10 YaRN original length 32x", config=with_numbers(rope_original_length=4096)),
    Mutant("M10 concentration missing", code=("rotary_tables", no_concentration)),
    Mutant("M11 interleaved rotary", code=("rotate", interleaved_rotary)),
    Mutant("M12 experts reversed", mapped(EXPERTS, lambda m: m.flip(0))),
    Mutant(
        "M12 two experts exchanged",
        mapped(EXPERTS, lambda m: torch.cat((m[1:2], m[0:1], m[2:]))),
    ),
    Mutant("M12 EP blocks exchanged", mapped(EXPERTS, lambda m: m.roll(m.shape[0] // 2, 0))),
    Mutant("M13 layers 0 and 2 exchanged", order=lambda n: {0: 2, 2: 0}.get(n, n)),
    Mutant("M13 layers 2 and 3 exchanged", order=lambda n: {2: 3, 3: 2}.get(n, n)),
    Mutant("M14 norm weights exchanged", exchanged("attention_norm", "mlp_norm")),
    Mutant("M14 final norm all ones", norm=torch.ones_like),
    Mutant("M15 scale +1 in one block", packed=scales_up(slice(3, 4), slice(1, 2))),
    Mutant("M15 scale +1 in one row", packed=scales_up(slice(3, 4), slice(None))),
    Mutant("M15 scale +1 everywhere", packed=scales_up(slice(None), slice(None))),
    Mutant("M15 scale -1 everywhere", packed=scales_up(slice(None), slice(None), by=-1)),
    Mutant("M16 nibbles exchanged", packed=exchanged_nibbles),
    Mutant("M18 one bit of one element flipped", packed=flipped_bit),
    Mutant("M19 stale last shard", stale_from=3),
    Mutant("M20 embedding rows shifted", embedding=lambda own, other: own.roll(1, 0)),
    Mutant("M20 unembedding rows shifted", unembedding=lambda own, other: own.roll(1, 0)),
    Mutant(
        "M20 embedding and unembedding exchanged",
        embedding=lambda own, other: other,
        unembedding=lambda own, other: other,
    ),
    Mutant("M21 softmax before top-k", code=("route", presoftmax)),
    Mutant("M22 swiglu alpha 1.0", config=with_numbers(swiglu_alpha=1.0)),
    Mutant("M22 clamp missing", config=with_numbers(swiglu_limit=1e9)),
    Mutant("M22 +1 missing", code=("swiglu", swiglu_like(-torch.inf, 7.0, 0.0))),
    Mutant("M22 norm epsilon 1e-6", config=with_numbers(norm_eps=1e-6)),
    Mutant("M23 down bias doubled by tensor parallelism", mapped("down_bias", lambda b: b * 2)),
    Mutant("M23 gate and up bias halved", mapped("gate_bias up_bias", lambda b: b / 2)),
    Mutant("M24 pipeline boundary off by one", order=lambda n: (0, 1, 1, 2)[n]),
    Mutant(
        "M25 attention weights rounded through fp8",
        mapped("q_weight o_weight", lambda m: m.to(torch.float8_e4m3fn).to(torch.bfloat16)),
    ),
    Mutant("M26 the least used expert zeroed", zeroed_expert(0)),
)

BELOW_ROUNDING = Mutant(
    "M22 gate clamped on both sides", code=("swiglu", swiglu_like(-7.0, 7.0, 1.0))
)
"""Moves a logit by less than two correct implementations differ: only exactness can see it."""

HARMLESS: tuple[Mutant, ...] = (
    Mutant("clean run"),
    Mutant("M14 norms through fp16, exact for BF16 near 1", mapped("mlp_norm", Tensor.half)),
    Mutant("M17 zeros with the other sign: bytes see it, logits cannot", packed=negated_zeros),
)
