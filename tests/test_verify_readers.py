from __future__ import annotations

import json
import math
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load, save_file
from torch import Tensor
from torch._ops import OpOverload
from torch.utils._python_dispatch import TorchDispatchMode

from gptoss_convert import Options, convert, verify_checkpoints
from gptoss_convert.containers import Chunk
from gptoss_convert.containers.torch_dist import read
from gptoss_convert.errors import CodecError, GptossError, InputError, IntegrityError
from gptoss_convert.formats.config import Config
from gptoss_convert.formats.megatron import fields
from gptoss_convert.verify.result import VerifyOptions
from gptoss_convert.verify.sides import FewerLayers
from gptoss_convert.witness.adapted import AdaptedReader
from gptoss_convert.witness.configs import Section, megatron_config
from gptoss_convert.witness.fetch import Fetcher
from gptoss_convert.witness.forward import Numerics
from gptoss_convert.witness.fp4 import Packed, checked
from gptoss_convert.witness.hf import HfReader
from gptoss_convert.witness.megatron import MegatronReader
from gptoss_convert.witness.mistakes import Mistake, MistakenReader
from gptoss_convert.witness.model import ModelConfig
from gptoss_convert.witness.openai import OpenAiReader
from gptoss_convert.witness.readers import ChangedReader, Reader
from gptoss_convert.witness.torchtitan import TorchtitanReader
from gptoss_convert.witness.walk import Prompts, all_logits
from gptoss_convert.witness.witness import Given
from tests.test_forward import CPU, sequences
from tests.tiny_files import write_hf_bf16, write_hf_mxfp4, write_megatron, write_openai
from tests.tiny_models import (
    DISTINCT,
    SQUARE,
    TinyShape,
    decode_mxfp4,
    hf_bf16_tensors,
    megatron_tensors,
    random_weights,
)
from tests.trainer_names import torchtitan


def megatron_reader(iteration: Path, config: ModelConfig) -> MegatronReader:
    return MegatronReader(iteration, read(iteration).chunks, config, CPU)


@pytest.mark.parametrize("shape", [DISTINCT, SQUARE], ids=["distinct", "square"])
def test_the_same_model_gives_the_same_bits_from_every_layout(
    tmp_path: Path, shape: TinyShape
) -> None:
    weights = random_weights(shape, seed=3)
    packed = HfReader(write_hf_mxfp4(tmp_path / "mxfp4", shape, weights), CPU)
    iteration = write_megatron(tmp_path / "mcore" / "iter_0000001", shape, weights, pad_vocab=31)
    readers: list[Reader] = [
        HfReader(write_hf_bf16(tmp_path / "bf16", shape, weights), CPU),
        OpenAiReader(write_openai(tmp_path / "original", shape, weights), CPU),
        megatron_reader(iteration, packed.config),
    ]
    prompts = Prompts.of(sequences(shape), CPU)
    expected = all_logits(packed, prompts, Numerics())
    assert torch.isfinite(expected).all()
    assert torch.equal(expected, all_logits(packed, prompts, Numerics()))
    for reader in readers:
        assert torch.equal(expected, all_logits(reader, prompts, Numerics())), reader


@dataclass(frozen=True)
class Operand:
    """How an operand of a product lies in memory: what a kernel may be chosen by."""

    product: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    row_major: bool
    """It, or its transpose, as a weight `[out, in]` is."""
    misaligned: int
    """Bytes beyond a multiple of 64."""

    @classmethod
    def of(cls, product: str, held: Tensor) -> Operand:
        row_major = held.is_contiguous() or (held.ndim == 2 and held.t().is_contiguous())
        lies = tuple(held.shape), held.stride(), row_major, held.data_ptr() % 64
        return cls(product, held.dtype, *lies)


class Products(TorchDispatchMode):
    """Notes every operand of every product, in order."""

    def __init__(self) -> None:
        super().__init__()
        self.operands: list[Operand] = []

    def __torch_dispatch__(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, func: OpOverload, types: object, args: tuple[Any, ...], kwargs: Any = None
    ) -> object:
        name = func.overloadpacket.__name__
        if name in {"mm", "addmm", "linear", "mv", "addmv", "dot", "bmm", "baddbmm"}:
            self.operands += [Operand.of(name, one) for one in args if isinstance(one, Tensor)]
        return func(*args, **(kwargs or {}))


def every_reader(folder: Path, shape: TinyShape) -> list[Reader]:
    """The same model through every reader there is, in every layout that it knows."""
    weights = random_weights(shape, seed=3)
    packed = HfReader(write_hf_mxfp4(folder / "mxfp4", shape, weights), CPU)
    iteration = write_megatron(folder / "mcore" / "iter_0000001", shape, weights, pad_vocab=31)
    stacked = megatron_tensors(shape, weights)
    readers = [
        packed,
        HfReader(write_hf_bf16(folder / "bf16", shape, weights), CPU),
        OpenAiReader(write_openai(folder / "original", shape, weights), CPU),
        megatron_reader(iteration, packed.config),
        FewerLayers(packed, shape.layers),
        MistakenReader(packed, Mistake("nothing were wrong")),
    ]
    for per_expert in (False, True):
        keys, place = per_layer(stacked, shape, per_expert), folder / f"flat-{per_expert}"
        place.mkdir()
        chunks = flat_chunks(place, keys, halves=True)
        readers.append(MegatronReader(place, chunks, packed.config, CPU))
    wide = {name: tensor.float() for name, tensor in stacked.items()}
    (folder / "wide").mkdir()
    chunks = flat_chunks(folder / "wide", wide, halves=False)
    readers.append(MegatronReader(folder / "wide", chunks, packed.config, CPU))
    (folder / "torchtitan").mkdir()
    chunks = flat_chunks(folder / "torchtitan", torchtitan(hf_bf16_tensors(weights)), halves=False)
    config = json.loads((folder / "bf16" / "config.json").read_text())
    given = Given(folder / "torchtitan", shape.layers, tuple(chunks), config)
    return [*readers, TorchtitanReader(given, Fetcher(CPU))]


def own_subclasses(kind: type) -> set[type]:
    found = {one for one in kind.__subclasses__() if one.__module__.startswith("gptoss_convert")}
    return found.union(*map(own_subclasses, found)) if found else set()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bf16"])
@pytest.mark.parametrize("shape", [DISTINCT, SQUARE], ids=["distinct", "square"])
def test_every_operand_lies_the_same_whichever_reader_it_comes_from(
    tmp_path: Path, shape: TinyShape, dtype: torch.dtype
) -> None:
    prompts, noted = Prompts.of(sequences(shape)[:2], CPU), []
    readers = every_reader(tmp_path, shape)
    assert own_subclasses(Reader) - {type(one) for one in readers} == {ChangedReader, AdaptedReader}
    for reader in readers:
        with Products() as products:
            all_logits(reader, prompts, Numerics(dtype))
        # Attention multiplies activations, as strided as it likes; all else weights.
        weighed = [one for one in products.operands if "bmm" not in one.product]
        assert len(weighed) > 3 * shape.layers * (5 + shape.experts)
        for one in weighed:
            assert one.row_major, (reader, one)
            assert one.misaligned == 0, (reader, one)
        noted.append(products.operands)
    assert all(one == noted[0] for one in noted)


@pytest.mark.parametrize("shape", [DISTINCT, SQUARE], ids=["distinct", "square"])
def test_every_reader_hands_out_fresh_tensors(tmp_path: Path, shape: TinyShape) -> None:
    for reader in every_reader(tmp_path, shape):
        ends = {name: getattr(reader, name)() for name in ("embedding", "norm", "unembedding")}
        for name, held in (ends | vars(reader.layer(1))).items():
            for one in (held.blocks, held.scales) if isinstance(held, Packed) else (held,):
                assert one.is_contiguous(), (reader, name)
                assert one.data_ptr() == one.untyped_storage().data_ptr(), (reader, name)
                assert one.data_ptr() % 64 == 0, (reader, name)
                assert one.untyped_storage().nbytes() == one.nbytes, (reader, name)


def flat_chunks(folder: Path, tensors: dict[str, Tensor], halves: bool) -> list[Chunk]:
    """Store BF16 or F32 tensors raw in one file, whole or as two boxes along the last axis."""
    stored, chunks, offset = bytearray(), [], 0
    for name, tensor in tensors.items():
        width = tensor.shape[-1]
        cuts = [0, width // 2, width] if halves else [0, width]
        for low, high in pairwise(cuts):
            box = tensor[..., low:high].contiguous()
            start = (0,) * (tensor.ndim - 1) + (low,)
            shape, extent = tuple(tensor.shape), tuple(box.shape)
            kind = "BF16" if box.dtype == torch.bfloat16 else "F32"
            chunks.append(Chunk(name, kind, shape, start, extent, "flat.bin", offset))
            stored += box.view(torch.uint8).numpy().tobytes()
            offset += box.nbytes
    (folder / "flat.bin").write_bytes(stored)
    return chunks


def per_layer(tensors: dict[str, Tensor], shape: TinyShape, per_expert: bool) -> dict[str, Tensor]:
    """The same tensors with a key per layer and, if asked, a key per layer and expert."""
    stem, keys = ".mlp.experts.experts.", {}
    for name, tensor in tensors.items():
        if not name.startswith("decoder.layers."):
            keys[name] = tensor
            continue
        for n, part in enumerate(tensor):
            key = name.replace("decoder.layers.", f"decoder.layers.{n}.")
            if not (per_expert and stem in key):
                keys[key] = part
                continue
            for e, matrix in enumerate(part):
                own = key.replace(stem, f"{stem}{e}.")
                if "linear_fc1" in key:
                    keys[f"{own}_w"], keys[f"{own}_v"] = matrix.chunk(2)
                else:
                    keys[own] = matrix
    assert len(keys) > shape.layers
    return keys


@pytest.mark.parametrize("per_expert", [False, True])
def test_every_megatron_key_layout_reads_the_same(tmp_path: Path, per_expert: bool) -> None:
    weights = random_weights(DISTINCT, seed=4)
    config = HfReader(write_hf_mxfp4(tmp_path / "hf", DISTINCT, weights), CPU).config
    stacked = megatron_reader(
        write_megatron(tmp_path / "mcore" / "iter_0000001", DISTINCT, weights), config
    )
    keys = per_layer(megatron_tensors(DISTINCT, weights), DISTINCT, per_expert)
    reader = MegatronReader(tmp_path, flat_chunks(tmp_path, keys, halves=True), config, CPU)
    for n in range(DISTINCT.layers):
        for name, tensor in vars(stacked.layer(n)).items():
            assert torch.equal(tensor, vars(reader.layer(n))[name]), name


def test_a_gap_between_chunks_is_refused(tmp_path: Path) -> None:
    weights = random_weights(DISTINCT, seed=4)
    config = HfReader(write_hf_mxfp4(tmp_path / "hf", DISTINCT, weights), CPU).config
    chunks = flat_chunks(tmp_path, megatron_tensors(DISTINCT, weights), halves=True)
    gone = next(c for c in chunks if c.tensor.endswith("linear_proj.bias"))
    reader = MegatronReader(tmp_path, [c for c in chunks if c is not gone], config, CPU)
    with pytest.raises(IntegrityError, match=r"linear_proj\.bias: expects 224 elements .* 112"):
        reader.layer(1)


def test_missing_layers_are_refused(tmp_path: Path) -> None:
    weights = random_weights(DISTINCT, seed=4)
    config = HfReader(write_hf_mxfp4(tmp_path / "hf", DISTINCT, weights), CPU).config
    shorter = replace(config, sliding=config.sliding[:3])
    tensors = megatron_tensors(DISTINCT, weights)
    chunks = flat_chunks(tmp_path, tensors, halves=False)
    with pytest.raises(InputError, match="expects 3 layers, found 4"):
        MegatronReader(tmp_path, chunks, shorter, CPU)
    chunks = flat_chunks(tmp_path, per_layer(tensors, DISTINCT, False), halves=False)
    with pytest.raises(InputError, match="expects 3 layers, found more"):
        MegatronReader(tmp_path, chunks, shorter, CPU)


@pytest.mark.parametrize(
    ("rename", "message"),
    [
        ({}, r"layers\.2\.self_attn\.sinks: missing"),
        ({"model.layers.2.self_attn.sinks": (16,)}, r"sinks: expects shape \(15,\), found \(16,\)"),
    ],
)
def test_a_wrong_tensor_is_named(
    tmp_path: Path, rename: dict[str, tuple[int, ...]], message: str
) -> None:
    directory = write_hf_bf16(tmp_path / "hf", DISTINCT, random_weights(DISTINCT))
    for file in sorted(directory.glob("*.safetensors")):
        tensors = load(file.read_bytes())
        tensors.pop("model.layers.2.self_attn.sinks", None)
        if file.name.startswith("model-00002"):
            tensors |= {name: torch.zeros(size) for name, size in rename.items()}
        save_file(tensors, file)
    with pytest.raises(GptossError, match=message):
        HfReader(directory, CPU).layer(2)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("model_type", "llama", "model_type expects 'gpt_oss', found 'llama'"),
        ("hidden_size", "224", "hidden_size expects a whole number from 1 to .*, found '224'"),
        ("layer_types", ["full_attention"], "layer_types expects 4, sliding and full by turns"),
        (
            "rope_parameters",
            {"rope_type": "yarn", "factor": 2.0},
            "expects rope_parameters to repeat",
        ),
        ("quantization_config", {"quant_method": "gptq"}, "quant_method expects 'mxfp4'"),
    ],
)
def test_a_foreign_config_is_refused(tmp_path: Path, key: str, value: object, message: str) -> None:
    directory = write_hf_bf16(tmp_path / "hf", DISTINCT, random_weights(DISTINCT))
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(config | {key: value}))
    with pytest.raises(InputError, match=message):
        HfReader(directory, CPU)


def megatron_options(**changes: object) -> Section:
    """The numbers of DISTINCT as Megatron's options spell them."""
    options: dict[str, object] = {
        "num_layers": 4, "hidden_size": 224, "moe_ffn_hidden_size": 192,
        "num_attention_heads": 15, "num_query_groups": 5, "kv_channels": 20,
        "num_moe_experts": 8, "moe_router_topk": 4, "vocab_size": 353,
        "window_size": [15, 0], "window_attn_skip_freq": 2, "rotary_base": 150000,
        "yarn_rotary_scaling_factor": 32.0, "yarn_original_max_position_embeddings": 128,
        "yarn_beta_fast": 8.0, "yarn_beta_slow": 1.0, "yarn_mscale": None,
        "yarn_mscale_all_dim": None, "yarn_correction_range_round_to_int": False,
        "activation_func_clamp_value": 7.0, "layernorm_epsilon": 1e-5,
        "softmax_type": "learnable", "glu_linear_offset": 1.0, "gated_linear_unit": True,
        "normalization": "RMSNorm", "add_bias_linear": True, "add_qkv_bias": True,
        "moe_router_pre_softmax": False, "moe_router_score_function": "softmax",
        "position_embedding_type": "yarn", "share_embeddings_and_output_weights": False,
    }  # fmt: skip
    return Section(options | changes, "run_config.yaml: model")


def test_configs_of_all_ecosystems_agree(tmp_path: Path) -> None:
    weights = random_weights(DISTINCT)
    hf = HfReader(write_hf_mxfp4(tmp_path / "hf", DISTINCT, weights), CPU).config
    openai = OpenAiReader(write_openai(tmp_path / "original", DISTINCT, weights), CPU).config
    assert openai == hf
    numbers = {"window": 1, "rope_theta": 2.0, "rope_factor": 3.0, "rope_original_length": 4}
    numbers |= {"rope_beta_fast": 5.0, "rope_beta_slow": 6.0, "rope_truncate": True}
    numbers |= {"swiglu_limit": 8.0, "norm_eps": 9.0, "experts_per_token": 1}
    other = replace(hf, **numbers, sliding=(True,) * 4)
    assert megatron_config(megatron_options(), other) == hf
    listed = megatron_options(window_attn_skip_freq=[1, 0, 1, 0])
    assert megatron_config(listed, other) == hf


def test_a_window_of_one_key_too_many_is_seen(tmp_path: Path) -> None:
    weights = random_weights(DISTINCT)
    base = HfReader(write_hf_mxfp4(tmp_path / "hf", DISTINCT, weights), CPU).config
    assert megatron_config(megatron_options(window_size=[16, 0]), base).window == 17
    with pytest.raises(InputError, match="softmax_type expects 'learnable', found 'vanilla'"):
        megatron_config(megatron_options(softmax_type="vanilla"), base)


MUTANTS = {
    "rotary_base": 10000,
    "yarn_beta_fast": 2.0,
    "yarn_original_max_position_embeddings": 256,
    "activation_func_clamp_value": 3.0,
}


@pytest.mark.parametrize("field", MUTANTS)
def test_a_wrong_field_that_the_converter_writes_and_believes_fails_the_logits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, field: str
) -> None:
    """The same function writes a field and holds it against the model: only a witness can tell."""
    right = fields.model_numbers

    def wrong(config: Config) -> dict[str, Any]:
        return {**right(config), field: MUTANTS[field]}

    monkeypatch.setattr(fields, "model_numbers", wrong)
    hf = write_hf_mxfp4(tmp_path / "hf", DISTINCT, random_weights(DISTINCT))
    convert(hf, tmp_path / "megatron", Options(to="megatron"))
    found = verify_checkpoints(hf, tmp_path / "megatron", VerifyOptions(sample=300))
    assert [level.same for level in found.levels] == [True, True, False]


def test_all_codes_decode_exactly_at_all_scales() -> None:
    blocks = torch.arange(256, dtype=torch.uint8).view(1, 16, 16).expand(253, 16, 16)
    scales = torch.arange(253, dtype=torch.uint8).view(253, 1).expand(253, 16)
    packed = checked(Packed(blocks.contiguous(), scales.contiguous()), "x")
    expected = decode_mxfp4(blocks, scales)
    assert torch.isfinite(expected).all()
    for dtype in (torch.bfloat16, torch.float32):
        decoded = packed.decode(dtype)
        assert np.array_equal(
            decoded.float().view(torch.int32).numpy(), expected.float().view(torch.int32).numpy()
        )
    assert decoded[0, 2] == math.ldexp(0.5, -127)  # byte 1, low nibble first


def test_scales_without_a_finite_value_are_refused() -> None:
    blocks = torch.zeros(1, 16, dtype=torch.uint8)
    with pytest.raises(CodecError, match="x: expects scales up to 252, found 253"):
        checked(Packed(blocks, torch.tensor([253], dtype=torch.uint8)), "x")


def test_a_directory_of_one_file_needs_no_index(tmp_path: Path) -> None:
    weights = random_weights(SQUARE)
    sharded = write_hf_mxfp4(tmp_path / "hf", SQUARE, weights)
    single = tmp_path / "single"
    single.mkdir()
    (single / "config.json").write_bytes((sharded / "config.json").read_bytes())
    save_file(weights, single / "model.safetensors")
    assert torch.equal(HfReader(single, CPU).norm(), HfReader(sharded, CPU).norm())


def test_a_file_that_is_no_safetensors_is_named(tmp_path: Path) -> None:
    directory = write_openai(tmp_path / "original", SQUARE, random_weights(SQUARE))
    (directory / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1")
    with pytest.raises(IntegrityError, match=r"model\.safetensors: a Git LFS pointer"):
        OpenAiReader(directory, CPU)
    (directory / "model.safetensors").unlink()
    with pytest.raises(IntegrityError, match=r"expects \.safetensors files, found none"):
        OpenAiReader(directory, CPU)


def test_a_tensor_stored_twice_is_refused(tmp_path: Path) -> None:
    directory = write_openai(tmp_path / "original", SQUARE, random_weights(SQUARE))
    save_file({"norm.scale": torch.ones(128)}, directory / "sidecar.safetensors")
    with pytest.raises(IntegrityError, match=r"norm\.scale is stored in another file as well"):
        OpenAiReader(directory, CPU)
