"""Conversions that round: what is kept, what is left alone, and what an interruption leaves."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from gptoss_convert import Options, convert
from gptoss_convert.errors import UsageError
from gptoss_convert.quantise import run as calibration
from gptoss_convert.quantise.layers import RoundedLayers
from gptoss_convert.show.documents import document
from gptoss_convert.witness.forward import Numerics
from gptoss_convert.witness.hf import HfReader
from gptoss_convert.witness.oracles import transformers_logits
from gptoss_convert.witness.walk import Prompts, all_logits
from tests.test_convert import Notes
from tests.tiny_adapters import ATTENTION, EXPERTS, write_peft
from tests.tiny_files import write_hf_bf16, write_hf_mxfp4
from tests.tiny_models import TinyShape, random_weights

SHAPE = TinyShape(
    layers=2, hidden=64, inter=96, heads=4, kv_heads=2, head_dim=16, experts=4, vocab=353
)
UNTOUCHED = 2
"""The expert that the tune leaves alone, in every layer."""
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base in MXFP4, and the same tuned in BF16, in HF's layout and in Megatron's."""
    root = tmp_path_factory.mktemp("lossy")
    weights = random_weights(SHAPE, seed=1)
    write_hf_mxfp4(root / "base", SHAPE, weights)
    tuned = tuned_weights(weights)
    write_hf_bf16(root / "tuned", SHAPE, weights)
    for path in (root / "tuned").glob("*.safetensors"):
        held = load_file(path)
        save_file({name: tuned[name] for name in held}, path, metadata={"format": "pt"})
    convert(root / "tuned", root / "megatron", Options(to="megatron"))
    gen = torch.Generator().manual_seed(3)
    ids = torch.randint(0, SHAPE.vocab, (12, 100), generator=gen).tolist()
    (root / "tokens.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in ids))
    return root


def tuned_weights(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """HF's BF16 tensors with every expert but one changed by 3 % of its norm."""
    from tests.tiny_models import hf_bf16_tensors

    gen = torch.Generator().manual_seed(2)
    found = hf_bf16_tensors(weights)
    for name, value in found.items():
        if name.endswith("_proj"):
            noise = torch.randn(value.shape, generator=gen) * 0.03 * value.float().std()
            changed = (value.float() + noise).to(torch.bfloat16)
            changed[UNTOUCHED] = value[UNTOUCHED]  # The signs of its zeros, too.
            found[name] = changed.contiguous()
    return found


def options(folder: Path, **more: Any) -> Options:
    given = {"to": "hf", "dtype": "mxfp4", "scales": folder / "base", "lossy": "calibrated"}
    if more.get("lossy", "calibrated") == "calibrated":
        given["calibrate"] = str(folder / "tokens.jsonl")
    return Options(**{**given, **more})


@pytest.fixture(scope="module")
def rounded(folder: Path) -> Path:
    convert(folder / "tuned", folder / "rounded", options(folder))
    return folder / "rounded"


def experts(directory: Path) -> dict[str, Tensor]:
    tensors = {k: v for path in directory.glob("*.safetensors") for k, v in load_file(path).items()}
    return {k: v for k, v in tensors.items() if k.endswith(("_blocks", "_scales"))}


def digest(tensor: Tensor) -> str:
    return hashlib.sha256(tensor.contiguous().numpy().tobytes()).hexdigest()


@pytest.mark.parametrize("lossy", ["stochastic", "nearest", "calibrated"])
def test_experts_that_training_left_alone_keep_their_bytes(
    folder: Path, tmp_path: Path, lossy: str
):
    convert(folder / "tuned", tmp_path / "out", options(folder, lossy=lossy))
    base, made = experts(folder / "base"), experts(tmp_path / "out")
    assert base.keys() == made.keys() and len(base) == 4 * SHAPE.layers
    for name, before in base.items():
        assert digest(made[name][UNTOUCHED]) == digest(before[UNTOUCHED]), name
        if name.endswith("_blocks"):
            assert all(digest(made[name][e]) != digest(before[e]) for e in (0, 1, 3)), name


def test_everything_else_is_the_sources(folder: Path, rounded: Path):
    made, source = (
        load_file(rounded / "model.safetensors"),
        tuned_weights(random_weights(SHAPE, seed=1)),
    )
    common = source.keys() & made.keys()
    assert len(common) == len(source) - 2 * SHAPE.layers
    assert all(torch.equal(made[name], source[name]) for name in common)


@pytest.mark.parametrize("source", ["tuned", "megatron"])
@pytest.mark.parametrize("to", ["hf", "openai"])
def test_every_source_and_target_get_the_same_experts(
    folder: Path, tmp_path: Path, rounded: Path, source: str, to: str
):
    convert(folder / source, tmp_path / "out", options(folder, to=to))
    if to == "openai":
        convert(tmp_path / "out", tmp_path / "back", Options(to="hf"))
    made = experts(tmp_path / ("back" if to == "openai" else "out"))
    expected = experts(rounded)
    assert all(torch.equal(made[name], expected[name]) for name in expected)
    assert {path.name for path in tmp_path.iterdir()} <= {"out", "back"}


def test_the_output_loads_in_transformers_and_agrees_with_the_forward_pass(rounded: Path):
    prompts = [[5, 9, 200, 17, 3, 88], [1, 2, 3]]
    ours = all_logits(HfReader(rounded, CPU), Prompts.of(prompts, CPU), Numerics())
    theirs = torch.cat(transformers_logits(rounded, prompts, CPU))
    assert (ours - theirs).abs().max() < 5e-5


def test_outputs_stay_nearer_to_the_tune_than_by_any_rule(
    folder: Path, tmp_path: Path, rounded: Path
):
    prompts = [json.loads(line) for line in (folder / "tokens.jsonl").read_text().splitlines()[:4]]

    def logits(directory: Path) -> Tensor:
        return all_logits(HfReader(directory, CPU), Prompts.of(prompts, CPU), Numerics())

    tune = logits(folder / "tuned")
    distances = {"calibrated": (logits(rounded) - tune).norm()}
    for rule in ("floor", "ceil", "even", "best"):
        out = tmp_path / rule
        convert(folder / "tuned", out, options(folder, lossy="nearest", scale_rule=rule))
        distances[rule] = (logits(out) - tune).norm()
    assert min(distances, key=lambda name: distances[name]) == "calibrated", distances


def test_an_adapter_is_calibrated_as_the_merged_model_is(folder: Path, tmp_path: Path):
    """Attention and the experts of one layer: those of the other keep the base's bytes."""
    adapter = str(write_peft(tmp_path / "adapter", SHAPE, [ATTENTION, EXPERTS]))
    path = Path(adapter, "adapter_model.safetensors")
    kept = {k: v for k, v in load_file(path).items() if ".layers.0.mlp." not in k}
    save_file(kept, path, metadata={"format": "pt"})
    straight = options(folder, adapter=adapter, scales=None)
    convert(folder / "base", tmp_path / "straight", straight)
    convert(folder / "base", tmp_path / "merged", Options(to="hf", dtype="bf16", adapter=adapter))
    convert(tmp_path / "merged", tmp_path / "by way", options(folder))
    one, other = experts(tmp_path / "straight"), experts(tmp_path / "by way")
    base = experts(folder / "base")
    assert all(torch.equal(one[name], other[name]) for name in base)
    for name in base:
        untouched = ".layers.0." in name or name.endswith("_scales")
        assert untouched or not torch.equal(one[name], base[name]), name
    assert all(torch.equal(one[name], base[name]) for name in base if ".layers.0." in name)


class StopError(Exception):
    pass


def test_another_adapter_is_another_calibration(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def stop(*arguments: Any) -> Any:
        raise StopError

    first, second = (
        str(write_peft(tmp_path / str(seed), SHAPE, [EXPERTS], seed)) for seed in (1, 2)
    )
    monkeypatch.setattr(calibration, "round_layer", stop)
    with pytest.raises(StopError):
        convert(folder / "base", tmp_path / "out", options(folder, scales=None, adapter=first))
    for more in ({"adapter": second}, {"adapter": first, "adapter_scale": 0.5}):
        with pytest.raises(UsageError, match=r"unfinished .* another .*adapter"):
            convert(folder / "base", tmp_path / "out", options(folder, scales=None, **more))


def test_a_calibration_goes_on_after_the_last_layer_that_is_there(
    folder: Path, tmp_path: Path, rounded: Path, monkeypatch: pytest.MonkeyPatch
):
    count: list[int] = []
    round_layer = calibration.round_layer

    def counting(*arguments: Any) -> Any:
        count.append(arguments[1])
        if len(count) == 2:
            raise StopError
        return round_layer(*arguments)

    monkeypatch.setattr(calibration, "round_layer", counting)
    with pytest.raises(StopError):
        convert(folder / "tuned", tmp_path / "out", options(folder))
    left = {path.name for path in tmp_path.iterdir()}
    assert not (tmp_path / "out").exists() and ".out.gptoss-convert.rounded" in left
    convert(folder / "tuned", tmp_path / "out", options(folder))
    assert count == [0, 1, 1]
    found, expected = experts(tmp_path / "out"), experts(rounded)
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_other_tokens_are_another_calibration(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def stop(*arguments: Any) -> Any:
        raise StopError

    with monkeypatch.context() as patched:
        patched.setattr(calibration.Walk, "leave", stop)
        with pytest.raises(StopError):
            convert(folder / "tuned", tmp_path / "out", options(folder))
    other = tmp_path / "other.jsonl"
    other.write_text((folder / "tokens.jsonl").read_text().replace("[", "[7, ", 1))
    shutil.rmtree(tmp_path / ".out.gptoss-convert")
    (tmp_path / ".out.gptoss-convert.journal").unlink()
    with pytest.raises(UsageError, match=r"unfinished calibration of another kind"):
        convert(folder / "tuned", tmp_path / "out", options(folder, calibrate=str(other)))
    convert(folder / "tuned", tmp_path / "out", options(folder, calibrate=str(other), restart=True))


def test_the_report_says_what_is_kept_and_names_what_saw_too_little(folder: Path, tmp_path: Path):
    few = tmp_path / "few.jsonl"
    few.write_text("".join(f"{json.dumps([n, n + 1] * 8)}\n" for n in range(3)))
    notes = Notes()
    report = convert(
        folder / "tuned", tmp_path / "out", options(folder, calibrate=str(few)), notes
    ).summary()
    lines = [line for line in notes.lines if "experts rounded" in line]
    assert len(lines) == 2 and all("6 of 8 experts rounded, update kept" in line for line in lines)
    assert all("; 6 experts reached by fewer than 64 tokens" in line for line in lines)
    found = report["calibration"]
    assert (found["tokens"], found["held_out"]) == (46, 2)
    assert [(one["layer"], one["weight"]) for one in found["matrices"]] == [
        (n, weight) for n in range(2) for weight in ("gate_up.weight", "down.weight")
    ]
    for one in found["matrices"]:
        assert one["exact"] == [e == UNTOUCHED for e in range(4)]
        assert one["tokens"][UNTOUCHED] == 0 and one["kept"][UNTOUCHED] is None
        assert [one["tokens"][e] for e in (0, 1, 3)] == [46] * 3  # 4 experts, 4 of them a token.
    document("convert", report)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ({"lossy": "nearest", "calibrate": "auto"}, "--calibrate goes with --lossy calibrated"),
        ({"lossy": "stochastic", "base": Path("x")}, "--base goes with --lossy calibrated"),
        ({"lossy": "stochastic", "scale_rule": "ceil"}, "--scale-rule goes with --lossy nearest"),
        ({"dtype": "bf16", "scales": None}, "TARGET has BF16 experts"),
        ({"base": Path("missing")}, "no such directory"),
    ],
)
def test_words_that_do_not_go_together_are_refused(
    folder: Path, tmp_path: Path, words: dict[str, Any], message: str
):
    with pytest.raises(UsageError, match=message):
        convert(
            folder / "tuned",
            tmp_path / "out",
            Options(**{**vars(options(folder)), "calibrate": None, **words}),
        )
    assert not list(tmp_path.iterdir())


def test_nothing_is_calibrated_of_an_mxfp4_source(folder: Path, tmp_path: Path):
    attention = str(write_peft(tmp_path / "attention", SHAPE, [ATTENTION]))
    for adapter in (None, attention):
        with pytest.raises(UsageError, match="is MXFP4, nothing is to be rounded"):
            convert(
                folder / "base", tmp_path / "out", options(folder, scales=None, adapter=adapter)
            )
    convert(folder / "base", tmp_path / "out", Options(to="hf", adapter=attention, lossy=True))
    base, made = experts(folder / "base"), experts(tmp_path / "out")
    assert all(torch.equal(made[name], base[name]) for name in base)


def test_stochastic_rounding_does_not_depend_on_layout_or_workers(folder: Path, tmp_path: Path):
    ways: list[Callable[[Path], object]] = [
        lambda out: convert(folder / "tuned", out, options(folder, lossy=True)),
        lambda out: convert(folder / "megatron", out, options(folder, lossy=True, workers=1)),
    ]
    for n, way in enumerate(ways):
        way(tmp_path / str(n))
    convert(folder / "tuned", tmp_path / "o", options(folder, lossy=True, to="openai"))
    convert(tmp_path / "o", tmp_path / "2", Options(to="hf"))
    first, *others = (experts(tmp_path / str(n)) for n in range(3))
    assert all(torch.equal(one[name], first[name]) for one in others for name in first)


def test_the_note_of_a_rule_says_how_much_of_the_update_it_keeps(folder: Path, tmp_path: Path):
    kept: dict[str, list[float]] = {}
    for name, how in (("best", "best"), ("stochastic", None)):
        notes = Notes()
        more = {"lossy": "nearest", "scale_rule": how} if how else {"lossy": True}
        convert(folder / "tuned", tmp_path / name, options(folder, **more), notes)
        lines = [line for line in notes.lines if "update kept" in line]
        kept[name] = [float(line.split("update kept ")[1].split(",")[0]) for line in lines]
    assert len(kept["best"]) == len(kept["stochastic"]) == 2
    assert max(kept["best"]) < 0.1 and min(kept["stochastic"]) > 0.8


def test_layers_on_the_disk_lie_where_the_plan_expects_them(tmp_path: Path):
    from gptoss_convert.layouts.model import load_model
    from gptoss_convert.parameters import open as open_parameters

    write_hf_mxfp4(tmp_path / "base", SHAPE, random_weights(SHAPE, seed=1))
    base = open_parameters(tmp_path / "base")
    layers = RoundedLayers(tmp_path / "layers", load_model().sizes(base.checkpoint.config.numbers))
    layers.begin({}, restart=False)
    planned = layers.extents()
    for layer in range(SHAPE.layers):
        content = {
            f"{weight}.{part}": stored(base[f"{weight}.weight.{part}"][layer])
            for weight in ("gate_up", "down")
            for part in ("blocks", "scales")
        }
        layers.write(layer, {k: (lambda v=v: v) for k, v in content.items()}, {"layer": layer})
        assert layers.done(layer) == {"layer": layer}
        assert {k: bytes(v) for k, v in layers.read(layer).items()} == content
    for extent in planned:
        raw = extent.file.path.read_bytes()
        layer = extent.box[0][0]
        first = base[extent.param][layer].flatten()
        at = extent.at(extent.box)
        assert raw[at] == int(first[0]) and extent.file.path.stat().st_size == len(raw)


def stored(tensor: Tensor) -> bytes:
    """In the order of the table: both halves of gate_up one after another."""
    halves = tensor.ndim > 4 or (tensor.ndim == 4 and tensor.shape[2] == 2)
    return (tensor.transpose(1, 2) if halves else tensor).contiguous().numpy().tobytes()
