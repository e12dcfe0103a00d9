"""Writing to a RAM disk, by threads and files: `python -m benchmarks.ram_disk FOLDER`.

Each line has GB/s, and GB per processor second, of workers that write pieces of 8 MB in turn to so
many files: where the kernel lets one at a time write to a file, and as conversions do (decision
15). The best of `--rounds` runs, which alternate. FOLDER needs room for `--gigabytes`.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from itertools import count
from pathlib import Path
from tempfile import TemporaryDirectory

from gptoss_convert.machine import target_files
from gptoss_convert.machine.arena import Arena
from gptoss_convert.machine.target_files import TargetFiles
from gptoss_convert.machine.threads import run_all

PIECE = 8 << 20
BESIDE = target_files.lies_in_memory
MODES: dict[str, Callable[[int], bool]] = {"one at a time": lambda _: False, "at once": BESIDE}


def rates(folder: Path, threads: int, files: int, pieces: int) -> tuple[float, float]:
    """GB/s, and GB per processor second, of writing so many pieces to each file."""
    number = count()

    def worker() -> Callable[[int], tuple[None, int]]:
        arena = Arena(PIECE)
        arena.memory.write(bytes([next(number) % 255 + 1]) * PIECE)

        def write(piece: int) -> tuple[None, int]:
            into.write(str(piece % files), piece // files * PIECE, PIECE, arena, 0)
            return None, PIECE

        return write

    with TemporaryDirectory(dir=folder) as place, TargetFiles(Path(place)) as into:
        for name in range(files):
            into.create(str(name), pieces * PIECE)
        began, spent = time.perf_counter(), time.process_time()
        run_all(
            range(pieces * files),
            worker,
            workers=threads,
            finished=lambda _: None,
            advance=lambda _: None,
        )
        gigabytes = pieces * files * PIECE / 1e9
        return gigabytes / (time.perf_counter() - began), gigabytes / (time.process_time() - spent)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2, 4, 8, 14, 16])
    parser.add_argument("--files", type=int, nargs="+", default=[1, 3, 10])
    parser.add_argument("--gigabytes", type=float, default=8)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    for files in options.files:
        pieces = int(options.gigabytes * 1e9 / PIECE / files)
        for threads in options.threads:
            found: dict[str, list[tuple[float, float]]] = {mode: [] for mode in MODES}
            for _ in range(options.rounds):
                for mode, lies_in_memory in MODES.items():
                    target_files.lies_in_memory = lies_in_memory
                    found[mode].append(rates(options.folder, threads, files, pieces))
            said = (f"{mode} {max(one)[0]:6.2f} ({max(one)[1]:.2f})" for mode, one in found.items())
            print(f"{files:>3} files {threads:>3} threads   " + "   ".join(said), flush=True)


if __name__ == "__main__":
    main()
