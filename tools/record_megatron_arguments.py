"""Record how Megatron-LM's own parser and checks take the arguments that this project prints.

    git clone https://github.com/NVIDIA/Megatron-LM
    git -C Megatron-LM worktree add ../core_v0.19.0 core_v0.19.0      # and so for each version
    python tools/record_megatron_arguments.py core_v0.16.1 core_v0.19.0 main

Each argument is a checkout, named for its version. For each, a process of its own imports
`megatron.training`, lists the options of its parser, and takes the cases of
tests/megatron_arguments.py as `initialize_megatron` does: parse_args, load_args_from_checkpoint of
a directory that holds our common.pt, validate_args. Writes tests/recorded/
megatron-arguments.json.xz. Needs this project's development environment, six and triton; no GPU:
validate_args is told of a Hopper one. Nothing else is replaced.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import json
import lzma
import os
import subprocess
import sys
import tempfile
import typing
from argparse import Action, ArgumentParser, Namespace
from enum import Enum
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
from tests.megatron_arguments import RANKS, RECORD, Case, cases  # noqa: E402

_KINDS = {
    "_StoreTrueAction": "store_true",
    "_StoreFalseAction": "store_false",
    "_StoreAction": "store",
}


def main(checkouts: list[str]) -> None:
    """Record every checkout in a process of its own."""
    versions: dict[str, Any] = {}
    for checkout in map(Path, checkouts):
        done = subprocess.run(
            [sys.executable, "-W", "ignore", __file__, "--one", str(checkout)],
            env={**os.environ, "RANK": "0", "WORLD_SIZE": str(RANKS)},
            stdout=subprocess.PIPE,
            check=True,
        )
        versions[checkout.name] = json.loads(done.stdout.splitlines()[-1])
    content = {
        "cases": {name: case.plain() for name, case in cases().items()},
        "versions": versions,
    }
    RECORD.write_bytes(lzma.compress(json.dumps(content).encode(), preset=9))


def one(checkout: Path) -> dict[str, Any]:
    """One version: its commit, its options, and what became of the cases."""
    if not hasattr(typing, "override"):
        # Megatron-LM asks for Python 3.12 from 0.18 on, for this alone.
        typing.override = lambda function: function  # pyright: ignore
    sys.path.insert(0, str(checkout))
    import torch

    arguments = importlib.import_module("megatron.training.arguments")
    post_training = importlib.import_module("megatron.post_training.arguments")
    torch.cuda.get_device_capability = lambda *_: (9, 0)
    own = arguments.add_megatron_arguments(ArgumentParser(allow_abbrev=False))
    modelopt = post_training.add_modelopt_args(ArgumentParser(allow_abbrev=False))
    return {
        "commit": _commit(checkout),
        "options": [found for action in own._actions for found in _options(action)],
        "modelopt": sorted(name for a in modelopt._actions for name in a.option_strings),
        "outcomes": {name: _outcome(case) for name, case in cases().items()},
    }


def _commit(checkout: Path) -> str:
    words = ["git", "-C", str(checkout), "rev-parse", "HEAD"]
    return subprocess.run(words, stdout=subprocess.PIPE, text=True, check=True).stdout.strip()


def _options(action: Action) -> list[dict[str, Any]]:
    kind = type(action).__name__
    if kind == "_HelpAction":
        return []
    found = {"names": action.option_strings, "dest": action.dest}
    if kind == "BooleanOptionalAction":
        negative = [name for name in action.option_strings if name.startswith("--no-")]
        positive = [name for name in action.option_strings if name not in negative]
        sides = ((positive, "store_true"), (negative, "store_false"))
        return [{**found, "names": names, "kind": side} for names, side in sides]
    if _KINDS[kind] != "store":
        return [{**found, "kind": _KINDS[kind]}]
    choices = None if action.choices is None else [_plain(choice) for choice in action.choices]
    return [
        {
            **found,
            "kind": "store",
            "type": getattr(action.type, "__name__", None),
            "nargs": action.nargs,
            "choices": choices,
        }
    ]


def _outcome(case: Case) -> dict[str, Any]:
    """The arguments that Megatron-LM goes on with, or how it refuses."""
    import torch

    arguments = importlib.import_module("megatron.training.arguments")
    checkpointing = importlib.import_module("megatron.training.checkpointing")
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        iteration = root / "iter_0000001"
        iteration.mkdir()
        state = {"args": Namespace(**case.args), "checkpoint_version": 3.0, "iteration": 1}
        torch.save(state, iteration / "common.pt")
        backend = {"sharded_backend": "torch_dist", "sharded_backend_version": 1}
        backend |= {"common_backend": "torch", "common_backend_version": 1}
        (iteration / "metadata.json").write_text(json.dumps(backend))
        (root / "latest_checkpointed_iteration.txt").write_text("1")
        sys.argv = ["pretrain_gpt.py"]
        sys.argv += [word.replace("$CHECKPOINT", folder) for word in case.words]
        said = io.StringIO()
        try:
            with contextlib.redirect_stderr(said):
                args = arguments.parse_args()
            checkpointing.load_args_from_checkpoint(args)
            arguments.validate_args(args)
        except SystemExit:
            return {"refused": said.getvalue().strip().splitlines()[-1]}
        except Exception as error:
            return {"refused": f"{type(error).__name__}: {error}"}
    fields = json.dumps({name: _plain(value) for name, value in vars(args).items()})
    return {"fields": json.loads(fields.replace(folder, "$CHECKPOINT"))}


def _plain(value: Any) -> Any:
    """The value as JSON has it; an object of a class by the name of the class and its value."""
    if isinstance(value, Enum):
        return {"class": type(value).__qualname__, "name": value.name}
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return {"class": type(value).__qualname__}


if __name__ == "__main__":
    if sys.argv[1] == "--one":
        print(json.dumps(one(Path(sys.argv[2]).resolve())))
    else:
        main(sys.argv[1:])
