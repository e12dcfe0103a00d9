"""What differs between two checkpoints of any formats: configuration, weights and how much.

Both sides go through the mapping tables, so this is about contents, not about correctness.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from gptoss_convert.compare.arrays import Distance, distance, sum_of
from gptoss_convert.compare.config_diff import KeysDiff, Pair, keys_that_differ, numbers_that_differ
from gptoss_convert.compare.inventory import (
    Contents,
    WeightLayer,
    contents_of,
    encoding_of,
    in_words,
)
from gptoss_convert.compare.pairs import StepPair, judge_steps
from gptoss_convert.engine.steps import Plan, make_plan
from gptoss_convert.formats.checkpoint import Checkpoint
from gptoss_convert.formats.config import Config
from gptoss_convert.layouts.extents import Extent, overlap
from gptoss_convert.layouts.layout import Box
from gptoss_convert.layouts.model import load_model
from gptoss_convert.machine.progress import SILENT, Progress


@dataclass(frozen=True)
class ParameterDiff:
    """One parameter that both sides hold, in the layers that both hold."""

    parameter: str
    encodings: tuple[str, str]
    """`MXFP4`, or the dtype, of either side."""
    layers: Mapping[int | None, Distance]

    @property
    def total(self) -> Distance:
        """All layers together."""
        return sum_of(self.layers.values())

    def summary(self) -> dict[str, Any]:
        """The numbers as plain data, layer by layer where there are layers."""
        layers = [{"layer": n, **c.summary()} for n, c in self.layers.items() if n is not None]
        return {
            "parameter": self.parameter,
            "encodings": list(self.encodings),
            **self.total.summary(),
            "layers": layers,
        }


@dataclass(frozen=True)
class Diff:
    """What differs between two checkpoints, A and B."""

    a: Checkpoint
    b: Checkpoint
    numbers: Mapping[str, Pair]
    """Numbers of the model that differ."""
    keys: KeysDiff | None
    """Keys of config.json that differ, None unless both sides have one."""
    parameters: tuple[ParameterDiff, ...]
    only_in_a: tuple[str, ...]
    """Parameters and layers that B lacks, and tensors that are no part of GPT-OSS."""
    only_in_b: tuple[str, ...]
    shapes: Mapping[str, tuple[tuple[int, ...], tuple[int, ...]]]
    """Parameters that have other sizes in B; of these, rows of the vocabulary that both have are
    compared, nothing else."""

    @property
    def total(self) -> Distance:
        """All values that were compared."""
        return sum_of(one.total for one in self.parameters)

    @property
    def same(self) -> bool:
        """Whether both hold the same model: values and configuration, however they are stored."""
        apart = self.numbers or self.shapes or self.only_in_a or self.only_in_b
        return not (apart or (self.keys and self.keys.tells) or self.total.changed)

    @property
    def verdict(self) -> str:
        """The answer in one line."""
        total, parts = self.total, [one for one in self.parameters if one.total.changed]
        if self.same:
            return f"same: all {total.elements:,} values equal, bit by bit"
        if not parts:
            return f"different: not in the {total.elements:,} values that both have"
        norm = total.relative_norm
        return (
            f"different: {total.changed:,} of {total.elements:,} values ({100 * total.share:.3g} %)"
            f" in {len(parts)} of {len(self.parameters)} parameters"
            + (f", relative norm {norm:.2e}" if norm is not None else "")
        )

    def summary(self) -> dict[str, Any]:
        """The diff as plain data."""
        return {
            "same": self.same,
            "verdict": self.verdict,
            "a": _side(self.a),
            "b": _side(self.b),
            "numbers": {key: list(pair) for key, pair in self.numbers.items()},
            "keys": asdict(self.keys) if self.keys else None,
            "total": self.total.summary(),
            "modules": _modules_summary(self.parameters),
            "only_in_a": list(self.only_in_a),
            "only_in_b": list(self.only_in_b),
            "shapes": {name: list(map(list, pair)) for name, pair in self.shapes.items()},
        }


def diff(
    ours: Checkpoint,
    theirs: Checkpoint,
    *,
    workers: int | None = None,
    max_memory: int | None = None,
    progress: Progress = SILENT,
) -> Diff:
    """Compare two checkpoints value by value; float32 and float16 are rounded to BF16 for it.

    A difference is no error but the result.
    """
    ours_at, our_others = contents_of(ours)
    theirs_at, their_others = contents_of(theirs)
    common = ours_at.keys() & theirs_at.keys()
    shapes = _shapes(ours.config, theirs.config)
    limits = {name: _comparable(name, *pair) for name, pair in shapes.items()}
    plan = _plan(ours, theirs, *(_cut(at, common, limits) for at in (ours_at, theirs_at)))
    texts = [side.hf_config for side in (ours, theirs) if side.hf_config is not None]
    changes = judge_steps(
        plan,
        range(len(plan.steps)),
        _judge,
        workers=workers,
        max_memory=max_memory,
        progress=progress,
    )
    return Diff(
        ours,
        theirs,
        numbers_that_differ(ours.config, theirs.config),
        keys_that_differ(*texts) if len(texts) == 2 else None,
        tuple(_parameters(plan, dict(changes), ours_at, theirs_at)),
        (*in_words(ours_at.keys() - common), *our_others),
        (*in_words(theirs_at.keys() - common), *their_others),
        shapes,
    )


def _judge(number: int, pair: StepPair) -> tuple[int, Distance]:
    found = (one for piece in pair.pieces() for one in piece.values())
    return number, sum_of(distance(a, b) for _, a, b in found)


def _shapes(a: Config, b: Config) -> dict[str, tuple[tuple[int, ...], tuple[int, ...]]]:
    """The weights whose sizes differ otherwise than by the number of layers."""
    model = load_model()
    ours, theirs = model.sizes(a.numbers), model.sizes(b.numbers)
    return {
        name: (tuple(ours[x] for x in family.axes), tuple(theirs[x] for x in family.axes))
        for name, family in model.families.items()
        if any(ours[axis] != theirs[axis] for axis in family.axes if axis != "layer")
    }


def _comparable(name: str, a: Sequence[int], b: Sequence[int]) -> Box | None:
    """The box of a weight that both sides have, None if more than the vocabulary differs."""
    axes = load_model().families[name].axes
    differ = {axis for axis, m, n in zip(axes, a, b, strict=True) if m != n}
    if differ <= {"vocab"}:
        return tuple((0, min(m, n)) for m, n in zip(a, b, strict=True))
    return None


def _cut(at: Contents, common: set[WeightLayer], limits: Mapping[str, Box | None]) -> list[Extent]:
    """The extents of what both sides have, cut to what can be compared."""
    result: list[Extent] = []
    for (weight, layer), held in at.items():
        if (weight, layer) not in common:
            continue
        if weight not in limits:
            result += held
        elif limit := limits[weight]:
            cuts = ((extent, overlap(extent.box, limit)) for extent in held)
            result += [replace(extent, box=box) for extent, box in cuts if box]
    return result


def _plan(ours: Checkpoint, theirs: Checkpoint, source: list[Extent], target: list[Extent]) -> Plan:
    model = load_model()
    a, b = model.sizes(ours.config.numbers), model.sizes(theirs.config.numbers)
    sizes = {axis: min(a[axis], b[axis]) for axis in a if axis in b} | {
        "layer": max(a["layer"], b["layer"])
    }
    return make_plan(model, sizes, source, target, partial=True)


def _parameters(
    plan: Plan,
    changes: Mapping[int, Distance],
    ours: Contents,
    theirs: Contents,
) -> Iterator[ParameterDiff]:
    """The changes by parameter and layer, in model order."""
    found: dict[str, dict[int | None, list[Distance]]] = defaultdict(lambda: defaultdict(list))
    for number, step in enumerate(plan.steps):
        layer = step.layer if step.layer_axis >= 0 else None
        found[step.family.weight][layer].append(changes[number])
    for family in load_model().families.values():
        if layers := found.get(family.weight):
            ordered = sorted(layers, key=lambda n: -1 if n is None else n)
            encodings = (encoding_of(family.weight, ours), encoding_of(family.weight, theirs))
            summed = {layer: sum_of(layers[layer]) for layer in ordered}
            yield ParameterDiff(family.weight, encodings, summed)


MODULES = {"gate_up": "experts", "down": "experts"}
"""By the first word of a weight's name: its module, where that is another word."""


def module_of(parameter: str) -> str:
    """`attention`, `experts`, `router`, ...: the part of the model that a parameter belongs to."""
    first = parameter.partition(".")[0]
    return MODULES.get(first, first)


def _modules_summary(parameters: Sequence[ParameterDiff]) -> list[dict[str, Any]]:
    modules: dict[str, list[ParameterDiff]] = defaultdict(list)
    for one in parameters:
        modules[module_of(one.parameter)].append(one)
    return [
        {
            "module": module,
            **sum_of(one.total for one in members).summary(),
            "parameters": [one.summary() for one in members],
        }
        for module, members in modules.items()
    ]


def _side(checkpoint: Checkpoint) -> dict[str, Any]:
    return {
        "path": checkpoint.place,
        "format": checkpoint.label,
        "model": checkpoint.config.size,
        "notes": list(checkpoint.notes),
    }
