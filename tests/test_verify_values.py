"""Exact values: what differs is found, placed in the parameter, and explained."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from functools import partial
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from gptoss_convert import convert
from gptoss_convert.compare import pairs, values
from gptoss_convert.compare.pairs import StepPair, judge_steps
from gptoss_convert.compare.values import compare_values
from gptoss_convert.compare.values_report import Difference, ValuesReport
from gptoss_convert.containers import Chunk
from gptoss_convert.containers.refs import FileRef
from gptoss_convert.conversion.manifest import NAME
from gptoss_convert.conversion.options import Options
from gptoss_convert.engine import steps
from gptoss_convert.engine.steps import make_plan
from gptoss_convert.errors import InputError, ResourceError
from gptoss_convert.formats.adapters.adapter_options import AdapterOptions
from gptoss_convert.formats.registry import open_checkpoint
from gptoss_convert.hub.adapters import with_adapter
from gptoss_convert.layouts.model import load_model
from gptoss_convert.machine.files import SourceFiles
from gptoss_convert.machine.progress import SILENT
from gptoss_convert.machine.resources import peak_memory
from gptoss_convert.synth.synth import synth
from gptoss_convert.verify.values_level import describe
from tests.adapter_files import write_adapter
from tests.tiny_adapters import EXPERTS, peft_tensors, settings
from tests.tiny_files import write_hf_bf16, write_hf_mxfp4
from tests.tiny_models import SQUARE, random_weights

FORMATS = ("mxfp4", "bf16", "openai", "megatron")
GATE_UP = "model.layers.{}.mlp.experts.gate_up_proj"
DOWN = "model.layers.{}.mlp.experts.down_proj"


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiny")
    synth(folder / "mxfp4")
    convert(folder / "mxfp4", folder / "bf16", Options(to="hf", dtype="bf16"))
    convert(folder / "mxfp4", folder / "openai", Options(to="openai"))
    convert(folder / "mxfp4", folder / "megatron", Options(to="megatron"))
    return folder


@pytest.fixture(scope="module")
def square(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose hidden size is its intermediate size: no shape betrays a transpose."""
    folder = tmp_path_factory.mktemp("square") / "bf16"
    return write_hf_bf16(folder, SQUARE, random_weights(SQUARE, seed=3))


def compared(source: Path, target: Path, **options: Any) -> ValuesReport:
    return compare_values(open_checkpoint(source), open_checkpoint(target), **options)


def edited(source: Path, copy: Path, edits: dict[str, Callable[[Any], Any]]) -> Path:
    """A copy with the BF16 bits of some tensors replaced in place."""
    shutil.copytree(source, copy)
    for chunk in open_checkpoint(copy).chunks:
        if chunk.tensor in edits:
            bits: NDArray[np.uint16] = np.memmap(
                copy / chunk.file, np.uint16, "r+", offset=chunk.offset, shape=chunk.extent
            )
            bits[...] = edits[chunk.tensor](bits.copy())
            bits.flush()  # pyright: ignore[reportAttributeAccessIssue]
    return copy


def chunk_of(folder: Path, tensor: str) -> Chunk:
    return next(chunk for chunk in open_checkpoint(folder).chunks if chunk.tensor == tensor)


def flip(root: Path, chunk: Chunk, at: int) -> None:
    """Flip the lowest bit of a byte of a chunk."""
    with (root / chunk.file).open("r+b") as file:
        file.seek(chunk.offset + at)
        byte = file.read(1)[0]
        file.seek(chunk.offset + at)
        file.write(bytes([byte ^ 1]))


def test_equal_blocks_are_decoded_once_and_any_other_byte_is_seen(
    tiny: Path, tmp_path: Path
) -> None:
    shutil.copytree(tiny / "openai", tmp_path / "wrong")
    flip(tmp_path / "wrong", chunk_of(tmp_path / "wrong", "block.1.mlp.mlp2_weight.blocks"), 5)
    wrong = open_checkpoint(tmp_path / "wrong")
    source = open_checkpoint(tiny / "mxfp4")
    shared: dict[str, list[tuple[str, int, bool]]] = {}
    for name in ("openai", "bf16", "wrong"):
        target = wrong if name == "wrong" else open_checkpoint(tiny / name)
        plan = make_plan(
            load_model(),
            load_model().sizes(source.config.numbers),
            source.extents(),
            [one for one in target.extents() if name != "bf16" or "scales" not in one.param],
        )
        shared[name] = judge_steps(
            plan,
            range(len(plan.steps)),
            lambda number, pair: (pair.step.family.weight, pair.step.layer, made_once(pair)),
            workers=1,
            max_memory=1 << 30,
            progress=SILENT,
            whole=True,
        )
    packed = {"gate_up.weight", "down.weight"}
    assert all(once == (weight in packed) for weight, _, once in shared["openai"])
    assert not any(once for _, _, once in shared["bf16"])
    apart = {(weight, layer) for weight, layer, once in shared["wrong"] if not once}
    assert ("down.weight", 1) in apart and ("down.weight", 0) not in apart
    found = only(compare_values(source, wrong))
    assert (found.parameter, found.layer, found.differing) == ("down.weight", 1, 1)


def made_once(pair: StepPair) -> bool:
    ((_, ours, theirs),) = (one for piece in pair.pieces() for one in piece.values())
    return ours is theirs


def only(report: ValuesReport) -> Difference:
    (difference,) = report.differences
    return difference


@pytest.mark.parametrize(("source", "target"), [*combinations(FORMATS, 2)])
def test_every_pair_of_formats_holds_the_same_values(tiny: Path, source: str, target: str) -> None:
    report = compared(tiny / source, tiny / target)
    assert report.same
    assert (report.elements, report.differing) == (4_632_124, 0)


@pytest.mark.parametrize("name", FORMATS)
def test_fingerprints_are_those_of_the_manifest(tiny: Path, name: str) -> None:
    report = compared(tiny / name, tiny / "bf16")
    manifest = json.loads((tiny / "megatron" / NAME).read_text())
    assert report.parameters == manifest["parameters"]


def test_one_flipped_bit_is_named_with_its_place_and_both_values(
    tiny: Path, tmp_path: Path
) -> None:
    def flip(bits: NDArray[np.uint16]) -> NDArray[np.uint16]:
        bits[5, 33, 17] ^= 1
        return bits

    report = compared(
        tiny / "megatron", edited(tiny / "bf16", tmp_path / "x", {DOWN.format(2): flip})
    )
    found = only(report)
    assert (found.parameter, found.layer, found.differing) == ("down.weight", 2, 1)
    assert found.target_tensors == (DOWN.format(2),)
    # Stored as [expert, inter, hidden], the parameter's axes are layer, expert, hidden, inter.
    assert found.first.index == found.worst.index == (2, 5, 17, 33)
    assert found.first.ulps == 1
    assert found.first.source != found.first.target
    place = "layer 2 experts: model.layers.2.mlp.experts.down_proj differs; 1 of 286,720 values"
    assert describe(found).startswith(place)


@pytest.mark.parametrize("place", [0, -1])
def test_the_ends_of_a_tensor_are_looked_at(tiny: Path, tmp_path: Path, place: int) -> None:
    def flip(bits: NDArray[np.uint16]) -> NDArray[np.uint16]:
        bits.reshape(-1)[place] ^= 1
        return bits

    target = edited(tiny / "bf16", tmp_path / "x", {"lm_head.weight": flip})
    found = only(compared(tiny / "mxfp4", target))
    assert found.differing == 1
    assert found.first.index == ((0, 0) if place == 0 else (287, 223))


def test_the_first_and_the_worst_difference_are_told_apart(tiny: Path, tmp_path: Path) -> None:
    def change(bits: NDArray[np.uint16]) -> NDArray[np.uint16]:
        bits[3] += 1
        bits[9] = 0xFF7F
        return bits

    found = only(
        compared(
            tiny / "mxfp4", edited(tiny / "bf16", tmp_path / "x", {"model.norm.weight": change})
        )
    )
    assert (found.first.index, found.first.ulps, found.layer) == ((3,), 1, None)
    assert found.worst.index == (9,)
    assert found.worst.target == pytest.approx(-3.39e38, rel=1e-2)


def test_zeros_of_the_other_sign_differ_by_no_ulp(tiny: Path, tmp_path: Path) -> None:
    def negate(bits: NDArray[np.uint16]) -> NDArray[np.uint16]:
        bits[bits == 0] = 0x8000
        return bits

    found = only(
        compared(tiny / "mxfp4", edited(tiny / "bf16", tmp_path / "x", {DOWN.format(0): negate}))
    )
    assert found.differing > 0
    assert found.worst.ulps == 0
    assert found.looks == "zeros with the other sign"


@pytest.mark.parametrize(
    ("tensor", "edit", "looks"),
    [
        (DOWN, lambda bits: bits.swapaxes(1, 2), "transposed"),
        (DOWN, lambda bits: bits ^ 0x8000, "signs flipped"),
        (DOWN, lambda bits: bits * 0, "all zero in TARGET"),
        (GATE_UP, lambda bits: bits.reshape(8, 128, 128, 2)[..., ::-1].reshape(bits.shape),
         "gate and up exchanged"),
        (DOWN, lambda bits: bits[[0, 2, 1, *range(3, 8)]],
         "exchanged: expert 1 holds expert 2 of SOURCE"),
    ],
    ids=["transposed", "negated", "zeroed", "gate-up", "experts"],
)  # fmt: skip
def test_known_mistakes_are_recognised(
    square: Path, tmp_path: Path, tensor: str, edit: Callable[[Any], Any], looks: str
) -> None:
    name = tensor.format(1)
    found = only(compared(square, edited(square, tmp_path / "x", {name: edit})))
    assert (found.layer, found.looks) == (1, looks)
    assert describe(found).startswith(f"layer 1 experts: {name} differs; looks {looks}; ")


def test_exchanged_layers_say_whose_weights_they_hold(square: Path, tmp_path: Path) -> None:
    kept: dict[str, Any] = {}

    def keep(name: str) -> Callable[[Any], Any]:
        return lambda bits: kept.setdefault(name, bits)

    names = [DOWN.format(layer) for layer in (0, 2)]
    edited(square, tmp_path / "read", {name: keep(name) for name in names})
    swap = {names[0]: lambda bits: kept[names[1]], names[1]: lambda bits: kept[names[0]]}
    report = compared(square, edited(square, tmp_path / "x", swap))
    assert [(d.layer, d.looks) for d in report.differences] == [
        (0, "exchanged: it holds layer 2 of SOURCE"),
        (2, "exchanged: it holds layer 0 of SOURCE"),
    ]


def test_first_layers_alone_can_be_compared(tiny: Path, tmp_path: Path) -> None:
    target = edited(tiny / "bf16", tmp_path / "x", {DOWN.format(3): lambda bits: bits ^ 1})
    assert compared(tiny / "mxfp4", target, layers=3).same
    assert not compared(tiny / "mxfp4", target).same


def test_models_of_different_sizes_are_refused(tiny: Path, square: Path) -> None:
    with pytest.raises(InputError, match="hidden_size is 128, SOURCE has 224"):
        compared(tiny / "mxfp4", square)


def test_memory_is_bounded_and_too_little_is_said(tmp_path: Path) -> None:
    synth(tmp_path / "a", model="20b", layers=1)
    checkpoint = open_checkpoint(tmp_path / "a")
    before = peak_memory()
    assert compare_values(checkpoint, checkpoint, workers=2).same
    assert peak_memory() - before < 400_000_000 < sum(c.nbytes for c in checkpoint.chunks)
    with pytest.raises(ResourceError, match="one worker needs"):
        compare_values(checkpoint, checkpoint, max_memory=75_000_000)
    shutil.rmtree(tmp_path / "a")


@pytest.mark.parametrize("target", FORMATS)
def test_the_second_side_is_read_once_in_pieces_that_follow_one_another(
    target: str, tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However it lies: parts of experts that lie across would be thousands of short runs."""
    monkeypatch.setattr(steps, "PIECE_BYTES", 1 << 13)
    read: list[int] = []
    original = SourceFiles.read

    def noted(self: SourceFiles, file: FileRef, offset: int, nbytes: int, *place: Any) -> None:
        if file.root.is_relative_to(tiny / target):
            read.append(nbytes)
        original(self, file, offset, nbytes, *place)

    monkeypatch.setattr(SourceFiles, "read", noted)
    assert compared(tiny / "mxfp4", tiny / target).same
    chunks = open_checkpoint(tiny / target).chunks
    total = sum(chunk.nbytes for chunk in chunks)
    sides = 2 if target == "mxfp4" else 1
    assert total <= sum(read) / sides < 1.01 * total  # Gaps between short runs are read, too.
    if target == "bf16":
        assert 2 * len(chunks) < len(read) < total / (1 << 13)


def test_every_part_of_the_values_is_compared_with_blocks(tiny: Path, tmp_path: Path) -> None:
    """In Megatron's files each half of an expert is a part of its own."""
    shutil.copytree(tiny / "megatron", tmp_path / "wrong")
    target = open_checkpoint(tmp_path / "wrong")
    experts = [chunk for chunk in target.chunks if "experts.linear_fc1.weight" in chunk.tensor]
    last = max(experts, key=lambda chunk: chunk.start)
    flip(target.root, last, last.nbytes - 2)
    found = only(compared(tiny / "mxfp4", tmp_path / "wrong"))
    assert (found.parameter, found.layer, found.differing) == ("gate_up.weight", 3, 1)
    assert found.first.index[1:4] == (7, 159, 1)


def test_a_scale_alone_is_seen_and_both_fingerprints_are_whole(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pairs, "_AT_ONCE", 3000)
    shutil.copytree(tiny / "openai", tmp_path / "wrong")
    flip(tmp_path / "wrong", chunk_of(tmp_path / "wrong", "block.1.mlp.mlp2_weight.scales"), 700)
    report = compared(tiny / "mxfp4", tmp_path / "wrong")
    assert only(report).parameter == "down.weight"
    assert report.target_parameters == compared(tmp_path / "wrong", tiny / "bf16").parameters
    assert report.parameters == compared(tiny / "bf16", tiny / "mxfp4").parameters


@pytest.mark.parametrize("small", [False, True])
@pytest.mark.parametrize("to", ["hf", "megatron"])
def test_a_merge_is_compared_piece_by_piece_and_merged_once(
    to: str, small: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights = random_weights(SQUARE, 3)
    write_hf_bf16(tmp_path / "bf16", SQUARE, weights)
    write_hf_mxfp4(tmp_path / "mxfp4", SQUARE, weights)
    adapter = write_adapter(
        tmp_path / "adapter", peft_tensors(SQUARE, [EXPERTS], size=0.2), settings()
    )
    if small:
        monkeypatch.setattr(values, "make_plan", partial(make_plan, tile_bytes=1 << 16))
        monkeypatch.setattr(steps, "PIECE_BYTES", 1 << 13)
        monkeypatch.setattr(pairs, "_AT_ONCE", 1000)
    for base in ("bf16", "mxfp4"):
        wanted = Options(to=to, dtype="bf16" if to == "hf" else "keep", adapter=str(adapter))
        convert(tmp_path / base, tmp_path / f"{base}-merged", wanted)
        source = with_adapter(open_checkpoint(tmp_path / base), AdapterOptions(str(adapter)))
        target = open_checkpoint(tmp_path / f"{base}-merged")
        assert compare_values(source, target).same
        expert = max(target.chunks, key=lambda chunk: (chunk.nbytes, chunk.tensor))
        flip(target.root, expert, expert.nbytes // 2)
        found = only(compare_values(source, open_checkpoint(tmp_path / f"{base}-merged")))
        assert (found.differing, found.first) == (1, found.worst)


@pytest.mark.parametrize("small", [False, True])
def test_sqnr_of_each_expert_equals_its_definition(
    small: bool, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if small:
        monkeypatch.setattr(values, "make_plan", partial(make_plan, tile_bytes=2_000))
        monkeypatch.setattr(steps, "PIECE_BYTES", 500)
        monkeypatch.setattr(pairs, "_AT_ONCE", 100)
    kept: dict[str, NDArray[np.uint16]] = {}

    def coarser(bits: NDArray[np.uint16]) -> NDArray[np.uint16]:
        kept["before"], kept["after"] = bits.copy(), bits & np.uint16(0xFFC0)
        kept["after"][3] = bits[3]
        return kept["after"]

    # MXFP4 values have few bits: of other ones something is lost.
    source = edited(tiny / "bf16", tmp_path / "a", {DOWN.format(2): lambda bits: bits + 37})
    target = edited(source, tmp_path / "b", {DOWN.format(2): coarser})
    report = compared(source, target, statistics=True)
    assert report.statistics is not None
    before, after = (
        (kept[name].astype(np.uint32) << 16).view(np.float32).astype(np.float64).reshape(8, -1)
        for name in ("before", "after")
    )
    noise = ((before - after) ** 2).sum(1)
    rest = np.arange(8) != 3
    expected = 10 * np.log10((before**2).sum(1)[rest] / noise[rest])
    cells = report.statistics.sqnr["down.weight"]
    assert cells[2][3] is None
    assert np.allclose([cell for cell in cells[2] if cell is not None], expected, atol=1e-4)
    assert cells[0] == cells[1] == cells[3] == [None] * 8
    assert set(report.statistics.sqnr) == {"gate_up.weight", "down.weight"}
    whole = 10 * np.log10((before**2).sum() / noise.sum())
    assert only(report).sqnr == pytest.approx(whole, abs=1e-4)


def test_infinities_are_counted_and_in_no_sqnr(tiny: Path, tmp_path: Path) -> None:
    def change(bits: NDArray[np.uint16]) -> NDArray[np.uint16]:
        bits[0, 0, 0] = 0x7F80
        bits[0, 1, 1] = 0x7F7F
        return bits

    target = edited(tiny / "bf16", tmp_path / "x", {DOWN.format(0): change})
    statistics = compared(tiny / "mxfp4", target, statistics=True).statistics
    assert statistics is not None
    assert statistics.nonfinite == 1
    worst = statistics.sqnr["down.weight"][0][0]
    # The largest number's square is beyond float32.
    assert worst == -100


def test_scales_are_counted_as_the_files_hold_them(tiny: Path) -> None:
    statistics = compared(tiny / "mxfp4", tiny / "bf16", statistics=True).statistics
    assert statistics is not None
    assert statistics.target_scales == {}
    counts = np.zeros(256, np.int64)
    for chunk in open_checkpoint(tiny / "mxfp4").chunks:
        if chunk.tensor.endswith("down_proj_scales"):
            path = tiny / "mxfp4" / chunk.file
            held = np.fromfile(path, np.uint8, chunk.nbytes, offset=chunk.offset)
            counts += np.bincount(held, minlength=256)
    assert counts.sum() > 0
    assert statistics.source_scales["down.weight"] == counts.tolist()
    assert set(statistics.source_scales) == {"gate_up.weight", "down.weight"}


def test_statistics_are_left_out_unless_wanted(tiny: Path) -> None:
    assert compared(tiny / "mxfp4", tiny / "bf16").statistics is None


def test_both_sides_have_fingerprints(tiny: Path, tmp_path: Path) -> None:
    target = edited(tiny / "bf16", tmp_path / "x", {DOWN.format(1): lambda bits: bits ^ 1})
    report = compared(tiny / "mxfp4", target)
    assert report.target_parameters == compared(target, target).parameters
    differing = {
        name for name, found in report.parameters.items()
        if found != report.target_parameters[name]
    }  # fmt: skip
    assert differing == {"down.weight"}
