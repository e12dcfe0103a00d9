"""The limits a comparison is held against, read from limits.toml beside this module."""

from __future__ import annotations

import tomllib
from collections.abc import Sequence
from dataclasses import dataclass, fields
from importlib import resources
from typing import Any

from gptoss_convert.errors import UsageError
from gptoss_convert.witness.configs import Section
from gptoss_convert.witness.metrics import Summary


@dataclass(frozen=True)
class Limits:
    """The largest distance that still counts as parity."""

    name: str
    max_delta: float
    """Largest |Δlogit| at any position."""
    max_kl: float
    """Largest KL at any position, in nats."""
    mean_kl: float
    """Largest mean KL of all positions, in nats."""
    sub_block: float
    """Largest relative error after any sub-block at any position."""
    routing_agreement: float
    """Smallest share of positions, in any layer, that choose the same experts."""
    measured: str
    """Versions and hardware the floor was measured with."""


@dataclass(frozen=True)
class OracleLimits:
    """How far an ecosystem's own model may be from the shared forward pass."""

    tie: float
    """Router logits closer than this may be ordered either way."""
    max_delta: float
    """Largest |Δlogit| where no tie came before, at logits of standard deviation `spread`."""
    spread: float
    measured: str
    """Versions and hardware the floor was measured with."""

    def largest(self, spread: float) -> float:
        """Largest |Δlogit| allowed at logits of this standard deviation."""
        return self.max_delta * max(1.0, spread / self.spread)


@dataclass(frozen=True)
class ServedLimits:
    """How far a server's answers may be from the model's, in multiples of what bfloat16 makes."""

    kl_factor: float
    """Of a median of KL; |Δ log p| is about its square root, and so is its factor."""
    decile_factor: float
    """Of the ninth decile of KL."""
    allowance: float
    """A median of n positions may be exp(allowance / sqrt(n)) times further."""
    least_positions: int
    """Fewer are not judged."""
    decile_positions: int
    """The same of a ninth decile."""
    least_kl: float
    """What is always allowed: servers round the numbers they print."""
    least_delta: float
    top1_clear: float
    """Smallest share with the model's most likely token where its choice is clear."""
    suspicion: float
    """Median KL, in multiples of bfloat16's, from which on known mistakes are looked for."""
    advantage: float
    """How much better a mistake must explain the answers, as the mean logarithm of a ratio."""
    sigmas: float
    """And in how many standard errors."""
    coarse: float
    """Factor within which distances are alike that a rounding makes."""
    measured: str
    """Versions and hardware that the factors were measured with."""


def served_limits() -> ServedLimits:
    """The limits for servers."""
    table = Section(_tables()["served"], "limits.toml: served")
    whole = {"least_positions", "decile_positions"}
    numbers: dict[str, Any] = {
        one.name: table.integer(one.name) if one.name in whole else table.number(one.name)
        for one in fields(ServedLimits)
        if one.name != "measured"
    }
    return ServedLimits(**numbers, measured=str(table.value("measured")))


WIDE = 1024
"""Hidden size from which sums are long enough for the limits of the released models."""


def oracle_limits(hidden: int) -> OracleLimits:
    """The limits of the oracle level for models of a hidden size."""
    tables = _tables()["oracle"]
    name = "wide" if hidden >= WIDE else "narrow"
    table = Section(tables[name], f"limits.toml: oracle.{name}")
    return OracleLimits(
        tie=Section(tables, "limits.toml: oracle").number("tie"),
        max_delta=table.number("max_delta"),
        spread=table.number("spread"),
        measured=str(table.value("measured")),
    )


def lossy_share() -> float:
    """The largest KL(tune || MXFP4), as a share of KL(base || tune), that still counts as kept."""
    return Section(_tables()["lossy"], "limits.toml: lossy").number("kl_share")


def load_limits(name: str) -> Limits:
    """The limits of one table in limits.toml; UsageError lists the choices."""
    tables = _tables()
    del tables["oracle"], tables["served"]
    if name not in tables:
        raise UsageError(f"limits: expects one of {', '.join(tables)}, found {name!r}")
    table = Section(tables[name], f"limits.toml: {name}")
    return Limits(
        name=name,
        max_delta=table.number("max_delta"),
        max_kl=table.number("max_kl"),
        mean_kl=table.number("mean_kl"),
        sub_block=table.number("sub_block"),
        routing_agreement=table.number("routing_agreement"),
        measured=str(table.value("measured")),
    )


def _tables() -> dict[str, Any]:
    file = resources.files("gptoss_convert.witness").joinpath("limits.toml")
    return tomllib.loads(file.read_text(encoding="utf-8"))


def violations(
    limits: Limits,
    overall: Summary,
    errors: Sequence[tuple[str, float]],
    agreements: Sequence[float],
) -> tuple[str, ...]:
    """Each limit that is exceeded, in words; NaN exceeds every limit.

    `errors` names each sub-block with its relative error, `agreements` goes layer by layer.
    """
    where, worst = max(errors, key=lambda named: named[1])
    lowest = min(range(len(agreements)), key=lambda layer: agreements[layer])
    upper = (
        ("max |Δlogit|", overall.max_delta, limits.max_delta),
        ("max KL", overall.kl_max, limits.max_kl),
        ("mean KL", overall.kl_mean, limits.mean_kl),
        (f"relative error after {where}", worst, limits.sub_block),
    )
    found = [
        f"{what}: expects at most {limit:g}, found {x:g}"
        for what, x, limit in upper
        if not x <= limit
    ]
    if not agreements[lowest] >= limits.routing_agreement:
        found.append(
            f"routing agreement of layer {lowest}: expects at least {limits.routing_agreement:g}, "
            f"found {agreements[lowest]:g}"
        )
    return tuple(found)
