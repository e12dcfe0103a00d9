"""The derivation that rounds by a rule: what a plan is given in place of the codec's own encoding.

Blocks that MXFP4 holds exactly are encoded as without a rule; the others are rounded anew.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from gptoss_convert.codecs.stats import EncodeStats
from gptoss_convert.engine.derivations import Change, Input
from gptoss_convert.engine.records import Effect
from gptoss_convert.layouts.model import Encoding, Family, Model

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from gptoss_convert.codecs.codec import Arrays, Codec, Ranges, Values, Weights
    from gptoss_convert.codecs.stats import ScaleStatistics
    from gptoss_convert.engine.work import Work
    from gptoss_convert.quantise.rules import Rule

    U8 = npt.NDArray[np.uint8]

CODEC = "mxfp4"
_BATCH = 1 << 11
"""Blocks rounded at once: what numpy makes of them stays in the cache."""


def changes(model: Model, held: frozenset[str], rule: Rule) -> dict[str, list[Change]]:
    """For every weight that MXFP4 can encode, by name: its rounding by a rule, led by the scales
    that are among the parameters `held`."""
    return {
        family.weight: [Round(family.weight, encoding, _hints(encoding, held), rule)]
        for family in model.families.values()
        if (encoding := encoding_of(family)) is not None
    }


def encoding_of(family: Family) -> Encoding | None:
    """A weight's encoding in MXFP4, if it has one."""
    return next((one for one in family.encodings if one.codec.name == CODEC), None)


def _hints(encoding: Encoding, held: frozenset[str]) -> tuple[str, ...]:
    return tuple(param for param in encoding.hints if param in held)


@dataclass(frozen=True, slots=True)
class Round:
    """An encoding of a weight's values by a rule, led by the scales that the base had."""

    weight: str
    encoding: Encoding
    hints: tuple[str, ...]
    rule: Rule
    inputs: tuple[Input, ...] = ()

    @property
    def needs(self) -> frozenset[str]:
        """The weight, and the hints."""
        return frozenset({self.weight, *self.hints})

    @property
    def makes(self) -> frozenset[str]:
        """Blocks and scales."""
        return frozenset(self.encoding.params)

    def run(self, work: Work) -> Effect:
        """Fill the places of the encoding."""
        ruled = replace(self.encoding, codec=Ruled(self.encoding.codec, self.rule))
        return Effect(encoded=work.encode(self.weight, ruled, self.hints))


class Ruled:
    """A codec of MXFP4 that rounds what it cannot hold by a rule; all else is the codec's own."""

    def __init__(self, codec: Codec, rule: Rule) -> None:
        self._codec = codec
        self._rule: Rule = rule
        self.name = codec.name
        self.members: Mapping[str, str] = codec.members
        self.block = codec.block
        self.hints = codec.hints
        self.magnitudes = codec.magnitudes

    def member_box(self, member: str, box: Ranges) -> Ranges:
        """As the codec's."""
        return self._codec.member_box(member, box)

    def decode(self, parts: Arrays, values: Values) -> None:
        """As the codec's."""
        self._codec.decode(parts, values)

    def statistics(self, parts: Arrays) -> ScaleStatistics:
        """As the codec's."""
        return self._codec.statistics(parts)

    def weighted_sum(self, parts: Arrays, weights: Weights) -> int | None:
        """As the codec's."""
        return self._codec.weighted_sum(parts, weights)

    def encode(self, values: Values, parts: Arrays, hints: Arrays) -> EncodeStats:
        """Exact blocks as the codec encodes them, the others by the rule."""
        from gptoss_convert.quantise import blocks

        stats = self._codec.encode(values, parts, hints)
        if not stats.inexact_blocks or stats.nonfinite:
            return stats
        found = EncodeStats()
        former = hints.get("scales")
        for piece in blocks.pieces(parts["scales"].shape, _BATCH):
            found += blocks.round_inexact(
                values, parts, None if former is None else former[piece], piece, self._rule
            )
        return replace(
            found,
            blocks=stats.blocks,
            hinted_blocks=stats.hinted_blocks,
            first_inexact=stats.first_inexact,
        )
