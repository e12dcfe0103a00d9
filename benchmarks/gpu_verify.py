"""Full-size verification on one GPU: parity of every format, mutants, memory, transformers beside.

Run `python -m benchmarks.gpu_verify FOLDER --model 20b --steps ...`, FOLDER on a fast disk or RAM
disk with room for two BF16 checkpoints. `--seconds` stops before a step that would start too late.
Everything is generated on the spot; nothing is downloaded.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path

import torch

from benchmarks.kernels import measured, table
from gptoss_convert.formats.registry import open_checkpoint
from gptoss_convert.machine.ranks import ALONE, join
from gptoss_convert.verify.oracle_level import distances, oracle_logits
from gptoss_convert.verify.sides import open_reader
from gptoss_convert.witness import forward, products
from gptoss_convert.witness.fetch import Fetcher
from gptoss_convert.witness.forward import Numerics
from gptoss_convert.witness.limits import load_limits
from gptoss_convert.witness.node import choose_device, sharing
from gptoss_convert.witness.parity import compare
from gptoss_convert.witness.parity_report import ParityReport
from gptoss_convert.witness.readers import Reader
from gptoss_convert.witness.rows import Rows
from gptoss_convert.witness.tokens import TokenSequence, sequence, token_set
from tests.mutants import MUTANTS, MutantReader, zeroed_expert

DEVICE = choose_device("auto", ALONE)
CHOSEN_MUTANTS = (
    "M1 ",
    "M3 ",
    "M6 q_bias",
    "M6 router",
    "M8 window",
    "M9 ",
    "M12 two",
    "M15 ",
    "M26 ",
)
AHEAD = 8_000_000_000


class Bench:
    """The folder, the model, and what was measured so far."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.folder: Path = options.folder
        self.folder.mkdir(parents=True, exist_ok=True)
        self.target_folder: Path = options.target_folder or options.folder
        self.model: str = options.model
        self.layers: int | None = options.layers
        self.out: Path | None = options.out
        self.longest: int = options.longest
        self.positions: int = options.positions
        self.ahead: int = options.ahead
        self.results: dict[str, object] = {}

    def place(self, name: str) -> Path:
        return (self.folder if name == "mxfp4" else self.target_folder) / name

    def reader(self, name: str, layers: int | None = None) -> Reader:
        return open_reader(open_checkpoint(self.place(name)), Fetcher(DEVICE, self.ahead), layers)

    def note(self, name: str, text: str, content: object = None) -> None:
        print(f"{name:<24} {text}", flush=True)
        self.results[name] = content if content is not None else text
        if self.out:
            path = self.out / f"{self.model}.json"
            path.write_text(json.dumps(self.results, indent=1, default=str))


def command(*words: str) -> dict[str, object]:
    """The JSON that a command of the program prints."""
    line = [sys.executable, "-m", "gptoss_convert", *words, "--quiet", "--json"]
    done = subprocess.run(line, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(words)}: {done.stderr[-500:]}")
    return json.loads(done.stdout)


def written(done: dict[str, object]) -> str:
    seconds, nbytes = float(str(done["seconds"])), int(str(done["write_bytes"]))
    memory = int(str(done["peak_memory_bytes"])) / 1e9
    return (
        f"{nbytes / 1e9:.1f} GB in {seconds:.1f} s, {nbytes / seconds / 1e9:.2f} GB/s written, "
        f"memory {memory:.2f} GB"
    )


def synth(bench: Bench) -> None:
    layers = ["--layers", str(bench.layers)] if bench.layers else []
    done = command("synth", str(bench.place("mxfp4")), "--model", bench.model, *layers)
    bench.note("synth mxfp4", written(done))


def convert(bench: Bench, name: str) -> None:
    target = {
        "bf16": ("hf", "bf16"),
        "megatron": ("megatron", "keep"),
        "openai": ("openai", "keep"),
    }
    to, dtype = target[name]
    source, out = str(bench.place("mxfp4")), str(bench.place(name))
    done = command("convert", source, out, "--to", to, "--dtype", dtype)
    bench.note(f"convert {name}", written(done))


def compared(
    bench: Bench, label: str, source: Reader, target: Reader, sequences: Sequence[TokenSequence],
    dtype: torch.dtype = torch.float32, limits: str = "lossless", extra_rounds: int = 4,
) -> ParityReport:  # fmt: skip
    """Compare, and note time, memory and the largest difference."""
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    began = time.perf_counter()
    numerics = Numerics.on(DEVICE, dtype)
    report = compare(
        source, target, sequences, load_limits(limits), DEVICE, numerics, extra_rounds=extra_rounds
    )
    seconds = time.perf_counter() - began
    peak = torch.cuda.max_memory_allocated() / 2**30 if DEVICE.type == "cuda" else 0.0
    held = torch.cuda.max_memory_reserved() / 2**30 if DEVICE.type == "cuda" else 0.0
    experts = source.config.experts * len(source.config.sliding)
    cold = sum(len(layer.cold_experts) for layer in report.layers)
    where = report.first_over
    bench.note(
        label,
        f"max|d| {report.overall.max_delta:.4g}  KL max {report.overall.kl_max:.3g}  "
        f"{report.overall.positions} positions  experts {experts - cold}/{experts}  "
        f"{seconds:.1f} s  GPU {peak:.1f} GiB ({held:.1f} reserved)"
        + (f"  first: layer {where.layer} {where.block} {where.error:.3g}" if where else ""),
        {"seconds": seconds, "gpu_gib": peak, "gpu_reserved_gib": held, **asdict(report)},
    )
    return report


def parity(bench: Bench, name: str) -> None:
    source, target = bench.reader("mxfp4"), bench.reader(name)
    tokens = token_set(source.config, bench.longest, bench.positions)
    compared(bench, f"parity mxfp4 {name}", source, target, tokens)


def short(bench: Bench, name: str) -> None:
    """512 tokens, as in the runs of transformers; first and second time."""
    for turn in ("first", "second"):
        source, target = bench.reader("mxfp4"), bench.reader(name)
        tokens = [sequence("text", 512, 0, source.config.vocab)]
        compared(bench, f"512 tokens {name} {turn}", source, target, tokens, extra_rounds=0)


def long(bench: Bench, name: str, dtype: torch.dtype = torch.float32) -> None:
    """One sequence of the model's full context."""
    source, target = bench.reader("mxfp4"), bench.reader(name)
    config = source.config
    length = int(config.rope_original_length * config.rope_factor)
    tokens = [sequence("text", length, 0, config.vocab)]
    label = f"{length} tokens {name} {str(dtype)[6:]}"
    compared(bench, label, source, target, tokens, dtype, extra_rounds=0)


def bf16(bench: Bench, name: str) -> None:
    source, target = bench.reader("mxfp4"), bench.reader(name)
    tokens = token_set(source.config, bench.longest, bench.positions)
    compared(bench, f"parity bf16 mode {name}", source, target, tokens, torch.bfloat16)


_TRANSFORMERS = """
import sys, time, torch
began = time.perf_counter()
from transformers import GptOssForCausalLM, Mxfp4Config
import transformers
imported = time.perf_counter()
extra = {"quantization_config": Mxfp4Config(dequantize=True)} if sys.argv[2] == "mxfp4" else {}
model = GptOssForCausalLM.from_pretrained(
    sys.argv[1], dtype=torch.bfloat16, device_map="cuda", attn_implementation="eager", **extra)
torch.cuda.synchronize()
loaded = time.perf_counter()
tokens = torch.arange(512, device="cuda").unsqueeze(0) * 97 % 200000
with torch.inference_mode():
    model(tokens, use_cache=False).logits.float().sum().item()
ran = time.perf_counter()
print(f"transformers {transformers.__version__}: import {imported - began:.1f} s, load "
      f"{loaded - imported:.1f} s, 512 tokens {ran - loaded:.2f} s, GPU "
      f"{torch.cuda.max_memory_allocated() / 2**30:.1f} GiB "
      f"({torch.cuda.max_memory_reserved() / 2**30:.1f} reserved)")
"""


def transformers(bench: Bench, name: str) -> None:
    """transformers loads and runs the same directory, in a process of its own."""
    line = [sys.executable, "-c", _TRANSFORMERS, str(bench.place(name)), name]
    done = subprocess.run(line, capture_output=True, text=True, check=False, timeout=240)
    last = done.stdout.strip().splitlines()[-1:] or [done.stderr.strip()[-300:]]
    bench.note(f"transformers {name}", last[0])


def attention(bench: Bench) -> None:
    """The fused kernel against query blocks in float64, and its time at full length."""
    gen = torch.Generator(DEVICE).manual_seed(0)

    def tensors(length: int, dtype: torch.dtype) -> list[torch.Tensor]:
        sizes = ((length, 64, 64), (length, 8, 64), (length, 8, 64), (64,))
        return [torch.randn(*n, generator=gen, device=DEVICE).to(dtype) for n in sizes]

    with forward.exact_products():
        q, k, v, sinks = tensors(1500, torch.float32)
        found = forward.attend_fused(q * 2, k, v, sinks).cpu()
        double = [x.double().cpu() for x in (q * 2, k, v, sinks)]
        expected = forward.attend(double[0], double[1], double[2], double[3], None, 1 << 24)
        error = float((found - expected).norm() / expected.norm())
        for dtype in (torch.float32, torch.bfloat16):
            q, k, v, sinks = tensors(65536, dtype)
            torch.cuda.synchronize()
            began = time.perf_counter()
            first = forward.attend_fused(q, k, v, sinks)
            torch.cuda.synchronize()
            seconds = time.perf_counter() - began
            again = torch.equal(first, forward.attend_fused(q, k, v, sinks))
            text = f"{seconds:.2f} s at 65536, same bits again {again}, relative error {error:.2g}"
            bench.note(f"attention {str(dtype)[6:]}", text)


def mutants(bench: Bench) -> None:
    """Wrong conversions at full width, four layers, prompts beyond YaRN's original length."""
    layers = min(4, len(bench.reader("mxfp4").config.sliding))
    source = bench.reader("mxfp4", layers)
    tokens = token_set(source.config, 4097, 0, sample=5000)
    seen = compared(bench, "clean", source, source, tokens, limits="float32")
    cold = seen.layers[1].cold_experts
    for mutant in MUTANTS:
        if mutant.name.startswith(CHOSEN_MUTANTS):
            if mutant.name.startswith("M26"):
                mutant = replace(mutant, layer=zeroed_expert(cold[0] if cold else 0))
            wrong = MutantReader(source, mutant, source)
            compared(bench, mutant.name[:24], source, wrong, tokens, limits="float32")


def workers(bench: Bench) -> None:
    """Conversion speed against the number of workers, six layers of the model."""
    source, target = bench.folder / "six", bench.folder / "six-bf16"
    command("synth", str(source), "--model", bench.model, "--layers", "6")
    for to, dtype in (("hf", "bf16"), ("megatron", "keep")):
        for count in (1, 2, 4, 8, 16):
            words = ("--to", to, "--dtype", dtype, "--workers", str(count), "--overwrite")
            done = command("convert", str(source), str(target), *words)
            bench.note(f"workers {count} {to}", written(done))
    shutil.rmtree(source)
    shutil.rmtree(target)


def oracle(bench: Bench, source: str, target: str) -> None:
    """`verify --level oracle`: the ecosystems' own models load both directories and run them."""
    line = [sys.executable, "-m", "gptoss_convert", "verify", "--level", "oracle"]
    report = (bench.out or bench.folder) / f"oracle-{source}-{target}.json"
    line += [str(bench.place(source)), str(bench.place(target)), "--json", str(report)]
    line += ["--max-length", str(bench.longest)]
    layers = len(bench.reader(source).config.sliding)
    began = time.perf_counter()
    done = subprocess.run(line, capture_output=True, text=True, check=False)
    seconds = time.perf_counter() - began
    said = (done.stdout or done.stderr).strip().splitlines()
    bench.note(f"oracle {source} {target}", f"{layers} layers, {seconds:.0f} s, {done.returncode}")
    print("\n".join(said[-12:]), flush=True)


def agreement(bench: Bench, name: str) -> None:
    """The shared forward pass against the ecosystem's own model, position by position."""
    checkpoint = open_checkpoint(bench.place(name))
    reader = bench.reader(name)
    for length in (130, 1024, bench.longest):
        tokens = list(sequence("text", length, 0, reader.config.vocab).tokens)
        found = oracle_logits(checkpoint, reader.config, [tokens], DEVICE)
        assert not isinstance(found, str), found
        one = distances(reader, tokens, found[0], DEVICE)
        spread, ordered = float(found[0].std()), one.delta.sort().values
        median, p99 = (float(ordered[int(share * (length - 1))]) for share in (0.5, 0.99))
        text = f"{length} tokens, std {spread:.2f}: median {median:.2g}, p99 {p99:.2g}, "
        text += f"max {float(ordered[-1]):.2g}"
        for tie in (1e-5, 3e-5, 1e-4, 3e-4, 1e-3):
            settled = one.margin.cummin(0).values > tie
            largest = float(one.delta[settled].max()) if settled.any() else 0.0
            text += f"; margin>{tie:g}: {int(settled.sum())} max {largest:.2g}"
        bench.note(f"agreement {name} {length}", text)
        del found
        if DEVICE.type == "cuda":
            torch.cuda.empty_cache()


def multiplied(bench: Bench) -> None:
    """Split products at the widths of the 20b: relative error against float64, TFLOP/s."""
    gen = torch.Generator(DEVICE).manual_seed(0)
    tokens, e, d = 8192, 32, 2880
    x = torch.randn(tokens, d, generator=gen, device=DEVICE)
    matrices = [
        (torch.randn(e, d, d, generator=gen, device=DEVICE) * d**-0.5).bfloat16() for _ in range(3)
    ]
    gate, up, down = ((m, torch.randn(e, d, generator=gen, device=DEVICE)) for m in matrices)
    chosen = torch.randn(tokens, e, generator=gen, device=DEVICE).topk(4).indices
    rows, choice = Rows.of_choices(chosen, e)
    shares, held = torch.ones(len(choice), device=DEVICE), choice // 4
    config = bench.reader("mxfp4").config
    inner = products.gated(x, held, rows, gate, up, config)
    whole = matrices[0][0].float()
    truth = x[:500].double() @ whole.double().t()

    def run(name: str, multiplications: int, call: Callable[[], torch.Tensor]) -> torch.Tensor:
        found = call()
        torch.cuda.synchronize()
        began = time.perf_counter()
        for _ in range(5):
            call()
        torch.cuda.synchronize()
        seconds = (time.perf_counter() - began) / 5
        bench.note(f"product {name}", f"{2 * multiplications / seconds / 1e12:.0f} TFLOP/s")
        return found

    one, all_rows = tokens * d * d, len(choice) * d * d
    for name, times, call in (
        ("float32", 1, lambda: x @ whole.t()),
        ("split", 3, lambda: products.linear(x, matrices[0][0], None)),
    ):
        found = run(name, times * one, call)[:500].double()
        bench.note(f"error {name}", f"{float((found - truth).norm() / truth.norm()):.2g}")
    run("gate, up", 6 * all_rows, lambda: products.gated(x, held, rows, gate, up, config))
    run("down", 3 * all_rows, lambda: products.down(inner, rows, *down, shares))


def verified(bench: Bench, label: str, name: str, *more: str) -> None:
    """The whole command with `--report`, as a user runs it: seconds in all, by level, memory."""
    folder = bench.target_folder / "report"
    file = (bench.out or bench.target_folder) / f"{label.replace(' ', '-')}.json"
    words = ["verify", str(bench.place("mxfp4")), str(bench.place(name)), "--json", str(file)]
    line = [sys.executable, "-m", "gptoss_convert", *words, "--report", str(folder), *more]
    began = time.perf_counter()
    done = subprocess.run([*line, "--quiet"], capture_output=True, text=True, check=False)
    seconds = time.perf_counter() - began
    if not file.exists():
        raise RuntimeError(f"status {done.returncode}: {done.stderr[-600:]}")
    levels = {level["name"]: level for level in json.loads(file.read_text())["levels"]}
    logits = levels["logits"]["numbers"]
    once = sum(layer["computed_once"] for layer in logits["layers"])
    bench.note(
        label,
        f"status {done.returncode}  max|d| {logits['overall']['max_delta']:.4g}  "
        f"{logits['overall']['positions']} positions  {once} of {len(logits['layers'])} once  "
        f"{seconds:.1f} s (values {levels['values']['seconds']:.1f}, "
        f"logits {levels['logits']['seconds']:.1f})  "
        f"GPU {logits['gpu_memory_bytes'] / 2**30:.1f} GiB",
    )


def different(bench: Bench, name: str) -> None:
    """The same with one bit of one sink of layer 0 flipped, so that both sides are computed."""
    checkpoint = open_checkpoint(bench.place(name))
    sinks = next(c for c in checkpoint.chunks if "sinks" in c.tensor and ".0." in c.tensor)
    path = checkpoint.root / sinks.file
    with path.open("r+b") as file:
        file.seek(sinks.offset)
        byte = file.read(1)[0]
        for value in (byte ^ 1, byte):
            file.seek(sinks.offset)
            file.write(bytes([value]))
            file.flush()
            if value != byte:
                verified(bench, f"verify {name} different", name)


def clean(bench: Bench) -> None:
    """Every format in both dtypes, both sides computed, five times: how many false alarms.

    Under torchrun all ranks compute; then run `synth` and the conversions without it before.
    """
    ranks = join()
    device = choose_device("auto", ranks)
    alarms, runs, where = 0, 0, []
    with sharing(ranks, device) as new_fetcher:
        for dtype in (torch.float32, torch.bfloat16):
            for name in ("mxfp4", "bf16", "openai", "megatron"):
                for _ in range(5):
                    source, target = (
                        open_reader(open_checkpoint(bench.place(one)), new_fetcher(bench.ahead), 4)
                        for one in ("mxfp4", name)
                    )
                    tokens = token_set(source.config, 4097, 0, sample=5000)
                    limits, numerics = load_limits("lossless"), Numerics.on(device, dtype)
                    found = compare(
                        source, target, tokens, limits, device, numerics,
                        extra_rounds=0, ranks=ranks, both=True,
                    )  # fmt: skip
                    runs += 1
                    if not found.passed:
                        alarms += 1
                        where.append(f"{name} {dtype}: {found.violations[0]}")
    if ranks.rank == 0:
        of = f"{runs} on {ranks.size} ranks" if ranks.size > 1 else str(runs)
        bench.note("clean", f"{alarms} false alarms of {of} {where[:3]}")


def kernels(bench: Bench) -> None:
    found = table(measured(5))
    print(found, flush=True)
    bench.results["kernels"] = found


STEPS: dict[str, Callable[[Bench], None]] = {
    "attention": attention,
    "synth": synth,
    "mutants": mutants,
    "products": multiplied,
    "workers": workers,
    "kernels": kernels,
    "clean": clean,
    **{
        f"verify-{n}": lambda b, n=n: verified(b, f"verify {n}", n)
        for n in ("bf16", "megatron", "openai")
    },
    **{
        f"both-{n}": lambda b, n=n: verified(b, f"verify {n} both", n, "--both")
        for n in ("bf16", "megatron", "openai")
    },
    "different-openai": lambda b: different(b, "openai"),
    **{f"convert-{n}": lambda b, n=n: convert(b, n) for n in ("bf16", "megatron", "openai")},
    **{f"parity-{n}": lambda b, n=n: parity(b, n) for n in ("bf16", "megatron", "openai")},
    **{f"short-{n}": lambda b, n=n: short(b, n) for n in ("bf16", "megatron")},
    **{f"bf16-{n}": lambda b, n=n: bf16(b, n) for n in ("bf16", "megatron")},
    **{f"long-{n}": lambda b, n=n: long(b, n) for n in ("bf16", "megatron", "openai")},
    **{f"longbf16-{n}": lambda b, n=n: long(b, n, torch.bfloat16) for n in ("bf16", "megatron")},
    "oracle-megatron": lambda b: oracle(b, "bf16", "megatron"),
    "oracle-mxfp4": lambda b: oracle(b, "mxfp4", "mxfp4"),
    **{f"agreement-{n}": lambda b, n=n: agreement(b, n) for n in ("mxfp4", "bf16", "megatron")},
    **{f"transformers-{n}": lambda b, n=n: transformers(b, n) for n in ("mxfp4", "bf16")},
    **{
        f"rm-{n}": lambda b, n=n: shutil.rmtree(b.place(n))
        for n in ("mxfp4", "bf16", "megatron", "openai")
    },
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--target-folder", type=Path)
    parser.add_argument("--model", default="20b")
    parser.add_argument("--layers", type=int)
    parser.add_argument("--longest", type=int, default=32768)
    parser.add_argument("--positions", type=int, default=65536)
    parser.add_argument("--ahead", type=int, default=AHEAD)
    parser.add_argument("--gpu-gib", type=float, help="Allow no more GPU memory than this.")
    parser.add_argument("--seconds", type=float, default=1e9)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--steps", nargs="+", choices=STEPS, required=True)
    options = parser.parse_args()
    began = time.perf_counter()
    bench = Bench(options)
    if options.gpu_gib:
        total = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction(options.gpu_gib * 2**30 / total)
    name = torch.cuda.get_device_name() if DEVICE.type == "cuda" else "CPU"
    bench.note("machine", f"{name}, torch {torch.__version__}, {time.strftime('%Y-%m-%d')}")
    for step in options.steps:
        spent = time.perf_counter() - began
        if spent > options.seconds and not step.startswith("rm-"):
            print(f"{step}: not run, {spent:.0f} s are spent", flush=True)
            continue
        try:
            STEPS[step](bench)
        except Exception as error:  # one step that fails must not cost the others their time
            bench.note(step, f"FAILED {type(error).__name__}: {str(error)[:400]}")
        print(f"{'':24} [{step} {time.perf_counter() - began - spent:.1f} s]", flush=True)


if __name__ == "__main__":
    main()
