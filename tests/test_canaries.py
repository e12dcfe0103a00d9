"""Nothing in a checkpoint is ever executed: files that would make a directory, by every command."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from gptoss_convert import __main__ as entry
from gptoss_convert.conversion.options import Options
from gptoss_convert.conversion.plan import plan
from gptoss_convert.conversion.run import run
from gptoss_convert.synth.synth import synth
from tests import test_trainers
from tests.faults.cases import edit_json
from tests.test_torch_dist import save_with_dcp

STARTS = {
    "many": Options("hf", workers=1, max_shard_size=700_000),
    "bf16": Options("hf", "bf16", workers=1),
    "openai": Options("openai", workers=1),
    "megatron": Options("megatron", workers=1),
}


def write_dcp(source: Path, target: Path) -> None:
    """The model as torch.distributed.checkpoint saves it, with an optimizer's state."""
    model = load_file(source / "model.safetensors")
    save_with_dcp(target, {"model": model, "optim": {"step": torch.ones(1)}})
    shutil.copyfile(source / "config.json", target / "config.json")


def write_shards(source: Path, target: Path) -> None:
    """The same as two ranks' safetensors."""
    test_trainers.write_shards(target, load_file(source / "model.safetensors"), 2)
    shutil.copyfile(source / "config.json", target / "config.json")


TRAINERS = {"dcp": write_dcp, "dcp-safetensors": write_shards}
"""Forms that trainers leave; each has its own way of being written here."""
Payload = Callable[[Path], bytes]


class MakeDirectory:
    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self) -> tuple[object, tuple[object, ...]]:
        return os.mkdir, (str(self.canary),)


def pickled(canary: Path) -> bytes:
    return pickle.dumps(MakeDirectory(canary))


def python(canary: Path) -> bytes:
    return f"import os\nos.mkdir({str(canary)!r})\n".encode()


def yaml_tag(canary: Path) -> bytes:
    return f"model:\n  num_layers: !!python/object/apply:os.mkdir ['{canary}']\n".encode()


def yaml_target(canary: Path) -> bytes:
    return f"model:\n  _target_: os.mkdir\n  _args_: ['{canary}']\n".encode()


def shell(canary: Path) -> bytes:
    return f"1; $(mkdir {canary}) `mkdir {canary}`\n".encode()


def template(canary: Path) -> bytes:
    return f"{{{{ cycler.__init__.__globals__.os.mkdir('{canary}') }}}}".encode()


def remote_code(canary: Path) -> bytes:
    """What transformers follows if it is told to trust: a class in a module beside the weights."""
    return json.dumps({"auto_map": {"AutoTokenizer": ["evil.Evil", None]}}).encode()


@pytest.fixture(scope="module")
def starts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("canaries")
    synth(folder / "one", layers=1, workers=1)
    for name, options in STARTS.items():
        run(plan(folder / "one", folder / name, options))
    for name, save in TRAINERS.items():
        save(folder / "bf16", folder / name)
    return folder


@pytest.fixture
def use(
    starts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> Callable[[Path], list[int]]:
    """Run every command on a directory: their exit statuses; none may be a bug's."""

    def run_all(source: Path) -> list[int]:
        target, statuses = tmp_path / "target", []
        for words in (
            ["inspect", source],
            ["check", source, "--read-data", "--workers", "1"],
            ["convert", source, target, "--to", "hf", "--workers", "1"],
            ["verify", starts / "one", source, "--level", "header"],
            ["verify", source, starts / "one", "--level", "values", "--workers", "1"],
        ):
            monkeypatch.setattr(sys, "argv", ["gptoss-convert", *map(str, words)])
            statuses.append(entry._run())
            assert statuses[-1] in {0, 1, 2, 3, 4}, capsys.readouterr().err
            shutil.rmtree(target, ignore_errors=True)
        return statuses

    return run_all


def test_the_payloads_are_live(tmp_path: Path) -> None:
    for payload, execute in (
        (pickled, pickle.loads),
        (python, exec),
        (yaml_tag, yaml.unsafe_load),
        (shell, lambda content: subprocess.run(["sh", "-c", content], capture_output=True)),
    ):
        execute(payload(tmp_path / payload.__name__))
        assert (tmp_path / payload.__name__).is_dir(), payload.__name__


@pytest.mark.parametrize("start", ["one", *STARTS, *TRAINERS])
def test_a_pickle_in_place_of_any_file_is_not_loaded(
    starts: Path, tmp_path: Path, use: Callable[[Path], list[int]], start: str
) -> None:
    source, canary = tmp_path / "source", tmp_path / "canary"
    shutil.copytree(starts / start, source)
    files = [path for path in sorted(source.rglob("*")) if path.is_file()]
    refused = 0
    for path in files:
        before = path.read_bytes()
        path.write_bytes(pickled(canary))
        refused += any(use(source))
        path.write_bytes(before)
        assert not canary.exists(), path
    # The tokenizer's files travel unread; whatever else a command reads is refused.
    assert refused >= 3
    assert use(source)[:4] == [0, 0, 0, 0]


@pytest.mark.parametrize(
    ("start", "file", "payload"),
    [
        ("megatron", "iter_0000001/run_config.yaml", yaml_tag),
        ("megatron", "iter_0000001/run_config.yaml", yaml_target),
        ("megatron", "latest_checkpointed_iteration.txt", shell),
        ("megatron", "hf/tokenizer_config.json", remote_code),
        ("one", "tokenizer_config.json", remote_code),
        ("one", "chat_template.jinja", template),
        ("one", "evil.py", python),
        ("one", "conftest.py", python),
    ],
)
def test_what_would_run_elsewhere_does_not_run_here(
    starts: Path,
    tmp_path: Path,
    use: Callable[[Path], list[int]],
    start: str,
    file: str,
    payload: Payload,
) -> None:
    source, canary = tmp_path / "source", tmp_path / "canary"
    shutil.copytree(starts / start, source)
    (source / file).write_bytes(payload(canary))
    (source / "evil.py").write_bytes(python(canary))
    if start == "one":
        edit_json(
            source / "config.json",
            lambda c: c.update(auto_map={"AutoModelForCausalLM": "evil.Evil"}),
        )
    use(source)
    assert not canary.exists()


def test_a_pickle_in_place_of_the_journal_is_not_loaded(
    starts: Path, tmp_path: Path, use: Callable[[Path], list[int]]
) -> None:
    journal = tmp_path / ".target.gptoss-convert.journal"
    journal.write_bytes(pickled(tmp_path / "canary"))
    assert use(starts / "one") == [0, 0, 0, 0, 0]
    assert not (tmp_path / "canary").exists()


def test_modules_in_the_working_directory_are_not_imported(starts: Path, tmp_path: Path) -> None:
    """Whoever works inside a downloaded directory must not import what lies in it."""
    source, canary = tmp_path / "source", tmp_path / "canary"
    shutil.copytree(starts / "one", source)
    for name in ("torch", "pickle", "numpy", "yaml", "sitecustomize"):
        (source / f"{name}.py").write_bytes(python(canary))
    script = "from gptoss_convert.__main__ import main; main()"
    words = [sys.executable, "-P", "-c", script, "convert", ".", "../target", "--to", "megatron"]
    done = subprocess.run(words, cwd=source, capture_output=True, text=True, check=False)
    assert not canary.exists()
    assert done.returncode == 0, done.stderr
