"""An adapter as its writer's own code would take it: pairs of matrices for each weight.

Written by hand from the formulas of PEFT, Unsloth, Tinker, Automodel and Megatron-Bridge: where the
tables of the converter are wrong, a merge by them and one by these formulas disagree.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from gptoss_convert.witness.configs import read_json
from gptoss_convert.witness.fetch import Fetcher
from gptoss_convert.witness.model import ModelConfig
from gptoss_convert.witness.readers import StoredTensors, safetensors_chunks

_PREFIX = "base_model.model."
FILE = "adapter_model.safetensors"


@dataclass(frozen=True)
class Pair:
    """The update of matrices: scale · b @ a, `b` `[..., out, rank]`, `a` `[..., rank, in]`."""

    b: Tensor
    a: Tensor
    scale: float
    to_parameter: bool = False
    """PEFT rounds an update of a parameter or an embedding before it adds it."""
    magnitude: Tensor | None = None
    """DoRA's length of each row, `[out]`."""
    scales: tuple[float, ...] = ()
    """By expert, where they differ."""


@dataclass(frozen=True)
class Asked:
    """What the files do not always say, and how strong the update is to be."""

    layout: str | None = None
    down: str | None = None
    strength: float = 1.0


class AdapterFiles:
    """Files as PEFT names them: `<module>.lora_A.weight` `[r, in]`, `.lora_B.weight` `[out, r]`."""

    def __init__(self, root: Path, config: ModelConfig, asked: Asked, fetcher: Fetcher) -> None:
        self.config, self._asked = config, asked
        self.settings: Mapping[str, Any] = read_json(root / "adapter_config.json").content
        self._files = StoredTensors(root, safetensors_chunks(root, [FILE]), fetcher)
        self._names: dict[str, list[str]] = {}
        for name in self._files.names():
            plain = name.removeprefix(_PREFIX).replace(".attn.", ".self_attn.")
            plain = plain.replace("model.unembed_tokens.", "lm_head.")
            self._names.setdefault(plain.replace("base_layer.", ""), []).append(name)
        self._swapped, self._grouped, self._halves = self._layout()

    def whole(self, name: str) -> Tensor | None:
        """A tensor that the adapter holds whole, by its name in Hugging Face's BF16 layout."""
        found = self._names.get(name)
        return self._read(found[0]).to(torch.bfloat16) if found else None

    def rows(self, module: str) -> tuple[list[int], Tensor] | None:
        """Trained tokens: which rows of a vocabulary, and what stands there instead."""
        found = self._names.get(f"{module}.token_adapter.trainable_tokens_delta")
        if not found:
            return None
        asked = self.settings["trainable_token_indices"]
        if not isinstance(asked, list):
            asked = next(rows for name, rows in asked.items() if f".{module}".endswith(f".{name}"))
        return asked, self._read(found[0]).to(torch.bfloat16)

    def linear(self, module: str) -> Pair | None:
        """The update of a linear module, its magnitude with it."""
        a, b = (self._names.get(f"{module}.lora_{half}.weight") for half in "AB")
        if not a or not b:
            return None
        length = self._names.get(f"{module}.lora_magnitude_vector")
        magnitude = self._read(length[0]) if length else None
        weight = f"{module}.weight"
        ends = self.settings.get("target_parameters") or []
        whole = any(f".{weight}".endswith(f".{end}") for end in ends)
        name = weight if whole else module
        return self._pair(name, self._read(b[0]), self._read(a[0]), whole, magnitude)

    def bias(self, module: str) -> tuple[Tensor, float] | None:
        """`lora_bias`: what is added to a module's bias, and how strongly."""
        found, a = (self._names.get(f"{module}.{end}") for end in ("lora_B.bias", "lora_A.weight"))
        if not found or not a:
            return None
        return self._read(found[0]), self._scale(module, self._files.shape(a[0])[0])

    def embedding(self) -> Pair | None:
        """The update of the embedding, rows first: `(B A)` transposed."""
        a, b = (self._names.get(f"model.embed_tokens.lora_embedding_{half}") for half in "AB")
        if not a or not b:
            return self.linear("model.embed_tokens")
        return self._pair("model.embed_tokens", self._read(a[0]).T, self._read(b[0]).T, True)

    def router(self, prefix: str) -> Pair | None:
        """The update of a router's weight, which is a parameter to PEFT."""
        found = self.linear(f"{prefix}.mlp.router")
        if found is None:
            return None
        return self._pair(f"{prefix}.mlp.router.weight", found.b, found.a, True)

    def gate(self, prefix: str) -> Pair | None:
        """The update of all experts' gates, `[expert, inter, hidden]`."""
        return self._part(prefix, 0)

    def up(self, prefix: str) -> Pair | None:
        """The update of all experts' `up`, `[expert, inter, hidden]`."""
        return self._part(prefix, 1)

    def down(self, prefix: str) -> Pair | None:
        """The update of all experts' `down`, `[expert, hidden, inter]`."""
        stem = f"{prefix}.mlp.experts"
        return (
            self._each(f"{stem}.down_projs.{{}}")
            or self._each(f"{stem}.{{}}.down_proj")
            or self._tinker(f"{stem}.w2")
            or self._automodel(f"{stem}.lora_down")
            or self._fused(prefix, "down_proj")
        )

    def expert_bias(self, prefix: str, name: str) -> Pair | None:
        """The update of an expert bias parameter, `[expert, out]` = b `[expert, r]` @ a."""
        out = {"gate_up_proj_bias": 2 * self.config.inter, "down_proj_bias": self.config.hidden}
        for a, b in self._levels(prefix):
            rank, length = self._files.shape(a)
            if self._files.shape(b) == (self.config.experts, rank) and length == out[name]:
                named = f"{prefix}.mlp.experts.{name}"
                return self._pair(named, self._read(b), self._read(a), True)
        return None

    def _part(self, prefix: str, which: int) -> Pair | None:
        stem = f"{prefix}.mlp.experts"
        apart = self._each(f"{stem}.{{}}.{('gate', 'up')[which]}_proj")
        if apart := apart or self._tinker(f"{stem}.{('w1', 'w3')[which]}"):
            return apart
        both = (
            self._each(f"{stem}.gate_up_projs.{{}}")
            or self._automodel(f"{stem}.lora_gate_and_up")
            or self._fused(prefix, "gate_up_proj")
        )
        if both is None:
            return None
        rows = both.b.chunk(2, -2)[which] if self._halves else both.b[..., which::2, :]
        return replace(both, b=rows)

    def _each(self, module: str) -> Pair | None:
        """A module for each expert; those without an update get one of zero."""
        found = [self.linear(module.format(expert)) for expert in range(self.config.experts)]
        some = next((pair for pair in found if pair is not None), None)
        if some is None:
            return None
        full = [pair or Pair(some.b * 0, some.a * 0, some.scale) for pair in found]
        most = max(pair.a.shape[0] for pair in full)
        b = [pad(pair.b, (0, most - pair.b.shape[1])) for pair in full]
        a = [pad(pair.a, (0, 0, 0, most - pair.a.shape[0])) for pair in full]
        scales = tuple(pair.scale for pair in full)
        return Pair(torch.stack(b), torch.stack(a), some.scale, scales=scales)

    def _tinker(self, module: str) -> Pair | None:
        """A `[E or 1, r, in]`, B `[E or 1, out, r]`."""
        a, b = (self._names.get(f"{module}.lora_{half}.weight") for half in "AB")
        if not a or not b:
            return None
        return self._pair(module, self._read(b[0]), self._read(a[0]))

    def _automodel(self, module: str) -> Pair | None:
        """A `[E, in, r]`, B `[E, r, out]`; the update is A @ B, input-major."""
        a, b = (self._names.get(f"{module}_{half}") for half in "AB")
        if not a or not b:
            return None
        down, up = self._read(a[0]), self._read(b[0])
        scale = self.settings["lora_alpha"] / down.shape[-1] * self._asked.strength
        return Pair(up.transpose(1, 2), down.transpose(1, 2), scale)

    def _fused(self, prefix: str, name: str) -> Pair | None:
        """All experts in one pair: A `[E·r, in]`, B `[out, r·E]`; see PEFT's ParamWrapper."""
        experts = self.config.experts
        for a, b in self._levels(prefix):
            if self._which(a, b) != name:
                continue
            half, other = self._read(a), self._read(b)
            rank = half.shape[0] // experts
            a_ERI = half.view(experts, rank, -1)
            if self._grouped:
                b_EOR = other.view(-1, experts, rank).transpose(0, 1)
            else:
                b_EOR = other.view(-1, rank, experts).permute(2, 0, 1)
            if self._swapped:
                a_ERI, b_EOR = b_EOR.transpose(1, 2), a_ERI.transpose(1, 2)
            return self._pair(f"{prefix}.mlp.experts.{name}", b_EOR, a_ERI, True)
        return None

    def _levels(self, prefix: str) -> Iterator[tuple[str, str]]:
        """The pairs on an experts module, however deep they are wrapped."""
        for a in self._names.get(f"{prefix}.mlp.experts.lora_A.weight", ()):
            b = a.replace(".lora_A.", ".lora_B.")
            if b in self._files:
                yield a, b

    def _which(self, a: str, b: str) -> str | None:
        """Which parameter a fused pair updates: its sides are those of only one."""
        sides = (self._files.shape(a)[1], self._files.shape(b)[0])
        gate_up = (self.config.hidden, 2 * self.config.inter)
        down = (self.config.inter, self.config.hidden)
        if self._swapped:
            gate_up, down = gate_up[::-1], down[::-1]
        return {gate_up: "gate_up_proj", down: "down_proj"}.get(sides)

    def _layout(self) -> tuple[bool, bool, bool]:
        """(are a and b exchanged, is B grouped by expert, are gate and up halves)?"""
        pairs = [
            (self._files.shape(a)[1], self._files.shape(b)[0])
            for name in self._names
            if name.endswith(".mlp.experts.lora_A.weight")
            for a, b in self._levels(name.removesuffix(".mlp.experts.lora_A.weight"))
            if self._files.shape(b)[0] != self.config.experts  # else a bias's
        ]
        c = self.config
        normal = {(c.hidden, 2 * c.inter), (c.inter, c.hidden)}
        swapped = bool(pairs) and not normal.issuperset(pairs)
        square = bool(pairs) and c.hidden == c.inter and set(pairs) == {(c.hidden, c.hidden)}
        swapped = self._asked.down == "swapped" if square and self._asked.down else swapped
        exported = swapped and "peft_version" not in self.settings
        return swapped, exported or self._said() == "grouped_by_expert", exported

    def _said(self) -> str:
        """What stands of the order of lora_B, in the words of Unsloth's files."""
        words = {"peft": "rank_major", "grouped": "grouped_by_expert"}
        if self._asked.layout:
            return words[self._asked.layout]
        found = re.search(r"'lora_B_layout': '(\w+)'", str(dict(self.settings)))
        return found[1] if found else "rank_major"

    def _read(self, name: str) -> Tensor:
        return self._files.read(name, self._files.shape(name)).float()

    def _pair(
        self,
        name: str,
        b: Tensor,
        a: Tensor,
        to_parameter: bool = False,
        magnitude: Tensor | None = None,
    ) -> Pair:
        return Pair(b, a, self._scale(name, a.shape[-2]), to_parameter, magnitude)

    def _scale(self, name: str, rank: int) -> float:
        patterns = self.settings.get("alpha_pattern") or {}
        hits = (v for key, v in patterns.items() if re.match(rf"(.*\.)?({key})$", name))
        alpha = next(hits, self.settings["lora_alpha"])
        root = math.sqrt(rank) if self.settings.get("use_rslora") else rank
        return alpha / root * self._asked.strength
