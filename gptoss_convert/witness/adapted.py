"""Reader of a base with an adapter: each layer as the merged model would have it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from gptoss_convert.witness.adapter_files import FILE, AdapterFiles, Asked, Pair
from gptoss_convert.witness.bridge_files import BridgeFiles
from gptoss_convert.witness.fetch import Fetcher
from gptoss_convert.witness.fp4 import Packed
from gptoss_convert.witness.model import ExpertMatrices, LayerWeights
from gptoss_convert.witness.readers import ChangedReader, Reader

_WHOLE = {
    "attention_norm": "input_layernorm.weight",
    "mlp_norm": "post_attention_layernorm.weight",
    "sinks": "self_attn.sinks",
    "router_weight": "mlp.router.weight",
    "router_bias": "mlp.router.bias",
    "down_bias": "mlp.experts.down_proj_bias",
    **{f"{p}_{kind}": f"self_attn.{p}_proj.{kind}" for p in "qkvo" for kind in ("weight", "bias")},
}
"""By field: the tensor that an adapter may hold whole."""


class AdaptedReader(ChangedReader):
    """A reader whose weights have the adapter's updates added, each sum rounded to BF16 once.

    With `as_peft`, in PEFT's own arithmetic.
    """

    def __init__(
        self, base: Reader, root: Path, asked: Asked, fetcher: Fetcher, as_peft: bool = False
    ) -> None:
        super().__init__(base, base.config)
        kind = AdapterFiles if (root / FILE).exists() else BridgeFiles
        self._adapter = kind(root, base.config, asked, fetcher)
        self._as_peft = as_peft

    def _embedding(self) -> Tensor:
        module = "model.embed_tokens"
        rows = self._vocabulary(module, self._reader.embedding())
        return self._sum(rows, self._adapter.embedding())

    def _unembedding(self) -> Tensor:
        rows = self._vocabulary("lm_head", self._reader.unembedding())
        return self._sum(rows, self._adapter.linear("lm_head"))

    def _norm(self) -> Tensor:
        whole = self._adapter.whole("model.norm.weight")
        return self._reader.norm() if whole is None else whole

    def _layer(self, index: int) -> LayerWeights:
        prefix = f"model.layers.{index}"
        found = self._with_whole(self._reader.layer(index), prefix)
        changed: dict[str, Tensor] = {}
        for p in "qkvo":
            module = f"{prefix}.self_attn.{p}_proj"
            name = f"{p}_weight"
            changed[name] = self._sum(getattr(found, name), self._adapter.linear(module))
            if added := self._adapter.bias(module):
                values, scale = added
                b = Pair(values.unsqueeze(1), torch.ones(1, 1, device=values.device), scale)
                name = f"{p}_bias"
                changed[name] = self._sum(getattr(found, name).unsqueeze(1), b).squeeze(1)
        changed["router_weight"] = self._sum(found.router_weight, self._adapter.router(prefix))
        changed |= self._biases(found, prefix)
        experts: dict[str, ExpertMatrices] = {}
        for part in ("gate", "up", "down"):
            pair: Pair | None = getattr(self._adapter, part)(prefix)
            name = f"{part}_weight"
            if pair is not None:
                experts[name] = self._experts(getattr(found, name), pair)
        return replace(found, **changed, **experts)

    def _vocabulary(self, module: str, rows: Tensor) -> Tensor:
        whole = self._adapter.whole(f"{module}.weight")
        rows = rows if whole is None else whole
        if trained := self._adapter.rows(module):
            indexes, values = trained
            rows = rows.clone()
            rows[torch.tensor(indexes, device=rows.device)] = values
        return rows

    def _with_whole(self, weights: LayerWeights, prefix: str) -> LayerWeights:
        """The layer with what the adapter holds whole."""
        held: dict[str, Tensor] = {}
        for field, name in _WHOLE.items():
            if (whole := self._adapter.whole(f"{prefix}.{name}")) is not None:
                held[field] = whole
        stem = f"{prefix}.mlp.experts"
        if (both := self._adapter.whole(f"{stem}.gate_up_proj")) is not None:
            held["gate_weight"] = both[..., 0::2].transpose(1, 2)
            held["up_weight"] = both[..., 1::2].transpose(1, 2)
        if (down := self._adapter.whole(f"{stem}.down_proj")) is not None:
            held["down_weight"] = down.transpose(1, 2)
        if (both := self._adapter.whole(f"{stem}.gate_up_proj_bias")) is not None:
            held["gate_bias"], held["up_bias"] = both[:, 0::2], both[:, 1::2]
        return replace(weights, **held)

    def _biases(self, weights: LayerWeights, prefix: str) -> Mapping[str, Tensor]:
        """The experts' biases with the updates that they may have as parameters."""
        changed: dict[str, Tensor] = {}
        if pair := self._adapter.expert_bias(prefix, "down_proj_bias"):
            changed["down_bias"] = self._sum(weights.down_bias, pair)
        if pair := self._adapter.expert_bias(prefix, "gate_up_proj_bias"):
            for which, part in enumerate(("gate", "up")):
                own = replace(pair, a=pair.a[:, which::2])
                changed[f"{part}_bias"] = self._sum(getattr(weights, f"{part}_bias"), own)
        return changed

    def _experts(self, matrices: ExpertMatrices, pair: Pair) -> Tensor:
        """Expert by expert, so that little more than the result is in memory."""
        dense: list[Tensor] = []
        for expert in range(self.config.experts):
            one = matrices[expert]
            values = one.decode(torch.bfloat16) if isinstance(one, Packed) else one
            b, a = (m[expert if m.shape[0] > 1 else 0] for m in (pair.b, pair.a))
            scale = pair.scales[expert] if pair.scales else pair.scale
            dense.append(self._sum(values, replace(pair, b=b, a=a, scale=scale)))
        return torch.stack(dense)

    def _sum(self, weight: Tensor, pair: Pair | None) -> Tensor:
        """W + scale · b @ a as BF16 `[out, in]`; with a magnitude, each row of that length."""
        if pair is None:
            return weight
        if self._as_peft:
            return _peft_sum(weight, pair)
        total = weight.double() + pair.scale * (pair.b.double() @ pair.a.double())
        if pair.magnitude is not None:
            length = torch.linalg.vector_norm(total, dim=1)
            total = total * (pair.magnitude.double() / length).unsqueeze(1)
        return rounded(total)


def rounded(values: Tensor) -> Tensor:
    """float64 as the nearest BF16, ties to even: torch's own cast would round to float32 first."""
    bits = values.contiguous().view(torch.int64)
    kept = (bits + 0x0FFF_FFFF_FFFF + (bits >> 45 & 1)) & ~0x1FFF_FFFF_FFFF
    # Below its smallest normal number BF16 has fewer bits: steps of 2^-133 are whole there.
    small = (values * 2.0**133).round() * 2.0**-133
    normal = kept.view(torch.float64)
    return torch.where(values.abs() < 2.0**-126, small, normal).to(torch.float32).bfloat16()


def _peft_sum(weight: Tensor, pair: Pair) -> Tensor:
    """PEFT's: a float32 product, a fused multiply-add at a time; a parameter's is rounded first."""
    update = torch.zeros(weight.shape, dtype=torch.float32, device=weight.device)
    for k in range(pair.a.shape[0]):
        column, row = pair.b[:, k : k + 1].double(), pair.a[k : k + 1].double()
        update = (update.double() + column * row).float()
    update = update * pair.scale
    if pair.magnitude is not None:
        total = weight.float() + update
        factor = pair.magnitude / torch.linalg.norm(total, dim=1)
        return (factor.unsqueeze(1) * total).bfloat16()
    if pair.to_parameter:
        update = update.bfloat16()
    return (weight.float() + update.float()).bfloat16()
