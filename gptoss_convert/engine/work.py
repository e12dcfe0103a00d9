"""A box of a step in a worker's memory, and what is done to it: copy, cast, decode, encode, sum.

BF16 values are carried as their bits, in uint16.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np

from gptoss_convert.codecs.mxfp4 import relayout
from gptoss_convert.codecs.stats import EncodeStats, ScaleStatistics
from gptoss_convert.engine.buffers import Array, Part, Parts, gather, joined, loose, within
from gptoss_convert.engine.derivations import Derivation
from gptoss_convert.engine.fingerprint import MASK, examined, packed_fingerprint
from gptoss_convert.engine.records import Digest, Effect
from gptoss_convert.engine.steps import Step
from gptoss_convert.errors import CodecError, IntegrityError
from gptoss_convert.layouts.layout import Box
from gptoss_convert.layouts.model import Encoding


class Work:
    """A step's box at work: `held` is what is known, `outputs` are to be filled."""

    def __init__(self, step: Step, held: Parts, outputs: Parts) -> None:
        self.step = step
        self.held = dict(held)
        self.outputs = outputs

    def run(self, chain: Iterable[Derivation]) -> Effect:
        """Run derivations in order."""
        effect = Effect()
        for derivation in chain:
            effect += derivation.run(self) or Effect()
        return effect

    def made(self, *params: str) -> None:
        """The outputs of these parameters are filled: hold them for the derivations that follow."""
        self.held |= {param: self.outputs[param] for param in params}

    def gather(self, param: str) -> Array:
        """What is held of a parameter for the step's box, as one view."""
        return gather(joined(self.held[param]), self.step.box_of(param))

    def copy(self, param: str) -> None:
        """Fill the outputs of a parameter with what is held of it."""
        held = joined(self.held[param])
        for output in joined(self.outputs[param]):
            output.fill(held)
        self.made(param)

    def cast(self, weight: str) -> int:
        """Hold the float32 and float16 parts of a weight as BF16; returns the values rounded."""
        changed = 0
        parts: list[Part] = []
        for part in self.held[weight]:
            if part.extent.dtype != self.step.family.dtype:
                rounded = np.empty(part.array.shape, np.uint16)
                changed += relayout.cast(part.array, rounded)
                part = Part(part.extent, part.box, -1, rounded)
            parts.append(part)
        self.held[weight] = parts
        return changed

    def decode(self, weight: str, encoding: Encoding) -> None:
        """Fill the outputs of a weight; raises IntegrityError for what has no finite value."""
        block = encoding.codec.block
        for output in joined(self.outputs[weight]):
            (lo, hi) = output.box[-1]
            first, last = lo // block * block, -(-hi // block) * block
            whole = (first, last) == (lo, hi)
            values = output.array
            if not whole:
                values = np.empty((*output.array.shape[:-1], last - first), np.uint16)
            step = self.step.part(output.box)
            try:
                encoding.codec.decode(self._members(step, encoding), values)
            except CodecError as error:
                param = encoding.params[-1]
                raise self._refused(param, step.box_of(param), error) from None
            if not whole:
                relayout.copy(values[..., lo - first : hi - first], output.array)
        self.made(weight)

    def encode(self, weight: str, encoding: Encoding, hints: Sequence[str]) -> EncodeStats:
        """Fill the outputs of an encoding; raises IntegrityError for infinities and NaN."""
        outputs = {param: joined(self.outputs[param]) for param in encoding.params}
        rooms = {param: self._room(param, outputs[param]) for param in encoding.params}
        stats = encoding.codec.encode(
            self.gather(weight),
            {member: rooms[param].array for member, param in encoding.by_member()},
            {m: self.gather(param) for m, param in encoding.by_member() if param in hints},
        )
        for param, room in rooms.items():
            for output in outputs[param]:
                if output is not room:
                    output.fill([room])
        self.made(*encoding.params)
        if stats.nonfinite:
            what = f"{stats.nonfinite} values are infinite or NaN"
            raise self._refused(weight, self.step.box, what)
        return stats

    def stands_for(self, encoding: Encoding, values: Part) -> bool:
        """Whether what is held of an encoding decodes to exactly these values, which begin and end
        between its blocks; raises IntegrityError for blocks that are not finite."""
        step = self.step.part(values.box)
        try:
            return encoding.codec.same(self._members(step, encoding), values.array)
        except CodecError as error:
            param = encoding.params[-1]
            raise self._refused(param, step.box_of(param), error) from None

    def summed(self, encoding: Encoding | None) -> Digest:
        """Sum up what is held of the weight: as values, else of this encoding; raises
        IntegrityError for blocks that are not finite."""
        step = self.step
        if encoding is None:
            return _digest(step, within(self.held[step.family.weight], step.box))
        members = self._members(step, encoding)
        try:
            total = packed_fingerprint(
                encoding.codec, members, step.box, step.lengths, step.layer_axis
            )
        except CodecError as error:
            raise self._refused(encoding.params[-1], step.box, error) from None
        return Digest(total, True)

    def digest(self, encoded: EncodeStats) -> Digest:
        """Sum up the values that the target stores, from BF16 where that has them too; raises
        IntegrityError for blocks that are not finite."""
        recipe = self.step.recipe
        weight, encoding = recipe.family.weight, recipe.encoding
        if weight in recipe.makes or (recipe.has_values and not encoded.inexact_blocks):
            return self.summed(None)
        return Digest(None, True) if encoding is None else self.summed(encoding)

    def statistics(self) -> ScaleStatistics:
        """What the encoded blocks look like that the source or the target stores."""
        encoding = self.step.recipe.measured
        if encoding is None:
            return ScaleStatistics()
        return encoding.codec.statistics(self._members(self.step, encoding))

    def _members(self, step: Step, encoding: Encoding) -> dict[str, Array]:
        return {
            member: gather(joined(self.held[param]), step.box_of(param))
            for member, param in encoding.by_member()
        }

    def _room(self, param: str, outputs: Sequence[Part]) -> Part:
        """Where a parameter is made: the output if it is in one piece, else to be copied there."""
        box = self.step.box_of(param)
        return outputs[0] if len(outputs) == 1 and outputs[0].box == box else loose(outputs[0], box)

    def _refused(self, param: str, box: Box, why: object) -> IntegrityError:
        # What a step makes has TARGET's names: whoever looks for the cause needs SOURCE's.
        read = (one for one in self.step.sources if one.param == param)
        extent = next(read, self.held[param][0].extent)
        return IntegrityError(f"{extent.file}: {extent.tensor}: box {_show(box)}: {why}")


def _digest(step: Step, parts: Sequence[Part]) -> Digest:
    """Of BF16 values; those of an alias count elsewhere, but must be finite too."""
    total, odd, counted = 0, False, False
    for part in parts:
        one, found = examined(part.array, part.box, step.lengths, step.layer_axis)
        odd |= found
        if not part.extent.alias:
            total, counted = total + one & MASK, True
    return Digest(total if counted else None, not odd)


def _show(box: Box) -> str:
    return "[" + ", ".join(str(lo) if hi == lo + 1 else f"{lo}:{hi}" for lo, hi in box) + "]"
