"""Coverage-guided fuzzing of the parsers, beside tests/fuzzing.py: not part of the suite.

`pip install atheris`, then `python -m tests.fuzz_atheris CORPUS -max_total_time=1800`: the options
are libFuzzer's. An input's first byte chooses the file, the others are what the file holds.
"""

from __future__ import annotations

import random
import sys
import tempfile
from pathlib import Path

import atheris  # pyright: ignore[reportMissingImports]

with atheris.instrument_imports(  # pyright: ignore[reportAttributeAccessIssue]
    include=["gptoss_convert"]
):
    from tests.fuzzing import FILES, attempt, little_memory, make_starts, spoil

NAMES = sorted(FILES)
OWN_SHARE = 0.5
"""Share of mutations made with knowledge of JSON; libFuzzer makes the others."""


def main() -> None:
    with tempfile.TemporaryDirectory(prefix="gptoss-atheris-") as place:
        folder = Path(place)
        stopped = make_starts(folder)
        corpus = next((Path(one) for one in sys.argv[1:] if not one.startswith("-")), None)
        if corpus is not None:
            corpus.mkdir(parents=True, exist_ok=True)
            for number, name in enumerate(NAMES):
                start, file = FILES[name]
                content = (folder / start / file).read_bytes()
                (corpus / f"start-{number}").write_bytes(bytes([number]) + content)

        def mutate(data: bytes, most: int, seed: int) -> bytes:
            chance = random.Random(seed)
            name = NAMES[data[0] % len(NAMES)] if data else NAMES[0]
            if len(data) > 9 and chance.random() < OWN_SHARE:
                try:
                    return (data[:1] + spoil(name, data[1:], chance))[:most]
                except (ValueError, IndexError, RecursionError, KeyError):
                    pass
            return atheris.Mutate(data, most)

        def one_input(data: bytes) -> None:
            if data:
                with little_memory():
                    attempt(folder, NAMES[data[0] % len(NAMES)], data[1:], stopped)

        atheris.Setup(sys.argv, one_input, custom_mutator=mutate)
        atheris.Fuzz()


if __name__ == "__main__":
    main()
