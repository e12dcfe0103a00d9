"""The page of a verification of a server: its distance from the model, and from known mistakes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from gptoss_convert.show.report_page.document import (
    NONE,
    SHOWN,
    Code,
    Facts,
    Listing,
    ReportPage,
    Section,
    Stage,
    Table,
    columns,
    number,
    share,
    visible,
)
from gptoss_convert.show.report_page.surroundings import environment, side
from gptoss_convert.show.report_page.verdict import Levels


def served_page(summary: Mapping[str, Any], levels: Levels, command: str | None) -> ReportPage:
    """The page of a summary whose TARGET is a server."""
    source, target, served = summary["source"], summary["target"], levels["served"]
    asks = "its answers against the forward pass"
    told = f"{asks}, {served['seconds']:.1f} s"
    return ReportPage(
        title=f"{visible(source['path'])} and {visible(target['path'])}",
        tone="same" if summary["same"] else "different",
        verdict="The server answers as the model does"
        if summary["same"]
        else "The server answers otherwise than the model",
        reasons=tuple(visible(f"{one}.") for one in _reasons(served)),
        sides=(("SOURCE", side(source)), ("SERVER", _server(target, served["numbers"]))),
        steps=(
            Stage("header", "same", f"SOURCE complete, {levels['header']['seconds']:.1f} s"),
            Stage("served", "same" if served["same"] else "different", told),
        ),
        sections=tuple(_sections(served, command)),
    )


def _reasons(served: Mapping[str, Any]) -> Iterator[str]:
    yield from served["findings"][:2] or [served["text"]]
    diagnosis = served["numbers"]["diagnosis"]
    if served["same"] and diagnosis:
        yield f"None of {len(diagnosis['likenesses'])} known mistakes explains the answers better"


def _server(target: Mapping[str, Any], numbers: Mapping[str, Any]) -> Facts:
    notes = tuple(("note", visible(note)) for note in target["notes"])
    return Facts((
        ("address", Code(visible(target["path"]))),
        ("model", visible(target["model"])),
        ("engine", visible(target["engine"])),
        ("asked by", visible(numbers["protocol"])),
        ("questions", f"{numbers['requests']:,}, {numbers['top']} tokens at a position"),
        *notes,
    ))  # fmt: skip


def _sections(served: Mapping[str, Any], command: str | None) -> Iterator[Section]:
    numbers = served["numbers"]
    yield _distances(numbers)
    if numbers["diagnosis"]:
        yield _mistakes(numbers["diagnosis"])
    if served["findings"]:
        told = tuple(map(visible, served["findings"][:SHOWN]))
        yield Section("What was found?", "In the words of the command.", (Listing(told),))
    yield _agreement(numbers)
    yield _sequences(numbers)
    computed = {"dtype": "float32, and bfloat16 for the floor", **numbers}
    yield environment({"logits": {"numbers": computed}}, "served", command)


def _distances(numbers: Mapping[str, Any]) -> Section:
    rows = tuple(
        (
            one["name"],
            number(one["positions"]),
            number(one["server"]["kl_median"]),
            number(one["floor"]["kl_median"]),
            number(one["server"]["kl_p90"]),
            number(one["floor"]["kl_p90"]),
            number(one["server"]["delta_median"]),
            number(one["floor"]["delta_median"]),
            ("too few" if not one["judged"] else "over" if one["over"] else "within"),
        )
        for one in numbers["ranges"]
    )
    titles = ("positions", "#count", "#KL, median", "#bfloat16", "#KL, 9th decile", "#bfloat16",
              "#Δ log p, median", "#bfloat16", "limit")  # fmt: skip
    factor = number(numbers["limits"]["kl_factor"])
    lead = (
        "KL from the model in float32 to the server, over the tokens it told, all others as one; "
        "beside it what this model in bfloat16 is from itself, which is the floor. A median may be "
        f"{factor} times the floor, more where positions are few. “added” are tokens that the "
        "server went on with itself."
    )
    return Section("How far are its answers?", lead, (Table(columns(*titles), rows),))


def _mistakes(diagnosis: Mapping[str, Any]) -> Section:
    itself = ("(the model itself)", number(diagnosis["model"]["kl_median"]), NONE, NONE, NONE)
    rows = tuple(
        (
            visible(one["mistake"]),
            number(one["spread"]["kl_median"]),
            number(one["advantage"]),
            number(one["sigmas"]),
            "explains it"
            if one["near"] and one["better"]
            else "in part"
            if one["better"]
            else "no",
        )
        for one in diagnosis["likenesses"]
    )
    titles = ("as if …", "#KL, median", "#advantage", "#standard errors", "likely?")
    lead = (
        "The forward pass with each mistake that engines make, held against the same answers: the "
        "one the server makes leaves only rounding. The advantage is the mean logarithm of how "
        "much nearer the answers are to it than to the model."
    )
    table = Table(columns(*titles), (itself, *rows))
    return Section("Which known mistake do they look like?", lead, (table,))


def _likely(one: Mapping[str, Any]) -> str:
    if not one["better"]:
        return "no"
    return "explains it" if one["near"] else "in part"


def _agreement(numbers: Mapping[str, Any]) -> Section:
    found, worst = numbers["agreement"], numbers["worst"]
    rows = (
        ("same most likely token, everywhere", share(found["everywhere"])),
        ("where the choice is clear", f"{share(found['clear'])} of {found['clear_positions']:,}"),
        ("clear means a margin above", number(found["least_margin"])),
        ("largest KL", f"{number(worst['kl'])} at {worst['position']} of {worst['sequence']}"),
    )
    lead = "A choice is clear where rounding cannot turn it."
    return Section("Is the most likely token the same?", lead, (Facts(rows),))


def _sequences(numbers: Mapping[str, Any]) -> Section:
    rows = tuple(
        (visible(one["name"]), number(one["length"]), number(one["positions"]))
        for one in numbers["sequences"]
    )
    lead = f"Digest {numbers['token_digest'][:16]}: two reports with one digest asked the same."
    table = Table(columns("sequence", "#tokens", "#positions"), rows)
    return Section("What was it asked?", lead, (table,))
