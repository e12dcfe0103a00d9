"""Reader of HF directories, BF16 and MXFP4, after transformers' GptOss modules."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from gptoss_convert.containers.safetensors import INDEX
from gptoss_convert.errors import InputError
from gptoss_convert.witness.configs import Section, read_json
from gptoss_convert.witness.fetch import Fetcher
from gptoss_convert.witness.fp4 import BLOCK, Packed, checked
from gptoss_convert.witness.hf_config import hf_config
from gptoss_convert.witness.model import ExpertMatrices, LayerWeights, ModelConfig
from gptoss_convert.witness.per_expert import PER_EXPERT
from gptoss_convert.witness.private import private_copy
from gptoss_convert.witness.readers import (
    Reader,
    StoredTensors,
    SubBlock,
    hf_files,
    safetensors_chunks,
)
from gptoss_convert.witness.witness import Given, Sequences, Witness


class HfReader(Reader):
    """An HF directory; config.json says whether its experts are packed, as for transformers."""

    def __init__(
        self,
        directory: Path,
        device: torch.device,
        fetcher: Fetcher | None = None,
        given: Given | None = None,
    ):
        dressed = given is not None and given.dressed
        config = (
            Section(given.config, f"{directory}: config.json")
            if given is not None and dressed
            else read_json(directory / "config.json")
        )
        self.config = hf_config(config)
        self.packed = config.content.get("quantization_config") is not None
        if given is not None and given.packed is not None:
            self.packed = given.packed
        elif self.packed:
            config.section("quantization_config").require("quant_method", "mxfp4")
        self._naming = given.naming if given is not None else ""
        rounded = given is not None and given.rounded
        if given is not None and dressed:
            chunks = [*given.chunks]
        else:
            chunks = safetensors_chunks(directory, hf_files(directory))
        self._files = StoredTensors(directory, chunks, fetcher or Fetcher(device), rounded)

    def _embedding(self) -> Tensor:
        return self._vocabulary("model.embed_tokens.weight")

    def _norm(self) -> Tensor:
        return self._files.read("model.norm.weight", (self.config.hidden,))

    def _unembedding(self) -> Tensor:
        return self._vocabulary("lm_head.weight")

    def _vocabulary(self, name: str) -> Tensor:
        return self._files.read(name, (self.config.vocab, self.config.hidden))

    def prepare(self, index: int) -> None:
        """Start to read layer `index`, or the unembedding."""
        last = index == len(self.config.sliding)
        self._files.ahead("lm_head." if last else f"model.layers.{index}.")

    def _layer(self, index: int) -> LayerWeights:
        """The weights of layer `index`; gate and up are the even and odd rows, or columns."""
        c, prefix = self.config, f"model.layers.{index}"
        q, kv = c.heads * c.head_dim, c.kv_heads * c.head_dim

        def read(name: str, *shape: int) -> Tensor:
            return self._files.read(f"{prefix}.{name}", shape)

        experts = f"{prefix}.mlp.experts"
        gate_up, gate_up_bias = self._gate_up(experts), self._bias(experts, "gate_up", 2 * c.inter)
        return LayerWeights(
            attention_norm=read("input_layernorm.weight", c.hidden),
            q_weight=read("self_attn.q_proj.weight", q, c.hidden),
            q_bias=read("self_attn.q_proj.bias", q),
            k_weight=read("self_attn.k_proj.weight", kv, c.hidden),
            k_bias=read("self_attn.k_proj.bias", kv),
            v_weight=read("self_attn.v_proj.weight", kv, c.hidden),
            v_bias=read("self_attn.v_proj.bias", kv),
            sinks=read("self_attn.sinks", c.heads),
            o_weight=read("self_attn.o_proj.weight", c.hidden, q),
            o_bias=read("self_attn.o_proj.bias", c.hidden),
            mlp_norm=read("post_attention_layernorm.weight", c.hidden),
            router_weight=read("mlp.router.weight", c.experts, c.hidden),
            router_bias=read("mlp.router.bias", c.experts),
            gate_weight=gate_up[:, 0::2],
            gate_bias=gate_up_bias[:, 0::2],
            up_weight=gate_up[:, 1::2],
            up_bias=gate_up_bias[:, 1::2],
            down_weight=self._down(experts),
            down_bias=self._bias(experts, "down", c.hidden),
        )

    def _gate_up(self, experts: str) -> ExpertMatrices:
        """`[expert, (inter glu), hidden]`: stacked BF16 is input-major, all else output-major."""
        c = self.config
        if self.packed:
            return self._blocks(f"{experts}.gate_up_proj", 2 * c.inter, c.hidden)
        if self._naming in PER_EXPERT:
            return PER_EXPERT[self._naming](self._files, experts, "gate_up", c, "weight")
        name = f"{experts}.gate_up_proj" + self._ending
        if self._naming == "mis-saved-rows":
            return self._files.read(name, (c.experts, 2 * c.inter, c.hidden))
        return self._files.read(name, (c.experts, c.hidden, 2 * c.inter)).transpose(1, 2)

    def _down(self, experts: str) -> ExpertMatrices:
        """`[expert, hidden, inter]`: stacked BF16 is input-major, all else output-major."""
        c = self.config
        if self.packed:
            return self._blocks(f"{experts}.down_proj", c.hidden, c.inter)
        if self._naming in PER_EXPERT:
            return PER_EXPERT[self._naming](self._files, experts, "down", c, "weight")
        name = f"{experts}.down_proj" + self._ending
        if self._naming == "mis-saved-rows":
            return self._files.read(name, (c.experts, c.hidden, c.inter))
        return self._files.read(name, (c.experts, c.inter, c.hidden)).transpose(1, 2)

    def _bias(self, experts: str, which: str, rows: int) -> Tensor:
        if self._naming in PER_EXPERT:
            return PER_EXPERT[self._naming](self._files, experts, which, self.config, "bias")
        return self._files.read(f"{experts}.{which}_proj_bias", (self.config.experts, rows))

    @property
    def _ending(self) -> str:
        """What mis-saved names of experts have behind them."""
        return "_blocks" if self._naming.startswith("mis-saved") else ""

    def _blocks(self, stem: str, rows: int, columns: int) -> Packed:
        return read_packed(self._files, stem, "_", (self.config.experts, rows, columns))

    def feeding(self, index: int, block: SubBlock) -> tuple[str, ...]:
        """Names of the tensors that feed a sub-block of layer `index`."""
        ends = ("_blocks", "_scales", "_bias") if self.packed else ("", "_bias")
        names = {
            "attention": (
                "input_layernorm.weight",
                *(f"self_attn.{p}_proj.{kind}" for p in "qkvo" for kind in ("weight", "bias")),
                "self_attn.sinks",
            ),
            "router": ("post_attention_layernorm.weight", "mlp.router.weight", "mlp.router.bias"),
            "experts": tuple(
                f"mlp.experts.{p}_proj{end}" for p in ("gate_up", "down") for end in ends
            ),
        }
        return tuple(f"model.layers.{index}.{name}" for name in names[block])


def read_packed(
    files: StoredTensors, stem: str, separator: str, shape: tuple[int, int, int]
) -> Packed:
    """Blocks and scales of `stem` that decode to `shape` `[expert, out, in]`."""
    experts, rows, columns = shape
    if columns % BLOCK != 0:
        raise InputError(f"{stem}: expects rows in blocks of {BLOCK}, found {columns} columns")
    scales = (experts, rows, columns // BLOCK)
    packed = Packed(
        files.read_bytes(f"{stem}{separator}blocks", (*scales, BLOCK // 2)),
        files.read_bytes(f"{stem}{separator}scales", scales),
    )
    return checked(packed, stem)


def _oracle(
    given: Given, config: ModelConfig, sequences: Sequences, device: torch.device
) -> list[Tensor] | str:
    says = given.config.get("quantization_config")
    method = says.get("quant_method") if isinstance(says, Mapping) else None
    if given.naming.startswith("mis-saved") or method != ("mxfp4" if given.packed else None):
        return "(read with --repair: transformers would not read it so)"
    if given.dressed or given.naming in PER_EXPERT:
        return "(names or configuration are not transformers': it would not read it so)"
    from gptoss_convert.witness.oracles import silence, transformers_logits

    index = {"metadata": {}, "weight_map": {chunk.tensor: chunk.file for chunk in given.chunks}}
    written = {"config.json": json.dumps(given.config).encode()}
    if {chunk.file for chunk in given.chunks} != {"model.safetensors"}:
        written[INDEX] = json.dumps(index).encode()
    with silence(), private_copy(given.root, given.chunks, written) as place:
        return transformers_logits(place, sequences, device, len(config.sliding))


def _reader(given: Given, fetcher: Fetcher) -> HfReader:
    return HfReader(given.root, fetcher.device, fetcher, given)


WITNESS = Witness(_reader, _oracle, "transformers")
