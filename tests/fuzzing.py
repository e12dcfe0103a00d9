"""Spoiled files for fuzzing: every untrusted file of a checkpoint, bytes or JSON values changed.

As a script, it goes on until the time is up: `python -m tests.fuzzing --minutes 10`.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import random
import resource
import struct
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from gptoss_convert.conversion.journal import Journal
from gptoss_convert.conversion.manifest import read_manifest
from gptoss_convert.conversion.options import Options
from gptoss_convert.conversion.plan import Conversion, plan
from gptoss_convert.conversion.run import run
from gptoss_convert.errors import GptossError
from gptoss_convert.synth.synth import synth
from tests.stopping import At, HaltError, halt

JOURNAL = "journal"
FILES = {
    "header": ("one", "model.safetensors"),
    "config": ("one", "config.json"),
    "manifest": ("one", "gptoss-convert.json"),
    "index": ("many", "model.safetensors.index.json"),
    "scales": ("bf16", "mxfp4-scales/scales.safetensors"),
    "origin": ("bf16", "mxfp4-scales/origin.json"),
    "openai config": ("openai", "config.json"),
    "metadata": ("megatron", "iter_0000001/.metadata"),
    "metadata.json": ("megatron", "iter_0000001/metadata.json"),
    "common": ("megatron", "iter_0000001/common.pt"),
    "distcp": ("megatron", "iter_0000001/__0_0.distcp"),
    "run config": ("megatron", "iter_0000001/run_config.yaml"),
    "tracker": ("megatron", "latest_checkpointed_iteration.txt"),
    JOURNAL: ("journal", "journal"),
}
"""By name: the directory that holds the file, and its path there."""
PLANNED = Options("hf", "mxfp4", workers=1)
"""What every start is planned to become: opened, checked, its small files read for TARGET."""
ROOM = 1 << 30
"""Bytes of address space that reading any spoiled file may take."""
_ODD: tuple[Any, ...] = (
    *(None, True, -1, 0, 1, 1 << 31, 1 << 63, 1 << 70, 10**400, 1.5, -0.0, "", "x" * 600),
    *("../x", "/x", "a:b", "\0", "\n", "a\udc80", [], {}, [[]], [1, 2], {"a": {}}, ["../x"]),
)
_BYTES = (b"", b"\0", b"\xff", b"{", b"]", b'"', b"\n", b"9" * 30, b"../", b"\x80\x02", b"\x94")


def make_starts(folder: Path) -> Conversion:
    """Good directories to spoil; returns the conversion that left the journal."""
    synth(folder / "one", layers=1, workers=1)
    options = {
        "many": Options("hf", workers=1, max_shard_size=700_000),
        "bf16": Options("hf", "bf16", workers=1),
        "openai": Options("openai", workers=1),
        "megatron": Options("megatron", workers=1),
    }
    for name, chosen in options.items():
        run(plan(folder / "one", folder / name, chosen))
    stopped = plan(folder / "one", folder / "stopped", Options("hf", workers=1))
    try:
        run(stopped, At(4, halt))
    except HaltError:
        (folder / "journal").mkdir()
        (folder / ".stopped.gptoss-convert.journal").rename(folder / "journal" / "journal")
    return stopped


def spoil(name: str, content: bytes, chance: random.Random) -> bytes:
    """The content with a few bytes or JSON values changed."""
    prefix, text, rest = b"", content, b""
    if name in ("header", "scales") and chance.random() < 0.9:
        length = struct.unpack("<Q", content[:8])[0]
        text, rest = content[8 : 8 + length], content[8 + length :]
    if text[:1] == b"{" and chance.random() < 0.6:
        text = spoil_json(json.loads(text), chance)
    else:
        text = spoil_bytes(text, chance)
    if rest:
        prefix = struct.pack("<Q", len(text))
    return prefix + text + rest


def spoil_json(content: Any, chance: random.Random) -> bytes:
    for _ in range(chance.randint(1, 3)):
        _replace_one(content, chance)
    return json.dumps(content, ensure_ascii=True).encode()


def _replace_one(content: Any, chance: random.Random) -> None:
    """Walk down a random path and put an odd value at its end."""
    while True:
        keys = list(content) if isinstance(content, dict) else list(range(len(content)))
        if not keys:
            return
        key = chance.choice(keys)
        if isinstance(content[key], dict | list) and content[key] and chance.random() < 0.8:
            content = content[key]
            continue
        if isinstance(content, dict) and chance.random() < 0.2:
            content[str(chance.choice(_ODD))[:600]] = content.pop(key)
        else:
            content[key] = copy.deepcopy(chance.choice(_ODD))
        return


def spoil_bytes(content: bytes, chance: random.Random) -> bytes:
    for _ in range(chance.randint(1, 4)):
        at = chance.randrange(len(content) + 1)
        length = min(chance.choice((0, 1, 1, 2, 8, 100)), len(content) - at)
        piece = chance.choice(_BYTES) * chance.choice((1, 1, 1, 50))
        if chance.random() < 0.3 and content:
            start = chance.randrange(len(content))
            piece = content[start : start + chance.choice((1, 4, 30, 400))]
        if chance.random() < 0.5 and length:
            piece = bytes(byte ^ 1 << chance.randrange(8) for byte in content[at : at + length])
        content = content[:at] + piece + content[at + length :]
    return content


def attempt(folder: Path, name: str, content: bytes, stopped: Conversion) -> str:
    """Read a spoiled file as the commands do: the kind of answer; raises what is no answer."""
    start, file = FILES[name]
    path = folder / start / file
    before = path.read_bytes()
    path.write_bytes(content)
    try:
        if name == JOURNAL:
            descriptor = os.open(path, os.O_RDWR)
            try:
                Journal(descriptor, "journal", stopped.header)
            finally:
                os.close(descriptor)
        else:
            read_manifest(folder / start)
            plan(folder / start, folder / "target", PLANNED)
    except GptossError as error:
        assert str(error)
        return type(error).__name__
    finally:
        path.write_bytes(before)
    return "accepted"


@contextmanager
def little_memory() -> Iterator[None]:
    """Let the process grow by ROOM at most: what allocates by a number it read runs into it."""
    old = resource.getrlimit(resource.RLIMIT_AS)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + ROOM, old[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, old)


def main(arguments: Sequence[str] | None = None) -> int:
    """Spoil and read until the time is up; keep what crashed."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--minutes", type=float, default=1.0)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    answers: Counter[str] = Counter()
    until = time.monotonic() + 60 * options.minutes
    with tempfile.TemporaryDirectory(prefix="gptoss-fuzz-") as place:
        folder = Path(place)
        stopped = make_starts(folder)
        seed = options.seed
        while time.monotonic() < until:
            for name, (start, file) in FILES.items():
                chance = random.Random(f"{name} {seed}")
                content = spoil(name, (folder / start / file).read_bytes(), chance)
                began = time.monotonic()
                try:
                    with little_memory():
                        answers[attempt(folder, name, content, stopped)] += 1
                except Exception:
                    traceback.print_exc()
                    kept = Path(f"crash-{name.replace(' ', '-')}-{seed}")
                    kept.write_bytes(content)
                    print(f"{name}: seed {seed}: kept as {kept}")
                    return 1
                if (took := time.monotonic() - began) > 5:
                    print(f"{name}: seed {seed}: took {took:.1f} s")
            seed += 1
    print(f"{sum(answers.values())} files read, no crash: {dict(answers)}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
