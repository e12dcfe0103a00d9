"""Derivations: how the parameters that a target stores are made from those that a source stores.

They are chosen when the plan is made, by what both sides hold; executing a step runs them in order.
A change of values on the way, such as the merge of an adapter or another rounding, is a derivation
that is given to the plan: docs/decisions/0011-derivations.md.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import takewhile
from typing import TYPE_CHECKING, Protocol

from gptoss_convert.engine.records import Effect
from gptoss_convert.errors import InputError
from gptoss_convert.layouts.extents import Extent
from gptoss_convert.layouts.layout import Box
from gptoss_convert.layouts.model import Encoding, Family

if TYPE_CHECKING:
    from gptoss_convert.engine.work import Work


@dataclass(frozen=True, slots=True)
class Input:
    """A further parameter that a change reads, besides the weight and its encodings."""

    param: str
    axes: tuple[str, ...]
    """Slowest first. Along the weight's axes a step reads its own range, along others all."""
    lengths: tuple[int, ...]

    def box(self, axes: Sequence[str], box: Box) -> Box:
        """The box of this parameter that belongs to a box of the weight, whose axes are `axes`."""
        spans = dict(zip(axes, box, strict=True))
        lengths = zip(self.axes, self.lengths, strict=True)
        return tuple(spans.get(axis, (0, length)) for axis, length in lengths)


class Derivation(Protocol):
    """Makes some parameters of a step's box from others."""

    @property
    def needs(self) -> frozenset[str]:
        """The parameters that it starts from."""
        ...

    @property
    def makes(self) -> frozenset[str]:
        """The parameters that it fills, or changes in place where it needs them too."""
        ...

    def run(self, work: Work) -> Effect | None:
        """Do it for `work.step.box`; returns what that did to the values, if anything."""
        ...


class Change(Derivation, Protocol):
    """A derivation that a plan is given for a weight.

    One that makes the weight changes its values in place, when they have been read or decoded. One
    that makes an encoding's members encodes them.
    """

    @property
    def inputs(self) -> tuple[Input, ...]:
        """What else it reads; extents among the plan's sources hold it, in any dtype."""
        ...


@dataclass(frozen=True, slots=True)
class _Chosen:
    needs: frozenset[str]
    makes: frozenset[str]


@dataclass(frozen=True, slots=True)
class Copy(_Chosen):
    """Parameters that both sides store: the same bits, arranged as the target wants them."""

    def run(self, work: Work) -> None:
        for param in sorted(self.makes):
            work.copy(param)


@dataclass(frozen=True, slots=True)
class Cast(_Chosen):
    """A weight that the source stores as float32 or float16, rounded to BF16."""

    def run(self, work: Work) -> Effect:
        return Effect(cast_values=work.cast(work.step.family.weight))


@dataclass(frozen=True, slots=True)
class Decode(_Chosen):
    """A weight's values from an encoding of it, exact."""

    encoding: Encoding

    def run(self, work: Work) -> None:
        work.decode(work.step.family.weight, self.encoding)


@dataclass(frozen=True, slots=True)
class Encode(_Chosen):
    """An encoding of a weight's values; the scales of a former one, if known, are its hints."""

    encoding: Encoding
    hints: tuple[str, ...]

    def run(self, work: Work) -> Effect:
        weight = work.step.family.weight
        return Effect(encoded=work.encode(weight, self.encoding, self.hints))


@dataclass(frozen=True)
class Recipe:
    """All derivations of one weight, the same for each of its steps."""

    family: Family
    needs: tuple[str, ...]
    """What is read, in the order in which it is laid out in memory."""
    makes: tuple[str, ...]
    """What is written."""
    first: tuple[Derivation, ...]
    """Run first, on what was read."""
    whole: tuple[Derivation, ...]
    """Run next: those that do not make the target's weight."""
    by_rows: bool
    """Whether they may be run on some rows of the box after others: they only encode."""
    by_piece: tuple[Derivation, ...]
    """Run last, on one piece of the box after another: those that make the target's weight."""
    scratch: bool
    """Whether the weight is made on the way, though neither side stores it."""
    has_values: bool
    """Whether the weight's BF16 values are held for the step's box at once, read or made."""
    encoding: Encoding | None
    """The encoding that the target stores."""
    measured: Encoding | None
    """The encoding whose statistics are taken: the target's, else the source's."""
    boxes: Mapping[str, Callable[[Box], Box]]
    """By parameter: its box that belongs to a box of the weight."""
    rows: Mapping[str, int]
    """By parameter: how many leading axes it shares with the weight, the last one aside."""


def choose(
    family: Family,
    held: Mapping[str, Sequence[Extent]],
    wanted: Iterable[str],
    changes: Sequence[Change] = (),
) -> Recipe:
    """The recipe that makes the wanted parameters from those held, with these changes on the way.

    Raises InputError for what the source does not hold.
    """
    weight, wanted = family.weight, frozenset(wanted)
    own = frozenset({weight})
    source, target = family.stored(held), family.stored(wanted)
    edits = [change for change in changes if weight in change.makes]
    floats = any(extent.dtype != family.dtype for extent in held.get(weight, ()))
    first = (Cast(own, own),) if floats else ()
    whole: list[Derivation] = []
    by_piece: list[Derivation] = []
    if weight in wanted:
        by_piece = [Copy(own, own) if weight in held else _decode(family, source, held), *edits]
    elif target is not None and target is source and not edits:
        whole = [Copy(params := frozenset(target.params), params)]
    elif target is not None:
        decode = [] if weight in held else [_decode(family, source, held)]
        whole = [*decode, *edits, _encode(own, target, held, changes)]
    made = frozenset(param for one in (*whole, *by_piece) for param in one.makes)
    if beside := wanted - made:
        whole.append(Copy(beside, beside))
    needs = _needs((*first, *whole, *by_piece))
    if lacking := sorted(needs - held.keys()):
        raise InputError(f"{weight}: the source holds no {' and no '.join(lacking)}")
    inputs = [one for change in changes for one in change.inputs]
    order = (*family.members, *(one.param for one in inputs))
    scratch = weight not in held and weight in made - wanted
    geometry = [*_geometry(family, inputs)]
    return Recipe(
        family,
        needs=tuple(param for param in order if param in needs),
        makes=tuple(param for param in family.members if param in wanted),
        first=first,
        whole=tuple(whole),
        by_rows=[type(one) for one in whole] == [Encode],
        by_piece=tuple(by_piece),
        scratch=scratch,
        has_values=scratch or weight in needs,
        encoding=target,
        measured=target or source,
        boxes={param: box for param, box, _ in geometry},
        rows={param: rows for param, _, rows in geometry},
    )


def _decode(family: Family, source: Encoding | None, held: Mapping[str, object]) -> Decode:
    """Decode what is held; of several incomplete encodings, the one that lacks least is named."""
    if source is None and family.encodings:
        source = max(family.encodings, key=lambda one: sum(param in held for param in one.params))
    if source is None:
        raise InputError(f"{family.weight}: the source holds no {family.weight}")
    return Decode(frozenset(source.params), frozenset({family.weight}), source)


def _encode(
    weight: frozenset[str],
    target: Encoding,
    held: Mapping[str, object],
    changes: Iterable[Change],
) -> Derivation:
    """The change that encodes, else the codec's own encoding."""
    hints = tuple(param for param in target.hints if param in held)
    own = Encode(weight | {*hints}, frozenset(target.params), target, hints)
    return next((change for change in changes if own.makes <= change.makes), own)


def _needs(chain: Iterable[Derivation]) -> frozenset[str]:
    """What must be read for a chain to run."""
    needs: set[str] = set()
    made: set[str] = set()
    for one in chain:
        needs |= one.needs - made
        made |= one.makes
    return frozenset(needs)


def _geometry(
    family: Family, inputs: Iterable[Input]
) -> Iterator[tuple[str, Callable[[Box], Box], int]]:
    """(parameter, its box for a box of the weight, how many leading axes it shares)."""
    yield family.weight, lambda box: box, len(family.axes) - 1
    for encoding in family.encodings:
        for (member, param), axes in zip(encoding.by_member(), encoding.axes, strict=True):
            box = partial(encoding.codec.member_box, member)
            yield param, box, _shared(axes, family.axes)
    for one in inputs:
        yield one.param, partial(one.box, family.axes), _shared(one.axes, family.axes)


def _shared(axes: Sequence[str], weight: Sequence[str]) -> int:
    pairs = zip(axes, weight[:-1], strict=False)
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))
