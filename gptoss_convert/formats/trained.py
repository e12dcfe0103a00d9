"""What every form that trainers leave has in common: its names, its configuration, what it lacks.

A form is a module beside this one: it knows its files, and hands their chunks to `open_trained`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from gptoss_convert.containers import DTYPE_BYTES, Chunk
from gptoss_convert.containers.paths import folder_inside, lies, open_file
from gptoss_convert.containers.refs import FileRef
from gptoss_convert.errors import InputError, IntegrityError, UsageError
from gptoss_convert.formats import unsupported
from gptoss_convert.formats.carried import carried_files
from gptoss_convert.formats.checkpoint import CONFIG, Checkpoint, Choices, Format, misfits
from gptoss_convert.formats.config import Config
from gptoss_convert.formats.heads import configure, require_rows
from gptoss_convert.formats.names import Names, why_zero
from gptoss_convert.layouts.model import load_model, tables_in
from gptoss_convert.layouts.table_files import load_table
from gptoss_convert.layouts.tables import Table

_MOST_ZERO = 1 << 20
"""Bytes of a tensor that is looked at for zeros: one number an expert takes less."""
_FOLDER = "trainers"
"""Where the tables of names lie that only trainers use."""
MIS_SAVED = {
    "mis-saved": "transformers 5.21 to 5.23 save",
    "mis-saved-rows": "torchtitan exports them, output-major",
}
"""Variants of Hugging Face's table that are read with --repair alone, and who writes them."""


_GATE_PROJ = {"expert-halves": "half", "expert-gates": "gate"}
"""Variants of Hugging Face's table that --gate-proj alone tells apart."""


@dataclass(frozen=True)
class Place:
    """A folder of a checkpoint that a trainer puts the weights in."""

    inside: str
    """Its name in the checkpoint's own folder, empty for that itself."""
    writer: str
    """Which trainers do."""

    @property
    def depth(self) -> int:
        """How many folders below the checkpoint's own."""
        return len(Path(self.inside).parts)


@dataclass(frozen=True)
class Form:
    """A form that trainers leave: what it is, and where."""

    what: str
    """In words."""
    places: tuple[Place, ...]
    """In the order in which they are looked at; the empty one last."""
    holds: Callable[[Path], bool]
    """Whether a folder holds such weights."""

    def recognise(self, path: Path) -> Path | None:
        """The folder of a directory that the weights lie in, None where there is none."""
        inside = (folder_inside(path, p.inside) if p.inside else path for p in self.places)
        return next(
            (folder for folder in inside if folder is not None and self.holds(folder)), None
        )

    def place(self, folder: Path) -> Place:
        """Which of the places a folder with weights is, however it was named."""
        every = (
            p
            for p in self.places
            if not p.depth or folder.parts[-p.depth :] == Path(p.inside).parts
        )
        return next(every)

    def beside(self, folder: Path) -> list[Path]:
        """Where config.json and tokenizer may lie: in the checkpoint's own folder, never above it,
        where another model's may."""
        own = (folder, *folder.parents[: self.place(folder).depth])
        inside = (
            (place, folder_inside(place, name))
            for place in own
            for name in unsupported.TRAINERS_FOLDERS
        )
        return [*own, *(found for _, found in inside if found is not None)]


@cache
def trainer_tables() -> tuple[Table, ...]:
    """Hugging Face's table, and those of the names that only trainers use."""
    names = (name.removesuffix(".toml") for name in tables_in(_FOLDER))
    return (load_table("hf"), *(load_table(f"{_FOLDER}/{name}") for name in names))


def open_trained(
    kind: Format,
    form: Form,
    folder: Path,
    names: Names,
    stored: Sequence[Chunk],
    choices: Choices,
    skipped: Mapping[str, int] | None = None,
) -> Checkpoint:
    """The checkpoint that these chunks in `folder` are, under names that `read_names` found.

    `skipped` counts what is no weight, if that is more than the names of tensors tell. Raises
    InputError where there are no weights, none in a known naming, or config.json is nowhere.
    """
    chunks = names.chunks(stored)
    skipped = names.skipped if skipped is None else skipped
    writer = next(filter(None, map(_written_by, names.tables)), form.place(folder).writer)
    beside = form.beside(folder)
    problem = unsupported.recognise_state(str(folder), names)
    if problem := problem or unsupported.recognise_tensors(str(folder), chunks):
        raise problem
    if not names.tables:
        raise InputError(f"{folder}: {form.what}, by {writer}: tensors in no known naming")
    zeros = [chunk for chunk in chunks if why_zero(chunk.tensor)]
    for chunk in zeros:
        _require_zero(folder, chunk, names)
    chunks = tuple(chunk for chunk in chunks if chunk not in zeros) if zeros else chunks
    skipped = {**skipped, **({"zero": len({c.tensor for c in zeros})} if zeros else {})}
    lacking = lacking_in(beside)
    own = (place / CONFIG for place in beside if lies(place, CONFIG))
    path = choices.config or next(own, None)
    if path is None:
        raise InputError(
            f"{folder}: {form.what}, by {writer}; it lacks {' and '.join(lacking)}: pass "
            "--config CONFIG_JSON, that of the model it was trained from"
        )
    said = configure(path, names.tables, chunks, choices.vocab_size)
    table, variant = best_naming(folder, names.tables, said.config, said.chunks, choices)
    wrong = wrong_rows(table, variant, said.config, said.chunks)
    require_rows(path, said.config, names.tables, wrong)
    notes = repaired(folder, variant, choices)
    return Checkpoint(
        kind,
        variant,
        folder,
        said.config,
        said.text,
        said.chunks,
        {},
        carried=next(filter(None, map(carried_files, beside)), ()),
        notes=(*said.config.notes, *said.notes, *notes, *skipped_notes(skipped)),
        details={
            "form": form.what,
            "written_by": writer,
            "configuration": str(path),
            "naming": f"{table.format}: {variant}",
            **told(names, stored),
            "skipped": dict(skipped),
            "lacks": lacking,
        },
        naming=table,
        dressed=True,
    )


def told(names: Names, stored: Sequence[Chunk]) -> dict[str, Any]:
    """What `inspect` says of the names that were found."""
    return {
        "prefix": names.prefix,
        "wrappers": list(names.wrappers),
        "chunks": len(stored),
        "skipped": dict(names.skipped),
    }


def _require_zero(folder: Path, chunk: Chunk, names: Names) -> None:
    """Refuse a tensor that the model has no place for, unless all of it is zero, of either sign."""
    with open_file(FileRef(folder, chunk.file, chunk.identity)) as file:
        file.seek(chunk.offset)
        raw = bytearray(file.read(min(chunk.nbytes, _MOST_ZERO)))
    size = DTYPE_BYTES[chunk.dtype]
    raw[size - 1 :: size] = bytes(byte & 0x7F for byte in raw[size - 1 :: size])
    if any(raw) or len(raw) < chunk.nbytes:
        stored = next(name for name, its in names.weights.items() if its == chunk.tensor)
        raise InputError(
            f"{folder}: {stored} is not zero: {why_zero(chunk.tensor)}; "
            f"--drop '*.{stored.rpartition('.')[2]}' leaves it out all the same"
        )


def repaired(root: Path, variant: str, choices: Choices) -> list[str]:
    """A note on what is read with --repair; raises IntegrityError where that is not asked for."""
    if variant not in MIS_SAVED:
        return []
    what = f"BF16 experts under the names of packed blocks, as {MIS_SAVED[variant]}"
    if not choices.repair:
        raise IntegrityError(f"{root}: {what}; pass --repair to read them as BF16")
    return [f"{what}; --repair reads them as BF16"]


def best_naming(
    where: Path, tables: Sequence[Table], config: Config, chunks: Sequence[Chunk], choices: Choices
) -> tuple[Table, str]:
    """The table and the variant whose names fit best; raises UsageError where they leave it open.

    Where two have the same names, experts lie input-major or output-major, and shapes decide: no
    model has them all alike, as gate_up is twice as wide as down.
    """
    every = [(table, variant) for table in tables for variant in table.variants]
    misfit = [len(misfits(*one, config, chunks)) for one in every]
    best = [one for one, count in zip(every, misfit, strict=True) if count == min(misfit)]
    if any(variant in _GATE_PROJ for _, variant in best):
        best = [one for one in best if _GATE_PROJ[one[1]] == _asked(where, choices)]
    elif choices.gate_proj:
        raise UsageError(f"{where}: --gate-proj is for names such as experts.0.gate_proj; omit it")
    return min(best, key=lambda one: len(wrong_rows(*one, config, chunks)) if best[1:] else 0)


def _asked(where: Path, choices: Choices) -> str:
    if choices.gate_proj is None:
        raise UsageError(
            f"{where}: experts.0.gate_proj is the first half of the rows in which gate and up "
            "alternate as llm-compressor saved from June to August 2026 (#2647), and the gate "
            "itself since #3100; pass --gate-proj half or --gate-proj gate (verify against the "
            "base model shows which)"
        )
    return choices.gate_proj


def wrong_rows(
    table: Table, variant: str, config: Config, chunks: Sequence[Chunk]
) -> dict[str, int]:
    """The first length of each tensor that has not the shape a variant gives it."""
    tensors = table.tensors(variant, load_model().sizes(config.numbers))
    shapes = {tensor.name: tensor.shape for tensor in tensors}
    return {c.tensor: c.shape[0] for c in chunks if c.shape and shapes.get(c.tensor) != c.shape}


def _written_by(table: Table) -> str | None:
    """Who has the names of a table, if only one trainer has."""
    return table.format.removeprefix(f"{_FOLDER}/") if "/" in table.format else None


def lacking_in(beside: Sequence[Path]) -> list[str]:
    """What a served directory has and this one does not."""
    lacks = [] if any(lies(place, CONFIG) for place in beside) else [CONFIG]
    carried = {path.name for place in beside for path in carried_files(place)}
    return lacks if "tokenizer.json" in carried else [*lacks, "a tokenizer"]


def skipped_notes(skipped: Mapping[str, int]) -> list[str]:
    """A note on what holds no weights, if there is any."""
    words = ", ".join(f"{count} {kind}" for kind, count in sorted(skipped.items()))
    return [f"skipped entries that hold no weights: {words}"] * bool(words)
