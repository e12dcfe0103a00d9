"""An adapter of Megatron-Bridge as its own code would take it: see `adapter_files`."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor

from gptoss_convert.containers import torch_dist
from gptoss_convert.containers.paths import read_text
from gptoss_convert.containers.plain_yaml import parse_yaml
from gptoss_convert.witness.adapter_files import Asked, Pair
from gptoss_convert.witness.fetch import Fetcher
from gptoss_convert.witness.model import ModelConfig
from gptoss_convert.witness.readers import StoredTensors

_MOST = 1 << 22


class BridgeFiles:
    """Megatron-Bridge's torch_dist: `….adapter.linear_in` `[r, in]`, `linear_out` `[out, r]`."""

    def __init__(self, root: Path, config: ModelConfig, asked: Asked, fetcher: Fetcher) -> None:
        self.config, self._asked = config, asked
        directory = torch_dist.find_iteration(root, None)
        where = directory / "run_config.yaml"
        self._run = parse_yaml(str(where), read_text(directory, where.name, _MOST))
        self._files = StoredTensors(directory, torch_dist.read(directory).chunks, fetcher)

    def whole(self, name: str) -> Tensor | None:
        """Nothing: such adapters hold low-rank pairs only."""
        return None

    def rows(self, module: str) -> None:
        """Nothing, likewise."""

    def bias(self, module: str) -> None:
        """Nothing, likewise."""

    def embedding(self) -> None:
        """Nothing, likewise."""

    def expert_bias(self, prefix: str, name: str) -> None:
        """Nothing, likewise."""

    def linear(self, module: str) -> Pair | None:
        """q, k, v of the fused module (rows by group: its queries, its key, its value), or o."""
        if not module.startswith("model.layers."):
            return None
        layer, part = int(module.split(".")[2]), module.rpartition(".")[2].removesuffix("_proj")
        attention = "self_attention"
        if part == "o":
            return self._pair(layer, f"{attention}.linear_proj.adapter")
        own = self._pair(layer, f"{attention}.linear_qkv.adapter.adapter_{part}")
        fused = self._pair(layer, f"{attention}.linear_qkv.adapter")
        if own or not fused:
            return own
        c = self.config
        groups = fused.b.view(c.kv_heads, c.heads // c.kv_heads + 2, c.head_dim, -1)
        rows = {"q": groups[:, :-2], "k": groups[:, -2:-1], "v": groups[:, -1:]}[part]
        return Pair(rows.reshape(-1, fused.b.shape[-1]), fused.a, fused.scale)

    def router(self, prefix: str) -> Pair | None:
        """The update of a router's weight."""
        return self._pair(int(prefix.split(".")[2]), "mlp.router.adapter")

    def gate(self, prefix: str) -> Pair | None:
        """The update of all experts' gates: the first half of fc1's rows, or a pair of its own."""
        return self._fc1(prefix, 0)

    def up(self, prefix: str) -> Pair | None:
        """The update of all experts' `up`: the second half."""
        return self._fc1(prefix, 1)

    def down(self, prefix: str) -> Pair | None:
        """The update of all experts' `down`."""
        pair = self._pair(int(prefix.split(".")[2]), "mlp.experts.experts.linear_fc2.adapter")
        return self._for_experts(pair)

    def _fc1(self, prefix: str, which: int) -> Pair | None:
        layer, stem = int(prefix.split(".")[2]), "mlp.experts.experts.linear_fc1.adapter"
        own = self._pair(layer, f"{stem}.adapter_{('gate', 'up')[which]}", self._true_rows)
        fused = self._pair(layer, stem)
        if own is None and fused is not None:
            own = Pair(fused.b.chunk(2, -2)[which], fused.a, fused.scale)
        return self._for_experts(own)

    def _for_experts(self, pair: Pair | None) -> Pair | None:
        """One pair for all experts becomes one for each."""
        if pair is None:
            return None
        b, a = (m if m.ndim == 3 else m.unsqueeze(0) for m in (pair.b, pair.a))
        return Pair(b, a, pair.scale)

    def _true_rows(self, name: str, rows: Tensor) -> Tensor:
        """Tensor-parallel ranks save their gate (or up) rows as two halves each: put them back."""
        ranks = self._ranks()
        lengths = {chunk.extent[-2] for chunk in self._files.chunks(name)}
        if ranks == 1 or lengths != {self.config.inter // (2 * ranks)}:
            return rows
        halves = rows.unflatten(-2, (2, ranks, -1))
        return halves.transpose(-4, -3).flatten(-4, -2)

    def _ranks(self) -> int:
        model = self._run["model"]
        ranks = model.get("expert_tensor_parallel_size") or model.get("tensor_model_parallel_size")
        return int(ranks or 1)

    def _pair(self, layer: int, module: str, order=lambda name, rows: rows) -> Pair | None:
        halves: list[Tensor] = []
        for half in ("linear_out", "linear_in"):
            stacked = f"decoder.layers.{module}.{half}.weight"
            single = f"decoder.layers.{layer}.{module}.{half}.weight"
            name = single if single in self._files else stacked
            if name not in self._files:
                return None
            prefix = (layer,) if name == stacked else ()
            shape = self._files.shape(name)[len(prefix) :]
            rows = self._files.read(name, shape, prefix).float()
            halves.append(order(name, rows) if half == "linear_out" else rows)
        b, a = halves
        return Pair(b, a, self._run["peft"]["alpha"] / a.shape[-2] * self._asked.strength)
