"""A codec and changes that the package has never seen, brought by this test alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from gptoss_convert.codecs.codec import Codec, Ranges, load_codec
from gptoss_convert.codecs.stats import EncodeStats, ScaleStatistics
from gptoss_convert.containers import Chunk
from gptoss_convert.containers.refs import FileRef
from gptoss_convert.engine.derivations import Input, choose
from gptoss_convert.engine.execute import execute
from gptoss_convert.engine.records import Done, Effect
from gptoss_convert.engine.steps import Plan, make_plan
from gptoss_convert.engine.work import Work
from gptoss_convert.errors import InputError
from gptoss_convert.layouts.extents import Extent, extents, volume
from gptoss_convert.layouts.model import Model, parse_model, read_hub, read_toml
from gptoss_convert.layouts.table_files import parse_table
from gptoss_convert.layouts.tables import Table
from gptoss_convert.machine.arena import Arena
from gptoss_convert.machine.target_files import TargetFiles

if TYPE_CHECKING:
    from gptoss_convert.codecs.codec import Arrays, Values, Weights

NUMBERS = {
    "num_hidden_layers": 2,
    "num_local_experts": 3,
    "vocab_size": 11,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_attention_heads": 28,
    "num_key_value_heads": 7,
    "head_dim": 6,
}
BLOCK = 16


class Int8:
    """Signed bytes, 16 of which share a step that is stored as float32."""

    name = "int8"
    members: Mapping[str, str] = SimpleNamespace(codes="U8", steps="F32").__dict__
    block = BLOCK
    hints = ()
    magnitudes = ("codes", 0xFF)

    def member_box(self, member: str, box: Ranges) -> Ranges:
        lo, hi = box[-1]
        blocks = (*box[:-1], (lo // BLOCK, -(-hi // BLOCK)))
        return (*blocks, (0, BLOCK)) if member == "codes" else blocks

    def decode(self, parts: Arrays, values: Values) -> None:
        found = parts["codes"].view(np.int8) * parts["steps"].view(np.float32)[..., None]
        values[...] = bits_of(found.reshape(values.shape))

    def encode(self, values: Values, parts: Arrays, hints: Arrays) -> EncodeStats:
        blocks = floats_of(values).reshape(parts["codes"].shape)
        largest = np.abs(blocks).max(axis=-1)
        steps = np.exp2(np.ceil(np.log2(np.maximum(largest, 1e-30) / 127))).astype(np.float32)
        codes = np.rint(blocks / steps[..., None])
        parts["codes"][...] = codes.astype(np.int8).view(np.uint8)
        parts["steps"].view(np.float32)[...] = steps
        lost = codes * steps[..., None] != blocks
        return EncodeStats(blocks=steps.size, inexact_blocks=int(lost.any(axis=-1).sum()))

    def same(self, parts: Arrays, values: Values) -> bool:
        found = np.empty(values.shape, np.uint16)
        self.decode(parts, found)
        return np.array_equal(found, values)

    def statistics(self, parts: Arrays) -> ScaleStatistics:
        return ScaleStatistics(blocks=parts["steps"].size)

    def weighted_sum(self, parts: Arrays, weights: Weights) -> int | None:
        return None


def bits_of(values: np.ndarray) -> np.ndarray:
    """BF16 bits, rounded to nearest even."""
    wide = np.ascontiguousarray(values, np.float32).view(np.uint32)
    return ((wide + 0x7FFF + (wide >> 16 & 1)) >> 16).astype(np.uint16)


def floats_of(bits: np.ndarray) -> np.ndarray:
    return (bits.astype(np.uint32) << 16).view(np.float32)


@cache
def hub(block: int = BLOCK) -> Model:
    content = read_hub()
    content["axes"] |= {
        "hidden_16": f"hidden_size / {block}",
        "inter_16": f"intermediate_size / {block}",
        "code": BLOCK,
    }
    content["int8"] = {
        "gate_up.weight": {
            "codes": "layer expert inter glu hidden_16 code",
            "steps": "layer expert inter glu hidden_16",
        },
        "down.weight": {
            "codes": "layer expert hidden inter_16 code",
            "steps": "layer expert hidden inter_16",
        },
    }
    codec: Codec = Int8()
    return parse_model(content, lambda name: codec if name == "int8" else load_codec(name))


@cache
def table() -> Table:
    """Hugging Face's table, and one more variant of it."""
    content = read_toml("hf.toml")
    stem = "model.layers.{layer}.mlp.experts."
    content["variants"]["int8"] = ["common", "biases", "int8"]
    content["int8"] = {
        f"{stem}gate_up.codes": rule("gate_up.weight.codes", "expert (inter glu) hidden_16 code"),
        f"{stem}gate_up.steps": rule("gate_up.weight.steps", "expert (inter glu) hidden_16"),
        f"{stem}down.codes": rule("down.weight.codes", "expert hidden inter_16 code"),
        f"{stem}down.steps": rule("down.weight.steps", "expert hidden inter_16"),
    }
    return parse_table("toy", content, hub())


def rule(param: str, layout: str) -> dict[str, str]:
    return {"param": param, "layout": layout}


SIZES = hub().sizes(NUMBERS)
BYTES = {"U8": np.uint8, "BF16": np.uint16, "F32": np.float32}


@dataclass
class Memory(TargetFiles):
    """A checkpoint in memory: each tensor a file of its own."""

    tensors: dict[str, np.ndarray]

    def read(self, file: FileRef, offset: int, nbytes: int, arena: Arena, position: int) -> None:
        raw = self.tensors[file.name].tobytes()[offset : offset + nbytes]
        arena.memory[position : position + nbytes] = raw

    def write(self, name: str, offset: int, nbytes: int, arena: Arena, position: int) -> None:
        raw = self.tensors[name].view(np.uint8).reshape(-1)
        raw[offset : offset + nbytes] = np.frombuffer(arena.memory, np.uint8, nbytes, position)


def empty(variant: str) -> Memory:
    """A checkpoint of this variant, without values yet."""
    tensors = table().tensors(variant, SIZES)
    return Memory({t.name: np.zeros(t.shape, BYTES[t.dtype]) for t in tensors})


def held_by(checkpoint: Memory, variant: str) -> list[Extent]:
    dtypes = {np.dtype(kind): name for name, kind in BYTES.items()}
    chunks = [
        Chunk(name, dtypes[t.dtype], t.shape, (0,) * t.ndim, t.shape, name, 0)
        for name, t in checkpoint.tensors.items()
        if not name.startswith("adapter ")
    ]
    return extents("memory", table().tensors(variant, SIZES), chunks)


def values(seed: int) -> Memory:
    """BF16 values that every codec here holds exactly: small multiples of a power of two."""
    checkpoint = empty("bf16")
    generator = np.random.default_rng(seed)
    for tensor in checkpoint.tensors.values():
        codes = generator.choice([-4, -3, -2, -1, 1, 2, 3, 4], tensor.shape)
        tensor[...] = bits_of(codes * np.float32(2.0**-7))
    return checkpoint


def converted(
    source: Memory,
    given: str,
    wanted: str,
    changes: Mapping[str, Sequence[Any]] | None = None,
    more: Sequence[Extent] = (),
) -> tuple[Memory, Plan, list[Done]]:
    """The same checkpoint as another variant."""
    target = empty(wanted)
    plan = make_plan(
        hub(),
        SIZES,
        [*held_by(source, given), *more],
        held_by(target, wanted),
        tile_bytes=1 << 13,
        changes=changes,
    )
    results: list[Done] = []
    numbers = range(len(plan.steps))
    execute(
        plan,
        numbers,
        source,
        target,
        workers=2,
        finished=results.extend,
        advance=lambda nbytes: None,
    )
    return target, plan, sorted(results, key=lambda done: done.step)


def chain_of(plan: Plan, weight: str) -> list[str]:
    recipe = next(step.recipe for step in plan.steps if step.family.weight == weight)
    return [type(one).__name__ for one in (*recipe.first, *recipe.whole, *recipe.by_piece)]


def marks(plan: Plan, results: Sequence[Done]) -> dict[tuple[str, int], int]:
    """The fingerprint of every layer of every weight."""
    found: dict[tuple[str, int], int] = {}
    for step, done in zip(plan.steps, results, strict=True):
        key = step.family.weight, step.layer
        found[key] = (found.get(key, 0) + (done.fingerprint or 0)) % (1 << 64)
    return found


def same(a: Memory, b: Memory) -> bool:
    return a.tensors.keys() == b.tensors.keys() and all(
        np.array_equal(a.tensors[name].view(np.uint8), b.tensors[name].view(np.uint8))
        for name in a.tensors
    )


def test_a_codec_of_this_test_encodes_decodes_and_is_copied():
    source = values(1)
    packed, there, results = converted(source, "bf16", "int8")
    assert chain_of(there, "down.weight") == ["Encode"]
    assert sum(done.encoded.blocks for done in results) == 2 * 3 * 3 * 64 * 96 // BLOCK
    assert not any(done.encoded.inexact_blocks for done in results)
    copied, again, copies = converted(packed, "int8", "int8")
    assert chain_of(again, "down.weight") == ["Copy"]
    assert same(copied, packed)
    back, home, decoded = converted(packed, "int8", "bf16")
    assert chain_of(home, "down.weight") == ["Decode"]
    assert same(back, source)
    assert marks(there, results) == marks(again, copies) == marks(home, decoded)
    assert len({*marks(there, results).values()}) == len(marks(there, results))


def test_the_fingerprint_is_of_what_was_written_even_if_it_was_rounded(
    monkeypatch: pytest.MonkeyPatch,
):
    monkeypatch.setattr("gptoss_convert.engine.fingerprint._SCRATCH_BYTES", 1000)
    source = values(7)
    noise = np.random.default_rng(8)
    for layer in range(2):
        tensor = source.tensors[f"model.layers.{layer}.mlp.experts.down_proj"]
        tensor[...] = bits_of(noise.normal(size=tensor.shape))
    packed, there, results = converted(source, "bf16", "int8")
    assert any(done.encoded.inexact_blocks for done in results)
    _, home, decoded = converted(packed, "int8", "bf16")
    assert marks(there, results) == marks(home, decoded)
    _, exact, before = converted(source, "bf16", "bf16")
    assert marks(there, results) != marks(exact, before)


def test_one_encoding_becomes_another_by_way_of_values_in_memory():
    source = values(2)
    mxfp4, _, _ = converted(source, "bf16", "mxfp4")
    packed, plan, results = converted(mxfp4, "mxfp4", "int8")
    assert chain_of(plan, "down.weight") == ["Decode", "Encode"]
    assert same(packed, converted(source, "bf16", "int8")[0])
    assert same(converted(packed, "int8", "mxfp4")[0], mxfp4)
    assert sum(done.encoded.blocks for done in results) == 2 * 3 * 3 * 64 * 96 // BLOCK
    step = next(step for step in plan.steps if step.recipe.scratch)
    assert step.buffer_bytes() > step.source_bytes() + step.target_bytes() + 2 * volume(step.box)


def test_an_expert_of_zeros_is_noticed_in_any_encoding():
    source = values(3)
    source.tensors["model.layers.1.mlp.experts.down_proj"][2] = 0
    packed, _, _ = converted(source, "bf16", "int8")
    _, plan, results = converted(packed, "int8", "bf16")
    found = {
        (step.family.weight, step.layer, expert)
        for step, done in zip(plan.steps, results, strict=True)
        for expert in done.anomalies.zeros
    }
    assert found == {("down.weight", 1, 2)}


RANK = 3
A, B = "down.weight.A", "down.weight.B"
INPUTS = (
    Input(A, ("layer", "expert", "rank", "inter"), (2, 3, RANK, 96)),
    Input(B, ("layer", "expert", "hidden", "rank"), (2, 3, 64, RANK)),
)


@dataclass(frozen=True)
class Merge:
    """down.weight += B A, computed in float32 and rounded once."""

    needs = frozenset({"down.weight", A, B})
    makes = frozenset({"down.weight"})
    inputs = INPUTS

    def run(self, work: Work) -> None:
        delta = work.gather(B) @ work.gather(A)
        box = work.step.box
        for part in work.held["down.weight"]:
            inside = tuple(
                slice(lo - first, hi - first)
                for (lo, hi), (first, _) in zip(part.box, box, strict=True)
            )
            part.array[...] = bits_of(floats_of(part.array) + delta[inside])


def with_factors(checkpoint: Memory) -> tuple[Memory, list[Extent], np.ndarray]:
    """The checkpoint with two more files, where their parameters lie, and what they add."""
    generator = np.random.default_rng(9)
    factors: dict[str, np.ndarray] = {}
    more: list[Extent] = []
    for one in INPUTS:
        name = f"adapter {one.param}"
        array = generator.integers(-1, 2, one.lengths).astype(np.float32) * np.float32(2.0**-5)
        box = tuple((0, length) for length in one.lengths)
        more.append(Extent(one.param, box, FileRef(Path(), name), 0, array.strides, "F32", name))
        factors[name] = array
    delta = factors[f"adapter {B}"] @ factors[f"adapter {A}"]
    return Memory(checkpoint.tensors | factors), more, delta


@pytest.mark.parametrize("given", ["bf16", "mxfp4", "int8"])
@pytest.mark.parametrize("wanted", ["bf16", "mxfp4", "int8"])
def test_a_merge_happens_between_whatever_two_encodings(
    given: str, wanted: str, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("gptoss_convert.engine.steps.PIECE_BYTES", 2000)
    plain = values(4)
    source, more, delta = with_factors(converted(plain, "bf16", given)[0])
    merged, plan, results = converted(
        source, given, wanted, changes={"down.weight": [Merge()]}, more=more
    )
    expected = Memory(dict(plain.tensors))
    for layer in range(2):
        name = f"model.layers.{layer}.mlp.experts.down_proj"
        before = floats_of(plain.tensors[name])
        expected.tensors[name] = bits_of(before + delta[layer].transpose(0, 2, 1))
        assert (expected.tensors[name] != plain.tensors[name]).mean() > 0.3
    wished, other, others = converted(expected, "bf16", wanted)
    assert same(merged, wished)
    assert marks(plan, results) == marks(other, others)
    chain = chain_of(plan, "down.weight")
    assert chain.count("Merge") == 1
    assert ("Decode" in chain) == (given != "bf16") and ("Encode" in chain) == (wanted != "bf16")
    assert all(set(chain_of(plan, w)) == {"Copy"} for w in ("router.weight", "norm.weight"))


@dataclass(frozen=True)
class Ceiling:
    """Another way to encode down.weight: it makes no code but zero, and says so."""

    needs = frozenset({"down.weight"})
    makes = frozenset({"down.weight.codes", "down.weight.steps"})
    inputs = ()

    def run(self, work: Work) -> Effect:
        for param in self.makes:
            for output in work.outputs[param]:
                output.array[...] = 0
        work.made(*self.makes)
        return Effect(encoded=EncodeStats(blocks=1, inexact_blocks=1))


def test_a_change_that_makes_members_stands_in_for_the_encoding():
    packed, plan, results = converted(
        values(5), "bf16", "int8", changes={"down.weight": [Ceiling()]}
    )
    assert chain_of(plan, "down.weight") == ["Ceiling"]
    assert chain_of(plan, "gate_up.weight") == ["Encode"]
    for name, tensor in packed.tensors.items():
        assert tensor.any() != (".down." in name), name
    rounded = {
        step.family.weight
        for step, done in zip(plan.steps, results, strict=True)
        if done.encoded.inexact_blocks
    }
    assert rounded == {"down.weight"}


def test_what_a_change_reads_must_be_there():
    source = values(6)
    with pytest.raises(InputError, match=r"^down\.weight: the source holds no down\.weight\.A and"):
        converted(source, "bf16", "bf16", changes={"down.weight": [Merge()]})


def test_a_section_must_be_what_its_codec_says():
    with pytest.raises(InputError, match=r"^model\.toml: gate_up\.weight\.codes: its axes have"):
        hub(32).sizes(NUMBERS)
    content = read_hub()
    with pytest.raises(InputError, match=r"'gate_up\.weight\.blocks' is a parameter already"):
        parse_model({**content, "again": content["mxfp4"]}, lambda name: load_codec("mxfp4"))
    with pytest.raises(InputError, match=r"^\[fp3\]: no codec has this name$"):
        parse_model({**content, "fp3": {}})


def test_a_recipe_is_a_value_that_says_what_it_needs_and_makes():
    family = hub().families["down.weight"]
    mxfp4 = family.encodings[0].params
    held = {param: [] for param in mxfp4}
    recipe = choose(family, held, ["down.weight", mxfp4[1]])
    assert recipe.needs == mxfp4
    assert recipe.makes == ("down.weight", mxfp4[1])
    assert [type(one).__name__ for one in recipe.whole] == ["Copy"]
    assert [type(one).__name__ for one in recipe.by_piece] == ["Decode"]
