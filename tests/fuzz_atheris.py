"""Coverage-guided fuzzing of one parser, beside tests/fuzzing.py: not part of the suite.

`pip install atheris`, then `python -m tests.fuzz_atheris FILE CORPUS -max_total_time=600`: FILE is
a name in `tests.fuzzing.FILES`, the options are libFuzzer's. With a file in place of CORPUS, what
crashed is read again.
"""

from __future__ import annotations

import random
import struct
import sys
import tempfile
from pathlib import Path

import atheris  # pyright: ignore[reportMissingImports]

with atheris.instrument_imports(  # pyright: ignore[reportAttributeAccessIssue]
    include=["gptoss_convert"]
):
    from tests.fuzzing import FILES, attempt, little_memory, make_starts, spoil

OWN_SHARE = 0.5
"""Share of mutations made with knowledge of JSON; libFuzzer makes the others."""


def main() -> None:
    name, corpus, *options = sys.argv[1:]
    with tempfile.TemporaryDirectory(prefix="gptoss-atheris-") as place:
        folder = Path(place)
        stopped = make_starts(folder)
        content = folder.joinpath(*FILES[name]).read_bytes()
        if not Path(corpus).is_file():
            Path(corpus).mkdir(parents=True, exist_ok=True)
            (Path(corpus) / "start").write_bytes(content)

        def mutate(data: bytes, most: int, seed: int) -> bytes:
            chance = random.Random(seed)
            if chance.random() < OWN_SHARE:
                try:
                    return spoil(name, data, chance)[:most]
                except (ValueError, IndexError, RecursionError, KeyError, struct.error):
                    pass
            return atheris.Mutate(data, most)

        def one_input(data: bytes) -> None:
            with little_memory():
                attempt(folder, name, data, stopped)

        libfuzzer = [sys.argv[0], corpus, f"-max_len={2 * len(content) + 4096}", *options]
        atheris.Setup(libfuzzer, one_input, custom_mutator=mutate)
        atheris.Fuzz()


if __name__ == "__main__":
    main()
