"""What a report says about the run itself: sides, limits, versions, machine, command, digests."""

from __future__ import annotations

import os
import platform
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime
from importlib import metadata
from typing import Any

from gptoss_convert.show.report_page.document import (
    Code,
    Facts,
    Part,
    Section,
    Table,
    columns,
    number,
    visible,
)
from gptoss_convert.show.report_page.verdict import Levels
from gptoss_convert.version import VERSION

_PACKAGES = ("numpy", "torch", "transformers", "megatron-core", "matplotlib")


def side(found: Mapping[str, Any]) -> Facts:
    """What one of the two checkpoints is."""
    notes = tuple(("note", visible(note)) for note in found["notes"])
    if merged := found["adapter"]:
        told = f"{merged['dialect']}, by {visible(merged['written_by'])}, SHA-256 "
        digest = f"{told}{merged['sha256']}"
        notes = (("with adapter", Code(visible(merged["path"]))), ("", digest), *notes)
    return Facts((
        ("path", Code(visible(found["path"]))),
        ("format", found["format"]),
        ("model", f"gpt-oss {found['model']}"),
        ("size", f"{found['bytes'] / 1e9:.3g} GB" if found["bytes"] >= 1e8
         else f"{found['bytes'] / 1e6:.3g} MB"),
        *notes,
    ))  # fmt: skip


def surroundings(levels: Levels, limits: str, command: str | None) -> Iterator[Section]:
    """The sections at the end."""
    if "logits" in levels:
        yield _limits(levels["logits"]["numbers"])
    if "values" in levels:
        yield _fingerprints(levels["values"]["numbers"])
    yield environment(levels, limits, command)


def _limits(logits: Mapping[str, Any]) -> Section:
    limits, overall = logits["limits"], logits["overall"]
    errors = [e["error"] for layer in logits["layers"] for e in layer["errors"]]
    lowest = min(layer["routing_agreement"] for layer in logits["layers"])
    rows = (
        ("Δlogit, worst", "at most", limits["max_delta"], overall["max_delta"]),
        ("KL, worst", "at most", limits["max_kl"], overall["kl_max"]),
        ("KL, mean", "at most", limits["mean_kl"], overall["kl_mean"]),
        ("relative error after a sub-block", "at most", limits["sub_block"], max(errors)),
        ("same routing, lowest layer", "at least", limits["routing_agreement"], lowest),
    )
    shown = tuple(
        (what, f"{way} {number(limit)}", number(found)) for what, way, limit, found in rows
    )
    lead = f"The limits “{limits['name']}”, measured: {limits['measured']}."
    return Section("Which limits?", lead, (Table(columns("what", "#limit", "#found"), shown),))


def _fingerprints(values: Mapping[str, Any]) -> Section:
    ours, theirs = values["parameters"], values["target_parameters"]
    rows = tuple(
        (
            weight,
            Code(ours[weight]["fingerprint"]),
            Code(theirs[weight]["fingerprint"]),
            "yes" if ours[weight] == theirs[weight] else "no",
        )
        for weight in ours
    )
    lead = (
        "64 bits of each parameter's values, the same in every format; the manifest holds them too."
    )
    table = Table(columns("parameter", "SOURCE", "TARGET", "equal"), rows)
    return Section("Which fingerprints?", lead, (table,))


def environment(levels: Levels, limits: str, command: str | None) -> Section:
    """What it takes to run a verification again."""
    logits = levels.get("logits", {}).get("numbers", {})
    memory = logits.get("gpu_memory_bytes")
    rows = [
        ("command", Code(visible(command)) if command else "(from Python)"),
        ("date", f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC"),
        ("gptoss-convert", VERSION),
        ("Python", f"{platform.python_version()}, {platform.platform()}"),
        ("packages", ", ".join(_versions())),
        ("processors", str(os.cpu_count())),
        ("limits", limits),
    ]
    if logits:
        device = f"{logits['hardware']}, torch {logits['torch_version']}"
        rows += [("logits on", visible(device)), ("computed in", logits["dtype"])]
        rows += [("GPU memory", f"{memory / 2**30:.1f} GiB at most")] if memory else []
    parts: tuple[Part, ...] = (Facts(tuple(rows)),)
    return Section("How was it run?", "Everything needed to run it again.", parts)


def _versions() -> Iterator[str]:
    for name in _PACKAGES:
        try:
            yield f"{name} {metadata.version(name)}"
        except metadata.PackageNotFoundError:
            continue
