"""A small GPT-OSS that is trained on the spot: what `keep_tune` rounds.

A byte is a token. The model is GPT-OSS in everything but size; while it is trained its experts see
their weights as MXFP4 holds them (straight through, by the ceil rule), as the released models were,
so that they lie on the grid in the end. All experts are computed for every token, which is wasteful
and many times as fast as a loop over them.

Shape suffixes as in `witness.forward`, and B sequences.
"""

from __future__ import annotations

import json
import math
import random
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional

from gptoss_convert.witness import forward, rotary
from gptoss_convert.witness.model import ModelConfig

LENGTH = 512
"""Tokens of a training sequence."""
Parameters = dict[str, Tensor]
"""By the names of Hugging Face's BF16 layout."""


def small_config(layers: int, width: int, experts: int) -> ModelConfig:
    """GPT-OSS with hidden and intermediate size `width`."""
    return ModelConfig(
        hidden=width, inter=width, heads=8, kv_heads=2, head_dim=64, experts=experts,
        experts_per_token=4, vocab=256, sliding=tuple(n % 2 == 0 for n in range(layers)),
        window=128, rope_theta=150000.0, rope_factor=32.0, rope_original_length=4096,
        rope_beta_fast=32.0, rope_beta_slow=1.0, rope_truncate=False, swiglu_alpha=1.702,
        swiglu_limit=7.0, norm_eps=1e-5,
    )  # fmt: skip


def fresh(config: ModelConfig, device: torch.device, seed: int) -> Parameters:
    """Random parameters, float32."""
    gen = torch.Generator().manual_seed(seed)
    c, q, kv = config, config.heads * config.head_dim, config.kv_heads * config.head_dim

    def normal(*shape: int, fan: int) -> Tensor:
        return torch.randn(*shape, generator=gen).mul_(fan**-0.5).to(device)

    def zeros(*shape: int) -> Tensor:
        return torch.zeros(*shape, device=device)

    made = {
        "model.embed_tokens.weight": normal(c.vocab, c.hidden, fan=1),
        "model.norm.weight": zeros(c.hidden) + 1,
        "lm_head.weight": normal(c.vocab, c.hidden, fan=c.hidden),
    }
    for n in range(len(c.sliding)):
        layer = {
            "input_layernorm.weight": zeros(c.hidden) + 1,
            "self_attn.q_proj.weight": normal(q, c.hidden, fan=c.hidden),
            "self_attn.q_proj.bias": zeros(q),
            "self_attn.k_proj.weight": normal(kv, c.hidden, fan=c.hidden),
            "self_attn.k_proj.bias": zeros(kv),
            "self_attn.v_proj.weight": normal(kv, c.hidden, fan=c.hidden),
            "self_attn.v_proj.bias": zeros(kv),
            "self_attn.sinks": zeros(c.heads),
            "self_attn.o_proj.weight": normal(c.hidden, q, fan=q * len(c.sliding)),
            "self_attn.o_proj.bias": zeros(c.hidden),
            "post_attention_layernorm.weight": zeros(c.hidden) + 1,
            "mlp.router.weight": normal(c.experts, c.hidden, fan=c.hidden),
            "mlp.router.bias": zeros(c.experts),
            "mlp.experts.gate_up_proj": normal(c.experts, c.hidden, 2 * c.inter, fan=c.hidden),
            "mlp.experts.gate_up_proj_bias": zeros(c.experts, 2 * c.inter),
            "mlp.experts.down_proj": normal(
                c.experts, c.inter, c.hidden, fan=c.inter * len(c.sliding)
            ),
            "mlp.experts.down_proj_bias": zeros(c.experts, c.hidden),
        }
        made |= {f"model.layers.{n}.{name}": value for name, value in layer.items()}
    return made


def is_expert(name: str) -> bool:
    """Whether MXFP4 can hold this parameter."""
    return name.endswith(("gate_up_proj", "down_proj"))


def on_grid(weight: Tensor) -> Tensor:
    """An expert parameter [E, in, out] as MXFP4 holds it: the ceil rule, to nearest."""
    blocks = weight.unflatten(1, (-1, 32))
    largest = blocks.abs().amax(2, keepdim=True).clamp(min=1e-20)
    scale = torch.exp2(torch.ceil(torch.log2(largest / 6) - 1e-6))
    ratio = (blocks / scale).abs()
    step = torch.where(ratio < 2, 0.5, torch.where(ratio < 4, 1.0, 2.0))
    rounded = (ratio / step).round_().mul_(step).clamp_(max=6)
    return (rounded.copysign(blocks) * scale).flatten(1, 2)


class _Straight(torch.autograd.Function):
    """`on_grid` with the gradient of the identity."""

    @staticmethod
    def forward(context: object, weight: Tensor) -> Tensor:  # pyright: ignore
        return on_grid(weight)

    @staticmethod
    def backward(context: object, gradient: Tensor) -> Tensor:  # pyright: ignore
        return gradient


def logits(
    p: Mapping[str, Tensor], tokens_BS: Tensor, config: ModelConfig
) -> tuple[Tensor, Tensor]:
    """Logits [B, S, V], in bfloat16 where autocast says so, and how unevenly experts are chosen."""
    x = p["model.embed_tokens.weight"][tokens_BS]
    tables = rotary.rotary_tables(config, tokens_BS.shape[1], tokens_BS.device)
    uneven = x.new_zeros(())
    for n in range(len(config.sliding)):
        start = f"model.layers.{n}."
        layer = {k.removeprefix(start): v for k, v in p.items() if k.startswith(start)}
        window = config.window if config.sliding[n] else None
        x = x + _attention(x, layer, config, window, tables)
        added, one = _experts(x, layer, config)
        x, uneven = x + added, uneven + one
    found = functional.linear(_norm(x, p["model.norm.weight"], config), p["lm_head.weight"])
    return found, uneven / len(config.sliding)


def _norm(x: Tensor, weight: Tensor, config: ModelConfig) -> Tensor:
    return functional.rms_norm(x.float(), x.shape[-1:], weight, config.norm_eps)


def _attention(
    x: Tensor,
    p: Mapping[str, Tensor],
    c: ModelConfig,
    window: int | None,
    tables: tuple[Tensor, Tensor],
) -> Tensor:
    h = _norm(x, p["input_layernorm.weight"], c)
    q, k, v = (
        functional.linear(
            h, p[f"self_attn.{w}_proj.weight"], p[f"self_attn.{w}_proj.bias"]
        ).unflatten(-1, (-1, c.head_dim))
        for w in "qkv"
    )
    cos, sin = (table.unsqueeze(1) for table in tables)

    def turned(y: Tensor) -> Tensor:
        a, b = y.float().chunk(2, -1)
        return torch.cat((a * cos - b * sin, b * cos + a * sin), -1).to(y.dtype).transpose(1, 2)

    q, k, v = turned(q), turned(k), v.transpose(1, 2)
    k, v = (y.repeat_interleave(c.heads // c.kv_heads, 1) for y in (k, v))
    scores = (q @ k.transpose(2, 3)).float() * c.head_dim**-0.5
    place = torch.arange(x.shape[1], device=x.device)
    apart = place[:, None] - place
    unseen = (apart < 0) if window is None else (apart < 0) | (apart >= window)
    scores = scores.masked_fill(unseen, -math.inf)
    sinks = p["self_attn.sinks"].float().view(1, -1, 1, 1).expand(*scores.shape[:3], 1)
    shares = torch.cat((scores, sinks), -1).softmax(-1)[..., :-1].to(v.dtype)
    mixed = (shares @ v).transpose(1, 2).flatten(2)
    return functional.linear(mixed, p["self_attn.o_proj.weight"], p["self_attn.o_proj.bias"])


def _experts(x: Tensor, p: Mapping[str, Tensor], c: ModelConfig) -> tuple[Tensor, Tensor]:
    h = _norm(x, p["post_attention_layernorm.weight"], c)
    with torch.autocast(h.device.type, enabled=False):
        router = functional.linear(h, p["mlp.router.weight"], p["mlp.router.bias"])
        top, chosen = router.topk(c.experts_per_token, -1)
        shares_TE = torch.zeros_like(router).scatter(-1, chosen, top.softmax(-1)).flatten(0, 1)
        # Switch Transformer's auxiliary loss (Fedus et al. 2021): 1 where all are chosen alike.
        chances = router.softmax(-1).flatten(0, 1).mean(0)
        uneven = ((shares_TE > 0).float().mean(0) * chances).sum() * c.experts / c.experts_per_token
    gate_up = torch.einsum("td,edf->tef", h.flatten(0, 1), p["mlp.experts.gate_up_proj"])
    gate_up = gate_up + p["mlp.experts.gate_up_proj_bias"].to(gate_up.dtype)
    inner = forward.swiglu(gate_up[..., 0::2], gate_up[..., 1::2], c)
    weighed = inner * shares_TE.unsqueeze(-1).to(inner.dtype)
    down = torch.einsum("tef,efd->td", weighed, p["mlp.experts.down_proj"])
    bias = shares_TE.to(down.dtype) @ p["mlp.experts.down_proj_bias"].to(down.dtype)
    return (down + bias).view_as(x), uneven


def loss(p: Mapping[str, Tensor], batch: Tensor, config: ModelConfig) -> Tensor:
    """Nats a token of a batch [B, S + 1], and a hundredth of how unevenly experts are chosen."""
    with torch.autocast(batch.device.type, torch.bfloat16):
        found, uneven = logits(p, batch[:, :-1], config)
    nats = functional.cross_entropy(found.float().flatten(0, 1), batch[:, 1:].flatten())
    return nats + 0.01 * uneven


@dataclass(frozen=True)
class Tuning:
    """How to train: what moves, how fast, how long."""

    rate: float
    steps: int
    seconds: float = 1e9
    quantised: bool = False
    """Whether the experts see their weights as MXFP4 holds them."""
    rank: int = 0
    """Of low-rank updates of the experts and of attention alone; 0 trains every parameter."""
    sequences: int = 24


def train(
    start: Parameters, text: Tensor, config: ModelConfig, how: Tuning, seed: int
) -> Parameters:
    """The parameters after training on a text of bytes; `start` is left as it is."""
    gen = torch.Generator(device=text.device).manual_seed(seed)
    frozen, moving, merged = _moving(start, how, seed)
    optimizer = torch.optim.AdamW(
        moving, lr=how.rate, betas=(0.9, 0.95), weight_decay=0.0, fused=text.is_cuda
    )
    began, step, done = time.monotonic(), 0, 0.0
    while step < how.steps and done < 1:
        done = max(step / how.steps, (time.monotonic() - began) / how.seconds)
        for group in optimizer.param_groups:
            group["lr"] = (
                how.rate * min(1, (step + 1) / 50) * (0.5 + 0.5 * math.cos(math.pi * min(done, 1)))
            )
        now = merged()
        if how.quantised:
            now = {k: _Straight.apply(v) if is_expert(k) else v for k, v in now.items()}
        found = loss({**frozen, **now}, draw(text, how.sequences, gen), config)
        found.backward()
        torch.nn.utils.clip_grad_norm_(moving, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if step % 500 == 0:
            print(
                f"    step {step} loss {found.item():.3f} {time.monotonic() - began:.0f} s",
                flush=True,
            )
        step += 1
    with torch.no_grad():
        return {**frozen, **{k: v.detach().clone() for k, v in merged().items()}}


def _moving(
    start: Parameters, how: Tuning, seed: int
) -> tuple[Parameters, list[Tensor], Callable[[], Parameters]]:
    """What stays, the leaves that move, and what they make of the parameters."""
    if not how.rank:
        leaves = {k: v.clone().requires_grad_() for k, v in start.items()}
        return {}, list(leaves.values()), lambda: leaves
    gen = torch.Generator().manual_seed(seed)
    pairs: dict[str, tuple[Tensor, Tensor]] = {}
    for name, value in start.items():
        if is_expert(name) or ("self_attn" in name and value.ndim == 2):
            *lead, rows, columns = value.shape
            a = torch.randn(*lead, rows, how.rank, generator=gen).mul_(rows**-0.5).to(value.device)
            b = torch.zeros(*lead, how.rank, columns, device=value.device)
            pairs[name] = a.requires_grad_(), b.requires_grad_()

    def merged() -> Parameters:
        return {k: start[k] + a @ b for k, (a, b) in pairs.items()}

    frozen = {k: v for k, v in start.items() if k not in pairs}
    return frozen, [leaf for pair in pairs.values() for leaf in pair], merged


def draw(text: Tensor, count: int, gen: torch.Generator) -> Tensor:
    """Passages [count, LENGTH + 1] of a text."""
    first = torch.randint(0, len(text) - LENGTH - 1, (count,), generator=gen, device=text.device)
    return text[first[:, None] + torch.arange(LENGTH + 1, device=text.device)]


def texts(device: torch.device) -> tuple[Tensor, Tensor]:
    """Two domains, as bytes: the Python sources and the C++ headers of the installed packages."""
    packages = Path(torch.__file__).parents[1]
    python = _bytes(packages, ("*.py",), limit=60_000_000)
    headers = _bytes(packages, ("*.h", "*.cuh", "*.hpp"), limit=20_000_000)
    return _tokens(python, device), _tokens(headers, device)


def _tokens(text: bytes, device: torch.device) -> Tensor:
    return torch.frombuffer(bytearray(text), dtype=torch.uint8).to(device).long()


def _bytes(folder: Path, patterns: Sequence[str], limit: int) -> bytes:
    paths = sorted(path for pattern in patterns for path in folder.rglob(pattern) if path.is_file())
    random.Random(1).shuffle(paths)
    found: list[bytes] = []
    total = 0
    for path in paths:
        found.append(path.read_bytes()[:200_000])
        total += len(found[-1])
        if total > limit:
            break
    return b"\n".join(found)


def write_directory(folder: Path, p: Parameters, config: ModelConfig, *, mxfp4: bool) -> Path:
    """Parameters as a Hugging Face directory; `mxfp4` stores experts that lie on the grid so."""
    folder.mkdir()
    tensors: dict[str, Tensor] = {}
    for name, value in p.items():
        if mxfp4 and is_expert(name):
            blocks, scales = _encoded(value)
            tensors |= {f"{name}_blocks": blocks.cpu(), f"{name}_scales": scales.cpu()}
        else:
            tensors[name] = value.to(torch.bfloat16).cpu().contiguous()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(_config_json(config, mxfp4), indent=1))
    return folder


def _encoded(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Blocks and scales of values that lie on the grid of the ceil rule."""
    grid = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6], device=weight.device)
    blocks = weight.transpose(1, 2).unflatten(2, (-1, 32))
    largest = blocks.abs().amax(3, keepdim=True).clamp(min=2.0**-120)
    exponent = torch.ceil(torch.log2(largest / 6) - 1e-6)
    codes = torch.searchsorted(grid, (blocks.abs() / torch.exp2(exponent)).contiguous())
    if not torch.equal(grid[codes] * torch.exp2(exponent), blocks.abs()):
        raise ValueError("the experts do not lie on the grid")
    codes = codes.to(torch.uint8) | (blocks.signbit().to(torch.uint8) << 3)
    scales = (exponent.squeeze(3) + 127).to(torch.uint8)
    return (codes[..., 0::2] | (codes[..., 1::2] << 4)).contiguous(), scales.contiguous()


def _config_json(c: ModelConfig, mxfp4: bool) -> dict[str, object]:
    rope = {
        "rope_type": "yarn",
        "factor": c.rope_factor,
        "original_max_position_embeddings": c.rope_original_length,
        "beta_fast": c.rope_beta_fast,
        "beta_slow": c.rope_beta_slow,
        "truncate": c.rope_truncate,
    }
    kinds = {True: "sliding_attention", False: "full_attention"}
    content: dict[str, object] = {
        "architectures": ["GptOssForCausalLM"],
        "model_type": "gpt_oss",
        "attention_bias": True,
        "tie_word_embeddings": False,
        "hidden_act": "silu",
        "hidden_size": c.hidden,
        "intermediate_size": c.inter,
        "num_hidden_layers": len(c.sliding),
        "num_attention_heads": c.heads,
        "num_key_value_heads": c.kv_heads,
        "head_dim": c.head_dim,
        "num_local_experts": c.experts,
        "num_experts_per_tok": c.experts_per_token,
        "experts_per_token": c.experts_per_token,
        "vocab_size": c.vocab,
        "sliding_window": c.window,
        "layer_types": [kinds[sliding] for sliding in c.sliding],
        "max_position_embeddings": int(c.rope_original_length * c.rope_factor),
        "initial_context_length": c.rope_original_length,
        "rope_theta": c.rope_theta,
        "rope_scaling": rope,
        "swiglu_limit": c.swiglu_limit,
        "rms_norm_eps": c.norm_eps,
        "torch_dtype": "bfloat16",
        "pad_token_id": 0,
        "eos_token_id": 0,
    }
    if mxfp4:
        content["quantization_config"] = {
            "quant_method": "mxfp4",
            "modules_to_not_convert": [
                "model.layers.*.self_attn",
                "model.layers.*.mlp.router",
                "model.embed_tokens",
                "lm_head",
            ],
        }
    return content
