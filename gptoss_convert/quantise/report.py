"""What rounding did to the experts of a layer, and in sum: plain values that turn into JSON."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

FEW_TOKENS = 64
"""Experts that fewer tokens reach are rounded without calibration."""


@dataclass(frozen=True)
class MatrixReport:
    """One weight of a layer, by expert; NaN where an expert was exact or met no held-out token."""

    weight: str
    exact: tuple[bool, ...]
    """Whether MXFP4 holds the expert as it is: it is left alone."""
    tokens: tuple[int, ...]
    """Calibration tokens that reached it; not counted for exact ones."""
    kept: tuple[float, ...]
    """What is left of the update in the outputs on held-out tokens: their projection on it."""
    error: tuple[float, ...]
    """Norm of the outputs' error on held-out tokens, over the norm of the update's outputs."""
    flips: tuple[float, ...]
    """Share of the codes that are not the base's."""

    @classmethod
    def joined(cls, parts: Sequence[MatrixReport]) -> MatrixReport:
        """The experts of all parts, one after another."""
        lists = {
            field.name: tuple(value for part in parts for value in getattr(part, field.name))
            for field in fields(cls)
            if field.name != "weight"
        }
        return cls(parts[0].weight, **lists)

    @property
    def cold(self) -> tuple[int, ...]:
        """Experts that too few tokens reached to calibrate them."""
        pairs = enumerate(zip(self.tokens, self.exact, strict=True))
        return tuple(e for e, (tokens, exact) in pairs if not exact and tokens < FEW_TOKENS)

    def plain(self) -> dict[str, Any]:
        """As JSON values, NaN as null."""
        return {
            name: [None if isinstance(v, float) and math.isnan(v) else v for v in value]
            if isinstance(value, tuple)
            else value
            for name, value in asdict(self).items()
        }

    @classmethod
    def of(cls, plain: Mapping[str, Any]) -> MatrixReport:
        """What `plain` gave."""
        lists: dict[str, Any] = {
            field.name: tuple(math.nan if v is None else v for v in plain[field.name])
            for field in fields(cls)
            if field.name != "weight"
        }
        return cls(plain["weight"], **lists)


def mean(values: Iterable[float]) -> float:
    """The mean of those that are numbers, NaN without any."""
    numbers = [value for value in values if not math.isnan(value)]
    return math.fsum(numbers) / len(numbers) if numbers else math.nan


@dataclass(frozen=True)
class Calibrated:
    """What a calibration did."""

    tokens: int
    """That it used."""
    held_out: int
    """Other tokens, on which it was measured."""
    kl: float
    """Mean KL(tuned || rounded) over those, in nats; NaN without any."""
    layers: tuple[tuple[MatrixReport, ...], ...]
    device: str = "cpu"
    """What computed it."""
    seconds: float = 0.0
    gpu_memory: int = 0
    """Most bytes that were allocated on the GPU at once."""

    def of(self, weight: str) -> list[MatrixReport]:
        """The reports on one weight, layer by layer."""
        return [one for layer in self.layers for one in layer if one.weight == weight]

    def lines(self) -> Iterator[str]:
        """A line for each weight, for people."""
        for weight in ("gate_up.weight", "down.weight"):
            reports = self.of(weight)
            experts = sum(len(one.exact) for one in reports)
            exact = sum(sum(one.exact) for one in reports)
            if exact == experts:
                continue
            cold = [f"{n}:{e}" for n, one in enumerate(reports) for e in one.cold]
            few = f"; {len(cold)} experts reached by fewer than {FEW_TOKENS} tokens" if cold else ""
            kept = mean(v for one in reports for v in one.kept)
            flips = mean(v for one in reports for v in one.flips)
            yield (
                f"{weight}: {experts - exact} of {experts} experts rounded, update kept "
                f"{kept:.2f}, {flips:.1%} of the codes changed{few}"
            )
        if self.held_out:
            yield f"KL(tuned || MXFP4) {self.kl:.2g} nats on {self.held_out} tokens held out"

    def summary(self) -> dict[str, Any]:
        """As JSON values."""
        layers = [
            {"layer": n, **one.plain()} for n, layer in enumerate(self.layers) for one in layer
        ]
        kl = None if math.isnan(self.kl) else self.kl
        return {
            "tokens": self.tokens,
            "held_out": self.held_out,
            "kl": kl,
            "device": self.device,
            "seconds": round(self.seconds, 3),
            "gpu_memory_bytes": self.gpu_memory,
            "matrices": layers,
        }
