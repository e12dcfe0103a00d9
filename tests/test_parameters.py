"""A checkpoint as a mapping: every format gives the same tensors, and reads what is asked for."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import gptoss_convert
from gptoss_convert import Options, Parameters, convert
from gptoss_convert.containers.refs import FileRef
from gptoss_convert.errors import InputError, IntegrityError, UsageError
from gptoss_convert.formats.checkpoint import Choices
from gptoss_convert.layouts.model import load_model
from gptoss_convert.machine.arena import Arena
from gptoss_convert.machine.files import SourceFiles
from tests.tiny_files import hf_config, write_hf_bf16, write_hf_mxfp4, write_megatron, write_openai
from tests.tiny_models import DISTINCT, TinyShape, decode_mxfp4, random_weights

SHAPE = DISTINCT
FORMATS = ("hf-mxfp4", "hf-bf16", "openai", "megatron")
PACKED = ("hf-mxfp4", "openai")
GATE_UP, DOWN = 2 * SHAPE.inter * SHAPE.hidden, SHAPE.hidden * SHAPE.inter


def parameters_of(shape: TinyShape, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Every parameter, with the axes that `model.toml` names, stated by hand."""

    def stacked(name: str) -> Tensor:
        return torch.stack([weights[f"model.layers.{n}.{name}"] for n in range(shape.layers)])

    def heads(name: str, *sizes: int) -> Tensor:
        return stacked(f"self_attn.{name}").unflatten(1, sizes)

    def pairs(name: str) -> Tensor:
        return stacked(f"mlp.experts.{name}").unflatten(2, (shape.inter, 2))

    group = (shape.kv_heads, shape.heads // shape.kv_heads)
    out = stacked("self_attn.o_proj.weight").unflatten(2, (*group, shape.head_dim))
    found = {
        "embedding.weight": weights["model.embed_tokens.weight"],
        "attention.norm.weight": stacked("input_layernorm.weight"),
        "attention.out.weight": out,
        "attention.out.bias": stacked("self_attn.o_proj.bias"),
        "attention.sinks": heads("sinks", *group),
        "mlp.norm.weight": stacked("post_attention_layernorm.weight"),
        "router.weight": stacked("mlp.router.weight"),
        "router.bias": stacked("mlp.router.bias"),
        "gate_up.weight.blocks": pairs("gate_up_proj_blocks"),
        "gate_up.weight.scales": pairs("gate_up_proj_scales"),
        "gate_up.bias": pairs("gate_up_proj_bias"),
        "down.weight.blocks": stacked("mlp.experts.down_proj_blocks"),
        "down.weight.scales": stacked("mlp.experts.down_proj_scales"),
        "down.bias": stacked("mlp.experts.down_proj_bias"),
        "norm.weight": weights["model.norm.weight"],
        "unembedding.weight": weights["lm_head.weight"],
    }
    for kind in ("weight", "bias"):
        found[f"attention.q.{kind}"] = heads(f"q_proj.{kind}", *group, shape.head_dim)
        found[f"attention.k.{kind}"] = heads(f"k_proj.{kind}", shape.kv_heads, shape.head_dim)
        found[f"attention.v.{kind}"] = heads(f"v_proj.{kind}", shape.kv_heads, shape.head_dim)
    for weight in ("gate_up.weight", "down.weight"):
        found[weight] = decode_mxfp4(found[f"{weight}.blocks"], found[f"{weight}.scales"])
    return found


@pytest.fixture(scope="module")
def expected() -> dict[str, Tensor]:
    return parameters_of(SHAPE, random_weights(SHAPE, seed=11))


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("formats")
    weights = random_weights(SHAPE, seed=11)
    write_hf_mxfp4(root / "hf-mxfp4", SHAPE, weights)
    write_hf_bf16(root / "hf-bf16", SHAPE, weights)
    write_openai(root / "openai", SHAPE, weights)
    write_megatron(root / "megatron" / "iter_0000001", SHAPE, weights, pad_vocab=31)
    (root / "config.json").write_text(json.dumps(hf_config(SHAPE, mxfp4=False)))
    return root


def opened(folders: Path, name: str) -> Parameters:
    config = folders / "config.json" if name == "megatron" else None
    return gptoss_convert.open(folders / name, Choices(config=config))


def same(found: Tensor, wanted: Tensor) -> bool:
    bits = torch.int16 if wanted.dtype == torch.bfloat16 else wanted.dtype
    return found.dtype == wanted.dtype and torch.equal(found.view(bits), wanted.view(bits))


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_gives_the_same_parameters(
    folders: Path, expected: dict[str, Tensor], name: str
) -> None:
    with opened(folders, name) as checkpoint:
        packed = {param for param in expected if param.endswith((".blocks", ".scales"))}
        assert set(checkpoint) == set(expected) - (packed if name not in PACKED else set())
        for param, parameter in checkpoint.items():
            assert parameter.axes == load_model().params[param]
            assert parameter.shape == tuple(expected[param].shape)
            assert parameter.nbytes == expected[param].nbytes
            assert same(parameter[...], expected[param]), param


@pytest.mark.parametrize("name", FORMATS)
def test_an_index_means_what_it_means_to_torch(
    folders: Path, expected: dict[str, Tensor], name: str
) -> None:
    choose = random.Random(5)
    with opened(folders, name) as checkpoint:
        for param, parameter in checkpoint.items():
            for _ in range(6):
                index = random_index(choose, parameter.shape)
                assert same(parameter[index], expected[param][index]), (param, index)


def random_index(choose: random.Random, shape: tuple[int, ...]) -> Any:
    items: list[Any] = []
    for length in shape[: choose.randint(1, len(shape))]:
        low, high = sorted(choose.choices(range(-1, length + 1), k=2))
        step = choose.choice([1, 1, 1, 2, 3])
        items.append(choose.choice([choose.randrange(-length, length), slice(low, high, step)]))
    if choose.random() < 0.3:
        items[choose.randrange(len(items)) :] = [..., slice(choose.randrange(shape[-1]), None)]
    return tuple(items) if len(items) > 1 else items[0]


@contextmanager
def counted(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """The length of every read while the context lasts."""
    lengths: list[int] = []
    original = SourceFiles.read

    def read(
        files: SourceFiles, file: FileRef, offset: int, nbytes: int, arena: Arena, at: int
    ) -> None:
        lengths.append(nbytes)
        original(files, file, offset, nbytes, arena, at)

    with monkeypatch.context() as patched:
        patched.setattr(SourceFiles, "read", read)
        yield lengths


@pytest.mark.parametrize(
    ("name", "param", "index", "needed"),
    [
        ("hf-mxfp4", "gate_up.weight", (1, 2), [GATE_UP // 2, GATE_UP // 32]),
        ("openai", "down.weight", (3, 7), [DOWN // 2, DOWN // 32]),
        ("hf-mxfp4", "gate_up.weight.scales", (1, 2), [GATE_UP // 32]),
        ("hf-bf16", "gate_up.weight", (1, 2), [2 * GATE_UP]),
        ("megatron", "gate_up.weight", (1, 2), [2 * GATE_UP]),
        ("hf-mxfp4", "down.weight", (0, 5, 17), [SHAPE.inter // 2, SHAPE.inter // 32]),
        ("hf-mxfp4", "down.weight", (0, 5, 17, slice(32, 96)), [32, 2]),
        ("hf-mxfp4", "down.weight", (0, 5, 17, 40), [16, 1]),
        ("openai", "attention.k.bias", (2, 1), [2 * SHAPE.head_dim]),
        ("megatron", "norm.weight", (5,), [2]),
        ("megatron", "embedding.weight", (slice(10, 13),), [2 * 3 * SHAPE.hidden]),
        ("hf-bf16", "router.weight", (slice(2, 2),), []),
    ],
)
def test_an_index_reads_its_bytes_and_no_others(
    folders: Path,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    param: str,
    index: Any,
    needed: list[int],
) -> None:
    with opened(folders, name) as checkpoint, counted(monkeypatch) as lengths:
        checkpoint[param][index]
    assert sorted(lengths, reverse=True) == needed


def test_opening_and_looking_reads_no_weight(
    folders: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with counted(monkeypatch) as lengths, opened(folders, "hf-mxfp4") as checkpoint:
        assert repr(checkpoint)
        assert all(map(repr, checkpoint.values()))
    assert lengths == []


def test_scattered_elements_are_read_with_the_gaps_between_them_not_one_by_one(
    folders: Path, expected: dict[str, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    # Stored as (inter, hidden): the elements of one row of the parameter lie 2 x hidden apart.
    with opened(folders, "hf-bf16") as checkpoint, counted(monkeypatch) as lengths:
        assert same(checkpoint["down.weight"][1, 3, 9], expected["down.weight"][1, 3, 9])
    assert lengths == [2 * (SHAPE.inter - 1) * SHAPE.hidden + 2]


def test_an_int_picks_a_layer_and_iterating_goes_through_the_layers(
    folders: Path, expected: dict[str, Tensor]
) -> None:
    with opened(folders, "megatron") as checkpoint:
        sinks = checkpoint["attention.sinks"]
        assert len(sinks) == SHAPE.layers
        layers = [*sinks]
    assert len(layers) == SHAPE.layers
    assert all(map(same, layers, expected["attention.sinks"]))


def test_a_parameter_tells_where_it_lies(folders: Path) -> None:
    with opened(folders, "hf-mxfp4") as checkpoint:
        down = checkpoint["down.weight"]
        assert (down.dtype, down.stored_as) == ("BF16", "MXFP4")
        assert down.stored_bytes == SHAPE.layers * SHAPE.experts * DOWN * 17 // 32
        assert down.tensors[:2] == (
            "model.layers.0.mlp.experts.down_proj_blocks",
            "model.layers.1.mlp.experts.down_proj_blocks",
        )
        assert {path.parent for path in down.files} == {folders / "hf-mxfp4"}
        assert repr(down) == (
            "down.weight: layer=4 expert=8 hidden=224 inter=192; BF16, 2,752,512 bytes; "
            "stored as MXFP4, 731,136 bytes, in model-00001-of-00002.safetensors and 1 more files"
        )
        assert repr(checkpoint["norm.weight"]).endswith("in model-00002-of-00002.safetensors")


def test_a_checkpoint_shows_its_parameters_as_a_table(folders: Path) -> None:
    with opened(folders, "hf-mxfp4") as checkpoint:
        head, titles, *rows = repr(checkpoint).splitlines()
    assert head.endswith("/hf-mxfp4: hf-mxfp4, gpt-oss 4 layers, 8 experts, hidden 224")
    assert titles.split()[:3] == ["parameter", "axes", "shape"]
    assert len({len(line) for line in (titles, *rows)}) == 1
    table = {row.split()[0]: " ".join(row.split()[1:]) for row in rows}
    assert table["gate_up.weight.scales"] == (
        "layer expert inter glu hidden_block 4 x 8 x 192 x 2 x 7 U8 U8 86,016"
    )
    assert table["norm.weight"] == "hidden 224 BF16 BF16 448"


def test_the_scales_beside_bf16_weights_are_a_parameter(folders: Path, tmp_path: Path) -> None:
    convert(folders / "hf-mxfp4", tmp_path / "bf16", Options(to="hf", dtype="bf16"))
    with (
        gptoss_convert.open(tmp_path / "bf16") as ours,
        opened(folders, "hf-mxfp4") as original,
    ):
        scales = ours["down.weight.scales"]
        assert same(scales[2], original["down.weight.scales"][2])
        assert ours["down.weight"].stored_as == "BF16"
        assert "down.weight.blocks" not in ours


def test_float32_is_rounded_if_asked_for(tmp_path: Path, expected: dict[str, Tensor]) -> None:
    from safetensors.torch import load_file, save_file

    folder = write_hf_bf16(tmp_path / "f32", SHAPE, random_weights(SHAPE, seed=11))
    shard = folder / "model-00002-of-00002.safetensors"
    save_file({name: tensor.float() for name, tensor in load_file(shard).items()}, shard)
    with pytest.raises(InputError, match="expects dtype BF16, found F32"):
        gptoss_convert.open(folder)
    with gptoss_convert.open(folder, cast=True) as checkpoint:
        assert checkpoint["norm.weight"].stored_as == "F32"
        assert same(checkpoint["norm.weight"][...], expected["norm.weight"])


@pytest.mark.parametrize(
    ("use", "error", "message"),
    [
        (lambda ck: ck["attention.q.wieght"], KeyError, "did you mean attention.q.weight?"),
        (lambda ck: ck["x"], KeyError, "x: no such parameter; known: embedding.weight, "),
        (lambda ck: ck["down.weight.blocks"], KeyError, "stores its experts as BF16"),
        (lambda ck: ck["down.weight"][4], IndexError,
         "down.weight: layer 4 does not exist, there are 4"),
        (lambda ck: ck["down.weight"][0, -9], IndexError, "expert -9 does not exist"),
        (lambda ck: ck["norm.weight"][0, 0], IndexError, "2 indexes for the axes hidden"),
        (lambda ck: ck["norm.weight"][..., ...], IndexError, "2 indexes for the axes hidden"),
        (lambda ck: ck["norm.weight"][::-1], IndexError, "slices go forwards, found step -1"),
        (lambda ck: ck["down.weight"]["0"], TypeError, "'0' is neither a number nor a slice"),
        (lambda ck: ck["down.weight"][0, 1.5], TypeError, "expert: 1.5 is neither"),
    ],
)  # fmt: skip
def test_mistakes_are_named(
    folders: Path, use: Callable[[Parameters], object], error: type[Exception], message: str
) -> None:
    with opened(folders, "hf-bf16") as checkpoint, pytest.raises(error) as caught:
        use(checkpoint)
    assert message in str(caught.value)


def test_nothing_is_read_from_a_closed_checkpoint(folders: Path) -> None:
    with opened(folders, "hf-bf16") as checkpoint:
        norm = checkpoint["norm.weight"]
        assert norm[0].shape == ()
    with pytest.raises(UsageError, match=r"00002.safetensors: the checkpoint was closed"):
        norm[0]


def test_a_parameter_keeps_its_checkpoint_open(folders: Path) -> None:
    norm = opened(folders, "hf-bf16")["norm.weight"]
    assert norm[...].shape == (SHAPE.hidden,)


def test_a_file_that_changed_is_refused(tmp_path: Path) -> None:
    folder = write_hf_bf16(tmp_path / "x", SHAPE, random_weights(SHAPE, seed=1))
    with gptoss_convert.open(folder) as checkpoint:
        assert checkpoint["norm.weight"][0].shape == ()
        shard = folder / "model-00002-of-00002.safetensors"
        shard.write_bytes(shard.read_bytes())
        with pytest.raises(IntegrityError, match="changed while it was being read"):
            checkpoint["norm.weight"][0]


def test_large_parameters_are_read_in_tiles(
    folders: Path, expected: dict[str, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gptoss_convert.parameters.TILE_BYTES", 2 * GATE_UP)
    with opened(folders, "hf-mxfp4") as checkpoint, counted(monkeypatch) as lengths:
        found = checkpoint["gate_up.weight"][1:3]
    assert same(found, expected["gate_up.weight"][1:3])
    assert sorted(lengths) == [GATE_UP // 32] * 16 + [GATE_UP // 2] * 16


def test_torch_is_imported_when_a_tensor_is_made_and_not_before(folders: Path) -> None:
    code = (
        "import sys, gptoss_convert\n"
        f"checkpoint = gptoss_convert.open({str(folders / 'hf-mxfp4')!r})\n"
        "assert repr(checkpoint) and repr(checkpoint['norm.weight'])\n"
        "assert 'torch' not in sys.modules\n"
        "sys.modules['torch'] = None\n"
        "try:\n"
        "    checkpoint['norm.weight'][0]\n"
        "except gptoss_convert.GptossError as error:\n"
        "    print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("tensors need torch (pip install torch): ")
