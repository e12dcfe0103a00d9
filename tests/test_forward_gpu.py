"""The forward pass on a CUDA device: exact decoding, equal bits, full-size layers and lengths."""

from __future__ import annotations

import math
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from gptoss_convert.containers.torch_dist import read
from gptoss_convert.conversion.options import Options
from gptoss_convert.conversion.run import convert
from gptoss_convert.formats.registry import open_checkpoint
from gptoss_convert.synth.synth import synth
from gptoss_convert.verify.sides import open_reader
from gptoss_convert.witness import forward, metrics, products
from gptoss_convert.witness.fetch import Fetcher
from gptoss_convert.witness.forward import Numerics
from gptoss_convert.witness.fp4 import Packed
from gptoss_convert.witness.hf import HfReader
from gptoss_convert.witness.limits import load_limits
from gptoss_convert.witness.megatron import MegatronReader
from gptoss_convert.witness.model import LayerWeights, ModelConfig
from gptoss_convert.witness.openai import OpenAiReader
from gptoss_convert.witness.parity import compare
from gptoss_convert.witness.rows import Rows
from gptoss_convert.witness.tokens import token_set
from gptoss_convert.witness.walk import layer_states
from tests.tiny_files import write_hf_bf16, write_hf_mxfp4, write_megatron, write_openai
from tests.tiny_models import DISTINCT, random_weights

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


GPU, CPU = torch.device("cuda"), torch.device("cpu")

RELEASED_20B = ModelConfig(
    hidden=2880,
    inter=2880,
    heads=64,
    kv_heads=8,
    head_dim=64,
    experts=32,
    experts_per_token=4,
    vocab=201088,
    sliding=(True, False),
    window=128,
    rope_theta=150000.0,
    rope_factor=32.0,
    rope_original_length=4096,
    rope_beta_fast=32.0,
    rope_beta_slow=1.0,
    rope_truncate=False,
    swiglu_alpha=1.702,
    swiglu_limit=7.0,
    norm_eps=1e-5,
)
"""The sizes of gpt-oss-20b with its first two layers, one sliding and one full."""


def random_layer(config: ModelConfig, device: torch.device, seed: int = 0) -> LayerWeights:
    """Random weights of realistic size, experts in MXFP4, BF16 for the rest."""
    gen = torch.Generator(device).manual_seed(seed)
    q, kv = config.heads * config.head_dim, config.kv_heads * config.head_dim
    d, f, e = config.hidden, config.inter, config.experts

    def normal(*size: int, std: float, mean: float = 0.0) -> Tensor:
        values = torch.randn(*size, generator=gen, device=device) * std + mean
        return values.to(torch.bfloat16)

    def packed(rows: int, columns: int) -> Packed:
        size = (e, rows, columns // 32)
        options = {"generator": gen, "device": device, "dtype": torch.uint8}
        return Packed(
            torch.randint(0, 256, (*size, 16), **options),
            torch.randint(117, 120, size, **options),
        )

    return LayerWeights(
        attention_norm=normal(d, std=0.2, mean=1.0),
        q_weight=normal(q, d, std=d**-0.5),
        q_bias=normal(q, std=0.5),
        k_weight=normal(kv, d, std=d**-0.5),
        k_bias=normal(kv, std=0.5),
        v_weight=normal(kv, d, std=d**-0.5),
        v_bias=normal(kv, std=0.5),
        sinks=normal(config.heads, std=1.0),
        o_weight=normal(d, q, std=q**-0.5),
        o_bias=normal(d, std=0.3),
        mlp_norm=normal(d, std=0.2, mean=1.0),
        router_weight=normal(e, d, std=2 * d**-0.5),
        router_bias=normal(e, std=1.0),
        gate_weight=packed(f, d),
        gate_bias=normal(e, f, std=3.0),
        up_weight=packed(f, d),
        up_bias=normal(e, f, std=3.0),
        down_weight=packed(d, f),
        down_bias=normal(e, d, std=0.3),
    )


def run_layers(
    weights: LayerWeights, config: ModelConfig, x_TD: Tensor, numerics: Numerics
) -> dict[str, Tensor]:
    """The state after each sub-block of the second of two layers with the same weights."""
    streams, lengths = [x_TD], [[len(x_TD)]]
    for _ in layer_states(streams, lengths, weights, config, 0, numerics):
        pass
    second = layer_states(streams, lengths, weights, config, 1, numerics)
    return {state.block: state.values[0].clone() for state in second}


def residual(length: int, config: ModelConfig) -> Tensor:
    gen = torch.Generator(GPU).manual_seed(1)
    return torch.randn(length, config.hidden, generator=gen, device=GPU)


def test_all_codes_decode_on_the_gpu_as_on_the_cpu_subnormals_included() -> None:
    blocks = torch.arange(256, dtype=torch.uint8).view(1, 16, 16).expand(253, 16, 16).contiguous()
    scales = torch.arange(253, dtype=torch.uint8).view(253, 1).expand(253, 16).contiguous()
    for dtype in (torch.float32, torch.bfloat16):
        expected = Packed(blocks, scales).decode(dtype)
        found = Packed(blocks.to(GPU), scales.to(GPU)).decode(dtype).cpu()
        bits = torch.int32 if dtype == torch.float32 else torch.int16
        assert torch.equal(found.view(bits), expected.view(bits))


def test_packed_and_transposed_weights_give_the_same_bits_every_time() -> None:
    weights = random_layer(RELEASED_20B, GPU)
    x_TD = residual(1500, RELEASED_20B)
    decoded = {
        name: forward.dense(getattr(weights, name), torch.bfloat16)
        for name in ("gate_weight", "up_weight", "down_weight")
    }
    input_major = {name: m.transpose(1, 2).contiguous() for name, m in decoded.items()}
    strided = replace(weights, **{name: m.transpose(1, 2) for name, m in input_major.items()})
    for numerics in (Numerics.on(GPU), Numerics.on(GPU, torch.bfloat16)):
        x = x_TD.to(numerics.dtype)
        with forward.exact_products():
            expected, again, other = (
                run_layers(one, RELEASED_20B, x, numerics)["experts"]
                for one in (weights, weights, strided)
            )
        assert torch.isfinite(expected).all()
        assert torch.equal(expected, again)
        assert torch.equal(expected, other)


def test_the_gpu_agrees_with_the_cpu_so_tf32_is_off() -> None:
    config = replace(RELEASED_20B, experts=8)
    weights, x_TD = random_layer(config, GPU), residual(300, config)
    split = Numerics.on(GPU)
    plain = replace(split, split=False)
    torch.set_float32_matmul_precision("high")
    try:
        with forward.exact_products():
            found, by_cublas = (
                run_layers(weights, config, x_TD, one)["attention"].cpu() for one in (split, plain)
            )
        with torch.inference_mode():
            tf32 = run_layers(weights, config, x_TD, plain)["attention"].cpu()
    finally:
        torch.set_float32_matmul_precision("highest")
    on_cpu = {
        name: Packed(t.blocks.cpu(), t.scales.cpu()) if isinstance(t, Packed) else t.cpu()
        for name, t in vars(weights).items()
    }
    weights = replace(weights, **on_cpu)
    with forward.exact_products():
        expected = run_layers(weights, config, x_TD.cpu(), Numerics.on(CPU))["attention"]
    exact, float32, rounded = (
        float(((x - expected).norm(dim=1) / expected.norm(dim=1)).max())
        for x in (found, by_cublas, tf32)
    )
    print(f"GPU against CPU: split {exact:.3g}, float32 {float32:.3g}, TF32 {rounded:.3g}")
    assert split.split
    assert exact < 1e-5 and float32 < 1e-5
    assert rounded > 1e-4


def off(found: Tensor, truth: Tensor) -> float:
    """Relative error against float64."""
    return float((found.double() - truth).norm() / truth.norm())


def test_split_products_are_as_exact_as_float32_and_rows_stand_alone() -> None:
    gen = torch.Generator(GPU).manual_seed(3)
    config, tokens, e, d = RELEASED_20B, 3000, 32, 2880
    x = torch.randn(tokens, d, generator=gen, device=GPU)
    shape = e, d, d
    weights = [
        (torch.randn(shape, generator=gen, device=GPU) * d**-0.5).bfloat16() for _ in range(3)
    ]
    biases = [torch.randn(e, d, generator=gen, device=GPU) for _ in range(3)]
    gate, up, down = zip(weights, biases, strict=True)
    chosen = torch.randn(tokens, e, generator=gen, device=GPU).topk(4).indices
    rows, choice = Rows.of_choices(chosen, e)
    shares, held = torch.rand(len(choice), generator=gen, device=GPU), choice // 4
    inner = products.gated(x, held, rows, gate, up, config)
    added = products.down(inner, rows, *down, shares)
    some = torch.arange(0, len(choice), 97, device=GPU)
    expert, x_some = chosen.flatten()[choice[some]], x[held[some]].double()
    sides = (
        torch.einsum("rd,rfd->rf", x_some, w[expert].double()) + b[expert] for w, b in (gate, up)
    )
    truth = forward.swiglu(*sides, config)  # pyright: ignore[reportCallIssue]
    error = off(inner[:, some].double().sum(0), truth)
    truth = torch.einsum("rf,rdf->rd", truth, down[0][expert].double()) + down[1][expert]
    errors = error, off(added[some], truth * shares[some, None])
    whole = products.linear(x, weights[0][0], None)
    errors += (off(whole, x.double() @ weights[0][0].double().t()),)
    print("relative errors: gated {:.2g}, down {:.2g}, linear {:.2g}".format(*errors))
    assert max(errors) < 1e-6
    for part in (slice(0, 1), slice(77, 1000), slice(2999, 3000)):
        assert torch.equal(products.linear(x[part], weights[0][0], None), whole[part])


@pytest.mark.parametrize("window", [None, 128])
def test_attention_with_split_products_is_as_exact_as_float32(window: int | None) -> None:
    # Triton, which the kernels are written in, is there with a GPU only.
    from gptoss_convert.witness import kernels

    gen = torch.Generator(GPU).manual_seed(4)
    sizes = ((1500, 64, 64), (1500, 8, 64), (1500, 8, 64), (64,))
    q, k, v, sinks = (torch.randn(size, generator=gen, device=GPU) for size in sizes)
    for one in (sinks, torch.full_like(sinks, -math.inf)):
        found = kernels.attend(q * 2, products.split(k), products.split(v), one, window)
        double = [x.double().cpu() for x in (q * 2, k, v, one)]
        truth = forward.attend(double[0], double[1], double[2], double[3], window, 1 << 24)
        assert off(found.cpu(), truth) < 1e-6


def test_scores_on_the_gpu_are_those_of_the_cpu_and_nan_is_a_difference() -> None:
    gen = torch.Generator(GPU).manual_seed(5)
    ours = torch.randn(20, 201088, generator=gen, device=GPU) * 3
    theirs = ours + 1e-3 * torch.randn(20, 201088, generator=gen, device=GPU)
    following = torch.arange(20, device=GPU) - 1
    found, expected = (metrics.score(ours.to(d), theirs.to(d), following.to(d)) for d in (GPU, CPU))
    for name, column in vars(found).items():
        torch.testing.assert_close(
            column, vars(expected)[name], rtol=1e-9, atol=1e-12, equal_nan=True
        )
    same = metrics.score(ours, ours.clone(), following)
    assert not same.kl.any() and not same.max_delta.any()
    theirs[3, 100] = math.nan
    assert metrics.score(ours, theirs, following).max_delta[3].isnan()


@pytest.fixture(scope="module")
def full_width(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two layers of the 20b in every format."""
    folder = tmp_path_factory.mktemp("full")
    synth(folder / "mxfp4", model="20b", layers=2)
    for name, options in (
        ("bf16", Options(to="hf", dtype="bf16")),
        ("openai", Options(to="openai")),
        ("megatron", Options(to="megatron")),
    ):
        convert(folder / "mxfp4", folder / name, options)
    return folder


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bf16"])
@pytest.mark.parametrize("name", ["mxfp4", "bf16", "openai", "megatron"])
def test_no_format_raises_a_false_alarm_at_full_width(
    full_width: Path, name: str, dtype: torch.dtype
) -> None:
    source, target = (
        open_reader(open_checkpoint(full_width / one), Fetcher(GPU), None)
        for one in ("mxfp4", name)
    )
    tokens = token_set(source.config, 1024, 0)
    limits, numerics = load_limits("lossless"), Numerics.on(GPU, dtype)
    report = compare(source, target, tokens, limits, GPU, numerics, extra_rounds=0, both=True)
    assert report.passed, report.violations
    assert not any(layer.computed_once for layer in report.layers)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bf16"])
def test_fused_attention_agrees_with_query_blocks_in_float64(dtype: torch.dtype) -> None:
    gen = torch.Generator(GPU).manual_seed(2)
    sizes = ((1500, 64, 64), (1500, 8, 64), (1500, 8, 64), (64,))
    tensors = [torch.randn(*size, generator=gen, device=GPU).to(dtype) for size in sizes]
    q, k, v, sinks = tensors
    found = forward.attend_fused(q, k, v, sinks)
    assert torch.equal(found, forward.attend_fused(q, k, v, sinks))
    q, k, v, sinks = (x.double().cpu() for x in tensors)
    expected = forward.attend(q, k, v, sinks, None, 1 << 24)
    error = (found.double().cpu() - expected).norm() / expected.norm()
    assert error < (5e-6 if dtype == torch.float32 else 1e-2)


def test_every_layout_gives_the_same_bits_through_its_reader(tmp_path: Path) -> None:
    weights = random_weights(DISTINCT, seed=9)
    packed = HfReader(write_hf_mxfp4(tmp_path / "mxfp4", DISTINCT, weights), GPU)
    iteration = write_megatron(tmp_path / "mcore" / "iter_0000001", DISTINCT, weights, pad_vocab=31)
    sequences = token_set(packed.config, longest=1024, positions=0)
    for target in (
        HfReader(write_hf_bf16(tmp_path / "bf16", DISTINCT, weights), GPU),
        OpenAiReader(write_openai(tmp_path / "original", DISTINCT, weights), GPU),
        MegatronReader(iteration, read(iteration).chunks, packed.config, GPU),
    ):
        report = compare(packed, target, sequences, load_limits("lossless"), GPU, both=True)
        assert report.passed, report.violations


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bf16"])
def test_131072_tokens_fit(dtype: torch.dtype) -> None:
    weights = random_layer(RELEASED_20B, GPU)
    streams, lengths = [residual(131072, RELEASED_20B).to(dtype)], [[131072]]
    torch.cuda.reset_peak_memory_stats()
    numerics = Numerics.on(GPU, dtype)
    for layer, kind in enumerate(("sliding", "full")):
        torch.cuda.synchronize()
        start = time.perf_counter()
        with forward.exact_products():
            for _ in layer_states(streams, lengths, weights, RELEASED_20B, layer, numerics):
                pass
        torch.cuda.synchronize()
        print(f"{kind} layer, {dtype}: {time.perf_counter() - start:.2f} s")
        assert torch.isfinite(streams[0]).all()
    peak = torch.cuda.max_memory_allocated() / 2**30
    print(f"peak memory, {dtype}: {peak:.1f} GiB")
    assert peak < 40
