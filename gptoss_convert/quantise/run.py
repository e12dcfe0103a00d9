"""A calibration from open checkpoints to rounded layers on the disk."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gptoss_convert.errors import UsageError
from gptoss_convert.formats.checkpoint import Checkpoint, Choices, casts
from gptoss_convert.machine.progress import Progress
from gptoss_convert.machine.ranks import ALONE
from gptoss_convert.parameters import Parameters
from gptoss_convert.parameters import open as open_parameters
from gptoss_convert.quantise.calibration import Former, RoundedLayer, round_layer
from gptoss_convert.quantise.layers import RoundedLayers
from gptoss_convert.quantise.matrices import packed, unpacked
from gptoss_convert.quantise.passages import Batch, Walk, with_packed
from gptoss_convert.quantise.report import Calibrated, MatrixReport
from gptoss_convert.verify.logits_level import memory_advice
from gptoss_convert.verify.prompts import own_sequences
from gptoss_convert.verify.sides import open_reader
from gptoss_convert.version import VERSION
from gptoss_convert.witness import forward, metrics
from gptoss_convert.witness.fetch import Fetcher
from gptoss_convert.witness.forward import Numerics
from gptoss_convert.witness.fp4 import Packed
from gptoss_convert.witness.model import LayerWeights
from gptoss_convert.witness.node import choose_device
from gptoss_convert.witness.parity import hardware
from gptoss_convert.witness.readers import Reader
from gptoss_convert.witness.tokens import TokenSequence, passages
from gptoss_convert.witness.walk import Prompts

AUTO = "auto"
"""The texts of this package."""
LONGEST = 2048
"""Tokens of a calibration sequence; longer ones are cut."""
MOST_TOKENS = 131072
"""Of a text that has more, the first so many are used."""
_POSITIONS = 1024
"""Logits held at once."""


def calibrate_checkpoint(
    source: Checkpoint,
    layers: RoundedLayers,
    *,
    text: str | None,
    base: Path | None,
    device: str,
    follow_links: bool,
    restart: bool,
    progress: Progress,
) -> Calibrated:
    """Round an open checkpoint's experts on a text, on `auto` tokens, or on token ids.

    Raises UsageError if `base` is of another size, or if what was left there is of other making.
    """
    where = choose_device(device, ALONE)
    reader = open_reader(source, Fetcher(where), None)
    former = _opened_former(source, base, follow_links)
    sequences = _sequences(text, source, reader.config.vocab)
    made = {
        "source": {
            str(source.root / name): [one.size, one.written_ns, one.changed_ns, one.inode]
            for name, one in sorted({chunk.file: chunk.identity for chunk in source.chunks}.items())
            if one is not None
        },
        "base": str(former.checkpoint.root) if former else None,
        "adapter": source.adapter.record() | {"path": None} if source.adapter else None,
        **identity(sequences, where),
    }
    layers.begin(made, restart)
    with memory_advice():
        return calibrate(Model(reader, former), sequences, layers, where, progress)


def _sequences(text: str | None, source: Checkpoint, vocab: int) -> tuple[TokenSequence, ...]:
    if text is None or text == AUTO:
        return passages(vocab)
    return own_sequences(Path(text), None, (source,), vocab)


def _opened_former(source: Checkpoint, base: Path | None, follow_links: bool) -> Parameters | None:
    """The checkpoint that knows the experts' scales before: the base, else SOURCE itself, where it
    is MXFP4 under an adapter or has a sidecar."""
    if base is None:
        known = source.scales is not None or source.encoding == "mxfp4"
        alone = replace(source, adapter=None)
        return Parameters(alone, alone.extents(casts(True))) if known else None
    found = open_parameters(base, Choices(follow_links=follow_links))
    if found.checkpoint.config.numbers != source.config.numbers:
        raise UsageError(f"--base {base}: another size of model than {source.root}")
    return found


@dataclass(frozen=True)
class Model:
    """The model to be rounded, and what is known of the one that it was tuned from."""

    reader: Reader
    former: Parameters | None
    """A checkpoint that has the scales the experts had, and their codes too if it is MXFP4."""


def calibrate(
    model: Model,
    sequences: Sequence[TokenSequence],
    layers: RoundedLayers,
    device: torch.device,
    progress: Progress,
) -> Calibrated:
    """Round what is not on the disk yet, layer by layer; the same bits wherever it was stopped."""
    began = time.monotonic()
    reader = model.reader
    # Not split: then one expert's matrices are decoded at a time, not a layer's.
    numerics = replace(Numerics.on(device), split=False)
    count = len(reader.config.sliding)
    batches = [*_batches(sequences, device)]
    reports: list[tuple[MatrixReport, ...]] = []
    with forward.exact_products(), progress.phase("calibrating", 0, count) as advance:
        embedding_VD = reader.embedding()
        spill = _spill(batches, embedding_VD.shape[1], device, layers.root)
        walk = Walk(batches, embedding_VD, reader.config, numerics, spill)
        del embedding_VD
        for index in range(count):
            weights = walk.attend(index, reader.layer(index))
            if index + 1 < count:
                reader.prepare(index + 1)
            if (note := layers.done(index)) is None:
                rounded = round_layer(
                    walk, index, weights, reader.config, _former(model, index, device)
                )
                found = rounded.reports
                gate_up, down = packed(rounded.gate_up), packed(rounded.down)
                layers.write(index, _content(gate_up, down), _note(rounded))
                del rounded
            else:
                gate_up, down = _stored(layers, index, weights, device)
                found = tuple(MatrixReport.of(one) for one in note["reports"])
            reports.append(found)
            walk.leave(weights, with_packed(weights, gate_up, down))
            advance(0)
        kl, positions = _divergence(walk, reader, numerics)
    tokens = sum(len(batch.prompts.tokens) for batch in batches if not batch.held_out)
    peak = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else 0
    seconds = time.monotonic() - began
    return Calibrated(tokens, positions, kl, tuple(reports), hardware(device), seconds, peak)


def identity(sequences: Sequence[TokenSequence], device: torch.device) -> dict[str, Any]:
    """What decides the rounded bits beside the weights: tokens, device, and libraries."""
    content = hashlib.sha256()
    for one in sequences:
        content.update(f"{one.name} {' '.join(map(str, one.tokens))}\n".encode())
    made = {"device": hardware(device), "torch": torch.__version__, "tool": VERSION}
    return {"tokens": content.hexdigest(), **made}


def split(sequences: Sequence[TokenSequence]) -> tuple[list[list[int]], list[list[int]]]:
    """Passages to calibrate on, and every eighth, held out; a single one gives its last eighth."""
    pieces = [
        list(one.tokens[start : start + LONGEST])
        for one in sequences
        for start in range(0, len(one.tokens), LONGEST)
    ]
    total = list(accumulate(map(len, pieces)))
    pieces = pieces[: 1 + sum(before < MOST_TOKENS for before in total[:-1])]
    if len(pieces) >= 8:
        return [one for n, one in enumerate(pieces) if n % 8 != 7], pieces[7::8]
    longest = max(pieces, key=len)
    cut = len(longest) - len(longest) // 8
    held_out = [longest[cut:]] if longest[cut:] else []
    return [one[:cut] if one is longest else one for one in pieces], held_out


def _batches(sequences: Sequence[TokenSequence], device: torch.device) -> Iterator[Batch]:
    """Passages together, so that an expert's products are not small."""
    room = 16384 if device.type == "cuda" else 4096
    for held_out, pieces in zip((False, True), split(sequences), strict=True):
        batch: list[list[int]] = []
        for passage in pieces:
            if batch and sum(map(len, batch)) + len(passage) > room:
                yield Batch(Prompts.of(batch, device), held_out)
                batch = []
            batch.append(passage)
        if batch:
            yield Batch(Prompts.of(batch, device), held_out)


def _spill(
    batches: Sequence[Batch], hidden: int, device: torch.device, folder: Path
) -> Path | None:
    """Where the streams go if the device has no room for them: both take at most a quarter."""
    needed = 2 * 4 * hidden * sum(len(batch.prompts.tokens) for batch in batches)
    on_gpu = device.type == "cuda"
    room = torch.cuda.mem_get_info(device)[1] // 4 if on_gpu else 2_000_000_000
    return folder if needed > room else None


def _former(model: Model, layer: int, device: torch.device) -> tuple[Former, Former]:
    """What is known of a layer's experts before they were tuned, gate_up and down."""
    gate_up = _former_of(model.former, "gate_up.weight", layer)
    down = _former_of(model.former, "down.weight", layer)
    # Rows as in `round_layer`: gate before up.
    gate_up = [None if part is None else part.transpose(1, 2).flatten(1, 2) for part in gate_up]
    return _as_former(gate_up, device), _as_former(down, device)


def _former_of(former: Parameters | None, weight: str, layer: int) -> list[Tensor | None]:
    """Scales [E, N..., B] and blocks [E, N..., B, 16], as far as they are known."""
    names = (f"{weight}.scales", f"{weight}.blocks")
    return [former[name][layer] if former and name in former else None for name in names]


def _as_former(parts: Sequence[Tensor | None], device: torch.device) -> Former:
    scales, blocks = (part if part is None else part.to(device) for part in parts)
    if scales is None:
        return Former()
    if blocks is None:
        return Former(scales.transpose(1, 2).contiguous())
    known = unpacked(Packed(blocks, scales))
    return Former(known.scales, known.codes)


def _content(gate_up: Packed, down: Packed) -> dict[str, Callable[[], memoryview]]:
    parts = {
        "gate_up.blocks": gate_up.blocks,
        "gate_up.scales": gate_up.scales,
        "down.blocks": down.blocks,
        "down.scales": down.scales,
    }
    return {name: partial(_on_host, part) for name, part in parts.items()}


def _on_host(tensor: Tensor) -> memoryview:
    return tensor.contiguous().cpu().numpy().data.cast("B")


def _note(rounded: RoundedLayer) -> Mapping[str, Any]:
    return {"reports": [one.plain() for one in rounded.reports]}


def _sizes(weights: LayerWeights) -> tuple[int, int, int]:
    """Experts, intermediate and hidden size."""
    experts, inter = weights.gate_bias.shape
    return experts, inter, len(weights.mlp_norm)


def _stored(
    layers: RoundedLayers, index: int, weights: LayerWeights, device: torch.device
) -> tuple[Packed, Packed]:
    """A layer's experts as an interrupted calibration wrote them."""
    content = layers.read(index)
    experts, inter, hidden = _sizes(weights)
    shapes = {"gate_up": (experts, 2 * inter, hidden // 32), "down": (experts, hidden, inter // 32)}

    def tensor(name: str, shape: tuple[int, ...]) -> Tensor:
        held = torch.frombuffer(bytearray(content[name]), dtype=torch.uint8)
        return held.view(shape).to(device)

    found = [
        Packed(tensor(f"{name}.blocks", (*shape, 16)), tensor(f"{name}.scales", shape))
        for name, shape in shapes.items()
    ]
    return found[0], found[1]


def _divergence(walk: Walk, reader: Reader, numerics: Numerics) -> tuple[float, int]:
    """Mean KL(tuned ‖ rounded) in nats over the held-out tokens, and how many there are."""
    norm, unembedding_VD = reader.norm(), forward.dense(reader.unembedding(), numerics.dtype)
    found: list[Tensor] = []
    for n, batch in enumerate(walk.batches):
        if not batch.held_out:
            continue
        none = torch.full_like(batch.prompts.tokens, -1)
        pairs = zip(
            *(part.split(_POSITIONS) for part in (walk.tuned[n], walk.rounded[n], none)),
            strict=True,
        )
        for tuned_TD, rounded_TD, next_T in pairs:
            ours, theirs = (
                forward.logits(x, norm, unembedding_VD, reader.config)
                for x in (tuned_TD, rounded_TD)
            )
            found.append(metrics.score(ours, theirs, next_T).kl)
    scores = torch.cat(found) if found else torch.zeros(0, dtype=torch.float64)
    return metrics.mean(scores), len(scores)
