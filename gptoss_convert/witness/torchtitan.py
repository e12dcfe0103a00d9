"""Reader of torchtitan's own names, after its GPT-OSS modules: every matrix is `[out, in]`."""

from __future__ import annotations

from torch import Tensor

from gptoss_convert.witness.configs import Section
from gptoss_convert.witness.fetch import Fetcher
from gptoss_convert.witness.hf_config import hf_config
from gptoss_convert.witness.model import LayerWeights
from gptoss_convert.witness.readers import Reader, StoredTensors, SubBlock
from gptoss_convert.witness.witness import Given

_EXPERTS = "moe.routed_experts.inner_experts"


class TorchtitanReader(Reader):
    """A checkpoint in torchtitan's present names; its numbers are a config.json's."""

    def __init__(self, given: Given, fetcher: Fetcher):
        self.config = hf_config(Section(given.config, f"{given.root}: config.json"))
        self._fused = given.naming == "fused"
        self._files = StoredTensors(given.root, given.chunks, fetcher, given.rounded)

    def prepare(self, index: int) -> None:
        """Start to read layer `index`, or the unembedding."""
        last = index == len(self.config.sliding)
        self._files.ahead("lm_head." if last else f"layers.{index}.")

    def _embedding(self) -> Tensor:
        return self._files.read("tok_embeddings.weight", (self.config.vocab, self.config.hidden))

    def _norm(self) -> Tensor:
        return self._files.read("norm.weight", (self.config.hidden,))

    def _unembedding(self) -> Tensor:
        return self._files.read("lm_head.weight", (self.config.vocab, self.config.hidden))

    def _layer(self, index: int) -> LayerWeights:
        """The weights of layer `index`; gate and up are the even and odd rows."""
        c, prefix = self.config, f"layers.{index}"

        def read(name: str, *shape: int) -> Tensor:
            return self._files.read(f"{prefix}.{name}", shape)

        heads = c.heads * c.head_dim
        q, k, v = self._qkv(prefix, "weight", (c.hidden,))
        q_bias, k_bias, v_bias = self._qkv(prefix, "bias", ())
        mlp1 = read(f"{_EXPERTS}.mlp1_weight_EGD", c.experts, 2 * c.inter, c.hidden)
        mlp1_bias = read(f"{_EXPERTS}.mlp1_bias_EG", c.experts, 2 * c.inter)
        return LayerWeights(
            attention_norm=read("attention_norm.weight", c.hidden),
            q_weight=q,
            q_bias=q_bias,
            k_weight=k,
            k_bias=k_bias,
            v_weight=v,
            v_bias=v_bias,
            sinks=read("attention.sinks", c.heads),
            o_weight=read("attention.wo.weight", c.hidden, heads),
            o_bias=read("attention.wo.bias", c.hidden),
            mlp_norm=read("ffn_norm.weight", c.hidden),
            router_weight=read("moe.router.gate.weight", c.experts, c.hidden),
            router_bias=read("moe.router.gate.bias", c.experts),
            gate_weight=mlp1[:, 0::2],
            gate_bias=mlp1_bias[:, 0::2],
            up_weight=mlp1[:, 1::2],
            up_bias=mlp1_bias[:, 1::2],
            down_weight=read(f"{_EXPERTS}.mlp2_weight_EDF", c.experts, c.hidden, c.inter),
            down_bias=read(f"{_EXPERTS}.mlp2_bias_ED", c.experts, c.hidden),
        )

    def _qkv(self, prefix: str, kind: str, columns: tuple[int, ...]) -> tuple[Tensor, ...]:
        """Rows of q, k and v; fused, each kv head has its queries', its key's and its value's."""
        c, stem = self.config, f"{prefix}.attention.qkv_linear"
        rows = [heads * c.head_dim for heads in (c.heads, c.kv_heads, c.kv_heads)]
        if not self._fused:
            return tuple(
                self._files.read(f"{stem}.{one}.{kind}", (count, *columns))
                for one, count in zip(("wq", "wk", "wv"), rows, strict=True)
            )
        fused = self._files.read(f"{stem}.wqkv.{kind}", (sum(rows), *columns))
        by_kv_head = fused.unflatten(0, (c.kv_heads, -1))
        shares = [count // c.kv_heads for count in rows]
        return tuple(part.flatten(0, 1) for part in by_kv_head.split(shares, dim=1))

    def feeding(self, index: int, block: SubBlock) -> tuple[str, ...]:
        """Names of the tensors that feed a sub-block of layer `index`."""
        qkv = ("wqkv",) if self._fused else ("wq", "wk", "wv")
        names = {
            "attention": (
                "attention_norm.weight",
                *(
                    f"attention.qkv_linear.{one}.{kind}"
                    for one in qkv
                    for kind in ("weight", "bias")
                ),
                "attention.wo.weight",
                "attention.wo.bias",
                "attention.sinks",
            ),
            "router": ("ffn_norm.weight", "moe.router.gate.weight", "moe.router.gate.bias"),
            "experts": tuple(
                f"{_EXPERTS}.{one}"
                for one in ("mlp1_weight_EGD", "mlp1_bias_EG", "mlp2_weight_EDF", "mlp2_bias_ED")
            ),
        }
        return tuple(f"layers.{index}.{name}" for name in names[block])
