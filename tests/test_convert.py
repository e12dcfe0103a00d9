"""Conversions of tiny models from end to end, held against directories that other code wrote."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from gptoss_convert import Options, convert
from gptoss_convert.check.inspection import inspect
from gptoss_convert.errors import (
    CodecError,
    GptossError,
    InputError,
    IntegrityError,
    ResourceError,
    TargetError,
    UsageError,
)
from gptoss_convert.machine.progress import SILENT
from tests.tiny_files import (
    hf_config,
    openai_config,
    write_hf_bf16,
    write_hf_mxfp4,
    write_openai,
)
from tests.tiny_models import (
    DISTINCT,
    SQUARE,
    TinyShape,
    decode_mxfp4,
    hf_bf16_tensors,
    openai_tensors,
    random_weights,
)

SHAPES = {"distinct": DISTINCT, "square": SQUARE}
MANIFEST = "gptoss-convert.json"
SIDECAR = "mxfp4-scales"
INDEX = "model.safetensors.index.json"
TOKENIZER = {"tokenizer.json": "{}", "chat_template.jinja": "{{ x }}", "LICENSE": "Apache"}

Tensors = dict[str, Tensor]


@pytest.fixture(scope="module")
def given(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One model of each shape in every layout, as reference libraries write it."""
    folders: dict[str, Path] = {}
    for name, shape in SHAPES.items():
        root = tmp_path_factory.mktemp(name)
        weights = random_weights(shape, seed=7)
        folders[f"{name} hf-mxfp4"] = write_hf_mxfp4(root / "mxfp4", shape, weights)
        folders[f"{name} hf-bf16"] = write_hf_bf16(root / "bf16", shape, weights)
        folders[f"{name} openai"] = write_openai(root / "original", shape, weights)
        for folder in (root / "mxfp4", root / "bf16"):
            for file, text in TOKENIZER.items():
                (folder / file).write_text(text)
    return folders


def tensors_in(folder: Path) -> Tensors:
    tensors: Tensors = {}
    for path in folder.glob("*.safetensors"):
        part = load_file(path)
        assert not tensors.keys() & part.keys()
        tensors |= part
    return tensors


def same(a: Tensors, b: Tensors) -> bool:
    """Equality of names, dtypes, shapes and bits."""
    return a.keys() == b.keys() and all(
        a[n].dtype == b[n].dtype
        and a[n].shape == b[n].shape
        and torch.equal(a[n].reshape(-1).view(torch.uint8), b[n].reshape(-1).view(torch.uint8))
        for n in a
    )


def files_in(folder: Path) -> dict[str, bytes]:
    """Every file by its path, without the manifest."""
    paths = (p for p in folder.rglob("*") if p.is_file())
    found = {str(p.relative_to(folder)): p.read_bytes() for p in paths}
    return {name: content for name, content in found.items() if name != MANIFEST}


def expected(label: str, shape: TinyShape) -> Tensors:
    weights = random_weights(shape, seed=7)
    if label == "openai":
        return openai_tensors(shape, weights)
    return hf_bf16_tensors(weights) if label == "hf-bf16" else weights


class Notes:
    """What a conversion said, line by line."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self.phase = SILENT.phase

    def note(self, text: str) -> None:
        self.lines.append(text)


LABELS = ("hf-mxfp4", "hf-bf16", "openai")


def options_to(label: str, **more: Any) -> Options:
    to, _, dtype = label.partition("-")
    return Options(to=to, dtype=dtype or "mxfp4", workers=2, **more)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("target", LABELS)
@pytest.mark.parametrize("source", LABELS)
def test_every_pair_gives_what_independent_code_gives(
    given: dict[str, Path], tmp_path: Path, shape: str, source: str, target: str
):
    options = options_to(target, scales=None)
    if source == "hf-bf16" and target != "hf-bf16":
        options = options_to(target, scales=given[f"{shape} hf-mxfp4"])
    convert(given[f"{shape} {source}"], tmp_path / "out", options)
    assert same(tensors_in(tmp_path / "out"), expected(target, SHAPES[shape]))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("target", ["hf-mxfp4", "openai"])
def test_without_scales_the_values_are_the_same(
    given: dict[str, Path], tmp_path: Path, shape: str, target: str
):
    convert(given[f"{shape} hf-bf16"], tmp_path / "out", options_to(target))
    found, wanted = tensors_in(tmp_path / "out"), expected(target, SHAPES[shape])
    assert not same(found, wanted)
    assert same(decoded(found), decoded(wanted))


def decoded(tensors: Tensors) -> Tensors:
    result: Tensors = {}
    for name, tensor in tensors.items():
        if name.endswith("blocks"):
            result[name] = decode_mxfp4(tensor, tensors[name.removesuffix("blocks") + "scales"])
        elif not name.endswith("scales"):
            result[name] = tensor
    return result


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("label", ["hf-mxfp4", "hf-bf16"])
def test_transformers_loads_the_output_to_equal_parameters(
    given: dict[str, Path], tmp_path: Path, shape: str, label: str
):
    other = "hf-bf16" if label == "hf-mxfp4" else "hf-mxfp4"
    convert(given[f"{shape} {other}"], tmp_path / "out", options_to(label))
    found = loaded_parameters(tmp_path / "out", label)
    wanted = loaded_parameters(given[f"{shape} {label}"], label)
    assert same(found, wanted)
    written = hf_bf16_tensors(random_weights(SHAPES[shape], seed=7))
    assert same({n: t.to(torch.bfloat16) for n, t in found.items()}, written)


def loaded_parameters(folder: Path, label: str) -> Tensors:
    from transformers import GptOssForCausalLM
    from transformers.utils.quantization_config import Mxfp4Config

    more: dict[str, Any] = {}
    if label == "hf-mxfp4":
        more["quantization_config"] = Mxfp4Config(dequantize=True)
    model = GptOssForCausalLM.from_pretrained(folder, dtype=torch.float32, **more)
    return {n: p.detach().contiguous() for n, p in model.named_parameters()}


@pytest.fixture
def odd(given: dict[str, Path], tmp_path: Path) -> Path:
    """An MXFP4 directory in three files of odd names, order and metadata."""
    folder = tmp_path / "odd"
    folder.mkdir()
    tensors = tensors_in(given["distinct hf-mxfp4"])
    names = sorted(tensors, key=lambda name: name[::-1])
    weight_map: dict[str, str] = {}
    for i, file in enumerate(("x.safetensors", "b-2.safetensors", "a-1.safetensors")):
        part = names[i::3]
        save_file({n: tensors[n] for n in part}, folder / file, metadata={"step": str(i)})
        weight_map |= dict.fromkeys(part, file)
    size = sum(t.nbytes for t in tensors.values())
    index = {"weight_map": weight_map, "metadata": {"total_size": size}}
    (folder / INDEX).write_text(json.dumps(index, indent=7))
    config = hf_config(DISTINCT, mxfp4=True) | {"my_key": {"b": 1, "a": None}}
    (folder / "config.json").write_text(json.dumps(config, indent=3) + "\n\n")
    (folder / "tokenizer.json").write_text("{}")
    return folder


def test_mxfp4_to_bf16_and_back_is_identical_file_for_file(odd: Path, tmp_path: Path):
    convert(odd, tmp_path / "bf16", options_to("hf-bf16"))
    assert json.loads((tmp_path / "bf16" / "config.json").read_bytes())["my_key"]
    convert(tmp_path / "bf16", tmp_path / "back", options_to("hf-mxfp4"))
    assert files_in(tmp_path / "back") == files_in(odd)


def test_the_way_back_may_pass_through_openais_layout(odd: Path, tmp_path: Path):
    convert(odd, tmp_path / "original", options_to("openai"))
    convert(tmp_path / "original", tmp_path / "hf", options_to("hf-mxfp4"))
    assert same(tensors_in(tmp_path / "hf"), tensors_in(odd))


def test_published_files_survive_every_way_round(given: dict[str, Path], tmp_path: Path):
    published = options_to("hf-mxfp4", shards="published")
    convert(given["distinct openai"], tmp_path / "hf", published)
    first = files_in(tmp_path / "hf")
    convert(tmp_path / "hf", tmp_path / "bf16", options_to("hf-bf16"))
    convert(tmp_path / "bf16", tmp_path / "back", options_to("hf-mxfp4"))
    assert files_in(tmp_path / "back") == first
    convert(tmp_path / "bf16", tmp_path / "original", options_to("openai", shards="published"))
    original = files_in(tmp_path / "original")
    assert (
        original["model.safetensors"]
        == (given["distinct openai"] / "model.safetensors").read_bytes()
    )
    convert(tmp_path / "original", tmp_path / "again", published)
    assert files_in(tmp_path / "again") == first


def test_a_single_file_with_an_index_comes_back(given: dict[str, Path], tmp_path: Path):
    folder = tmp_path / "single"
    folder.mkdir()
    tensors = tensors_in(given["distinct hf-mxfp4"])
    save_file(tensors, folder / "model.safetensors")
    size = sum(t.nbytes for t in tensors.values())
    index = {
        "metadata": {"total_size": size},
        "weight_map": dict.fromkeys(tensors, "model.safetensors"),
    }
    (folder / INDEX).write_text(json.dumps(index))
    shutil.copy(given["distinct hf-mxfp4"] / "config.json", folder)
    convert(folder, tmp_path / "bf16", options_to("hf-bf16"))
    convert(tmp_path / "bf16", tmp_path / "back", options_to("hf-mxfp4"))
    assert files_in(tmp_path / "back") == files_in(folder)


def test_scales_of_a_reference_restore_the_bytes(given: dict[str, Path], tmp_path: Path):
    source = given["distinct hf-mxfp4"]
    convert(source, tmp_path / "bf16", options_to("hf-bf16", keep_scales=False))
    assert not (tmp_path / "bf16" / SIDECAR).exists()
    plain, restored = options_to("hf-mxfp4"), options_to("hf-mxfp4", scales=source)
    convert(tmp_path / "bf16", tmp_path / "plain", plain)
    convert(tmp_path / "bf16", tmp_path / "restored", restored)
    original = tensors_in(source)
    assert not same(tensors_in(tmp_path / "plain"), original)
    assert same(tensors_in(tmp_path / "restored"), original)


def test_a_bf16_directory_with_a_sidecar_may_be_the_reference(
    given: dict[str, Path], tmp_path: Path
):
    source = given["distinct hf-mxfp4"]
    convert(source, tmp_path / "with", options_to("hf-bf16"))
    convert(source, tmp_path / "without", options_to("hf-bf16", keep_scales=False))
    options = options_to("hf-mxfp4", scales=tmp_path / "with")
    convert(tmp_path / "without", tmp_path / "back", options)
    assert same(tensors_in(tmp_path / "back"), tensors_in(source))


@pytest.mark.parametrize("seed", [1, 2])
def test_a_wrong_reference_never_changes_a_value(given: dict[str, Path], tmp_path: Path, seed: int):
    other = random_weights(DISTINCT, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    for name in other:
        if name.endswith("_scales"):
            other[name] = torch.randint(
                0, 256, other[name].shape, generator=generator, dtype=torch.uint8
            )
    wrong = write_hf_mxfp4(tmp_path / "wrong", DISTINCT, other)
    options = options_to("hf-mxfp4", scales=wrong)
    convert(given["distinct hf-bf16"], tmp_path / "out", options)
    found = tensors_in(tmp_path / "out")
    assert same(decoded(found), decoded(expected("hf-mxfp4", DISTINCT)))


def test_a_reference_is_refused_where_it_cannot_help(given: dict[str, Path], tmp_path: Path):
    mxfp4, square = given["distinct hf-mxfp4"], given["square hf-mxfp4"]
    bf16 = given["distinct hf-bf16"]
    for source, reference, message in (
        (mxfp4, mxfp4, f"--scales {mxfp4}: SOURCE is MXFP4 and has its own scales"),
        (bf16, square, f"--scales {square}: another size of model than {bf16}"),
        (bf16, bf16, f"--scales {bf16}: holds no MXFP4 scales"),
    ):
        with pytest.raises(UsageError) as refused:
            convert(source, tmp_path / "out", options_to("hf-mxfp4", scales=reference))
        assert str(refused.value) == message


def test_an_edit_of_config_json_survives_the_way_back(odd: Path, tmp_path: Path):
    convert(odd, tmp_path / "bf16", options_to("hf-bf16"))
    path = tmp_path / "bf16" / "config.json"
    config = json.loads(path.read_bytes())
    config["eos_token_id"] = 5
    path.write_text(json.dumps(config))
    convert(tmp_path / "bf16", tmp_path / "back", options_to("hf-mxfp4"))
    back = json.loads((tmp_path / "back" / "config.json").read_bytes())
    assert back["eos_token_id"] == 5
    assert back["quantization_config"]["quant_method"] == "mxfp4"
    assert back["my_key"] == {"b": 1, "a": None}
    names = {INDEX, "x.safetensors", "a-1.safetensors", "b-2.safetensors"}
    before, after = files_in(odd), files_in(tmp_path / "back")
    assert {name: after[name] for name in names} == {name: before[name] for name in names}


def test_attention_may_be_tuned_while_experts_come_back(odd: Path, tmp_path: Path):
    """What was trained on in BF16 keeps the bytes of the experts it left alone."""
    convert(odd, tmp_path / "bf16", options_to("hf-bf16"))
    name = "model.layers.1.self_attn.o_proj.weight"
    for path in (tmp_path / "bf16").glob("*.safetensors"):
        tensors = load_file(path)
        tensors[name] = tensors[name] * 2
        save_file(tensors, path, metadata={"format": "pt"})
    convert(tmp_path / "bf16", tmp_path / "back", options_to("hf-mxfp4"))
    found, before = tensors_in(tmp_path / "back"), tensors_in(odd)
    assert torch.equal(found.pop(name), before.pop(name) * 2)
    assert same(found, before)


@pytest.fixture
def bf16(given: dict[str, Path], tmp_path: Path) -> Path:
    return Path(shutil.copytree(given["distinct hf-bf16"], tmp_path / "source"))


def change(folder: Path, edit: Callable[[Tensors], object]) -> None:
    """Edit the tensors of every shard of a directory, and its index with them."""
    weight_map: dict[str, str] = {}
    for path in sorted(folder.glob("*.safetensors")):
        tensors = load_file(path)
        edit(tensors)
        save_file({n: t.contiguous() for n, t in tensors.items()}, path)
        weight_map |= dict.fromkeys(tensors, path.name)
    (folder / INDEX).write_text(json.dumps({"weight_map": weight_map}))


def nothing_visible(tmp_path: Path) -> bool:
    return not (tmp_path / "out").exists() and not any(tmp_path.glob(".out.*"))


DOWN = "model.layers.2.mlp.experts.down_proj"


def perturbed(tensors: Tensors) -> None:
    if DOWN in tensors:
        tensors[DOWN][3, 5, 7] = 1.2345
        tensors[DOWN][4, 50, 7] = 3e8


def test_values_without_an_mxfp4_form_are_stated_and_refused(bf16: Path, tmp_path: Path):
    change(bf16, perturbed)
    with pytest.raises(CodecError) as refused:
        convert(bf16, tmp_path / "out", options_to("hf-mxfp4"))
    assert refused.value.exit_code == 3
    blocks = 4 * 8 * 224 * 6
    loss = f"{bf16}: down.weight: 2 of {blocks} blocks (0.0%) are not exact in MXFP4: "
    assert str(refused.value).startswith(loss)
    assert str(refused.value).endswith("; pass --lossy to round, nothing was written")
    assert nothing_visible(tmp_path)


def test_lossy_rounds_what_has_no_form_and_nothing_else(bf16: Path, tmp_path: Path):
    change(bf16, perturbed)
    notes = Notes()
    report = convert(bf16, tmp_path / "out", options_to("hf-mxfp4", lossy=True), notes)
    assert sum("blocks (0.0%) are not exact in MXFP4" in line for line in notes.lines) == 1
    found, before = decoded(tensors_in(tmp_path / "out")), decoded(expected("hf-mxfp4", DISTINCT))
    differ = [name for name in found if not torch.equal(found[name], before[name])]
    assert differ == [f"{DOWN}_blocks"]
    changed = (found[differ[0]] != before[differ[0]]).reshape(-1, 32).any(dim=1)
    assert int(changed.sum()) == 2
    assert report.summary()["outcomes"]["down.weight"]["inexact_blocks"] == 2


@pytest.mark.parametrize("value", [float("inf"), float("-inf"), float("nan")])
def test_values_that_are_no_numbers_are_an_integrity_error(
    bf16: Path, tmp_path: Path, value: float
):
    def spoil(tensors: Tensors) -> None:
        if DOWN in tensors:
            tensors[DOWN][3, 5, 7] = value

    change(bf16, spoil)
    with pytest.raises(GptossError, match=f"{DOWN}: .* infinite or NaN") as refused:
        convert(bf16, tmp_path / "out", options_to("hf-mxfp4", lossy=True))
    assert refused.value.exit_code == 4
    assert nothing_visible(tmp_path)


def test_a_scale_that_bf16_cannot_hold_is_refused_with_its_place(
    given: dict[str, Path], tmp_path: Path
):
    source = Path(shutil.copytree(given["distinct hf-mxfp4"], tmp_path / "source"))

    def spoil(tensors: Tensors) -> None:
        if f"{DOWN}_scales" in tensors:
            tensors[f"{DOWN}_scales"][3, 5, 1] = 255

    change(source, spoil)
    with pytest.raises(GptossError, match=rf"{DOWN}_scales: .*found 255, is NaN"):
        convert(source, tmp_path / "out", options_to("hf-bf16"))
    assert nothing_visible(tmp_path)
    with pytest.raises(IntegrityError, match=r"block \(0, 3, 5, 1\): .*found 255, is NaN"):
        convert(source, tmp_path / "out", options_to("openai"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_wider_floats_are_rounded_by_explicit_cast_only(
    bf16: Path, tmp_path: Path, dtype: torch.dtype
):
    def widen(tensors: Tensors) -> None:
        for name in tensors:
            tensors[name] = tensors[name].to(dtype)

    before = {n: t.to(dtype).to(torch.bfloat16) for n, t in tensors_in(bf16).items()}
    change(bf16, widen)
    with pytest.raises(InputError, match=r"expects dtype BF16, found F\d\d; pass --cast"):
        convert(bf16, tmp_path / "out", options_to("hf-bf16"))
    convert(bf16, tmp_path / "out", options_to("hf-bf16", cast=True))
    assert same(tensors_in(tmp_path / "out"), before)


def test_a_cast_says_what_it_rounded(bf16: Path, tmp_path: Path):
    name = "model.norm.weight"

    def widen(tensors: Tensors) -> None:
        if name in tensors:
            tensors[name] = tensors[name].float() + 1e-6

    change(bf16, widen)
    notes = Notes()
    convert(bf16, tmp_path / "out", options_to("hf-bf16", cast=True), notes)
    assert f"norm.weight: {DISTINCT.hidden} values rounded to BF16" in notes.lines


def test_a_mis_saved_directory_is_repaired_when_told(bf16: Path, tmp_path: Path):
    before = tensors_in(bf16)

    def misname(tensors: Tensors) -> None:
        for name in [*tensors]:
            if name.endswith(("gate_up_proj", "down_proj")):
                tensors[f"{name}_blocks"] = tensors.pop(name)

    change(bf16, misname)
    with pytest.raises(IntegrityError, match=r"pass --repair to read them as BF16$"):
        convert(bf16, tmp_path / "out", options_to("hf-bf16"))
    (note,) = inspect(bf16).checkpoint.notes
    assert note.endswith("; --repair reads them as BF16")
    convert(bf16, tmp_path / "out", options_to("hf-bf16", repair=True))
    assert same(tensors_in(tmp_path / "out"), before)


def test_experts_that_were_lost_are_named(bf16: Path, tmp_path: Path):
    def collapse(tensors: Tensors) -> None:
        for name in [*tensors]:
            if name.endswith("gate_up_proj"):
                tensors["model.layers.gate_up_proj$"] = tensors.pop(name)

    for path in (bf16 / "model-00002-of-00002.safetensors", bf16 / INDEX):
        path.unlink()
    change(bf16, collapse)
    with pytest.raises(IntegrityError, match=r"all but one layer's are lost"):
        convert(bf16, tmp_path / "out", options_to("hf-bf16", repair=True))


def test_quantization_config_and_experts_must_agree(bf16: Path, tmp_path: Path):
    config = hf_config(DISTINCT, mxfp4=True)
    (bf16 / "config.json").write_text(json.dumps(config))
    with pytest.raises(
        IntegrityError, match=r"has quantization_config 'mxfp4', the experts are BF16"
    ):
        convert(bf16, tmp_path / "out", options_to("hf-bf16"))
    convert(bf16, tmp_path / "out", options_to("hf-bf16", repair=True))
    written = json.loads((tmp_path / "out" / "config.json").read_bytes())
    assert "quantization_config" not in written


def rename(old: str, new: str) -> Callable[[Tensors], object]:
    return lambda tensors: old in tensors and tensors.update({new: tensors.pop(old)})


def reshape(name: str) -> Callable[[Tensors], object]:
    return lambda tensors: name in tensors and tensors.update({name: tensors[name].mT})


BAD_TENSORS: dict[str, tuple[Callable[[Tensors], object], type[GptossError], str]] = {
    "unknown": (
        lambda t: [
            t.update({n[:-4] + "what": t[n] * 2}) for n in [*t] if n.endswith("o_proj.bias")
        ],
        IntegrityError,
        "4 unknown tensors: model.layers.{0..3}.self_attn.o_proj.what; --drop PATTERN leaves out "
        "what is not the model's",
    ),
    "missing": (
        lambda t: [t.pop(n) for n in [*t] if n.endswith("sinks")],
        IntegrityError,
        "4 tensors missing: model.layers.{0..3}.self_attn.sinks",
    ),
    "transposed": (
        reshape("model.layers.1.mlp.experts.down_proj"),
        InputError,
        "model.layers.1.mlp.experts.down_proj: layout 'expert inter hidden' expects shape "
        "(8, 192, 224), found (8, 224, 192)",
    ),
    "packed bytes for floats": (
        lambda t: (
            "model.norm.weight" in t
            and t.update({"model.norm.weight": torch.zeros(DISTINCT.hidden, dtype=torch.uint8)})
        ),
        InputError,
        "model.norm.weight: expects dtype BF16, found U8",
    ),
    "lora": (
        rename("model.norm.weight", "model.norm.lora_A.weight"),
        InputError,
        "LoRA weights; merge them into their base model first (model.norm.lora_A.weight)",
    ),
    "one of unsloth's names among others": (
        rename(DOWN, "model.layers.2.mlp.experts.down_projs.0.weight"),
        IntegrityError,
        "1 unknown tensors: model.layers.2.mlp.experts.down_projs.0.weight",
    ),
    "gptq": (
        rename("model.norm.weight", "model.norm.qweight"),
        InputError,
        "quantised with GPTQ or AWQ; supported: MXFP4 and BF16 (model.norm.qweight)",
    ),
}


@pytest.mark.parametrize("fault", BAD_TENSORS)
def test_bad_tensors_are_refused_with_the_exact_message(bf16: Path, tmp_path: Path, fault: str):
    edit, kind, message = BAD_TENSORS[fault]
    change(bf16, edit)
    with pytest.raises(kind) as refused:
        convert(bf16, tmp_path / "out", options_to("hf-bf16"))
    assert str(refused.value) == f"{bf16}: {message}"
    assert nothing_visible(tmp_path)


def test_layers_of_two_encodings_are_refused(given: dict[str, Path], tmp_path: Path):
    source = Path(shutil.copytree(given["distinct hf-mxfp4"], tmp_path / "source"))
    decoded_experts = tensors_in(given["distinct hf-bf16"])

    def mix(tensors: Tensors) -> None:
        for part in ("_blocks", "_scales"):
            if tensors.pop(DOWN + part, None) is not None:
                tensors[DOWN] = decoded_experts[DOWN]

    change(source, mix)
    with pytest.raises(GptossError, match=r"model.layers.2.mlp.experts.down_proj"):
        convert(source, tmp_path / "out", options_to("hf-bf16"))


def test_a_file_cut_short_is_refused(bf16: Path, tmp_path: Path):
    path = bf16 / "model-00002-of-00002.safetensors"
    os.truncate(path, path.stat().st_size - 1)
    with pytest.raises(IntegrityError, match=f"{path.name}: truncated: the header describes"):
        convert(bf16, tmp_path / "out", options_to("hf-bf16"))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("adapter_config.json", "{}", "a LoRA adapter, not a model"),
        ("x.gguf", "", "a GGUF file"),
        ("x.incomplete", "", "an unfinished download"),
    ],
)
def test_other_things_are_named(bf16: Path, tmp_path: Path, name: str, content: str, message: str):
    (bf16 / name).write_text(content)
    with pytest.raises(GptossError, match=f"{bf16}: {message}"):
        convert(bf16, tmp_path / "out", options_to("hf-bf16"))


def test_files_beside_the_weights_travel_byte_for_byte(given: dict[str, Path], tmp_path: Path):
    convert(given["distinct hf-mxfp4"], tmp_path / "out", options_to("hf-bf16"))
    found = files_in(tmp_path / "out")
    assert {n: found[n] for n in TOKENIZER} == {n: t.encode() for n, t in TOKENIZER.items()}


def test_openai_to_hf_takes_or_asks_for_a_tokenizer(given: dict[str, Path], tmp_path: Path):
    notes = Notes()
    convert(given["distinct openai"], tmp_path / "without", options_to("hf-mxfp4"), notes)
    assert notes.lines == [
        "no tokenizer.json and no tokenizer_config.json: SOURCE has none; "
        "pass --tokenizer DIR to add them"
    ]
    options = options_to("hf-mxfp4", tokenizer=given["distinct hf-mxfp4"])
    convert(given["distinct openai"], tmp_path / "with", options)
    assert TOKENIZER.keys() <= files_in(tmp_path / "with").keys()
    with pytest.raises(UsageError, match=r"--tokenizer .*nowhere: no such directory"):
        options = options_to("hf-mxfp4", tokenizer=tmp_path / "nowhere")
        convert(given["distinct openai"], tmp_path / "out", options)


def test_openai_gets_exactly_its_config_and_dtypes(given: dict[str, Path], tmp_path: Path):
    convert(given["distinct hf-mxfp4"], tmp_path / "out", options_to("openai"))
    assert set(files_in(tmp_path / "out")) == {
        "config.json",
        "dtypes.json",
        "model.safetensors",
    }
    config = json.loads((tmp_path / "out" / "config.json").read_bytes())
    assert config == openai_config(DISTINCT)
    assert [*config] == [*openai_config(DISTINCT)]
    written = (given["distinct openai"] / "dtypes.json").read_bytes()
    assert json.loads((tmp_path / "out" / "dtypes.json").read_bytes()) == json.loads(written)


@pytest.mark.parametrize("label", ["hf-mxfp4", "hf-bf16"])
def test_config_has_published_keys_and_both_forms_of_rope(
    given: dict[str, Path], tmp_path: Path, label: str
):
    convert(given["distinct openai"], tmp_path / "out", options_to(label))
    config = json.loads((tmp_path / "out" / "config.json").read_bytes())
    wanted = hf_config(DISTINCT, mxfp4=label == "hf-mxfp4")
    rope = config.pop("rope_parameters")
    # OpenAI's layout names no tokens; the released ids are beyond this vocabulary.
    numbers = {k: v for k, v in wanted.items() if k not in {"eos_token_id", "pad_token_id"}}
    assert config.keys() == numbers.keys()
    assert numbers.items() <= config.items()
    assert rope == {**config["rope_scaling"], "rope_theta": config["rope_theta"]}


def test_the_output_is_the_same_every_time(given: dict[str, Path], tmp_path: Path):
    for name, workers in (("one", 1), ("two", 4)):
        options = Options(to="hf", dtype="bf16", workers=workers, max_shard_size=3_000_000)
        convert(given["distinct hf-mxfp4"], tmp_path / name, options)
    one, two = tmp_path / "one", tmp_path / "two"
    assert files_in(one) == files_in(two)
    assert (one / MANIFEST).read_bytes() == (two / MANIFEST).read_bytes()


def test_shards_keep_to_the_limit_and_the_index_names_them(given: dict[str, Path], tmp_path: Path):
    options = Options(to="hf", max_shard_size=1_500_000)
    convert(given["distinct hf-mxfp4"], tmp_path / "out", options)
    shards = sorted((tmp_path / "out").glob("*.safetensors"))
    assert [p.name for p in shards] == [
        f"model-{n:05d}-of-{len(shards):05d}.safetensors" for n in range(1, len(shards) + 1)
    ]
    assert all(p.stat().st_size <= 1_500_000 + (1 << 16) for p in shards)
    index = json.loads((tmp_path / "out" / INDEX).read_bytes())
    for path in shards:
        with safe_open(path, "pt") as file:
            assert file.metadata() == {"format": "pt"}
            assert all(index["weight_map"][name] == path.name for name in file.keys())  # noqa: SIM118
        assert (8 + int.from_bytes(path.read_bytes()[:8], "little")) % 4096 == 0
    tensors = tensors_in(tmp_path / "out")
    assert index["weight_map"].keys() == tensors.keys()
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in tensors.values())
    pairs = {n.removesuffix("_blocks") for n in tensors if n.endswith("_blocks")}
    homes = index["weight_map"]
    assert all(homes[f"{pair}_blocks"] == homes[f"{pair}_scales"] for pair in pairs)


def test_published_files_are_the_reference_librarys(given: dict[str, Path], tmp_path: Path):
    convert(
        given["distinct hf-mxfp4"],
        tmp_path / "out",
        options_to("hf-mxfp4", shards="published"),
    )
    for path in (tmp_path / "out").glob("*.safetensors"):
        save_file(load_file(path), tmp_path / "again.safetensors")
        assert path.read_bytes() == (tmp_path / "again.safetensors").read_bytes()


@pytest.fixture
def umask() -> Iterator[int]:
    before = os.umask(0o027)
    yield 0o027
    os.umask(before)


def test_files_have_the_permissions_that_umask_gives(
    given: dict[str, Path], tmp_path: Path, umask: int
):
    convert(given["distinct hf-mxfp4"], tmp_path / "out", options_to("hf-bf16"))
    for path in (tmp_path / "out").rglob("*"):
        expects = 0o777 if path.is_dir() else 0o666
        assert path.stat().st_mode & 0o777 == expects & ~umask, path


def test_no_loader_reads_the_sidecar_as_weights(given: dict[str, Path], tmp_path: Path):
    convert(given["distinct hf-mxfp4"], tmp_path / "out", options_to("hf-bf16"))
    assert same(tensors_in(tmp_path / "out"), expected("hf-bf16", DISTINCT))
    assert {p.name for p in (tmp_path / "out" / SIDECAR).iterdir()} == {
        "scales.safetensors",
        "origin.json",
    }


def test_memory_that_does_not_suffice_is_refused(given: dict[str, Path], tmp_path: Path):
    source = given["distinct hf-mxfp4"]
    with pytest.raises(ResourceError, match=r"one worker needs \d+ MB, --max-memory is 10 MB"):
        convert(source, tmp_path / "out", options_to("hf-bf16", max_memory=10_000_000))
    report = convert(source, tmp_path / "out", options_to("hf-bf16", max_memory=256_000_000))
    assert report.summary()["memory_bytes"] <= 256_000_000


def test_a_hub_snapshot_asks_which_of_its_formats(given: dict[str, Path], tmp_path: Path):
    hub = Path(shutil.copytree(given["distinct hf-mxfp4"], tmp_path / "hub"))
    shutil.copytree(given["distinct openai"], hub / "original")
    with pytest.raises(UsageError) as refused:
        convert(hub, tmp_path / "out", options_to("hf-bf16"))
    assert str(refused.value) == f"{hub}: holds hf and openai; choose one with --from"
    for format in ("hf", "openai"):
        convert(hub, tmp_path / format, options_to("hf-bf16", format=format))
    assert same(tensors_in(tmp_path / "hf"), tensors_in(tmp_path / "openai"))


def test_a_target_that_holds_anything_is_kept(given: dict[str, Path], tmp_path: Path):
    target = tmp_path / "out"
    target.mkdir()
    convert(given["distinct openai"], target, options_to("hf-mxfp4"))
    before = files_in(target)
    with pytest.raises(TargetError, match=r"out: exists; pass --overwrite"):
        convert(given["square openai"], target, options_to("hf-mxfp4"))
    assert files_in(target) == before
    convert(given["square openai"], target, options_to("hf-mxfp4", overwrite=True))
    assert same(tensors_in(target), expected("hf-mxfp4", SQUARE))
    assert not any(tmp_path.glob(".out.*"))


def test_a_failed_overwrite_keeps_what_was_there(
    given: dict[str, Path], bf16: Path, tmp_path: Path
):
    target = tmp_path / "out"
    convert(given["distinct openai"], target, options_to("hf-mxfp4"))
    before = files_in(target)
    change(bf16, perturbed)
    with pytest.raises(CodecError):
        convert(bf16, target, options_to("hf-mxfp4", overwrite=True))
    assert files_in(target) == before
    assert not any(tmp_path.glob(".out.*"))


def test_the_source_is_left_as_it_was(given: dict[str, Path], tmp_path: Path):
    source = given["distinct hf-mxfp4"]
    before = {p: (p.read_bytes(), p.stat().st_mtime_ns) for p in sorted(source.iterdir())}
    convert(source, tmp_path / "out", options_to("hf-bf16"))
    assert {p: (p.read_bytes(), p.stat().st_mtime_ns) for p in sorted(source.iterdir())} == before
