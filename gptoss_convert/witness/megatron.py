"""Reader of Megatron torch_dist directories, after megatron-core's GPTModel."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor

from gptoss_convert.containers import Chunk
from gptoss_convert.errors import InputError
from gptoss_convert.witness.configs import Section, megatron_config
from gptoss_convert.witness.fetch import Fetcher
from gptoss_convert.witness.hf_config import hf_config
from gptoss_convert.witness.model import LayerWeights, ModelConfig
from gptoss_convert.witness.readers import Reader, StoredTensors, SubBlock
from gptoss_convert.witness.witness import Given, Sequences, Witness


class MegatronReader(Reader):
    """A torch_dist iteration: stacked keys, a key per layer, or a key per layer and expert.

    `config` comes from the caller, since the weights carry none; the vocabulary may be padded.
    `run` rows of gate alternate with as many of up in fc1; 0: all gates come first.
    """

    def __init__(
        self,
        directory: Path,
        chunks: Iterable[Chunk],
        config: ModelConfig,
        device: torch.device,
        fetcher: Fetcher | None = None,
        rounded: bool = False,
        run: int = 0,
    ):
        self.config = config
        self._run = run
        self._tensors = StoredTensors(directory, chunks, fetcher or Fetcher(device), rounded)
        self._stacked = "decoder.layers.self_attention.linear_qkv.weight" in self._tensors
        experts = self._layer_key(0, "mlp.experts.experts.0.linear_fc2.weight")
        self._per_expert = experts in self._tensors
        fused = self._layer_key(0, "mlp.linear_fc1.layer_norm_weight")
        plain = self._layer_key(0, "pre_mlp_layernorm.weight")
        fused_only = fused in self._tensors and plain not in self._tensors
        self._mlp_norm = (
            "mlp.linear_fc1.layer_norm_weight" if fused_only else ("pre_mlp_layernorm.weight")
        )
        self._check_layer_count()

    def _check_layer_count(self) -> None:
        name = self._layer_key(0, "self_attention.linear_qkv.weight")
        layers = len(self.config.sliding)
        if self._stacked:
            found = self._tensors.shape(name)[0]
            expected_end = found == layers
        else:
            beyond = self._layer_key(layers, "self_attention.linear_qkv.weight")
            expected_end, found = beyond not in self._tensors, f"more ({beyond})"
        if not expected_end:
            raise InputError(f"{name}: expects {layers} layers, found {found}")

    def _layer_key(self, index: int, name: str) -> str:
        return f"decoder.layers.{name}" if self._stacked else f"decoder.layers.{index}.{name}"

    def _embedding(self) -> Tensor:
        return self._vocabulary("embedding.word_embeddings.weight")

    def _norm(self) -> Tensor:
        return self._tensors.read("decoder.final_layernorm.weight", (self.config.hidden,))

    def _unembedding(self) -> Tensor:
        return self._vocabulary("output_layer.weight")

    def _vocabulary(self, name: str) -> Tensor:
        rows = self._tensors.shape(name)[0]
        if rows < self.config.vocab:
            raise InputError(f"{name}: expects at least {self.config.vocab} rows, found {rows}")
        return self._tensors.read(name, (rows, self.config.hidden))[: self.config.vocab]

    def prepare(self, index: int) -> None:
        """Start to read layer `index`, or the unembedding."""
        if index == len(self.config.sliding):
            self._tensors.ahead("output_layer.")
        elif self._stacked:
            self._tensors.ahead("decoder.layers.", (index,))
        else:
            self._tensors.ahead(f"decoder.layers.{index}.")

    def _layer(self, index: int) -> LayerWeights:
        """The weights of layer `index`: rows of q, k, v grouped by kv head, fc1 of gate and up."""
        c = self.config
        q, kv = c.heads * c.head_dim, c.kv_heads * c.head_dim

        def read(name: str, *shape: int) -> Tensor:
            prefix = (index,) if self._stacked else ()
            return self._tensors.read(self._layer_key(index, name), shape, prefix)

        q_weight, k_weight, v_weight = self._split_qkv(
            read("self_attention.linear_qkv.weight", q + 2 * kv, c.hidden)
        )
        q_bias, k_bias, v_bias = self._split_qkv(read("self_attention.linear_qkv.bias", q + 2 * kv))
        gate, up = self._fc1(index, "weight", (c.hidden,))
        gate_bias, up_bias = self._fc1(index, "bias", ())
        return LayerWeights(
            attention_norm=read("self_attention.linear_qkv.layer_norm_weight", c.hidden),
            q_weight=q_weight,
            q_bias=q_bias,
            k_weight=k_weight,
            k_bias=k_bias,
            v_weight=v_weight,
            v_bias=v_bias,
            sinks=read("self_attention.core_attention.softmax_offset", c.heads),
            o_weight=read("self_attention.linear_proj.weight", c.hidden, q),
            o_bias=read("self_attention.linear_proj.bias", c.hidden),
            mlp_norm=read(self._mlp_norm, c.hidden),
            router_weight=read("mlp.router.weight", c.experts, c.hidden),
            router_bias=read("mlp.router.bias", c.experts),
            gate_weight=gate,
            gate_bias=gate_bias,
            up_weight=up,
            up_bias=up_bias,
            down_weight=self._experts(index, "linear_fc2.weight", (c.hidden, c.inter)),
            down_bias=self._experts(index, "linear_fc2.bias", (c.hidden,)),
        )

    def _split_qkv(self, rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Each kv head's group holds its query heads, then its key head, then its value head."""
        c = self.config
        group = c.heads // c.kv_heads
        grouped = rows.unflatten(0, (c.kv_heads, group + 2, c.head_dim))
        q, k, v = grouped.split((group, 1, 1), dim=1)
        return q.flatten(0, 2), k.flatten(0, 2), v.flatten(0, 2)

    def _fc1(self, index: int, kind: str, columns: tuple[int, ...]) -> tuple[Tensor, Tensor]:
        """Gate and up, `[expert, inter, ...]`: parts of one tensor, or `_w` and `_v`."""
        inter = self.config.inter
        if self._per_expert:
            gate = self._experts(index, f"linear_fc1.{kind}_w", (inter, *columns))
            return gate, self._experts(index, f"linear_fc1.{kind}_v", (inter, *columns))
        fc1 = self._experts(index, f"linear_fc1.{kind}", (2 * inter, *columns))
        # core's grouped experts: `view(-1, inter // run, 2, run)`, and the 2 is gate and up.
        run = self._run or inter
        gate, up = fc1.unflatten(1, (inter // run, 2, run)).unbind(2)
        return gate.flatten(1, 2), up.flatten(1, 2)

    def _experts(self, index: int, name: str, shape: tuple[int, ...]) -> Tensor:
        """One tensor of all experts, `[expert, ...]`."""
        experts, stem = self.config.experts, "mlp.experts.experts"
        if not self._per_expert:
            prefix = (index,) if self._stacked else ()
            key = self._layer_key(index, f"{stem}.{name}")
            return self._tensors.read(key, (experts, *shape), prefix)
        keys = [self._layer_key(index, f"{stem}.{e}.{name}") for e in range(experts)]
        return torch.stack([self._tensors.read(key, shape) for key in keys])

    def feeding(self, index: int, block: SubBlock) -> tuple[str, ...]:
        """Names of the tensors that feed a sub-block; of a stacked one, row `index` does."""
        attention, experts = "self_attention", "mlp.experts.experts"
        if self._per_expert:
            experts = "mlp.experts.experts.*"
        halves = ("_w", "_v") if self._per_expert else ("",)
        names = {
            "attention": (
                f"{attention}.linear_qkv.layer_norm_weight",
                f"{attention}.linear_qkv.weight",
                f"{attention}.linear_qkv.bias",
                f"{attention}.core_attention.softmax_offset",
                f"{attention}.linear_proj.weight",
                f"{attention}.linear_proj.bias",
            ),
            "router": (self._mlp_norm, "mlp.router.weight", "mlp.router.bias"),
            "experts": (
                *(f"{experts}.linear_fc1.{k}{half}" for k in ("weight", "bias") for half in halves),
                f"{experts}.linear_fc2.weight",
                f"{experts}.linear_fc2.bias",
            ),
        }
        row = f"[{index}]" if self._stacked else ""
        return tuple(f"{self._layer_key(index, name)}{row}" for name in names[block])


def _reader(given: Given, fetcher: Fetcher) -> MegatronReader:
    """The arithmetic is what Megatron's own words say; sizes and vocabulary are config.json's."""
    config = hf_config(Section(given.config, f"{given.root}: config.json"))
    stated = () if given.overruled else given.words
    said = [megatron_config(Section(words, where), config) for where, words in stated]
    if any(one != said[0] for one in said):
        places = " and ".join(where for where, _ in given.words)
        raise InputError(f"{places}: state different models")
    config = said[0] if said else config
    if given.naming.startswith("module-"):
        raise InputError(
            f"{given.root}: names of Megatron's modules, which no reader here opens for logits; "
            "convert it and verify that, or use --level values"
        )
    run = _interleaved_by(given)
    device = fetcher.device
    return MegatronReader(given.root, given.chunks, config, device, fetcher, given.rounded, run)


def _interleaved_by(given: Given) -> int:
    """Rows of gate that alternate with as many of up, 0 where all gate rows come first.

    Megatron-LM's `args` say how it saved; Megatron-Bridge's `model` section, which names a class
    to be made of it, does not, and the user says.
    """
    for _, words in given.words:
        size = words.get("moe_mlp_glu_interleave_size")
        if "_target_" not in words and isinstance(size, int):
            # Experts one by one do not interleave.
            return size if words.get("moe_grouped_gemm", True) else 0
    return given.glu_interleave or 0


def _oracle(
    given: Given, config: ModelConfig, sequences: Sequences, device: torch.device
) -> list[Tensor] | str:
    if len(config.sliding) < given.layers:
        return "(megatron-core loads all layers or none)"
    if _interleaved_by(given):
        return "(megatron-core's local spec does not read interleaved rows)"
    from gptoss_convert.witness.megatron_oracle import megatron_logits

    return megatron_logits(given.root, config, sequences, device, chunks=given.chunks)


WITNESS = Witness(_reader, _oracle, "megatron-core")
