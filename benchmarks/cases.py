"""One measured run in a process of its own: `python -m benchmarks.cases CASE ARGUMENTS...`.

Prints one JSON line: seconds from before the work to after the last sync, processor seconds, peak
resident memory, bytes read and written. Start-up of the interpreter and imports are not counted,
but for the cases that are about them.
"""

from __future__ import annotations

import json
import os
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

Result = dict[str, Any]
_BLOCK = 32 << 20


def convert(source: str, target: str, to: str, dtype: str, leave_out: str = "nothing") -> Result:
    """A conversion; `leave_out` kernels (I/O alone), or digests (no CRC, fingerprint, checks)."""
    from gptoss_convert import Options, plan
    from gptoss_convert.codecs.stats import ScaleStatistics
    from gptoss_convert.conversion.run import run
    from gptoss_convert.engine import execute
    from gptoss_convert.engine.records import Anomalies, Digest, Effect
    from gptoss_convert.engine.work import Work

    if leave_out in {"kernels", "digests"}:
        nothing = type("NoChecksum", (), {"crc32": staticmethod(lambda *_: 0)})
        execute.isal_zlib = nothing
        Work.digest = lambda self, encoded: Digest(None, True)
        Work.statistics = lambda self: ScaleStatistics()
        execute.examine = lambda *_: Anomalies()
    if leave_out == "kernels":
        Work.run = lambda self, chain: Effect()
    began = time.monotonic()
    conversion = plan(source, target, Options(to=to, dtype=dtype))
    planned = time.monotonic() - began
    report = run(conversion)
    return {
        "seconds": planned + report.seconds,
        "plan_seconds": planned,
        "read": conversion.plan.read_bytes,
        "written": conversion.write_bytes,
    }


def verify(source: str, target: str, leave_out: str = "nothing") -> Result:
    """Compare all values of two checkpoints; `leave_out` the comparison to read both alone."""
    from gptoss_convert.compare import values
    from gptoss_convert.compare.pairs import StepPair
    from gptoss_convert.compare.values_report import Compared
    from gptoss_convert.formats.registry import open_checkpoint

    if leave_out == "kernels":

        def read(number: int, pair: StepPair, _: bool) -> Compared:
            for _piece in pair.pieces():
                pass
            return Compared(number, 0, None, None, 0, 0)

        values._compare = read  # pyright: ignore
    began = time.monotonic()
    ours, theirs = open_checkpoint(Path(source)), open_checkpoint(Path(target))
    values.compare_values(ours, theirs)
    sizes = [sum(chunk.nbytes for chunk in side.chunks) for side in (ours, theirs)]
    return {"seconds": time.monotonic() - began, "read": sum(sizes), "written": 0}


def write_limit(target: str, nbytes: str) -> Result:
    """What `dd` with direct I/O takes to write as many bytes, synced."""
    count = -(-int(nbytes) // _BLOCK)
    began = time.monotonic()
    options = [f"bs={_BLOCK}", f"count={count}", "oflag=direct", "conv=fsync", "status=none"]
    subprocess.run(["dd", "if=/dev/zero", f"of={target}", *options], check=True)
    return {"seconds": time.monotonic() - began, "read": 0, "written": count * _BLOCK}


def read_limit(source: str) -> Result:
    """What `dd` with direct I/O takes to read all files of a checkpoint."""
    files = [path for path in Path(source).rglob("*") if path.is_file()]
    began = time.monotonic()
    for path in files:
        options = [f"bs={_BLOCK}", "iflag=direct", "status=none"]
        subprocess.run(["dd", f"if={path}", "of=/dev/null", *options], check=True)
    total = sum(path.stat().st_size for path in files)
    return {"seconds": time.monotonic() - began, "read": total, "written": 0}


def both_limits(source: str, target: str, nbytes: str) -> Result:
    """What two `dd` take that read a checkpoint and write `nbytes` at once, both directly."""
    began = time.monotonic()
    with ThreadPoolExecutor() as pool:
        reading = pool.submit(read_limit, source)
        writing = pool.submit(write_limit, target, nbytes)
        read, written = reading.result()["read"], writing.result()["written"]
    return {"seconds": time.monotonic() - began, "read": read, "written": written}


def copy(source: str, target: str) -> Result:
    """`cp -r`, then fsync of every file."""
    began = time.monotonic()
    subprocess.run(["cp", "-r", source, target], check=True)
    total = 0
    for path in Path(target).rglob("*"):
        if path.is_file():
            descriptor = os.open(path, os.O_RDONLY)
            os.fsync(descriptor)
            os.close(descriptor)
            total += path.stat().st_size
    return {"seconds": time.monotonic() - began, "read": total, "written": total}


def transformers(source: str, target: str) -> Result:
    """transformers loads MXFP4 dequantised and saves BF16, as its users do."""
    import torch
    from transformers import GptOssForCausalLM, Mxfp4Config  # pyright: ignore

    torch.set_num_threads(len(os.sched_getaffinity(0)))
    began = time.monotonic()
    model = GptOssForCausalLM.from_pretrained(
        source, dtype=torch.bfloat16, quantization_config=Mxfp4Config(dequantize=True)
    )
    model.save_pretrained(target)  # pyright: ignore
    written = 0
    for path in Path(target).rglob("*.safetensors"):
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)
        written += path.stat().st_size
    return {"seconds": time.monotonic() - began, "read": 0, "written": written}


def dcp(target: str, layers: str) -> Result:
    """PyTorch DCP's default writer, for as many experts as `layers` layers of 8 experts hold."""
    import torch
    from torch.distributed import checkpoint

    tensors = {
        f"layer.{i}.{e}": torch.zeros(5760, 2880, dtype=torch.bfloat16).random_(0, 1000)
        for i in range(int(layers))
        for e in range(8)
    }
    total = sum(tensor.nbytes for tensor in tensors.values())
    began = time.monotonic()
    checkpoint.save(tensors, checkpoint_id=target, no_dist=True)  # pyright: ignore
    return {"seconds": time.monotonic() - began, "read": 0, "written": total}


def python(*arguments: str) -> Result:
    """A Python program, interpreter and imports included."""
    began = time.monotonic()
    run = [sys.executable, *arguments]
    subprocess.run(run, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    return {"seconds": time.monotonic() - began, "read": 0, "written": 0}


def planning(source: str, target: str) -> Result:
    """From a directory to a plan of its conversion to BF16, imports not counted."""
    from gptoss_convert import Options, plan

    began = time.monotonic()
    plan(source, target, Options(to="hf", dtype="bf16"))
    return {"seconds": time.monotonic() - began, "read": 0, "written": 0}


def kernels(rounds: str) -> Result:
    """Processor seconds of each kernel, of `np.copyto`, and of the peers' functions."""
    from benchmarks.kernels import measured

    began = time.monotonic()
    spent = measured(int(rounds))
    return {"seconds": time.monotonic() - began, "read": 0, "written": 0, "kernels": spent}


CASES: dict[str, Callable[..., Result]] = {
    "both_limits": both_limits,
    "convert": convert,
    "copy": copy,
    "dcp": dcp,
    "kernels": kernels,
    "planning": planning,
    "python": python,
    "read_limit": read_limit,
    "transformers": transformers,
    "verify": verify,
    "write_limit": write_limit,
}


def measure(case: str, *arguments: str) -> Result:
    """Run a case in a process of its own; TARGETs it made are the caller's to remove."""
    process = subprocess.run(
        [sys.executable, "-m", "benchmarks.cases", case, *arguments],
        check=True,
        stdout=subprocess.PIPE,
        text=True,
    )
    return json.loads(process.stdout.splitlines()[-1])


def remove(path: Path) -> None:
    """Delete a target, be it a file or a directory."""
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


if __name__ == "__main__":
    result = CASES[sys.argv[1]](*sys.argv[2:])
    own, children = (
        resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
    )
    result["peak_rss"] = own.ru_maxrss * 1024
    result["cpu"] = own.ru_utime + own.ru_stime + children.ru_utime + children.ru_stime
    print(json.dumps(result))
