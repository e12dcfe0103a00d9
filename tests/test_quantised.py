"""Checkpoints that other tools quantised, decoded bit for bit as their own libraries do."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from gptoss_convert.compare.values import compare_values
from gptoss_convert.containers import Chunk, safetensors
from gptoss_convert.containers.refs import FileRef
from gptoss_convert.conversion.options import Options
from gptoss_convert.conversion.plan import plan
from gptoss_convert.conversion.run import run
from gptoss_convert.engine.unpacking import Unpacker
from gptoss_convert.errors import GptossError, InputError, IntegrityError
from gptoss_convert.formats import quantised
from gptoss_convert.formats.registry import open_checkpoint
from gptoss_convert.layouts.extents import Extent
from gptoss_convert.machine.arena import Arena
from gptoss_convert.machine.files import SourceFiles
from gptoss_convert.verify.gate import verify_checkpoints
from gptoss_convert.verify.result import VerifyOptions
from tests import odd_models
from tests.tiny_files import hf_config
from tests.tiny_models import DISTINCT, FP4_VALUES, decode_mxfp4, hf_bf16_tensors, random_weights
from tests.trainer_names import per_expert

RECORDED = Path(__file__).parent / "recorded"
FILE = "quantised.safetensors"
FP8 = {"num_bits": 8, "type": "float", "block_structure": [8, 64]}


def values(chunk: Chunk, spans: Sequence[tuple[int, int]] = (), folder: Path = RECORDED) -> Tensor:
    """The decoded values of a tensor of the recorded file, or those of ranges, one by one."""
    box = tuple((0, n) for n in chunk.shape)
    extent = Extent(
        "", box, FileRef(folder, FILE), 0, (), "BF16", chunk.tensor, packed=chunk.packed
    )
    count = int(np.prod(chunk.shape))
    arena = Arena(1 << 20)
    found: list[np.ndarray] = []
    with SourceFiles() as files:
        source = Unpacker(files).of(extent)
        for first, last in spans or [(0, count)]:
            arena.reset(1 << 20)
            position = arena.take(2 * (last - first), 0)
            source.read(extent.file, 2 * first, 2 * (last - first), arena, position)
            raw = bytes(memoryview(arena.memory)[position : position + 2 * (last - first)])
            found.append(np.frombuffer(raw, np.int16))
    return torch.from_numpy(np.concatenate(found)).view(torch.bfloat16)


def recorded(method: str, stems: Sequence[str], **said: Any) -> dict[str, Chunk]:
    chunks = safetensors.read_header(RECORDED, FILE).chunks
    own = [chunk for chunk in chunks if chunk.tensor.partition(".")[0] in stems]
    found = quantised.decoded("config.json", RECORDED, own, {"quant_method": method, **said})
    assert all(chunk.packed for chunk in found.chunks), "a member was left"
    return {chunk.tensor: chunk for chunk in found.chunks}


@pytest.mark.parametrize(
    ("method", "stems", "said"),
    [
        ("bitsandbytes", ["plain", "nested", "fp4"], {}),
        ("compressed-tensors", ["nv", "mx"], {}),
        *(
            (
                "compressed-tensors",
                [stem, f"{stem}h"],
                {"config_groups": {"group_0": {"weights": {**FP8, "strategy": strategy}}}},
            )
            for stem, strategy in (("t", "tensor"), ("c", "channel"), ("b", "block"))
        ),
    ],
)
def test_every_tensor_decodes_as_its_library_decodes_it(
    method: str, stems: list[str], said: dict[str, Any]
):
    expected = load_file(RECORDED / "quantised-decoded.safetensors")
    generator = np.random.default_rng(1)
    found = recorded(method, stems, **said)
    assert {name.partition(".")[0] for name in found} == {*stems}
    for name, chunk in found.items():
        wanted = expected[name]
        assert chunk.shape == wanted.shape
        whole = values(chunk)
        assert torch.equal(whole.view(torch.int16), wanted.reshape(-1).view(torch.int16)), name
        # Any range is decoded by itself, from blocks that it may cut.
        ends = [sorted(generator.integers(0, len(whole), 2)) for _ in range(9)]
        spans = [(int(low), int(high) + 1) for low, high in ends]
        pieces = torch.cat([whole[low:high] for low, high in spans])
        assert torch.equal(values(chunk, spans).view(torch.int16), pieces.view(torch.int16)), name


@pytest.mark.parametrize("size", [None, [128, 128]])
def test_fp8_with_inverse_scales_is_the_product_by_blocks(tmp_path: Path, size: list[int] | None):
    """As transformers' FineGrainedFP8 multiplies: the name says inverse, the number is a factor."""
    generator = torch.Generator().manual_seed(3)
    codes = torch.randn(300, 200, generator=generator).to(torch.float8_e4m3fn)
    grid = (3, 2) if size else (1, 1)
    scales = torch.rand(grid, generator=generator) * 0.01 + 1e-4
    save_file({"w.weight": codes, "w.weight_scale_inv": scales}, tmp_path / FILE)
    chunks = safetensors.read_header(tmp_path, FILE).chunks
    said = {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": size}
    (found,) = quantised.decoded("config.json", tmp_path, chunks, said).chunks
    each = (128, 128) if size else codes.shape
    spread = scales.repeat_interleave(each[0], 0).repeat_interleave(each[1], 1)[:300, :200]
    wanted = (codes.float() * spread).to(torch.bfloat16)
    whole = values(found, folder=tmp_path)
    assert torch.equal(whole.view(torch.int16), wanted.reshape(-1).view(torch.int16))


def unpacked(codes: Tensor, scales: Tensor, common: Tensor) -> Tensor:
    """ModelOpt's experts by its own formula, written out: [E, K/2, N] -> [E, K, N]."""
    nibbles = torch.stack((codes & 15, codes >> 4), dim=2).flatten(1, 2)
    products = scales.float() * common
    each = products.repeat_interleave(16, dim=1)
    return (torch.tensor(FP4_VALUES)[nibbles.long()] * each).to(torch.bfloat16)


SAYS: dict[str, Any] = {
    "quant_method": "modelopt",
    "quant_algo": "NVFP4",
    "config_groups": {
        "group_0": {
            "input_activations": {"dynamic": False, "num_bits": 4, "group_size": 16},
            "weights": {"dynamic": False, "num_bits": 4, "type": "float", "group_size": 16},
            "targets": ["Linear"],
        }
    },
    "ignore": ["lm_head"],
    "producer": {"name": "modelopt", "version": "0.37.0"},
}


@pytest.fixture(scope="module")
def modelopt(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """ModelOpt's NVFP4 of a small model, and beside it what it decodes to, as BF16."""
    folder = tmp_path_factory.mktemp("modelopt")
    sizes: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 96, "num_local_experts": 4}
    plain = odd_models.save(folder / "bf16", **sizes)
    tensors = load_file(plain / "model.safetensors")
    generator = torch.Generator().manual_seed(2)
    stored: dict[str, Tensor] = {}
    for name, tensor in [*tensors.items()]:
        if not name.endswith(("gate_up_proj", "down_proj")):
            stored[name] = tensor
            continue
        experts, rows, columns = tensor.shape
        codes = torch.randint(0, 256, (experts, rows // 2, columns), generator=generator)
        scales = torch.rand((experts, rows // 16, columns), generator=generator) * 3 + 0.1
        common = torch.rand((), generator=generator) * 0.01
        stored[name] = codes.to(torch.uint8)
        stored[f"{name}_weight_scale"] = scales.to(torch.float8_e4m3fn)
        stored[f"{name}_weight_scale_2"] = common
        stored[f"{name}_input_scale"] = torch.rand((), generator=generator)
        tensors[name] = unpacked(stored[name], stored[f"{name}_weight_scale"], common)
    stored["model.layers.0.self_attn.k_proj.k_scale"] = torch.ones(1)
    shutil.copytree(plain, folder / "nvfp4")
    save_file(stored, folder / "nvfp4" / "model.safetensors", {"format": "pt"})
    odd_models.edit(folder / "nvfp4", quantization_config=SAYS)
    save_file(tensors, plain / "model.safetensors", {"format": "pt"})
    return folder


def changed(modelopt: Path, target: Path, tensors: Mapping[str, Tensor] | None = None) -> Path:
    """A copy of the quantised model with other tensors."""
    shutil.copytree(modelopt / "nvfp4", target)
    file = target / "model.safetensors"
    save_file(load_file(file) | dict(tensors or {}), file, {"format": "pt"})
    return target


def test_modelopts_experts_become_the_bf16_that_its_formula_gives(modelopt: Path, tmp_path: Path):
    conversion = plan(modelopt / "nvfp4", tmp_path / "out", Options("hf", workers=1))
    assert any("4 tensors decoded from NVFP4 by ModelOpt" in note for note in conversion.notes)
    assert any("1 scales of a KV cache left out" in note for note in conversion.notes)
    run(conversion)
    found = load_file(tmp_path / "out" / "model.safetensors")
    expected = load_file(modelopt / "bf16" / "model.safetensors")
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(found[name].view(torch.int16), tensor.view(torch.int16)), name
    said = json.loads((tmp_path / "out" / "config.json").read_text())
    assert "quantization_config" not in said
    # Compared as they lie, without a conversion.
    ours, theirs = (open_checkpoint(modelopt / name) for name in ("nvfp4", "bf16"))
    assert compare_values(ours, theirs, workers=1).same


def test_values_on_mxfp4s_grid_go_on_to_mxfp4_and_others_are_refused(
    modelopt: Path, tmp_path: Path
):
    with pytest.raises(GptossError, match="--lossy"):
        run(plan(modelopt / "nvfp4", tmp_path / "no", Options("hf", "mxfp4", workers=1)))
    stored = load_file(modelopt / "nvfp4" / "model.safetensors")
    even = {
        name: torch.full_like(tensor, 0.25 if tensor.dtype == torch.float8_e4m3fn else 0.5)
        for name, tensor in stored.items()
        if "_weight_scale" in name
    }
    source = changed(modelopt, tmp_path / "even", even)
    run(plan(source, tmp_path / "mxfp4", Options("hf", "mxfp4", workers=1)))
    ours, theirs = open_checkpoint(source), open_checkpoint(tmp_path / "mxfp4")
    assert theirs.encoding == "mxfp4"
    assert compare_values(ours, theirs, workers=1).same


@pytest.mark.parametrize("mistake", ["nibbles", "halves", "expert"])
def test_a_wrong_reading_is_not_the_model(modelopt: Path, tmp_path: Path, mistake: str):
    name = "model.layers.1.mlp.experts.gate_up_proj"
    codes = load_file(modelopt / "nvfp4" / "model.safetensors")[name]
    other = {
        "nibbles": codes >> 4 | (codes & 15) << 4,
        "halves": torch.cat((codes[..., ::2], codes[..., 1::2]), dim=-1),
        "expert": codes.roll(1, dims=0),
    }[mistake]
    source = changed(modelopt, tmp_path / "other", {name: other.contiguous()})
    report = compare_values(open_checkpoint(modelopt / "bf16"), open_checkpoint(source), workers=1)
    assert {(one.parameter, one.layer) for one in report.differences} == {("gate_up.weight", 1)}


@pytest.mark.parametrize(
    ("said", "message"),
    [
        ({"quant_algo": "W4A8_AWQ"}, "quant_algo is 'W4A8_AWQ'; read: \"NVFP4\""),
        ({"rotation": "hadamard"}, "rotation is not known here: 'hadamard'"),
        (
            {"config_groups": {"group_0": {"weights": {"num_bits": 4, "group_size": 32}}}},
            "config_groups group_0: weights: group_size is 32; read: 16",
        ),
    ],
)
def test_what_quantization_config_says_is_read_or_refused(
    modelopt: Path, tmp_path: Path, said: dict[str, Any], message: str
):
    source = changed(modelopt, tmp_path / "source")
    odd_models.edit(source, quantization_config={**SAYS, **said})
    with pytest.raises(InputError, match=r"config\.json: quantization_config: " + message):
        open_checkpoint(source)


def test_members_that_do_not_belong_together_are_refused(modelopt: Path, tmp_path: Path):
    name = "model.layers.0.mlp.experts.down_proj"
    scales = torch.ones((4, 3, 64)).to(torch.float8_e4m3fn)
    source = changed(modelopt, tmp_path / "source", {f"{name}_weight_scale": scales})
    with pytest.raises(InputError, match=rf"{name}: NVFP4 by ModelOpt: scales has shape"):
        open_checkpoint(source)


def test_a_scale_that_is_no_number_is_damage(modelopt: Path, tmp_path: Path):
    name = "model.layers.0.mlp.experts.down_proj"
    scale = torch.tensor(float("inf"))
    source = changed(modelopt, tmp_path / "source", {f"{name}_weight_scale_2": scale})
    with pytest.raises(IntegrityError, match=rf"{name}: values 0\.\.\d+: \d+ decoded values are"):
        run(plan(source, tmp_path / "out", Options("hf", workers=1)))
    assert not (tmp_path / "out").exists()


def test_bitsandbytes_says_in_json_what_its_blocks_are(tmp_path: Path):
    tensors = {k: v for k, v in load_file(RECORDED / FILE).items() if k.startswith("plain.")}
    key = "plain.weight.quant_state.bitsandbytes__nf4"
    state = json.loads(bytes(tensors[key].numpy()))

    def opened(**changes: Any) -> None:
        raw = json.dumps({**state, **changes}).encode()
        told = {**tensors, key: torch.tensor([*raw], dtype=torch.uint8)}
        save_file(told, tmp_path / FILE)
        chunks = safetensors.read_header(tmp_path, FILE).chunks
        quantised.decoded("config.json", tmp_path, chunks, {"quant_method": "bitsandbytes"})

    opened()
    for changes, message in (
        ({"dtype": "float16"}, "dtype is 'float16', which is not read"),
        ({"transposed": True}, "transposed is True, which is not read"),
        ({"shape": [8, 704.5]}, "shape is"),
        ({"blocksize": 32}, "absmax has shape"),
        ({"blocksize": 0}, "no blocksize"),
    ):
        with pytest.raises(InputError, match=message):
            opened(**changes)


SMALL = replace(DISTINCT, layers=1, experts=4, hidden=64, inter=96, vocab=99)
WHOLE = hf_bf16_tensors(random_weights(SMALL, seed=21))


def with_config(folder: Path, **said: Any) -> Path:
    folder.mkdir()
    config = {**hf_config(SMALL, mxfp4=False), "quantization_config": said}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def converted(source: Path, target: Path, **options: Any) -> dict[str, Tensor]:
    run(plan(source, target, Options("hf", workers=1, **options)))
    return load_file(target / "model.safetensors")


def stacked(decoded: Mapping[str, Tensor], names: Mapping[str, str]) -> dict[str, Tensor]:
    """The model in which these experts have taken their places, by parameter and expert."""
    model = {name: tensor.clone() for name, tensor in WHOLE.items()}
    for name, tensor in decoded.items():
        stem, _, kind = name.partition(".mlp.experts.")
        which, expert = names[kind.removesuffix(".weight")].split()
        model[f"{stem}.mlp.experts.{which}"][int(expert)] = tensor.T
    return model


def assert_same(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    assert not [n for n, t in expected.items() if not torch.equal(t, found[n])]


def test_unsloth_s_4_bit_experts_are_decoded_and_stacked(tmp_path: Path):
    """unsloth's names; half of the experts, as layers may be left in BF16."""
    generator = torch.Generator().manual_seed(3)
    levels = load_file(RECORDED / FILE)["plain.weight.quant_map"]
    stored = per_expert(WHOLE, "unsloth")
    decoded: dict[str, Tensor] = {}
    names: dict[str, str] = {}
    for which in ("gate_up", "down"):
        for expert in (0, 2):
            name = f"model.layers.0.mlp.experts.{which}_projs.{expert}.weight"
            shape = stored[name].shape
            codes = torch.randint(0, 256, (stored[name].numel() // 2, 1), generator=generator)
            largest = torch.rand(len(codes) // 32, generator=generator)
            pairs = torch.cat((codes >> 4, codes & 15), dim=1).reshape(-1)
            values = levels[pairs].reshape(-1, 64) * largest[:, None]
            decoded[name] = values.to(torch.bfloat16).reshape(shape)
            names[f"{which}_projs.{expert}"] = f"{which}_proj {expert}"
            state = {"quant_type": "nf4", "blocksize": 64, "dtype": "bfloat16", "shape": [*shape]}
            stored |= {
                name: codes.to(torch.uint8),
                f"{name}.absmax": largest,
                f"{name}.quant_map": levels.clone(),
                f"{name}.quant_state.bitsandbytes__nf4": torch.tensor(
                    [*json.dumps(state).encode()], dtype=torch.uint8
                ),
            }
    source = with_config(tmp_path / "source", quant_method="bitsandbytes", load_in_4bit=True)
    save_file(stored, source / "model.safetensors")
    assert_same(converted(source, tmp_path / "out"), stacked(decoded, names))


def test_compressed_mxfp4_of_attention_and_experts_goes_on_to_mxfp4(tmp_path: Path):
    """llm-compressor's names, gate and up apart; attention is decoded, experts stay exact."""
    generator = torch.Generator().manual_seed(4)
    stored = per_expert(WHOLE, "before")
    expected = {name: tensor.clone() for name, tensor in WHOLE.items()}
    for name, tensor in [*stored.items()]:
        experts = ".experts.experts." in name and name.endswith(".weight")
        if not experts and not name.endswith("o_proj.weight"):
            continue
        rows, columns = tensor.shape
        if columns % 32:
            continue
        codes = torch.randint(0, 256, (rows, columns // 2), generator=generator).to(torch.uint8)
        scales = torch.randint(119, 123, (rows, columns // 32), generator=generator)
        scales = scales.to(torch.uint8)
        values = decode_mxfp4(codes.reshape(rows, -1, 16), scales)
        stem = name.removesuffix(".weight")
        del stored[name]
        stored |= {f"{stem}.weight_packed": codes, f"{stem}.weight_scale": scales}
        if not experts:
            expected[name] = values
            continue
        layer, _, rest = stem.partition(".experts.experts.")
        expert, which = rest.split(".")
        whole = expected[f"{layer}.experts.{'down' if which == 'down_proj' else 'gate_up'}_proj"]
        into = whole[int(expert)]
        half = {"gate_proj": slice(0, None, 2), "up_proj": slice(1, None, 2)}
        into[:, half.get(which, slice(None))] = values.T
    source = with_config(
        tmp_path / "source",
        quant_method="compressed-tensors",
        format="mxfp4-pack-quantized",
        quantization_status="compressed",
        config_groups={
            "group_0": {
                "targets": ["Linear"],
                "weights": {
                    "num_bits": 4,
                    "type": "float",
                    "strategy": "group",
                    "group_size": 32,
                    "symmetric": True,
                    "dynamic": False,
                    "actorder": None,
                },
            }
        },
    )
    save_file(stored, source / "model.safetensors")
    assert_same(converted(source, tmp_path / "bf16"), expected)
    run(plan(source, tmp_path / "mxfp4", Options("hf", "mxfp4", workers=1)))
    assert compare_values(
        open_checkpoint(source), open_checkpoint(tmp_path / "mxfp4"), workers=1
    ).same


@pytest.mark.parametrize(
    ("method", "words"),
    [
        ("quark", "which does not say whether rows of gate and up alternate"),
        ("gptq", "dequantise it with its own library"),
        ("hqq", "which is not known here; supported: bitsandbytes, compressed-tensors, fp8"),
    ],
)
def test_other_quantisations_are_told_by_name(tmp_path: Path, method: str, words: str):
    source = with_config(tmp_path / "source", quant_method=method)
    save_file({**WHOLE, "odd": torch.ones(1)}, source / "model.safetensors")
    with pytest.raises(InputError, match=rf"quantised with '{method}', .*{words}"):
        open_checkpoint(source)


def test_a_quantised_model_has_no_witness_and_says_so(modelopt: Path):
    with pytest.raises(InputError, match="which no witness here reads; convert it"):
        verify_checkpoints(
            modelopt / "nvfp4",
            modelopt / "bf16",
            VerifyOptions(level="logits", device="cpu", max_length=20, sample=20, workers=1),
        )
