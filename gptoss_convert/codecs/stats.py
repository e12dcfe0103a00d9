"""Statistics of encodings, and of what encoding did to values; those of steps can be added up."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class EncodeStats:
    """Counts and errors of the blocks of one encoding; `a + b` is the encoding of a, then b."""

    blocks: int = 0
    inexact_blocks: int = 0
    inexact_values: int = 0
    """Values that decode to something else, non-finite ones included."""
    nonfinite: int = 0
    """Infinities and NaN: stored as +-6 times the block's scale, for want of a code."""
    clipped: int = 0
    """Finite values beyond 6 times the scale, saturated."""
    flushed: int = 0
    """Nonzero values that became zero."""
    zero_blocks: int = 0
    min_scale: int = 255
    """Over the blocks that hold a nonzero value; above `max_scale` if there is none."""
    max_scale: int = 0
    squares: float = 0.0
    """Sum of the squared finite values of the inexact blocks."""
    squared_error: float = 0.0
    """Sum of the squared errors of the finite values."""
    max_abs_error: float = 0.0
    hinted_blocks: int = 0
    """Blocks whose hint was taken where the rule would have chosen another scale."""
    first_inexact: int = -1
    """Flat index of the first inexact block, -1 if all are exact."""
    update: float = 0.0
    """Σ (value - near)² over the inexact blocks whose former scale is known, where `near` is the
    nearest code's value at that scale: the base's, unless an update moved past half a step."""
    update_kept: float = 0.0
    """Σ (value - near)·(encoded - near) over the same: all of the update is kept if they agree."""
    flipped: int = 0
    """Values of those blocks that were not encoded as `near`."""
    compared: int = 0
    """All values of those blocks."""

    def __add__(self, other: EncodeStats) -> EncodeStats:
        first = self.first_inexact
        if first < 0 and other.first_inexact >= 0:
            first = self.blocks + other.first_inexact
        return EncodeStats(
            blocks=self.blocks + other.blocks,
            inexact_blocks=self.inexact_blocks + other.inexact_blocks,
            inexact_values=self.inexact_values + other.inexact_values,
            nonfinite=self.nonfinite + other.nonfinite,
            clipped=self.clipped + other.clipped,
            flushed=self.flushed + other.flushed,
            zero_blocks=self.zero_blocks + other.zero_blocks,
            min_scale=min(self.min_scale, other.min_scale),
            max_scale=max(self.max_scale, other.max_scale),
            squares=self.squares + other.squares,
            squared_error=self.squared_error + other.squared_error,
            max_abs_error=max(self.max_abs_error, other.max_abs_error),
            hinted_blocks=self.hinted_blocks + other.hinted_blocks,
            first_inexact=first,
            update=self.update + other.update,
            update_kept=self.update_kept + other.update_kept,
            flipped=self.flipped + other.flipped,
            compared=self.compared + other.compared,
        )


@dataclass(frozen=True, slots=True)
class ScaleStatistics:
    """What blocks and their scales look like; `a + b` counts both."""

    blocks: int = 0
    zero_blocks: int = 0
    """Blocks whose values are all zero: any scale would do."""
    low_blocks: int = 0
    """Other blocks for which encoding them anew picks another scale."""
    min_scale: int = 255
    max_scale: int = 0

    def __add__(self, other: ScaleStatistics) -> ScaleStatistics:
        return ScaleStatistics(
            self.blocks + other.blocks,
            self.zero_blocks + other.zero_blocks,
            self.low_blocks + other.low_blocks,
            min(self.min_scale, other.min_scale),
            max(self.max_scale, other.max_scale),
        )
