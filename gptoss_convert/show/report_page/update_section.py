"""What is left of a fine-tune, where the base was named."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from gptoss_convert.show.report_page.document import NONE, Section, Table, columns, number


def update_section(logits: Mapping[str, Any]) -> Iterator[Section]:
    """How much of the update each layer's experts keep; nothing without a base."""
    update = logits.get("update")
    if not update:
        return
    rows = tuple(_row(n, layer) for n, layer in enumerate(update["layers"]))
    lead = (
        f"Mean KL from SOURCE to TARGET is {number(update['kl'])} nats, from the base to SOURCE "
        f"{number(update['kl_base'])}: what TARGET lost beside what the fine-tune did. Kept is the "
        "part of an expert's update that TARGET's expert still adds to the tokens that meet it; "
        "its error is random and may be large where it cancels."
    )
    titles = (
        "#layer", "#kept, mean", "#kept, least", "#by expert", "#error, mean",
        "#stream off, TARGET", "#stream off, base",
    )  # fmt: skip
    table = Table(columns(*titles), rows)
    yield Section("How much of the fine-tune is left?", lead, (table,))


def _row(n: int, layer: Mapping[str, Any]) -> tuple[str, ...]:
    kept = {e: part for e, part in enumerate(layer["kept"]) if part is not None}
    errors = [part for part in layer["error"] if part is not None]
    streams = (number(layer["stream_error"]), number(layer["stream_update"]))
    if not kept:
        return (str(n), NONE, NONE, NONE, NONE, *streams)
    least = min(kept, key=lambda e: kept[e])
    means = (sum(kept.values()) / len(kept), sum(errors) / len(errors))
    return (str(n), number(means[0]), number(kept[least]), str(least), number(means[1]), *streams)
