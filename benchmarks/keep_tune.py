"""Does a fine-tune survive MXFP4? A small GPT-OSS is trained, tuned, and converted in every way.

Run `python -m benchmarks.keep_tune FOLDER`, on one GPU: about two minutes a seed. The base is
trained on Python sources, its experts on MXFP4's grid; it is tuned on C++ headers, lightly and
strongly, all of it or by low-rank updates of attention and experts; each tune is converted back to
MXFP4 by `convert`, whatever rounds. All losses are of held-out text, by `verify`'s forward pass.

*kept* is the experts' gain that is left: (loss with the base's experts - loss after rounding) over
(loss with the base's experts - loss of the tune). `floor` is OCP MX 1.0's rule; `ceil` that of
OpenAI's kernels, ModelOpt and Megatron-Bridge, `even` that of llm-compressor and Quark, both by
their formulas; `GPTQ` is `calibrated` without dither, as llm-compressor rounds, and without a
tuned stream to follow.
"""

from __future__ import annotations

import argparse
import json
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from benchmarks import small_model
from benchmarks.small_model import Parameters, Tuning, is_expert
from gptoss_convert import Options, convert
from gptoss_convert.machine.ranks import ALONE
from gptoss_convert.quantise import calibrated, passages
from gptoss_convert.witness import forward
from gptoss_convert.witness.forward import Numerics
from gptoss_convert.witness.hf import HfReader
from gptoss_convert.witness.model import ModelConfig
from gptoss_convert.witness.node import choose_device
from gptoss_convert.witness.walk import Prompts, walk

DEVICE = choose_device("auto", ALONE)
ROUTES: dict[str, dict[str, Any]] = {
    "floor": {"lossy": "nearest", "scale_rule": "floor"},
    "ceil": {"lossy": "nearest", "scale_rule": "ceil"},
    "even": {"lossy": "nearest", "scale_rule": "even"},
    "best": {"lossy": "nearest", "scale_rule": "best"},
    "stochastic": {"lossy": "stochastic"},
    "GPTQ": {"lossy": "calibrated"},
    "calibrated": {"lossy": "calibrated"},
}
TUNES = {
    "light": Tuning(2e-5, 100),
    "strong": Tuning(1e-4, 200),
    "light low-rank": Tuning(1e-4, 100, rank=8),
    "strong low-rank": Tuning(4e-4, 200, rank=8),
}


@dataclass(frozen=True)
class Seed:
    """One base, the texts, and where its directories lie."""

    folder: Path
    config: ModelConfig
    base: Parameters
    calibration: Path
    held_out: tuple[Tensor, Tensor]
    """Python and C++, [sequences, length + 1]."""


def main() -> None:
    """Train, tune, convert, and print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("folder", type=Path, help="made, and removed at the end")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=45, help="of training, for each base")
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--experts", type=int, default=16)
    parser.add_argument("--tunes", default=",".join(TUNES))
    parser.add_argument("--routes", default=",".join(ROUTES))
    parser.add_argument(
        "--shrink", type=int, default=1, help="divides steps and texts: a rehearsal"
    )
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_float32_matmul_precision("high")
    rows: list[dict[str, Any]] = []
    for number in range(options.seeds):
        rows += _seed(number, options)
        if options.json:
            options.json.write_text(json.dumps(rows, indent=1))
    _print(rows)


def _seed(number: int, options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    began = time.monotonic()
    seed = _base(number, options)
    for name in options.tunes.split(","):
        how = TUNES[name]
        how = Tuning(how.rate, max(2, how.steps // options.shrink), rank=how.rank)
        tuned = _saved(
            small_model.train(seed.base, _training(options)[1], seed.config, how, number)
        )
        yield from _tune(seed, number, name, tuned, options.routes.split(","))
    shutil.rmtree(seed.folder)
    print(f"seed {number}: {time.monotonic() - began:.0f} s", flush=True)


def _training(options: argparse.Namespace) -> tuple[Tensor, Tensor]:
    """What is trained on: the first 95 % of either text."""
    python, headers = small_model.texts(DEVICE)
    return python[: len(python) * 95 // 100], headers[: len(headers) * 95 // 100]


def _base(number: int, options: argparse.Namespace) -> Seed:
    config = small_model.small_config(options.layers, options.width, options.experts)
    python, headers = small_model.texts(DEVICE)
    training = _training(options)
    steps = 1_000_000 if options.shrink == 1 else 2
    seconds = options.seconds
    plain = Tuning(2e-3, steps, 0.75 * seconds)
    on_grid = Tuning(5e-4, steps, 0.25 * seconds, quantised=True)
    p = small_model.fresh(config, DEVICE, number)
    p = small_model.train(p, training[0], config, plain, number)
    p = _saved(small_model.train(p, training[0], config, on_grid, number + 100))
    base = {k: small_model.on_grid(v) if is_expert(k) else v for k, v in p.items()}
    folder = options.folder / str(number)
    folder.mkdir(parents=True)
    count = max(2, 64 // options.shrink)
    held_out = (
        _drawn(python[len(training[0]) :], count, 7),
        _drawn(headers[len(training[1]) :], count, 7),
    )
    calibration = folder / "calibration.jsonl"
    passages_ = _drawn(training[1], max(8, 128 // options.shrink), 3)[:, :-1].tolist()
    calibration.write_text("".join(f"{json.dumps(one)}\n" for one in passages_))
    seed = Seed(folder, config, base, calibration, held_out)
    small_model.write_directory(folder / "before", p, config, mxfp4=False)
    small_model.write_directory(folder / "base", base, config, mxfp4=True)
    before, after = (_held(seed, folder / name) for name in ("before", "base"))
    print(
        f"seed {number}: {sum(v.numel() for v in p.values()) / 1e6:.0f} M parameters, held-out "
        f"Python {after.python:.4f} nats a byte, C++ {after.headers:.4f}; rounding the base's "
        f"experts cost {after.python - before.python:+.4f}",
        flush=True,
    )
    return seed


def _saved(p: Mapping[str, Tensor]) -> Parameters:
    """The parameters as BF16 holds them."""
    return {k: v.to(torch.bfloat16).float() for k, v in p.items()}


def _drawn(text: Tensor, count: int, seed: int) -> Tensor:
    return small_model.draw(text, count, torch.Generator(device=text.device).manual_seed(seed))


def _tune(
    seed: Seed, number: int, name: str, tuned: Parameters, routes: Sequence[str]
) -> Iterator[dict[str, Any]]:
    """Convert one tune in every way, and measure each."""
    experts = [k for k in tuned if is_expert(k)]
    update = _norm([tuned[k] - seed.base[k] for k in experts]) / _norm(
        [seed.base[k] for k in experts]
    )
    place = seed.folder / "tuned"
    small_model.write_directory(place, tuned, seed.config, mxfp4=False)
    dropped = {**tuned, **{k: seed.base[k] for k in experts}}
    small_model.write_directory(seed.folder / "dropped", dropped, seed.config, mxfp4=True)
    ours, without = _held(seed, place), _held(seed, seed.folder / "dropped")
    lost = _divergence(ours, without)
    print(
        f"  {name}: update {update:.4f} of the experts' weights; C++ {ours.headers:.4f}, with the "
        f"base's experts {without.headers:.4f}, KL {lost:.5f}; Python {ours.python:.4f}",
        flush=True,
    )
    for route in routes:
        began = time.monotonic()
        out = _converted(seed, place, route)
        seconds = time.monotonic() - began
        found = _held(seed, out)
        row = {
            "seed": number,
            "tune": name,
            "update": update,
            "route": route,
            "kept": (without.headers - found.headers) / (without.headers - ours.headers),
            "kl": _divergence(ours, found),
            "kl_dropped": lost,
            "python": found.python - ours.python,
            "seconds": seconds,
        }
        shutil.rmtree(out)
        print(
            f"    {route:<11} kept {row['kept']:6.3f}  KL {row['kl']:.5f}  Python "
            f"{row['python']:+.4f}  {seconds:.1f} s",
            flush=True,
        )
        yield row
    shutil.rmtree(place)
    shutil.rmtree(seed.folder / "dropped")


def _converted(seed: Seed, source: Path, route: str) -> Path:
    out = seed.folder / "out"
    more: dict[str, Any] = {}
    if ROUTES[route]["lossy"] == "calibrated":
        more = {"calibrate": str(seed.calibration), "base": seed.folder / "base"}
    with _as_others_do(route == "GPTQ"):
        convert(
            source,
            out,
            Options(to="hf", dtype="mxfp4", scales=seed.folder / "base", **ROUTES[route], **more),
        )
    return out


@contextmanager
def _as_others_do(asked: bool) -> Iterator[None]:
    """Round to nearest, and follow no tuned stream: the outputs wanted are the inputs' own."""
    if not asked:
        yield
        return
    kept = calibrated.FADE, passages.Passage.met

    def met(self: passages.Passage, expert: int) -> passages.Met | None:
        found = kept[1](self, expert)
        if found is None:
            return None
        return passages.Met(
            found.rounded,
            found.rounded,
            torch.zeros_like(found.missing),
            torch.ones_like(found.weight),
        )

    calibrated.FADE, passages.Passage.met = 1e30, met
    try:
        yield
    finally:
        calibrated.FADE, passages.Passage.met = kept


def _norm(tensors: Sequence[Tensor]) -> float:
    return float(torch.stack([one.square().sum() for one in tensors]).sum().sqrt())


@dataclass(frozen=True)
class Held:
    """log p of the next byte on held-out text, [B, S, V], and nats a byte."""

    python: float
    headers: float
    shares: Tensor
    """On C++."""


def _held(seed: Seed, folder: Path) -> Held:
    python, headers = (_log_shares(folder, text) for text in seed.held_out)
    return Held(_nll(python, seed.held_out[0]), _nll(headers, seed.held_out[1]), headers)


def _nll(shares_BSV: Tensor, text: Tensor) -> float:
    return float(functional.nll_loss(shares_BSV.flatten(0, 1).double(), text[:, 1:].flatten()))


def _divergence(ours: Held, theirs: Held) -> float:
    """Mean KL in nats between two models on held-out C++."""
    p, q = ours.shares.double(), theirs.shares.double()
    return float((p.exp() * (p - q)).sum(-1).mean())


def _log_shares(folder: Path, text: Tensor) -> Tensor:
    """log p of the next byte, [B, S, V]."""
    reader = HfReader(folder, DEVICE)
    prompts = Prompts.of(text[:, :-1].tolist(), DEVICE)
    with forward.exact_products():
        *_, last = walk(reader, [prompts], Numerics.on(DEVICE))
        matrix = forward.dense(reader.unembedding(), torch.float32)
        found = forward.logits(last.values[0], reader.norm(), matrix, reader.config)
        return found.log_softmax(-1).view(*text[:, 1:].shape, -1)


def _print(rows: Sequence[Mapping[str, Any]]) -> None:
    """kept, and KL as a share of what dropping the update costs: the mean and the worst seed."""
    tunes = list(dict.fromkeys(row["tune"] for row in rows))
    print("\n" + "kept (lowest seed); KL of KL(dropped)".ljust(14))
    print(f"{'':<12}" + "".join(f"{tune:>28}" for tune in tunes))
    for route in dict.fromkeys(row["route"] for row in rows):
        line = f"{route:<12}"
        for tune in tunes:
            these = [row for row in rows if row["route"] == route and row["tune"] == tune]
            kept = [row["kept"] for row in these]
            share = [row["kl"] / row["kl_dropped"] for row in these]
            line += (
                f"{sum(kept) / len(kept):>12.3f} ({min(kept):.3f}) {sum(share) / len(share):>6.1%}"
            )
        print(line)


if __name__ == "__main__":
    main()
