"""Which rows of a product belong to which expert. Letters as in `products`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

TILE = 128
"""Rows that one block of threads computes."""


@dataclass(frozen=True)
class Rows:
    """The rows of a product: each belongs to an expert, and they are sorted by it."""

    ends: Tensor
    """Where the rows of each expert end, int32 `[E]`."""
    tile_ends: Tensor
    """The same in tiles, as a tile holds rows of one expert only."""

    @classmethod
    def of(cls, ends_E: Tensor) -> Rows:
        """Rows whose experts end there; nothing waits for the device."""
        counts_E = ends_E.diff(prepend=ends_E.new_zeros(1))
        tiles_E = (counts_E + (TILE - 1)) // TILE
        return cls(ends_E.int(), tiles_E.cumsum(0).int())

    @classmethod
    def of_choices(cls, chosen_TA: Tensor, experts: int) -> tuple[Rows, Tensor]:
        """A row for each choice; also, by row, the index into `chosen_TA`, flattened."""
        sorted_R, choice_R = chosen_TA.flatten().sort(stable=True)
        each_E = torch.arange(experts, device=chosen_TA.device)
        return cls.of(torch.searchsorted(sorted_R, each_E, right=True)), choice_R

    def each(self) -> Iterator[slice]:
        """The rows of each expert."""
        ends = self.ends.tolist()
        for start, end in zip([0, *ends], ends, strict=False):
            yield slice(start, end)


def rows_by_expert(chosen_TA: Tensor, experts: int) -> Sequence[Tensor]:
    """For each expert the ascending indices into `chosen_TA`, flattened, where it stands."""
    found = chosen_TA.flatten()
    counts = found.bincount(minlength=experts).tolist()
    return found.sort(stable=True).indices.split(counts)
