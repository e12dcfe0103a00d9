"""Reader of OpenAI's `original/` directories, after gpt_oss.torch's model and checkpoint."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from gptoss_convert.errors import IntegrityError
from gptoss_convert.witness.configs import openai_config, read_json
from gptoss_convert.witness.fetch import Fetcher
from gptoss_convert.witness.hf import read_packed
from gptoss_convert.witness.model import LayerWeights
from gptoss_convert.witness.readers import Reader, StoredTensors, SubBlock, safetensors_chunks
from gptoss_convert.witness.witness import Witness


class OpenAiReader(Reader):
    """An `original/` directory; like OpenAI's code it reads every .safetensors file in it."""

    def __init__(self, directory: Path, device: torch.device, fetcher: Fetcher | None = None):
        self.config = openai_config(read_json(directory / "config.json"))
        files = sorted(path.name for path in directory.glob("*.safetensors"))
        if not files:
            raise IntegrityError(f"{directory}: expects .safetensors files, found none")
        chunks = safetensors_chunks(directory, files)
        self._files = StoredTensors(directory, chunks, fetcher or Fetcher(device))

    def _embedding(self) -> Tensor:
        return self._files.read("embedding.weight", (self.config.vocab, self.config.hidden))

    def _norm(self) -> Tensor:
        return self._files.read("norm.scale", (self.config.hidden,))

    def _unembedding(self) -> Tensor:
        return self._files.read("unembedding.weight", (self.config.vocab, self.config.hidden))

    def prepare(self, index: int) -> None:
        """Start to read layer `index`, or the unembedding."""
        last = index == len(self.config.sliding)
        self._files.ahead("unembedding." if last else f"block.{index}.")

    def _layer(self, index: int) -> LayerWeights:
        """The weights of layer `index`: q, k, v lie one after another, gate and up alternate."""
        c, prefix = self.config, f"block.{index}"
        q, kv = c.heads * c.head_dim, c.kv_heads * c.head_dim

        def read(name: str, *shape: int) -> Tensor:
            return self._files.read(f"{prefix}.{name}", shape)

        q_weight, k_weight, v_weight = read("attn.qkv.weight", q + 2 * kv, c.hidden).split(
            (q, kv, kv)
        )
        q_bias, k_bias, v_bias = read("attn.qkv.bias", q + 2 * kv).split((q, kv, kv))
        mlp1 = read_packed(
            self._files, f"{prefix}.mlp.mlp1_weight", ".", (c.experts, 2 * c.inter, c.hidden)
        )
        mlp1_bias = read("mlp.mlp1_bias", c.experts, 2 * c.inter)
        return LayerWeights(
            attention_norm=read("attn.norm.scale", c.hidden),
            q_weight=q_weight,
            q_bias=q_bias,
            k_weight=k_weight,
            k_bias=k_bias,
            v_weight=v_weight,
            v_bias=v_bias,
            sinks=read("attn.sinks", c.heads),
            o_weight=read("attn.out.weight", c.hidden, q),
            o_bias=read("attn.out.bias", c.hidden),
            mlp_norm=read("mlp.norm.scale", c.hidden),
            router_weight=read("mlp.gate.weight", c.experts, c.hidden),
            router_bias=read("mlp.gate.bias", c.experts),
            gate_weight=mlp1[:, 0::2],
            gate_bias=mlp1_bias[:, 0::2],
            up_weight=mlp1[:, 1::2],
            up_bias=mlp1_bias[:, 1::2],
            down_weight=read_packed(
                self._files, f"{prefix}.mlp.mlp2_weight", ".", (c.experts, c.hidden, c.inter)
            ),
            down_bias=read("mlp.mlp2_bias", c.experts, c.hidden),
        )

    def feeding(self, index: int, block: SubBlock) -> tuple[str, ...]:
        """Names of the tensors that feed a sub-block of layer `index`."""
        names = {
            "attention": (
                "attn.norm.scale",
                "attn.qkv.weight",
                "attn.qkv.bias",
                "attn.sinks",
                "attn.out.weight",
                "attn.out.bias",
            ),
            "router": ("mlp.norm.scale", "mlp.gate.weight", "mlp.gate.bias"),
            "experts": tuple(
                f"mlp.{mlp}_{part}"
                for mlp in ("mlp1", "mlp2")
                for part in ("weight.blocks", "weight.scales", "bias")
            ),
        }
        return tuple(f"block.{index}.{name}" for name in names[block])


WITNESS = Witness(
    lambda given, fetcher: OpenAiReader(given.root, fetcher.device, fetcher),
    lambda *_: "(OpenAI's own code is on no package index)",
)
