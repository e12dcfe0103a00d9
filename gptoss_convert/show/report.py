"""Results as pages for people; `summary()` of each result is for programs."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from gptoss_convert.layouts.ranges import ranges
from gptoss_convert.show.pages import Facts, Grid, Page
from gptoss_convert.show.texts import in_xml


def size(nbytes: float) -> str:
    """`13.76 GB`, powers of ten."""
    for unit in ("B", "kB", "MB", "GB"):
        if nbytes < 1000:
            return f"{nbytes:.0f} {unit}" if unit == "B" else f"{nbytes:.2f} {unit}"
        nbytes /= 1000
    return f"{nbytes:.2f} TB"


def tensors(groups: Iterable[Mapping[str, Any]]) -> Grid:
    """Folded tensors as a table."""
    rows = [
        (
            group["name"],
            f"{group['count']}",
            group["dtype"],
            " x ".join(map(str, group["shape"])),
            size(group["bytes"]),
        )
        for group in groups
    ]
    columns = ("tensor", "count", "dtype", "shape", "bytes")
    right = frozenset(("count", "shape", "bytes"))
    return Grid(columns, rows, right, names=True, spare=("count", "shape"))


def inspection(summary: Mapping[str, Any]) -> Page:
    """The page of `inspect`."""
    config = summary["config"]
    dtypes = ", ".join(f"{count} {dtype}" for dtype, count in sorted(summary["dtypes"].items()))
    files = summary["files"]
    encoding = {"mxfp4": "MXFP4", "bf16": "BF16"}[summary["encoding"]]
    rows = {
        "path": summary["path"],
        "format": f"{summary['format']} ({summary['variant']})",
        "model": f"gpt-oss {summary['model']}, {summary['parameters'] / 1e9:.3f} B parameters",
        "experts": f"{encoding}, {config['num_local_experts']} a layer, "
        f"{config['num_experts_per_tok']} a token",
        "layers": f"{config['num_hidden_layers']}, window {config['sliding_window']} on even ones",
        "widths": f"hidden {config['hidden_size']}, inter {config['intermediate_size']}, "
        f"vocabulary {config['vocab_size']}",
        "heads": f"{config['num_attention_heads']} query, {config['num_key_value_heads']} kv, "
        f"{config['head_dim']} wide",
        "context": f"{config['max_position_embeddings']} (YaRN {config['rope_factor']:g} x "
        f"{config['original_max_position_embeddings']}, theta {config['rope_theta']:g})",
        "tensors": f"{summary['tensors']} ({dtypes}), {size(summary['tensor_bytes'])}",
        "files": f"{len(files)} ({size(sum(files.values()))})",
    }
    rows |= _details(summary["details"])
    if summary["scales_sidecar"]:
        rows["sidecar"] = "MXFP4 scales: the way back restores the original bytes"
    if summary["carried_files"]:
        rows["beside"] = ", ".join(summary["carried_files"])
    return [Facts(rows), "", tensors(summary["tensor_groups"]), *_notes(summary)]


def adapter(summary: Mapping[str, Any]) -> Page:
    """The page of `inspect` of an adapter."""
    ranks = summary["ranks"] or [summary["r"]]
    strength = f"rank {', '.join(map(str, ranks))}, alpha {summary['alpha']}"
    kinds = [name for name in ("rslora", "dora") if summary[name]]
    rows = {
        "path": summary["path"],
        "adapter": f"{summary['dialect']}, written by {summary['written_by']}",
        "base": summary["base_model"] or "not named",
        "fits": summary["fits"] or "neither 20b nor 120b: pass --base to have its shapes read",
        "strength": ", ".join([strength, *kinds]),
        "tensors": f"{summary['tensors']}, {size(summary['tensor_bytes'])}",
    }
    if summary["parameters"]:
        rows["changes"] = ", ".join(summary["parameters"])
    if summary["layers"]:
        rows["layers"] = ranges(summary["layers"])
    if summary["experts"]:
        rows["experts"] = ranges(summary["experts"])
    if summary["ambiguous"]:
        rows["left open"] = summary["ambiguous"]
    return [Facts(rows), "", tensors(summary["tensor_groups"]), *_notes(summary)]


_PARALLEL = {"tensor": "TP", "pipeline": "PP", "expert": "EP", "expert_tensor": "ETP"}


def _details(details: Mapping[str, Any]) -> dict[str, str]:
    """What only a trainer's checkpoint can tell."""
    if not details:
        return {}
    counts = (f"{count} {kind}" for kind, count in sorted(details["skipped"].items()))
    skipped = ", ".join(counts)
    of_format = _form(details) if "form" in details else _megatron(details)
    return of_format | {"skipped": f"{skipped} entries" if skipped else "nothing"}


def _form(details: Mapping[str, Any]) -> dict[str, str]:
    behind = f", behind {details['prefix']!r}" if details["prefix"] else ""
    without = "".join(f", without {part!r}" for part in details["wrappers"])
    return {
        "form": f"{details['form']}, by {details['written_by']}",
        "names": details["naming"] + behind + without,
        "configuration": details["configuration"],
        "chunks": f"{details['chunks']}",
        "lacks": " and ".join(details["lacks"]) or "nothing",
    }


def _megatron(details: Mapping[str, Any]) -> dict[str, str]:
    short = ((n.removesuffix("_parallel_size"), s) for n, s in details["parallel"].items())
    parallel = ", ".join(f"{_PARALLEL[n.removesuffix('_model')]} {size}" for n, size in short)
    return {
        "iteration": f"{details['iteration']}, saved by {details['saved_by']}",
        "configuration": details["configuration"],
        "chunks": f"{details['chunks']}",
        "saved with": parallel or "parallel sizes not recorded",
        "optimizer": "present, ignored" if details["optimizer"] else "none",
    }


def check(summary: Mapping[str, Any]) -> Page:
    """The page of `check`: the answer last, below what it rests on."""
    share = summary["share_read"]
    seed = f", seed {summary['seed']}" if summary["seed"] is not None else ""
    problems = summary["problems"]
    facts = Facts(
        {
            "path": summary["path"],
            "format": f"{summary['format']}, gpt-oss {summary['model']}",
            "manifest": summary["manifest"] or "none",
            "read": f"{share:.0%} of the weights{seed}" if share else "headers and small files",
            "release": summary["release"] or "none that is known",
            "result": f"{len(problems)} problems" if problems else "intact",
        }
    )
    prints = {} if summary["manifest"] else summary["parameters"]
    rows = [(weight, found["fingerprint"]) for weight, found in sorted(prints.items())]
    table = ["", Grid(("parameter", "fingerprint"), rows)] if rows else []
    return [facts, *table, *(f"problem: {problem}" for problem in problems), *_notes(summary)]


_FILES = 8
"""Files that are listed one by one."""


def conversion(summary: Mapping[str, Any]) -> Page:
    """The page of a plan, `convert --dry-run`."""
    target = summary["target"]
    files = target["files"]
    rows = {
        "source": f"{summary['source']['format']}  {summary['source']['path']}",
        "target": f"{target['format']}-{target['variant']}  {target['path']}",
        "model": f"gpt-oss {summary['model']}",
        "tensors": f"{target['tensors']} in {len(files)} files",
        "reads": size(summary["read_bytes"]),
        "writes": size(summary["write_bytes"]),
        "steps": f"{summary['steps']} on {summary['workers']} workers",
        "memory": f"about {size(summary['memory_bytes'])}",
    }
    if (seconds := summary.get("estimated_seconds")) is not None:
        rows["disk"] = f"about {max(seconds, 0.1):.1f} s at its speed of now"
    listed = [(name, size(nbytes)) for name, nbytes in files.items()]
    if len(listed) > _FILES:
        rest = size(sum([*files.values()][3:-3]))
        listed = [*listed[:3], (f"... {len(listed) - 6} more", rest), *listed[-3:]]
    table = Grid(("file", "bytes"), listed, right=frozenset(("bytes",)))
    return [Facts(rows), "", tensors(target["tensor_groups"]), "", table, *_notes(summary)]


def finished(summary: Mapping[str, Any], launch: Sequence[str] = ()) -> Page:
    """The line at the end of a conversion, and how a trainer loads TARGET."""
    moved = summary["read_bytes"] + summary["write_bytes"]
    seconds = max(summary["seconds"], 1e-3)
    target = summary["target"]
    done = (
        f"{target['path']}: {size(summary['write_bytes'])} in {seconds:.1f} s "
        f"({moved / seconds / 1e6:.0f} MB/s read and written), "
        f"peak memory {size(summary['peak_memory_bytes'])}"
    )
    if not launch:
        return [done]
    return [done, "", *launch]


_MOST = 5
"""Findings of a level that are shown; `--json` has them all."""


def verification(summary: Mapping[str, Any]) -> Page:
    """The page of `verify`: the answer first, then level by level."""
    source, target = summary["source"], summary["target"]
    sides = {
        "source": f"{source['format']:<9}  {source['path']}",
        "target": f"{target['format']:<9}  {target['path']}",
    }
    if merged := source["adapter"]:
        sides["adapter"] = f"{merged['dialect']:<9}  {merged['path']}"
    levels = Grid(
        ("level", "answer", "time", "what"),
        [_level(level) for level in summary["levels"]],
        right=frozenset(("time",)),
    )
    page = [summary["verdict"], "", Facts(sides), "", levels]
    for level in summary["levels"]:
        if shown := level["numbers"].get("next_tokens_text"):
            page += ["", "next tokens: source, target", *(f"  {line}" for line in shown)]
    return page


def _level(level: Mapping[str, Any]) -> tuple[str, ...]:
    findings = level["findings"]
    more = [f"... {len(findings) - _MOST} more"] if len(findings) > _MOST else []
    what = level["text"] if level["same"] else "\n".join([*findings[:_MOST], *more])
    answer = "same" if level["same"] else "different"
    return level["name"], answer, f"{level['seconds']:.2f} s", what


def _notes(summary: Mapping[str, Any]) -> list[str]:
    return [f"note: {note}" for note in summary["notes"]]


def junit(summary: Mapping[str, Any]) -> str:
    """The levels as JUnit test cases, for continuous integration."""
    from xml.sax.saxutils import escape, quoteattr

    suite = f"{summary['source']['path']} against {summary['target']['path']}"
    failed = sum(not level["same"] for level in summary["levels"])
    cases = []
    for level in summary["levels"]:
        told = escape("\n".join(level["findings"]))
        body = "" if level["same"] else f"<failure message={quoteattr(level['findings'][0])}>{told}"
        body += "" if level["same"] else "</failure>"
        name, seconds = quoteattr(level["name"]), f"{level['seconds']:.3f}"
        cases.append(
            f'<testcase classname="gptoss-convert.verify" name={name} time="{seconds}">{body}'
            "</testcase>"
        )
    lines = [
        '<?xml version="1.0" encoding="UTF-8"?>',
        f'<testsuite name={quoteattr(suite)} tests="{len(cases)}" failures="{failed}">',
        *cases,
        "</testsuite>\n",
    ]
    return in_xml("\n".join(lines))
