"""What a checkpoint holds, weight by weight and layer by layer, be it complete or not."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace

from gptoss_convert.formats.checkpoint import Checkpoint, casts
from gptoss_convert.layouts.extents import Extent, extents
from gptoss_convert.layouts.model import load_model
from gptoss_convert.layouts.ranges import ranges

WeightLayer = tuple[str, int | None]
"""A weight, and its layer if it has layers."""
Contents = Mapping[WeightLayer, Sequence[Extent]]
"""Where each weight of each layer lies: its own extents, or those of an encoding."""


def contents_of(checkpoint: Checkpoint) -> tuple[Contents, list[str]]:
    """The extents of every weight and layer that the checkpoint holds whole, and other tensors."""
    sizes = load_model().sizes(checkpoint.config.numbers)
    known = [*checkpoint.table.tensors(checkpoint.variant, sizes)]
    names, stored = {t.name for t in known}, {chunk.tensor for chunk in checkpoint.chunks}
    found = extents(
        str(checkpoint.root),
        [tensor for tensor in known if tensor.name in stored],
        [chunk for chunk in checkpoint.chunks if chunk.tensor in names],
        casts(True),
        checkpoint.root,
    )
    by_member: dict[WeightLayer, list[Extent]] = defaultdict(list)
    for extent in found:
        if not extent.alias:
            for layer, part in _by_layer(extent):
                by_member[extent.param, layer].append(part)
    return dict(_weights(by_member)), sorted(stored - names)


def _by_layer(extent: Extent) -> Iterator[tuple[int | None, Extent]]:
    axes = load_model().params[extent.param]
    if "layer" not in axes:
        yield None, extent
        return
    axis = axes.index("layer")
    for layer in range(*extent.box[axis]):
        span = (*extent.box[:axis], (layer, layer + 1), *extent.box[axis + 1 :])
        yield layer, replace(extent, box=span)


def _weights(
    held: Mapping[WeightLayer, list[Extent]],
) -> Iterator[tuple[WeightLayer, list[Extent]]]:
    """By weight: its own extents, else those of an encoding that is all there."""
    layers = {layer for _, layer in held}
    for family in load_model().families.values():
        weight = family.weight
        for layer in layers:
            stored = family.stored({param for param in family.members if (param, layer) in held})
            if (weight, layer) in held:
                yield (weight, layer), held[weight, layer]
            elif stored:
                yield (weight, layer), [e for param in stored.params for e in held[param, layer]]


def encoding_of(weight: str, contents: Contents) -> str:
    """`MXFP4`, or the dtype that a weight is stored in."""
    held = [e for (name, _), found in contents.items() if name == weight for e in found]
    if encoding := load_model().families[weight].stored({extent.param for extent in held}):
        return encoding.codec.name.upper()
    return ", ".join(sorted({extent.dtype for extent in held}))


def in_words(places: Iterable[WeightLayer]) -> list[str]:
    """`down.weight of layers 3..5`."""
    layers: dict[str, list[int]] = defaultdict(list)
    for weight, layer in places:
        layers[weight] += [] if layer is None else [layer]
    return [
        f"{weight} of layers {ranges(layers[weight])}" if layers[weight] else weight
        for weight in load_model().families
        if weight in layers
    ]
