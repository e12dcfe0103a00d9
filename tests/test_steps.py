"""Permutation proof: every element is numbered, planned for, and found where it belongs.

All axes of the model have distinct lengths, and every element carries the digits of its own number
through several runs: a plan that passes is right for all data. The arrangement of each format is
restated by `tiny_models` and by the few lines below, which share nothing with the tables.
"""

from __future__ import annotations

import copy
import tomllib
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cache
from importlib import resources
from itertools import pairwise, product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from gptoss_convert import convert
from gptoss_convert.containers import Chunk
from gptoss_convert.containers.refs import FileRef
from gptoss_convert.conversion.options import Options
from gptoss_convert.engine.execute import execute, written_ranges
from gptoss_convert.engine.records import Done
from gptoss_convert.engine.steps import Plan, make_plan
from gptoss_convert.errors import InputError, IntegrityError
from gptoss_convert.layouts.extents import Extent, extents, volume
from gptoss_convert.layouts.model import load_model
from gptoss_convert.layouts.table_files import load_table, parse_table
from gptoss_convert.layouts.tables import Table
from gptoss_convert.machine.arena import Arena
from gptoss_convert.machine.target_files import TargetFiles
from gptoss_convert.synth.synth import synth
from tests.tiny_files import write_hf_bf16
from tests.tiny_models import (
    SQUARE,
    TinyShape,
    decode_mxfp4,
    hf_bf16_tensors,
    megatron_tensors,
    openai_tensors,
    random_weights,
)

SHAPE = TinyShape(
    layers=3, hidden=160, inter=32, heads=28, kv_heads=7, head_dim=6, experts=8, vocab=11
)
"""Axes of length 3, 8, 11, 160, 32, 7, 4, 6, 2; 5 blocks of hidden and 1 of inter."""

NUMBERS = {
    "num_hidden_layers": SHAPE.layers,
    "num_local_experts": SHAPE.experts,
    "vocab_size": SHAPE.vocab,
    "hidden_size": SHAPE.hidden,
    "intermediate_size": SHAPE.inter,
    "num_attention_heads": SHAPE.heads,
    "num_key_value_heads": SHAPE.kv_heads,
    "head_dim": SHAPE.head_dim,
}
SIZES = load_model().sizes(NUMBERS)

MEGATRON = (
    *("stacked", "stacked-local", "stacked-both"),
    *("per-layer", "per-layer-local", "per-layer-both"),
    *("per-expert", "per-expert-local"),
)
BF16 = (("hf", "bf16"), *(("megatron", variant) for variant in MEGATRON))
MXFP4 = (("hf", "mxfp4"), ("openai", "mxfp4"))

Tensors = Mapping[str, Tensor]
Side = tuple[str, str]
"""Format and variant."""


RUNS = range(7)


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@cache
def numbered(run: int) -> dict[str, Tensor]:
    """A model whose elements carry digit `run` of their number, under the HF MXFP4 names.

    BF16 elements carry 16 bits a run. Runs 0 to 4 number the FP4 codes, all scales alike; runs 5
    and 6 number the scales, all codes alike, so that decoding can hide neither.
    """
    numbers = {torch.bfloat16: 0, torch.uint8: 0}
    scales, numbered = 0, {}
    for name, like in random_weights(SHAPE).items():
        first = scales if name.endswith("_scales") else numbers[like.dtype]
        ids = torch.arange(first, first + like.numel()).reshape(like.shape)
        if name.endswith("_scales"):
            scales += like.numel()
            digit = ids // 200 ** (run - 5) % 200 if run >= 5 else torch.full_like(ids, 127)
            numbered[name] = digit.to(torch.uint8)
            continue
        numbers[like.dtype] += like.numel()
        if like.dtype == torch.bfloat16:
            digit = (ids >> 16 * (run % 2)) & 0xFFFF
            numbered[name] = (digit - (digit >> 15 << 16)).to(torch.int16).view(torch.bfloat16)
        else:
            low, high = ((2 * ids + half) >> 4 * run & 15 for half in (0, 1))
            packed = low | high << 4 if run < 5 else torch.full_like(ids, 0x22)
            numbered[name] = packed.to(torch.uint8)
    assert numbers[torch.uint8] * 2 < 16**5
    assert scales < 200**2
    assert numbers[torch.bfloat16] < 1 << 32
    return numbered


def per_layer(stacked: Tensors) -> dict[str, Tensor]:
    """Megatron's naming with one tensor a layer: axis 0 moves into the name."""
    tensors: dict[str, Tensor] = {}
    for name, tensor in stacked.items():
        if not name.startswith("decoder.layers."):
            tensors[name] = tensor
            continue
        for n in range(SHAPE.layers):
            tensors[name.replace("layers.", f"layers.{n}.", 1)] = tensor[n]
    return tensors


def per_expert(layers: Tensors) -> dict[str, Tensor]:
    """Megatron's naming with one tensor an expert: gate as `_w`, up as `_v`."""
    tensors: dict[str, Tensor] = {}
    for name, tensor in layers.items():
        head, found, kind = name.partition(".mlp.experts.experts.")
        for e in range(SHAPE.experts if found else 0):
            prefix = f"{head}{found}{e}.{kind}"
            if "fc1" in kind:
                tensors[f"{prefix}_w"] = tensor[e, : SHAPE.inter]
                tensors[f"{prefix}_v"] = tensor[e, SHAPE.inter :]
            else:
                tensors[prefix] = tensor[e]
        if not found:
            tensors[name] = tensor
    return tensors


def arranged(side: Side, weights: Tensors) -> dict[str, Tensor]:
    """The model as `side` stores it, by code that knows no table."""
    format, variant = side
    if side == ("hf", "mxfp4"):
        return dict(weights)
    if side == ("hf", "bf16"):
        return hf_bf16_tensors(weights)
    if format == "openai":
        return openai_tensors(SHAPE, weights)
    tensors = megatron_tensors(SHAPE, weights)
    naming, _, norm = variant.removeprefix("per-").partition("-")
    te, local = "pre_mlp_layernorm.weight", "mlp.linear_fc1.layer_norm_weight"
    if norm:
        moved = tensors[f"decoder.layers.{te}"]
        tensors[f"decoder.layers.{local}"] = moved
        if norm == "local":
            del tensors[f"decoder.layers.{te}"]
    if naming != "stacked":
        tensors = per_layer(tensors)
    return per_expert(tensors) if naming == "expert" else tensors


DTYPES = {torch.bfloat16: "BF16", torch.uint8: "U8"}


def whole_chunks(tensors: Tensors, file: str) -> list[Chunk]:
    """Every tensor in one piece, one behind the other, at odd multiples of its item size."""
    chunks: list[Chunk] = []
    offset = 6
    for name, tensor in tensors.items():
        shape = tuple(tensor.shape)
        chunk = Chunk(name, DTYPES[tensor.dtype], shape, (0,) * len(shape), shape, file, offset)
        chunks.append(chunk)
        offset += chunk.nbytes + 2
    return chunks


def cut_chunks(tensors: Tensors, file: str, seed: int) -> list[Chunk]:
    """Every tensor cut at random places along every dimension, the pieces in random order."""
    generator = np.random.default_rng(seed)
    chunks: list[Chunk] = []
    offset = 2
    for whole in whole_chunks(tensors, file):
        cuts = [
            sorted({0, length, *generator.integers(0, length, size=1).tolist()})
            for length in whole.shape
        ]
        boxes = list(product(*(pairwise(places) for places in cuts)))
        for i in generator.permutation(len(boxes)):
            start = tuple(lo for lo, _ in boxes[i])
            extent = tuple(hi - lo for lo, hi in boxes[i])
            chunk = Chunk(whole.tensor, whole.dtype, whole.shape, start, extent, file, offset)
            chunks.append(chunk)
            offset += chunk.nbytes + 2 * int(generator.integers(0, 3))
    return chunks


def box_of(chunk: Chunk) -> tuple[slice, ...]:
    return tuple(
        slice(first, first + length)
        for first, length in zip(chunk.start, chunk.extent, strict=True)
    )


def bits_of(tensor: Tensor) -> np.ndarray:
    return (tensor.view(torch.int16) if tensor.dtype == torch.bfloat16 else tensor).numpy()


class MemorySource:
    """The bytes of one made-up file, as the workers ask for them."""

    def __init__(self, tensors: Tensors, chunks: Sequence[Chunk]) -> None:
        self._bytes = bytearray(max(c.offset + c.nbytes for c in chunks))
        for chunk in chunks:
            piece = bits_of(tensors[chunk.tensor])[box_of(chunk)].tobytes()
            self._bytes[chunk.offset : chunk.offset + chunk.nbytes] = piece

    def read(self, file: FileRef, offset: int, nbytes: int, arena: Arena, position: int) -> None:
        assert 0 <= offset <= offset + nbytes <= len(self._bytes)
        arena.memory[position : position + nbytes] = self._bytes[offset : offset + nbytes]


def read_back(raw: bytearray, chunks: Sequence[Chunk]) -> dict[str, np.ndarray]:
    tensors: dict[str, np.ndarray] = {}
    for chunk in chunks:
        kind = np.dtype(np.uint8 if chunk.dtype == "U8" else np.int16)
        if chunk.tensor not in tensors:
            tensors[chunk.tensor] = np.zeros(chunk.shape, kind)
        piece = np.frombuffer(raw, kind, chunk.nbytes // kind.itemsize, chunk.offset)
        tensors[chunk.tensor][box_of(chunk)] = piece.reshape(chunk.extent)
    return tensors


def extents_of(side: Side, chunks: Sequence[Chunk], table: Table | None = None) -> list[Extent]:
    tensors = (table or load_table(side[0])).tensors(side[1], SIZES)
    return extents("made up", tensors, chunks)


def unaliased(found: Sequence[Extent]) -> list[Extent]:
    return [extent for extent in found if not extent.alias]


@cache
def model(side: Side, run: int) -> dict[str, Tensor]:
    """The numbered model as `side` stores it."""
    return arranged(side, numbered(run))


class MemoryTarget(TargetFiles):
    """A made-up file that takes the workers' bytes."""

    def __init__(self, chunks: Sequence[Chunk]) -> None:
        self.content = bytearray(max(c.offset + c.nbytes for c in chunks))

    def write(self, name: str, offset: int, nbytes: int, arena: Arena, position: int) -> None:
        assert 0 <= offset <= offset + nbytes <= len(self.content)
        self.content[offset : offset + nbytes] = arena.memory[position : position + nbytes]


def run_plan(plan: Plan, source: MemorySource, chunks: Sequence[Chunk]) -> dict[str, np.ndarray]:
    target = MemoryTarget(chunks)
    results: list[Done] = []
    execute(
        plan,
        range(len(plan.steps)),
        source,
        target,
        workers=1,
        finished=results.extend,
        advance=lambda nbytes: None,
    )
    for done in results:
        described = {(region.file, region.offset, region.length) for region in done.regions}
        assert described == written_ranges(plan.steps[done.step])
        for region in done.regions:
            written = target.content[region.offset : region.offset + region.length]
            assert region.crc == zlib.crc32(written)
    return read_back(target.content, chunks)


def misplaced(
    source: Side,
    target: Side,
    *,
    seed: int | None = None,
    tile_bytes: int = 1 << 15,
    table: Table | None = None,
    runs: Sequence[int] = RUNS,
) -> list[str]:
    """The target tensors that hold an element at another place than independent code says.

    With `seed`, both sides are cut into random chunks. `table` replaces the target's table.
    """
    given, wanted = model(source, 0), model(target, 0)
    from_chunks = (
        whole_chunks(given, "source") if seed is None else cut_chunks(given, "source", seed)
    )
    to_chunks = (
        whole_chunks(wanted, "target") if seed is None else cut_chunks(wanted, "target", seed + 1)
    )
    held = unaliased(extents_of(source, from_chunks))
    taken = extents_of(target, to_chunks, table)
    plan = make_plan(load_model(), SIZES, held, taken, tile_bytes)
    wrong: set[str] = set()
    for run in runs:
        tensors = MemorySource(model(source, run), from_chunks)
        found = run_plan(plan, tensors, to_chunks)
        by_value = source not in MXFP4
        wrong |= differences(found, model(target, run), by_value)
    return sorted(wrong)


def differences(found: Mapping[str, np.ndarray], expected: Tensors, by_value: bool) -> set[str]:
    """Names whose bits differ; `by_value`: packed experts by value, as an encoder may choose."""
    assert found.keys() == expected.keys()
    wrong: set[str] = set()
    for name, tensor in expected.items():
        if tensor.dtype == torch.bfloat16 or not by_value:
            if not same_bits(found[name], bits_of(tensor)):
                wrong.add(name)
        elif name.endswith("blocks"):
            scales = name.replace("blocks", "scales")
            made = decode_mxfp4(*(torch.from_numpy(found[n]) for n in (name, scales)))
            if not same_bits(bits_of(made), bits_of(decode_mxfp4(tensor, expected[scales]))):
                wrong.add(name)
    return wrong


def same_bits(a: np.ndarray, b: np.ndarray) -> bool:
    return a.dtype == b.dtype and np.array_equal(a, b)


PAIRS = [
    *product(MXFP4 + BF16[:1], MXFP4 + BF16),
    *product(BF16[1:], BF16[:1]),
    (BF16[1], MXFP4[1]),
    (BF16[-1], MXFP4[0]),
]


def name_of(pair: tuple[Side, Side]) -> str:
    return " to ".join("-".join(side) for side in pair)


@pytest.mark.parametrize(("source", "target"), PAIRS, ids=map(name_of, PAIRS))
def test_every_element_arrives_where_independent_code_puts_it(source: Side, target: Side):
    assert misplaced(source, target) == []


@pytest.mark.parametrize(("source", "target"), PAIRS[::5], ids=map(name_of, PAIRS[::5]))
def test_every_element_arrives_however_the_tensors_are_cut(source: Side, target: Side):
    assert misplaced(source, target, seed=3, tile_bytes=10000, runs=(1, 5)) == []


@pytest.mark.parametrize("seed", [None, 4])
@pytest.mark.parametrize("piece_bytes", [1, 3000, 11000])
def test_every_element_arrives_however_small_the_pieces(
    piece_bytes: int, seed: int | None, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("gptoss_convert.engine.steps.PIECE_BYTES", piece_bytes)
    for source, target in (
        *((MXFP4[0], target) for target in BF16[:3]),
        (BF16[0], BF16[1]),
        (BF16[1], BF16[0]),
    ):
        # The smallest take long: of the numbers, their lowest digit.
        runs = (0, 5) if piece_bytes > 1 else (0,)
        assert misplaced(source, target, seed=seed, runs=runs) == []


@pytest.mark.parametrize("exact", [True, False])
@pytest.mark.parametrize("to", ["hf", "openai"])
def test_what_is_encoded_row_by_row_is_summed_up_once(
    to: str, exact: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    source = tmp_path / "source"
    if exact:
        synth(tmp_path / "packed")
        convert(tmp_path / "packed", source, Options(to="hf", dtype="bf16"))
    else:
        write_hf_bf16(source, SQUARE, random_weights(SQUARE, seed=9))
    lossy = None if exact else "nearest"
    made: list[dict[str, bytes]] = []
    for at_once in (1 << 21, 20_000 if exact else 64):
        monkeypatch.setattr("gptoss_convert.engine.execute._AT_ONCE", at_once)
        target = tmp_path / str(at_once)
        convert(source, target, Options(to=to, dtype="mxfp4", lossy=lossy))
        made.append({file.name: file.read_bytes() for file in target.rglob("*.*")})
    assert "gptoss-convert.json" in made[0]
    assert made[0] == made[1]


def test_pieces_follow_one_another_in_the_target(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("gptoss_convert.engine.steps.PIECE_BYTES", 3000)
    held = extents_of(BF16[1], chunks_of(BF16[1]))
    taken = extents_of(BF16[0], chunks_of(BF16[0]))
    plan = make_plan(load_model(), SIZES, held, taken, 1 << 14)
    cut = [pieces for step in plan.steps if len(pieces := list(step.pieces())) > 1]
    assert {pieces[0].family.weight for pieces in cut} >= {"gate_up.weight"}
    for pieces in cut:
        (extent,) = pieces[0].targets
        places = [extent.at(piece.box) for piece in pieces]
        assert places == sorted(places)
        assert all(2 * volume(piece.box) < 3000 + 2 * 160 * 32 for piece in pieces)


def test_packed_experts_move_without_a_change_of_their_bytes():
    for source, target in product(MXFP4, MXFP4):
        weights = random_weights(SHAPE, seed=5)
        given, wanted = arranged(source, weights), arranged(target, weights)
        from_chunks, to_chunks = whole_chunks(given, "source"), cut_chunks(wanted, "target", 1)
        plan = make_plan(
            load_model(), SIZES, extents_of(source, from_chunks), extents_of(target, to_chunks)
        )
        found = run_plan(plan, MemorySource(given, from_chunks), to_chunks)
        assert all(same_bits(found[name], bits_of(wanted[name])) for name in wanted)


MUTATIONS: dict[str, tuple[Side, str, dict[str, object]]] = {
    "gate and up in halves": (
        ("hf", "bf16"),
        "model.layers.{layer}.mlp.experts.gate_up_proj",
        {"layout": "expert hidden (glu inter)"},
    ),
    "bias in halves": (
        ("hf", "bf16"),
        "model.layers.{layer}.mlp.experts.gate_up_proj_bias",
        {"layout": "expert (glu inter)"},
    ),
    "heads before groups": (
        ("hf", "bf16"),
        "model.layers.{layer}.self_attn.q_proj.weight",
        {"layout": "(group kv_head head_dim) hidden"},
    ),
    "sinks grouped the other way": (
        ("hf", "mxfp4"),
        "model.layers.{layer}.self_attn.sinks",
        {"layout": "(group kv_head)"},
    ),
    "k and v swapped": (
        ("openai", "mxfp4"),
        "block.{layer}.attn.qkv.weight",
        {"param": ["attention.q.weight", "attention.v.weight", "attention.k.weight"]},
    ),
    "q last": (
        ("openai", "mxfp4"),
        "block.{layer}.attn.qkv.bias",
        {"param": ["attention.k.bias", "attention.v.bias", "attention.q.bias"]},
    ),
    "rows interleaved in blocks": (
        ("openai", "mxfp4"),
        "block.{layer}.mlp.mlp1_weight.blocks",
        {"layout": "expert (glu inter) hidden_block byte"},
    ),
    "rows interleaved in scales": (
        ("hf", "mxfp4"),
        "model.layers.{layer}.mlp.experts.gate_up_proj_scales",
        {"layout": "expert (glu inter) hidden_block"},
    ),
    "up before gate": (
        ("megatron", "per-expert"),
        "decoder.layers.{layer}.mlp.experts.experts.{expert}.linear_fc1.bias_w",
        {"at": {"glu": 1}},
    ),
    "qkv not grouped": (
        ("megatron", "stacked"),
        "decoder.layers.self_attention.linear_qkv.weight",
        {"layout": "layer * hidden"},
    ),
}


def mutated(side: Side, name: str, change: Mapping[str, object]) -> Table:
    """The table of `side` with one rule changed, and its `_v` twin if the rule has one."""
    path = resources.files("gptoss_convert.mappings").joinpath(f"{side[0]}.toml")
    content: dict[str, Any] = copy.deepcopy(tomllib.loads(path.read_text(encoding="utf-8")))
    (section,) = [key for key in content["variants"][side[1]] if name in content[key]]
    content[section][name].update(change)
    twin = name.removesuffix("_w") + "_v"
    if twin in content[section]:
        content[section][twin]["at"] = {"glu": 0}
    return parse_table(side[0], content, load_model())


@pytest.mark.parametrize("mutation", MUTATIONS)
def test_the_proof_notices_a_wrong_table(mutation: str):
    side, name, change = MUTATIONS[mutation]
    wrong = misplaced(("hf", "bf16"), side, table=mutated(side, name, change))
    stem = name.format(layer=0, expert=0).replace("scales", "blocks")
    assert stem in wrong
    assert len({text.translate(str.maketrans("", "", "0123456789")) for text in wrong}) <= 2


def test_a_square_transpose_is_noticed_too():
    """Where lengths agree, a plan is accepted, and only the numbers tell."""
    side: Side = ("hf", "bf16")
    name = "model.layers.{layer}.self_attn.q_proj.bias"
    table = mutated(side, name, {"layout": "(head_dim kv_head group)"})
    wrong = misplaced(("openai", "mxfp4"), side, table=table, runs=(0,))
    assert wrong == [name.format(layer=n) for n in range(SHAPE.layers)]


def chunks_of(side: Side) -> list[Chunk]:
    return whole_chunks(model(side, 0), "source")


def refusal(held: Sequence[Extent], taken: Sequence[Extent]) -> str:
    with pytest.raises((IntegrityError, InputError)) as refused:
        make_plan(load_model(), SIZES, held, taken)
    return str(refused.value)


def shortened(found: Sequence[Extent], param: str, axis: int) -> Iterator[Extent]:
    for extent in found:
        lo, hi = extent.box[axis] if extent.param == param else (0, 0)
        box = (*extent.box[:axis], (lo, hi - 1), *extent.box[axis + 1 :])
        yield replace(extent, box=box) if extent.param == param else extent


def test_an_element_that_is_stored_nowhere_or_twice_is_refused():
    side: Side = ("hf", "bf16")
    whole = extents_of(side, chunks_of(side))
    lacking = list(shortened(whole, "embedding.weight", 1))
    assert refusal(lacking, whole) == (
        "source: embedding.weight[(0, 11), (0, 160)]: not stored completely"
    )
    assert refusal(whole, lacking) == (
        "target: embedding.weight[(0, 11), (0, 160)]: not stored completely"
    )
    twice = [*whole, *(e for e in whole if e.param == "norm.weight")]
    assert refusal(twice, whole) == "source: norm.weight[(0, 160)]: stored more than once"
    assert refusal(whole, twice) == "target: norm.weight[(0, 160)]: stored more than once"


def test_a_half_that_is_stored_twice_does_not_stand_for_the_other():
    side: Side = ("hf", "bf16")
    whole = extents_of(side, chunks_of(side))
    (norm,) = [e for e in whole if e.param == "norm.weight"]
    half = replace(norm, box=((0, SHAPE.hidden // 2),))
    folded = [e for e in whole if e is not norm] + [half, half]
    assert refusal(folded, whole) == "source: norm.weight[(0, 160)]: stored more than once"
    assert refusal(whole, folded) == "target: norm.weight[(0, 160)]: stored more than once"


def test_a_parameter_that_the_source_lacks_is_refused():
    side: Side = ("hf", "mxfp4")
    whole = extents_of(side, chunks_of(side))
    without = [e for e in whole if e.param != "down.weight.scales"]
    bf16 = extents_of(("hf", "bf16"), chunks_of(("hf", "bf16")))
    assert refusal(without, bf16) == "down.weight: the source holds no down.weight.scales"
    only = [e for e in bf16 if e.param != "norm.weight"]
    assert refusal(only, bf16) == "norm.weight: the source holds no norm.weight"


@pytest.mark.parametrize("tile_bytes", [1, 64, 5000, 1 << 20])
def test_tiles_stay_below_the_bound_and_never_cut_a_block(tile_bytes: int):
    held = extents_of(("hf", "mxfp4"), chunks_of(("hf", "mxfp4")))
    taken = extents_of(("hf", "bf16"), chunks_of(("hf", "bf16")))
    plan = make_plan(load_model(), SIZES, held, taken, tile_bytes)
    for step in plan.steps:
        lengths = [hi - lo for lo, hi in step.box]
        row = 2 * lengths[-1]
        assert 2 * int(np.prod(lengths)) <= max(tile_bytes, row)
        assert lengths[-1] == SIZES[step.family.axes[-1]]


def test_a_plan_counts_every_byte_once():
    mxfp4, bf16 = model(MXFP4[0], 0), model(BF16[0], 0)
    plan = make_plan(
        load_model(),
        SIZES,
        extents_of(MXFP4[0], whole_chunks(mxfp4, "source")),
        extents_of(BF16[0], whole_chunks(bf16, "target")),
    )
    assert plan.read_bytes == sum(t.nbytes for t in mxfp4.values())
    assert plan.write_bytes == sum(t.nbytes for t in bf16.values())
    assert plan.buffer_bytes == max(step.buffer_bytes() for step in plan.steps)


def test_steps_follow_the_order_of_the_target():
    held = extents_of(MXFP4[0], chunks_of(MXFP4[0]))
    taken = extents_of(MXFP4[1], cut_chunks(model(MXFP4[1], 0), "target", 9))
    plan = make_plan(load_model(), SIZES, held, taken, 1 << 12)
    firsts = [
        min(extent.at(part) for extent, part in step.parts(step.targets)) for step in plan.steps
    ]
    assert len(firsts) > 200
    assert sum(a > b for a, b in pairwise(firsts)) < len(firsts) // 3
