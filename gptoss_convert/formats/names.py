"""Names as trainers save them: wrappers' parts taken away, the model found behind its prefix.

`mappings/names.toml` lists what wrappers add and what lies beside weights. What is left is held
against the tables: a prefix P is one if P + each name without a layer stands in some table.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from functools import cache

from gptoss_convert.containers import Chunk
from gptoss_convert.errors import InputError, IntegrityError, UsageError
from gptoss_convert.layouts.model import read_toml
from gptoss_convert.layouts.tables import Table

DROPPED = "dropped"
"""What --drop names is counted under this word."""
_ANCHORS = ("embedding.weight", "norm.weight")
"""Parameters that every model has, and that no layer's index stands in the name of."""


@dataclass(frozen=True)
class Names:
    """Which stored tensors are a model's, and what the tables call them."""

    tables: tuple[Table, ...]
    """Those whose names were found; none where the tensors are in no known naming."""
    prefix: str
    """What stands before every name of the model, wrappers' parts aside: `app.model.`."""
    weights: Mapping[str, str]
    """By the name that is stored, the name in a table; what is not the model's keeps its own."""
    skipped: Mapping[str, int]
    """Tensors that hold no weights, by kind."""
    wrappers: tuple[str, ...]
    """The parts that were taken away."""

    def chunks(self, stored: Iterable[Chunk]) -> tuple[Chunk, ...]:
        """The chunks of weights, under the tables' names."""
        named = ((chunk, self.weights.get(chunk.tensor)) for chunk in stored)
        return tuple(
            chunk if name == chunk.tensor else replace(chunk, tensor=name)
            for chunk, name in named
            if name is not None
        )


def kind_of(name: str, drop: Collection[str] = ()) -> str | None:
    """What a tensor is that is no weight, None for a weight: `optimizer`, `dropped`."""
    if any(fnmatchcase(name, pattern) for pattern in drop):
        return DROPPED
    beside = _listed("beside")
    return next((beside[part] for part in name.split(".") if part in beside), None)


def left_out(drop: Collection[str]) -> Callable[[str], bool]:
    """Whether a tensor of a name is no weight, so that neither its dtype nor its shape matters."""
    return lambda name: kind_of(name, drop) is not None


def why_zero(name: str) -> str | None:
    """Why a tensor must be zero to be left out, None if it is none of these."""
    return _listed("zero").get(name.rpartition(".")[2])


def read_names(
    where: str, stored: Iterable[str], tables: Sequence[Table], drop: Collection[str] = ()
) -> Names:
    """What the stored names mean, held against these tables.

    Raises UsageError for a pattern that no name matches, InputError where there are two models,
    IntegrityError where two tensors have one name.
    """
    names = list(dict.fromkeys(stored))
    for pattern in drop:
        if not any(fnmatchcase(name, pattern) for name in names):
            raise UsageError(f"{where}: --drop {pattern!r}: no tensor has such a name")
    kinds = {name: kind_of(name, drop) for name in names}
    skipped = Counter(kind for kind in kinds.values() if kind)
    plain: dict[str, str] = {}
    for name in names:
        if kinds[name] is None:
            other = plain.setdefault(_undressed(name), name)
            if other != name:
                raise IntegrityError(f"{where}: {other} and {name} are the same tensor twice")
    found = [(table, prefix) for table in tables for prefix in _prefixes(where, table, plain)]
    prefix = max((prefix for _, prefix in found), key=len, default="")
    weights = {
        name: bare.removeprefix(prefix) if bare.startswith(prefix) else name
        for bare, name in plain.items()
    }
    parts = {part for name in plain.values() for part in name.split(".")}
    return Names(
        tuple(table for table, its in found if its == prefix),
        prefix,
        weights,
        dict(skipped),
        tuple(part for part in _listed("wrappers") if part in parts),
    )


def _prefixes(where: str, table: Table, plain: Mapping[str, str]) -> Iterator[str]:
    """The prefix behind which a table's model stands, if one does."""
    first, *others = _roots(table)
    found = [
        name.removesuffix(first) for name in plain if name == first or name.endswith(f".{first}")
    ]
    whole = [prefix for prefix in found if all(prefix + other in plain for other in others)]
    if len(whole) > 1:
        shown = " and ".join(repr(prefix) for prefix in sorted(whole)[:4])
        raise InputError(
            f"{where}: holds {len(whole)} models, behind {shown}; pass --drop for all but one, for "
            f"example --drop '{max(whole, key=len)}*'"
        )
    yield from whole


def _roots(table: Table) -> tuple[str, ...]:
    """The names of the anchors, in any variant of a table."""
    rules = [rule for rules in table.variants.values() for rule in rules if not rule.named]
    return tuple(
        next(rule.name for rule in rules if rule.params == (anchor,)) for anchor in _ANCHORS
    )


def _undressed(name: str) -> str:
    """The name without wrappers' parts, its components under the names that the tables have."""
    wrappers = _listed("wrappers")
    bare = ".".join(["", *(part for part in name.split(".") if part not in wrappers), ""])
    for other, same in _listed("same").items():
        bare = bare.replace(f".{other}.", f".{same}.")
    return bare[1:-1]


@cache
def _listed(section: str) -> Mapping[str, str]:
    return read_toml("names.toml")[section]
