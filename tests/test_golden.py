"""The released 20b and 120b, without their weights: names, shapes, sizes, files and full plans.

The inventory is written down here by hand, from the files as published; it shares nothing with the
tables.
"""

from __future__ import annotations

import json
import math
import struct
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest

from gptoss_convert import Options, inspect, plan
from gptoss_convert.containers import DTYPE_BYTES, Chunk
from gptoss_convert.engine.steps import make_plan
from gptoss_convert.formats.shards import specs_of
from gptoss_convert.layouts.extents import extents
from gptoss_convert.layouts.model import load_model
from gptoss_convert.layouts.table_files import load_table
from tests.tiny_files import known

SIZES = {"20b": (24, 32), "120b": (36, 128)}
H = I = 2880  # noqa: E741
VOCAB, Q, KV, HEADS = 201088, 4096, 512, 64

Inventory = dict[str, tuple[str, tuple[int, ...]]]
"""Dtype and shape by name."""


def hf_inventory(size: str, encoding: str) -> Inventory:
    layers, e = SIZES[size]
    tensors: Inventory = {
        "model.embed_tokens.weight": ("BF16", (VOCAB, H)),
        "model.norm.weight": ("BF16", (H,)),
        "lm_head.weight": ("BF16", (VOCAB, H)),
    }
    for n in range(layers):
        attention = {
            "q_proj.weight": (Q, H),
            "q_proj.bias": (Q,),
            "k_proj.weight": (KV, H),
            "k_proj.bias": (KV,),
            "v_proj.weight": (KV, H),
            "v_proj.bias": (KV,),
            "o_proj.weight": (H, Q),
            "o_proj.bias": (H,),
            "sinks": (HEADS,),
        }
        layer = f"model.layers.{n}"
        tensors |= {f"{layer}.self_attn.{k}": ("BF16", shape) for k, shape in attention.items()}
        tensors[f"{layer}.input_layernorm.weight"] = ("BF16", (H,))
        tensors[f"{layer}.post_attention_layernorm.weight"] = ("BF16", (H,))
        tensors[f"{layer}.mlp.router.weight"] = ("BF16", (e, H))
        tensors[f"{layer}.mlp.router.bias"] = ("BF16", (e,))
        experts = f"{layer}.mlp.experts"
        tensors[f"{experts}.gate_up_proj_bias"] = ("BF16", (e, 2 * I))
        tensors[f"{experts}.down_proj_bias"] = ("BF16", (e, H))
        if encoding == "bf16":
            tensors[f"{experts}.gate_up_proj"] = ("BF16", (e, H, 2 * I))
            tensors[f"{experts}.down_proj"] = ("BF16", (e, I, H))
            continue
        tensors[f"{experts}.gate_up_proj_blocks"] = ("U8", (e, 2 * I, 90, 16))
        tensors[f"{experts}.gate_up_proj_scales"] = ("U8", (e, 2 * I, 90))
        tensors[f"{experts}.down_proj_blocks"] = ("U8", (e, H, 90, 16))
        tensors[f"{experts}.down_proj_scales"] = ("U8", (e, H, 90))
    return tensors


def openai_inventory(size: str) -> Inventory:
    layers, e = SIZES[size]
    tensors: Inventory = {
        "embedding.weight": ("BF16", (VOCAB, H)),
        "norm.scale": ("BF16", (H,)),
        "unembedding.weight": ("BF16", (VOCAB, H)),
    }
    for n in range(layers):
        block: Inventory = {
            "attn.norm.scale": ("BF16", (H,)),
            "attn.qkv.weight": ("BF16", (5120, H)),
            "attn.qkv.bias": ("BF16", (5120,)),
            "attn.sinks": ("BF16", (HEADS,)),
            "attn.out.weight": ("BF16", (H, Q)),
            "attn.out.bias": ("BF16", (H,)),
            "mlp.norm.scale": ("BF16", (H,)),
            "mlp.gate.weight": ("BF16", (e, H)),
            "mlp.gate.bias": ("BF16", (e,)),
            "mlp.mlp1_weight.blocks": ("U8", (e, 2 * I, 90, 16)),
            "mlp.mlp1_weight.scales": ("U8", (e, 2 * I, 90)),
            "mlp.mlp1_bias": ("BF16", (e, 2 * I)),
            "mlp.mlp2_weight.blocks": ("U8", (e, H, 90, 16)),
            "mlp.mlp2_weight.scales": ("U8", (e, H, 90)),
            "mlp.mlp2_bias": ("BF16", (e, H)),
        }
        tensors |= {f"block.{n}.{name}": spec for name, spec in block.items()}
    return tensors


def inventory(size: str, label: str) -> Inventory:
    return openai_inventory(size) if label == "openai" else hf_inventory(size, label[3:])


LABELS = ("hf-mxfp4", "hf-bf16", "openai")
COUNTS = {
    ("20b", "hf-mxfp4"): (459, 13_761_264_768),
    ("120b", "hf-mxfp4"): (687, 65_248_815_744),
    ("20b", "hf-bf16"): (411, 41_829_514_368),
    ("120b", "hf-bf16"): (615, 233_658_313_344),
    ("20b", "openai"): (363, 13_761_264_768),
    ("120b", "openai"): (543, 65_248_815_744),
}


def numbers(size: str) -> dict[str, int]:
    return {
        "num_hidden_layers": SIZES[size][0],
        "num_local_experts": SIZES[size][1],
        "vocab_size": VOCAB,
        "hidden_size": H,
        "intermediate_size": I,
        "num_attention_heads": HEADS,
        "num_key_value_heads": 8,
        "head_dim": 64,
    }


def nbytes(dtype: str, shape: Sequence[int]) -> int:
    return math.prod(shape) * DTYPE_BYTES[dtype]


@pytest.mark.parametrize(("size", "label"), COUNTS)
def test_the_tables_name_exactly_the_published_tensors(size: str, label: str):
    format, _, variant = label.partition("-")
    tensors = load_table(format).tensors(variant or "mxfp4", load_model().sizes(numbers(size)))
    found = {spec.name: (spec.dtype, spec.shape) for spec in specs_of(tensors)}
    assert found == inventory(size, label)
    total = sum(nbytes(dtype, shape) for dtype, shape in found.values())
    assert (len(found), total) == COUNTS[size, label]


def published_config(size: str) -> dict[str, object]:
    layers, experts = SIZES[size]
    rope = {
        "beta_fast": 32.0,
        "beta_slow": 1.0,
        "factor": 32.0,
        "original_max_position_embeddings": 4096,
        "rope_type": "yarn",
        "truncate": False,
    }
    return {
        "architectures": ["GptOssForCausalLM"],
        "attention_bias": True,
        "attention_dropout": 0.0,
        "eos_token_id": 200002,
        "experts_per_token": 4,
        "head_dim": 64,
        "hidden_act": "silu",
        "hidden_size": H,
        "initial_context_length": 4096,
        "initializer_range": 0.02,
        "intermediate_size": I,
        "layer_types": ["sliding_attention", "full_attention"] * (layers // 2),
        "max_position_embeddings": 131072,
        "model_type": "gpt_oss",
        "num_attention_heads": HEADS,
        "num_experts_per_tok": 4,
        "num_hidden_layers": layers,
        "num_key_value_heads": 8,
        "num_local_experts": experts,
        "output_router_logits": False,
        "pad_token_id": 199999,
        "quantization_config": {
            "modules_to_not_convert": [
                "model.layers.*.self_attn",
                "model.layers.*.mlp.router",
                "model.embed_tokens",
                "lm_head",
            ],
            "quant_method": "mxfp4",
        },
        "rms_norm_eps": 1e-05,
        "rope_scaling": rope,
        "rope_theta": 150000,
        "router_aux_loss_coef": 0.9,
        "sliding_window": 128,
        "swiglu_limit": 7.0,
        "tie_word_embeddings": False,
        "transformers_version": "4.55.0.dev0",
        "use_cache": True,
        "vocab_size": VOCAB,
    }


def published_openai_config(size: str) -> dict[str, object]:
    layers, experts = SIZES[size]
    return {
        "num_hidden_layers": layers,
        "num_experts": experts,
        "experts_per_token": 4,
        "vocab_size": VOCAB,
        "hidden_size": H,
        "intermediate_size": I,
        "swiglu_limit": 7.0,
        "head_dim": 64,
        "num_attention_heads": HEADS,
        "num_key_value_heads": 8,
        "sliding_window": 128,
        "initial_context_length": 4096,
        "rope_theta": 150000,
        "rope_scaling_factor": 32.0,
        "rope_ntk_alpha": 1,
        "rope_ntk_beta": 32,
    }


def write_header_only(path: Path, tensors: Inventory) -> None:
    """A sparse file: a true header, and a hole where the weights would lie."""
    header: dict[str, object] = {}
    end = 0
    for name, (dtype, shape) in tensors.items():
        begin, end = end, end + nbytes(dtype, shape)
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + end)


@pytest.fixture(scope="module")
def sparse(tmp_path_factory: pytest.TempPathFactory) -> Mapping[tuple[str, str], Path]:
    """Directories of full size that hold headers alone."""
    folders: dict[tuple[str, str], Path] = {}
    for size, label in COUNTS:
        folder = tmp_path_factory.mktemp(f"{size}-{label}")
        config = published_openai_config(size) if label == "openai" else published_config(size)
        if label == "hf-bf16":
            del config["quantization_config"]
        (folder / "config.json").write_text(json.dumps(config))
        write_header_only(folder / "model.safetensors", inventory(size, label))
        folders[size, label] = folder
    return folders


PAIRS = [
    (size, label, *to)
    for size in SIZES
    for label in LABELS
    for to in (("hf", "mxfp4"), ("hf", "bf16"), ("openai", "mxfp4"))
]


@pytest.mark.parametrize(("size", "label", "to", "dtype"), PAIRS)
def test_every_pair_is_planned_at_full_size(
    sparse: Mapping[tuple[str, str], Path], size: str, label: str, to: str, dtype: str
):
    began = time.process_time()
    source = sparse[size, label]
    conversion = plan(source, source.parent / "target", Options(to=to, dtype=dtype))
    assert time.process_time() - began < 4, "plans are made in about a second"
    target = to if to == "openai" else f"{to}-{dtype}"
    total = COUNTS[size, target][1]
    read = COUNTS[size, label][1]
    written = conversion.plan.write_bytes
    if dtype == "bf16" and label != "hf-bf16":
        total += scales_bytes(size)
        # The sidecar's scales are read once, and written beside what they decode to.
    assert (conversion.plan.read_bytes, written) == (read, total)
    assert conversion.plan.buffer_bytes < 200_000_000
    assert conversion.summary()["model"] == size


def scales_bytes(size: str) -> int:
    layers, experts = SIZES[size]
    return layers * experts * (2 * I * 90 + H * 90)


SHARDS_20B = [4_792_272_488, 4_798_702_184, 4_170_342_232]
SHARDS_120B_OPENAI = [
    10_544_040_680,
    10_488_721_680,
    10_488_721_688,
    10_488_721_672,
    10_488_721_680,
    10_433_402_600,
    2_316_539_800,
]


def published_files(source: Path, to: str) -> tuple[dict[str, int], dict[str, bytes]]:
    options = Options(to=to, dtype="mxfp4", shards="published")
    image = plan(source, source.parent / "target", options).image
    return {file.name: file.size for file in image.files}, known(image)


def test_the_published_files_of_20b(sparse: Mapping[tuple[str, str], Path]):
    files, closing = published_files(sparse["20b", "openai"], "hf")
    names = [f"model-0000{n}-of-00002.safetensors" for n in range(3)]
    assert files == dict(zip(names, SHARDS_20B, strict=True))
    index = closing["model.safetensors.index.json"]
    assert len(index) == 36_355
    content = json.loads(index)
    assert content["metadata"] == {"total_size": 13_761_264_768}
    homes = {
        name: content["weight_map"][f"model.layers.18.self_attn.{name}"]
        for name in ("v_proj.bias", "q_proj.weight")
    }
    assert homes == {"v_proj.bias": names[0], "q_proj.weight": names[1]}
    files, closing = published_files(sparse["20b", "hf-mxfp4"], "openai")
    assert files == {"model.safetensors": 13_761_300_984}
    assert len(closing["config.json"]) == 376
    assert len(closing["dtypes.json"]) == 13_082
    assert "model.safetensors.index.json" not in closing


def test_the_published_files_of_120b(sparse: Mapping[tuple[str, str], Path]):
    files, closing = published_files(sparse["120b", "hf-mxfp4"], "openai")
    names = [f"model--{n:05d}-of-00007.safetensors" for n in range(1, 8)]
    assert files == dict(zip(names, SHARDS_120B_OPENAI, strict=True))
    index = closing["model.safetensors.index.json"]
    assert len(index) == 37_796
    content = json.loads(index)
    assert content["metadata"] == {"total_size": 65_248_815_744}
    first = {2: "block.14.mlp.mlp1_weight.blocks", 4: "block.25.", 5: "block.30."}
    for number, tensor in first.items():
        held = sorted(n for n, f in content["weight_map"].items() if f == names[number - 1])
        assert any(name.startswith(tensor) for name in held)
    assert len(closing["dtypes.json"]) == 19_658
    files, _ = published_files(sparse["120b", "openai"], "hf")
    assert [*files] == [f"model-{n:05d}-of-00014.safetensors" for n in range(15)]
    assert 4_115_586_736 in files.values()


def test_openai_config_of_20b_is_the_published_text(sparse: Mapping[tuple[str, str], Path]):
    _, closing = published_files(sparse["20b", "hf-mxfp4"], "openai")
    assert closing["config.json"] == json.dumps(published_openai_config("20b")).encode()


def test_hf_config_from_openai_has_every_published_key(sparse: Mapping[tuple[str, str], Path]):
    _, closing = published_files(sparse["120b", "openai"], "hf")
    written = json.loads(closing["config.json"])
    rope = written.pop("rope_parameters")
    expected = published_config("120b")
    assert written == expected
    assert rope == {**written["rope_scaling"], "rope_theta": 150000}


@pytest.mark.parametrize(("size", "label"), COUNTS)
def test_inspect_tells_what_it_is(sparse: Mapping[tuple[str, str], Path], size: str, label: str):
    summary = inspect(sparse[size, label]).summary()
    parameters = {"20b": 20_914_757_184, "120b": 116_829_156_672}
    assert (summary["model"], summary["format"]) == (size, label)
    assert summary["parameters"] == parameters[size]
    assert (summary["tensors"], summary["tensor_bytes"]) == COUNTS[size, label]


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("variant", ["stacked-both", "per-layer", "per-expert"])
def test_megatron_plans_at_full_size_from_native_chunks(size: str, variant: str):
    sizes = load_model().sizes(numbers(size))
    hf, megatron = load_table("hf"), load_table("megatron")
    source = [
        Chunk(name, dtype, shape, (0,) * len(shape), shape, "source", offset)
        for name, dtype, shape, offset in laid_out(hf_inventory(size, "mxfp4"))
    ]
    held = extents("hf", hf.tensors("mxfp4", sizes), source)
    target: list[Chunk] = []
    offset = 0
    for tensor in megatron.tensors(variant, sizes):
        box = tensor.chunk_shape or tensor.shape
        for corner in grid(tensor.shape, box):
            target.append(Chunk(tensor.name, "BF16", tensor.shape, corner, box, "target", offset))
            offset += target[-1].nbytes
    taken = extents("megatron", megatron.tensors(variant, sizes), target)
    made = make_plan(load_model(), sizes, held, taken)
    assert made.read_bytes == COUNTS[size, "hf-mxfp4"][1]
    assert made.write_bytes == offset
    if variant == "per-expert":
        assert max(len(step.targets) for step in made.steps) <= 2, "no step spans experts"


def laid_out(tensors: Inventory) -> list[tuple[str, str, tuple[int, ...], int]]:
    offset, laid = 0, []
    for name, (dtype, shape) in tensors.items():
        laid.append((name, dtype, shape, offset))
        offset += nbytes(dtype, shape)
    return laid


def grid(shape: Sequence[int], box: Sequence[int]) -> list[tuple[int, ...]]:
    corners: list[tuple[int, ...]] = [()]
    for length, step in zip(shape, box, strict=True):
        corners = [(*corner, at) for corner in corners for at in range(0, length, step)]
    return corners
