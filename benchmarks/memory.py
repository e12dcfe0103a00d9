"""Full-size conversions, check and verify under a cgroup's memory limit: do they keep to it?

`python -m benchmarks.memory FOLDER --limit 2GB` as root, where cgroup v1 or v2 can be written.
FOLDER needs 72 GB; SOURCE and TARGET of 42 GB each are never kept at once. `--layers 2` rehearses
it in 9 GB.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

V1 = Path("/sys/fs/cgroup/memory")
V2 = Path("/sys/fs/cgroup")
TO = {
    "mxfp4": ["--to", "hf", "--dtype", "mxfp4"],
    "bf16": ["--to", "hf", "--dtype", "bf16"],
    "openai": ["--to", "openai"],
    "megatron": ["--to", "megatron"],
}


class Group:
    """A memory cgroup with a limit, for one program after another."""

    def __init__(self, limit: int) -> None:
        one = (V1 / "memory.limit_in_bytes").exists()
        self.folder = (V1 if one else V2) / f"gptoss-memory-{os.getpid()}"
        self.folder.mkdir()
        file = "memory.limit_in_bytes" if one else "memory.max"
        (self.folder / file).write_text(str(limit))
        self.peak_file = "memory.max_usage_in_bytes" if one else "memory.peak"
        self.kill_file = "memory.oom_control" if one else "memory.events"

    def join(self) -> None:
        """Put the calling process into the group; before exec, so that every allocation counts."""
        (self.folder / "cgroup.procs").write_text("0")

    def run(self, line: list[str]) -> tuple[int, float, int]:
        """Exit status, seconds, peak resident bytes of a program that runs in the group."""

        began = time.monotonic()
        with subprocess.Popen(line, stdout=subprocess.DEVNULL, preexec_fn=self.join) as process:
            _, status, usage = os.wait4(process.pid, 0)
            process.returncode = os.waitstatus_to_exitcode(status)
        return process.returncode, time.monotonic() - began, usage.ru_maxrss * 1024

    def killed(self) -> int:
        """Programs that the kernel ended for memory."""
        words = (self.folder / self.kill_file).read_text().split()
        return int(words[words.index("oom_kill") + 1])

    def close(self) -> None:
        self.folder.rmdir()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--limit", default="2GB")
    parser.add_argument("--model", default="20b")
    parser.add_argument("--layers", help="Fewer layers than the model has, to rehearse.")
    parser.add_argument("--json", type=Path)
    chosen = parser.parse_args()
    limit = int(float(chosen.limit.removesuffix("GB")) * 1e9)
    program = [sys.executable, "-m", "gptoss_convert"]
    place, rows = chosen.folder, []
    place.mkdir(parents=True, exist_ok=True)
    memory = ["--max-memory", chosen.limit, "--quiet"]
    group = Group(limit)

    def step(name: str, line: list[str]) -> None:
        status, seconds, peak = group.run([*program, *line])
        row = {"step": name, "seconds": seconds, "peak": peak, "status": status,
               "killed": group.killed()}  # fmt: skip
        rows.append(row)
        print(f"{name:22} {seconds:6.0f} s {peak / 1e6:6.0f} MB  exit {status}  "
              f"oom kills {row['killed']}", flush=True)  # fmt: skip

    def convert(source: str, target: str, *, keep: bool = False) -> None:
        made = place / (target if keep else "made")
        step(f"{source} -> {target}",
             ["convert", str(place / source), str(made), *TO[target], *memory])  # fmt: skip
        if not keep:
            shutil.rmtree(made, ignore_errors=True)

    def look(name: str) -> None:
        step(f"check {name}", ["check", str(place / name), "--read-data", *memory])
        step(f"values mxfp4 {name}", ["verify", str(place / "mxfp4"), str(place / name),
                                      "--level", "values", *memory])  # fmt: skip

    fewer = ["--layers", chosen.layers] if chosen.layers else []
    step("synth", ["synth", str(place / "mxfp4"), "--model", chosen.model, *fewer])
    convert("mxfp4", "bf16", keep=True)
    look("bf16")
    convert("bf16", "mxfp4")
    convert("bf16", "openai")
    shutil.rmtree(place / "bf16")
    convert("mxfp4", "megatron", keep=True)
    look("megatron")
    convert("megatron", "mxfp4")
    convert("megatron", "openai")
    shutil.rmtree(place / "megatron")
    convert("mxfp4", "openai", keep=True)
    look("openai")
    convert("openai", "mxfp4")
    convert("openai", "bf16")
    convert("openai", "megatron")
    shutil.rmtree(place)
    group.close()
    if chosen.json:
        chosen.json.write_text(json.dumps(rows, indent=1))
    return int(any(row["status"] for row in rows))


if __name__ == "__main__":
    raise SystemExit(main())
