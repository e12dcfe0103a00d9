"""What the logits level measured: where two models part, along the context, by expert."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

from gptoss_convert.layouts.ranges import ranges
from gptoss_convert.show.report_page import figures
from gptoss_convert.show.report_page.document import (
    NONE,
    SHOWN,
    Code,
    Facts,
    Figure,
    Listing,
    Part,
    Section,
    Table,
    columns,
    counted,
    number,
    share,
    visible,
)


def figure_sections(logits: Mapping[str, Any]) -> Iterator[Section]:
    """What is better looked at than read."""
    yield _divergence(logits)
    yield _along_context(logits)
    yield _experts(logits)


def number_sections(logits: Mapping[str, Any]) -> Iterator[Section]:
    """The numbers, and the tokens they were measured on."""
    yield _numbers(logits)
    yield from _next_tokens(logits)
    yield _tokens(logits)


def _divergence(logits: Mapping[str, Any]) -> Section:
    layers, limit = logits["layers"], logits["limits"]["sub_block"]
    errors = [error for layer in layers for error in layer["errors"]]
    first, over = logits["first_over"], [e for e in errors if not e["error"] <= limit]
    if all(e["error"] == 0 for e in errors):
        title = f"No divergence: after all {len(errors)} sub-blocks both sides hold the same bits"
    elif first:
        place = f"layer {first['layer']} {first['block']}"
        title = f"They part at {place}: {len(over)} of {len(errors)} sub-blocks are over the limit"
    else:
        worst = max(e["error"] for e in errors)
        title = f"Within the limit: at most {number(worst)} of {number(limit)} after any sub-block"
    rows = tuple(
        (
            str(layer["errors"][0]["layer"]),
            *(number(e["error"]) for e in layer["errors"]),
            number(layer["errors"][2]["mean"]),
            *(number(layer["errors"][2][f"{side}_rms"]) for side in ("source", "target")),
        )
        for layer in layers
    )
    titles = ("#attention, worst", "#router, worst", "#experts, worst", "#experts, mean")
    figure = Figure(
        "divergence",
        title,
        "Each mark is the relative error of the position that is furthest off, after one sub-block "
        "of one layer: of the residual stream for attention and experts, of its own scores for the "
        "router. Below, the size of the residual stream: two lines that part mean a wrong scale.",
        partial(figures.divergence, layers, limit, first),
        Table(columns("#layer", *titles, "#SOURCE, RMS", "#TARGET, RMS"), rows),
    )
    parts: list[Part] = [figure]
    if first:
        fed = Code(", ".join(map(visible, logits["source_feeding"])))
        other = Code(", ".join(map(visible, logits["target_feeding"])))
        at = f"{number(first['error'])} at position {first['position']:,} of {first['sequence']}"
        parts.append(
            Facts(
                (
                    (
                        "first over the limit",
                        f"layer {first['layer']} {first['block']}: {visible(at)}",
                    ),
                    ("fed by, in SOURCE", fed),
                    ("fed by, in TARGET", other),
                )
            )
        )
    return Section(
        "Where do they part?", "The model from its first layer to its last.", tuple(parts)
    )


def _along_context(logits: Mapping[str, Any]) -> Section:
    found, limit = logits["kl_by_position"], logits["limits"]["max_kl"]
    marks = {"window": logits["window"], "YaRN": logits["original_length"]}
    worst = max(found, key=lambda r: r["kl_max"])
    if worst["kl_max"] == 0:
        title = "No divergence at any position"
    else:
        title = f"KL is {number(worst['kl_max'])} nats at worst, at {_place(worst)}"
    rows = tuple(
        (_span(r), f"{r['positions']:,}", number(r["kl_mean"]), number(r["kl_max"])) for r in found
    )
    figure = Figure(
        "kl",
        title,
        "KL divergence of TARGET's next-token distribution from SOURCE's. A jump at the window's "
        "border points to the sliding window, one at YaRN's original length to the rotary "
        "embedding.",
        partial(figures.kl_by_position, found, limit, marks),
        Table(columns("positions", "#scored", "#mean KL", "#worst KL"), rows),
    )
    lead = (
        f"Layers with a sliding window see {logits['window']:,} positions; beyond "
        f"{logits['original_length']:,} YaRN's scaling matters."
    )
    return Section("Does it depend on the position?", lead, (figure,))


def _place(found: Mapping[str, Any]) -> str:
    alone = found["end"] == found["start"] + 1
    return f"position{'' if alone else 's'} {_span(found)}"


def _span(found: Mapping[str, Any]) -> str:
    start, last = found["start"], found["end"] - 1
    return f"{start:,}" if start == last else f"{start:,}–{last:,}"


def _experts(logits: Mapping[str, Any]) -> Section:
    layers = logits["layers"]
    count = len(layers[0]["source_hits"])
    cold = sum(len(layer["cold_experts"]) for layer in layers)
    lowest = min(range(len(layers)), key=lambda n: layers[n]["routing_agreement"])
    agreement = layers[lowest]["routing_agreement"]
    reached = f"{len(layers) * count - cold:,} of {len(layers) * count:,} experts were chosen"
    if agreement == 1:
        title = f"{reached}; both sides route every position alike"
    else:
        title = f"{reached}; layer {lowest} routes {share(agreement)} of the positions alike"
    rows = tuple(
        (
            str(n),
            f"{min(layer['source_hits']):,}",
            f"{max(layer['source_hits']):,}",
            ranges(layer["cold_experts"]) or "none",
            f"{sum(abs(a - b) for a, b in _pairs(layer)) // 2:,}",
            share(layer["routing_agreement"]),
        )
        for n, layer in enumerate(layers)
    )
    titles = ("#layer", "#least chosen", "#most chosen", "never chosen", "#moved", "#same routing")
    figure = Figure(
        "experts",
        title,
        "Shades are multiples of an even load, each from its number on. What no prompt reaches is "
        "compared by values only. On the right, the share of positions that choose the same set of "
        "experts on both sides, in the round where it is lowest.",
        partial(figures.expert_maps, layers),
        Table(columns(*titles), rows),
    )
    lead = f"{count} experts a layer, in {len(layers)} layers."
    return Section("Which experts were reached?", lead, (figure,))


def _pairs(layer: Mapping[str, Any]) -> Iterator[tuple[int, int]]:
    return zip(layer["source_hits"], layer["target_hits"], strict=True)


def _numbers(logits: Mapping[str, Any]) -> Section:
    sides = {"all positions": logits["overall"], **logits["buckets"]}
    entries = {
        "positions": lambda s: f"{s['positions']:,}",
        "KL, mean": lambda s: number(s["kl_mean"]),
        "KL, 99 % below": lambda s: number(s["kl_p99"]),
        "KL, 99.9 % below": lambda s: number(s["kl_p999"]),
        "KL, worst": lambda s: number(s["kl_max"]),
        "same most likely token": lambda s: share(s["top1"]),
        "the same, where it is beyond doubt": lambda s: share(s["top1_decisive"]),
        "top 5 in common": lambda s: share(s["top5"]),
        "Δlogit, worst": lambda s: number(s["max_delta"]),
        "Δlogit, mean": lambda s: number(s["mean_delta"]),
        "NLL of SOURCE, nats": lambda s: _nats(s["source_nll"]),
        "NLL of TARGET, nats": lambda s: _nats(s["target_nll"]),
        "perplexity, TARGET − SOURCE": lambda s: number(s["perplexity_difference"]),
    }
    rows = tuple((what, *(show(one) for one in sides.values())) for what, show in entries.items())
    table = Table(columns("", *(f"#{name}" for name in sides)), rows)
    places = ("worst_kl", "worst_delta")
    where = Facts(
        tuple(
            (
                f"worst {what}",
                f"position {logits[place]['position']:,} of {visible(logits[place]['sequence'])}",
            )
            for what, place in zip(("KL", "Δlogit"), places, strict=True)
        )
    )
    lead = (
        "All scored positions, then those within the window, within YaRN's original length, beyond."
    )
    return Section("How far apart, in numbers?", lead, (table, where))


def _nats(value: float) -> str:
    return NONE if math.isnan(value) else f"{value:.6g}"


def _next_tokens(logits: Mapping[str, Any]) -> Iterator[Section]:
    if logits["next_tokens_text"]:
        lead = "Probability and token, SOURCE left, TARGET right."
        items = tuple(Code(visible(line)) for line in logits["next_tokens_text"])
        yield Section("What comes after the prompt?", lead, (Listing(items),))


def _tokens(logits: Mapping[str, Any]) -> Section:
    found = logits["sequences"]
    longest = max(found, key=lambda one: one["length"])
    cold = [
        (str(n), ranges(layer["cold_experts"]))
        for n, layer in enumerate(logits["layers"])
        if layer["cold_experts"]
    ]
    facts = Facts(
        (
            ("positions scored", f"{logits['overall']['positions']:,}"),
            (
                "sequences",
                f"{len(found)}, from {min(one['length'] for one in found):,} to "
                f"{longest['length']:,} tokens",
            ),
            ("SHA-256 of the tokens", Code(logits["token_digest"])),
        )
    )
    rows = tuple((Code(visible(one["name"])), f"{one['length']:,}") for one in found[:SHOWN])
    parts: list[Part] = [facts, Table(columns("sequence", "#tokens"), rows)]
    if cold:
        parts.append(Table(columns("layer", "experts that no position chose"), tuple(cold)))
    rest = f", the first {SHOWN} of them below" if len(found) > SHOWN else ""
    lead = f"Every position of {counted(len(found), 'sequence')} was scored{rest}."
    return Section("Which tokens were used?", lead, tuple(parts))
