"""Adapters that are damaged, of another model, or made to harm: a status and one line."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import struct
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from torch import Tensor

from gptoss_convert import __main__ as entry
from tests.adapter_files import records, write_base, write_recorded

WEIGHTS, CONFIG, PICKLE = "adapter_model.safetensors", "adapter_config.json", "adapter_model.bin"
PREFIX = "base_model.model.model.layers"
Edit = Callable[[Path], object]
Tensors = dict[str, Tensor]


def told(**changes: Any) -> Edit:
    """adapter_config.json with other values; None takes a key away."""

    def edit(adapter: Path) -> None:
        content = json.loads((adapter / CONFIG).read_text()) | changes
        kept = {key: value for key, value in content.items() if value is not None}
        (adapter / CONFIG).write_text(json.dumps(kept))

    return edit


def text(content: str | bytes, name: str = CONFIG) -> Edit:
    """A file of the adapter with this content."""
    return lambda adapter: (adapter / name).write_bytes(
        content if isinstance(content, bytes) else content.encode()
    )


def tensors(change: Callable[[Tensors], Tensors]) -> Edit:
    """The weights with other tensors."""

    def edit(adapter: Path) -> None:
        made = change(load_file(adapter / WEIGHTS))
        save_file({k: v.contiguous() for k, v in made.items()}, adapter / WEIGHTS, {"format": "pt"})

    return edit


def each(change: Callable[[str, Tensor], Tensor | None]) -> Edit:
    """Every tensor as it is changed, or without those that become None."""
    return tensors(lambda held: {k: v for k, t in held.items() if (v := change(k, t)) is not None})


def renamed(old: str, new: str) -> Edit:
    return tensors(lambda held: {name.replace(old, new): t for name, t in held.items()})


def query(change: Callable[[Tensor, bool], Tensor]) -> Edit:
    """The halves of q_proj changed, told which of them is lora_A."""
    return each(lambda name, t: change(t, ".lora_A." in name) if "q_proj" in name else t)


def ranked(rank: int) -> Edit:
    """q_proj of another rank, as the configuration says, too."""

    def edit(adapter: Path) -> None:
        query(lambda t, a: torch.zeros((rank, t.shape[1]) if a else (len(t), rank)))(adapter)
        told(rank_pattern={"q_proj": rank})(adapter)

    return edit


def one_value(part: str, value: float) -> Edit:
    def change(name: str, tensor: Tensor) -> Tensor:
        if part in name:
            tensor.view(-1)[3] = value
        return tensor

    return each(change)


def header(count: int, name: str = "x{}") -> Edit:
    """A file of so many tensors of one element, as short as they can be said."""

    def edit(adapter: Path) -> None:
        entries = (
            f'"{name.format(i)}":{{"dtype":"F32","shape":[1],"data_offsets":[{4 * i},{4 * i + 4}]}}'
            for i in range(count)
        )
        content = f"{{{','.join(entries)}}}".encode()
        with (adapter / WEIGHTS).open("wb") as file:
            file.write(struct.pack("<Q", len(content)) + content)
            file.truncate(8 + len(content) + 4 * count)

    return edit


class Harm:
    """Whoever unpickles this makes a folder."""

    def __init__(self, place: Path) -> None:
        self.place = place

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.place),)


def pickled(*names: str) -> Edit:
    """A pickle under the last name, the files of the other names gone."""

    def edit(adapter: Path) -> None:
        for name in names:
            (adapter / name).unlink(missing_ok=True)
        (adapter / names[-1]).write_bytes(pickle.dumps(Harm(adapter.parent / "harmed")))

    return edit


def linked(name: str) -> Edit:
    def edit(adapter: Path) -> None:
        shutil.move(adapter / name, adapter.parent / "elsewhere")
        (adapter / name).symlink_to(adapter.parent / "elsewhere")

    return edit


def instead(name: str, make: Callable[[Path], object]) -> Edit:
    """Something else under a file's name."""

    def edit(adapter: Path) -> None:
        (adapter / name).unlink()
        make(adapter / name)

    return edit


def cut(size: int) -> Edit:
    """The weights without their end."""
    return lambda a: os.truncate(a / WEIGHTS, size if size >= 0 else len_of(a) + size)


def len_of(adapter: Path) -> int:
    return (adapter / WEIGHTS).stat().st_size


def zipped(path: Path) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", b"")


USAGE, INPUT, DAMAGED = 2, 3, 4
CASES: dict[str, tuple[Edit, int, str]] = {
    "cut in the header's length": (cut(5), DAMAGED, "no safetensors header in 5 bytes"),
    "cut in the header": (cut(100), DAMAGED, "no safetensors header in 100 bytes"),
    "cut in the data": (cut(-1), DAMAGED, "truncated: the header describes"),
    "empty": (cut(0), DAMAGED, "empty file"),
    "more than it says": (lambda a: os.truncate(a / WEIGHTS, len_of(a) + 8), DAMAGED, "trailing"),
    "a header without end": (text(struct.pack("<Q", 1 << 60) + b"{}", WEIGHTS), DAMAGED, "header"),
    "not fetched": (
        text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n", WEIGHTS),
        DAMAGED,
        "a Git LFS pointer",
    ),
    "a page": (text("<html>", WEIGHTS), DAMAGED, "HTML page"),
    "an archive": (instead(WEIGHTS, zipped), DAMAGED, "archive, not safetensors"),
    "NaN": (one_value("q_proj.lora_B", float("nan")), DAMAGED, "q_proj.lora_B.weight: holds NaN"),
    "an infinity": (one_value("experts.lora_A", float("inf")), DAMAGED, "NaN or infinities"),
    "sums beyond BF16": (
        each(lambda name, t: t.float() * 1e30 if "q_proj" in name else t),
        DAMAGED,
        "inf at",
    ),
    "rank 0": (told(r=0), INPUT, "r is 0, expects a rank"),
    "a negative rank": (told(r=-4), INPUT, "r is -4"),
    "a rank in words": (told(r="4"), INPUT, "r is '4'"),
    "no rank": (told(r=None), INPUT, "r is None"),
    "a huge rank": (told(r=10**9), INPUT, "r is 1000000000"),
    "another rank": (told(r=8), INPUT, "says rank 8 for model.layers.0."),
    "halves of rank 0": (query(lambda t, a: t[:0] if a else t[:, :0]), INPUT, "empty tensor"),
    "a rank above all sides": (ranked(133), INPUT, "rank 133 for a matrix of attention.q.weight"),
    "no alpha": (told(lora_alpha=None), INPUT, "lora_alpha is None"),
    "alpha 0": (told(lora_alpha=0), INPUT, "lora_alpha is 0"),
    "alpha in words": (told(lora_alpha="8"), INPUT, "lora_alpha is '8'"),
    "alpha is NaN": (text('{"r": 4, "lora_alpha": NaN}'), DAMAGED, "NaN is not a JSON number"),
    "alpha is infinite": (text('{"r": 4, "lora_alpha": 1e999}'), DAMAGED, "1e999 is no finite"),
    "a configuration of nothing": (text(""), DAMAGED, "empty file"),
    "a list": (text("[]"), DAMAGED, "expects a JSON object"),
    "cut configuration": (text('{"r": 4,'), DAMAGED, "not JSON"),
    "a key twice": (text('{"r": 4, "r": 8}'), DAMAGED, "'r' appears twice"),
    "endless nesting": (text('{"a":' * 100_000), DAMAGED, "nested too deep"),
    "a number without end": (text('{"r": ' + "9" * 5000 + "}"), DAMAGED, "not JSON"),
    "no text": (text(b"\xff\xfe\x00"), DAMAGED, "not UTF-8"),
    "a long configuration": (text('{"a": "' + "a" * (1 << 22) + '"}'), DAMAGED, "at most 4194304"),
    "another method": (told(peft_type="LOHA"), INPUT, "peft_type 'LOHA'"),
    "another method, listed": (told(peft_type=["LORA"]), INPUT, "peft_type ['LORA']"),
    "an unknown key": (told(use_magic=True), INPUT, "'use_magic' is True"),
    "PiSSA": (told(init_lora_weights="pissa_niter_16"), INPUT, "training changed the base"),
    "OLoRA": (told(init_lora_weights="olora"), INPUT, "training changed the base"),
    "CorDA": (told(init_lora_weights="corda"), INPUT, "training changed the base"),
    "LoftQ": (told(init_lora_weights="loftq"), INPUT, "training changed the base"),
    "LoRA-GA": (told(init_lora_weights="lora_ga"), INPUT, "training changed the base"),
    "an unknown start": (told(init_lora_weights="magic"), INPUT, "init_lora_weights is 'magic'"),
    "a start of another type": (told(init_lora_weights=["pissa"]), INPUT, "expects a word"),
    "aLoRA": (told(alora_invocation_tokens=[3]), INPUT, "alora_invocation_tokens"),
    "Arrow": (told(arrow_config={"top_k": 2}), INPUT, "arrow_config"),
    "QALoRA": (told(use_qalora=True), INPUT, "use_qalora"),
    "BD-LoRA": (told(use_bdlora={"nblocks": 2}), INPUT, "use_bdlora"),
    "KaSA": (told(kasa_config={"beta": 1}), INPUT, "kasa_config"),
    "MonteCLoRA": (told(monteclora_config={"n": 1}), INPUT, "monteclora_config"),
    "repeated layers": (told(layer_replication=[[0, 2], [0, 2]]), INPUT, "layer_replication"),
    "DoRA without lengths": (told(use_dora=True), INPUT, "use_dora is true"),
    "DoRA of an embedding": (
        tensors(lambda t: t | {f"{PREFIX[:-7]}.embed_tokens.lora_magnitude_vector": torch.ones(3)}),
        INPUT,
        "DoRA of the embedding",
    ),
    "biases announced": (told(lora_bias=True), INPUT, "lora_bias is true"),
    "a flag in words": (told(use_rslora="yes"), INPUT, "use_rslora is 'yes'"),
    "biases in other words": (told(bias=["all"]), INPUT, "bias is ['all']"),
    "a module announced": (told(modules_to_save=["lm_head"]), DAMAGED, "modules_to_save names lm_"),
    "tokens announced": (
        told(trainable_token_indices=[3]),
        INPUT,
        "trainable_token_indices is tru",
    ),
    "negative tokens": (told(trainable_token_indices=[-1]), INPUT, "different row numbers"),
    "parameters in words": (told(target_parameters="all"), INPUT, "expects a list of names"),
    "patterns that disagree": (
        told(alpha_pattern={"q_proj": 4, "layers.0.self_attn.q_proj": 9}),
        INPUT,
        "keep one",
    ),
    "no patterns": (told(rank_pattern=[1]), INPUT, "expects an object"),
    "a pattern without end": (told(alpha_pattern={"(a+)+$": 3}), INPUT, "no pattern that is read"),
    "a slow pattern": (told(alpha_pattern={"(a|a)" * 40: 3}), INPUT, "could take too long"),
    "many slow patterns": (
        told(alpha_pattern={f"x.*.*{i}": 3 for i in range(100)}),
        INPUT,
        "could take too long",
    ),
    "a broken pattern": (told(alpha_pattern={"(": 3}), INPUT, "no pattern that is read"),
    "too many patterns": (told(rank_pattern={f"q{i}": 3 for i in range(20_000)}), INPUT, "at most"),
    "a pattern of rank 0": (told(rank_pattern={"q_proj": 0}), INPUT, "expects a rank"),
    "no configuration": (lambda a: (a / CONFIG).unlink(), DAMAGED, f"without {CONFIG}"),
    "no weights": (lambda a: (a / WEIGHTS).unlink(), DAMAGED, f"without {WEIGHTS}"),
    "a half missing": (
        each(lambda name, t: None if "0.self_attn.q_proj.lora_B" in name else t),
        DAMAGED,
        f"its other half, {PREFIX}.0.self_attn.q_proj.lora_B.weight, is missing",
    ),
    "an experts' half missing": (
        each(lambda name, t: None if "1.mlp.experts.lora_A" in name else t),
        DAMAGED,
        f"its other half, {PREFIX}.1.mlp.experts.lora_A.weight, is missing",
    ),
    "halves that differ": (
        query(lambda t, a: t[:3] if a else t),
        DAMAGED,
        "shape [3, 64] beside the other half's [132, 4] does not fit 'rank hidden'",
    ),
    "another width": (query(lambda t, a: t[:, :32] if a else t), DAMAGED, "does not fit"),
    "another number of axes": (query(lambda t, a: t[None]), DAMAGED, "does not fit"),
    "no axis": (query(lambda t, a: t[0, 0] if a else t), DAMAGED, "does not fit"),
    "another model's names": (renamed("self_attn.q_proj", "mlp.gate_proj"), DAMAGED, "has this na"),
    "another model's depth": (
        renamed("layers.1.", "layers.7."),
        DAMAGED,
        "layer 7, the base has 2",
    ),
    "a layer's number padded": (renamed("layers.1.", "layers.01."), DAMAGED, "has this name"),
    "a layer beyond all": (renamed("layers.1.", f"layers.{'9' * 40}."), DAMAGED, "has this name"),
    "a layer below all": (renamed("layers.1.", "layers.-1."), DAMAGED, "has this name"),
    "a training state's names": (renamed(".weight", ".default.weight"), DAMAGED, "has this name"),
    "everything twice": (
        tensors(
            lambda t: t | {n.removeprefix("base_model.model."): v.clone() for n, v in t.items()}
        ),
        DAMAGED,
        "stored twice",
    ),
    "a tensor more": (tensors(lambda t: t | {"more": torch.zeros(3)}), DAMAGED, "more: no tensor"),
    "integers": (query(lambda t, a: t.int()), INPUT, "dtype 'I32'"),
    "float64": (query(lambda t, a: t.double()), INPUT, "dtype 'F64'"),
    "a path in a name": (renamed("q_proj.lora_A", "../q_proj.lora_A"), INPUT, "not acceptable"),
    "a million tensors": (header(1_000_000), INPUT, "1000000 tensors, at most 60000"),
    "many names of no model": (header(2_000, f"{PREFIX}.0.q{{}}.lora_A"), DAMAGED, "1999 more"),
    "a pickle": (pickled(WEIGHTS, PICKLE), INPUT, "pickled weights are never loaded"),
    "a pickle alone": (pickled(WEIGHTS, CONFIG, PICKLE), INPUT, "pickled weights are never"),
    "a pickle by another name": (pickled(WEIGHTS), DAMAGED, "no safetensors header"),
    "linked weights": (linked(WEIGHTS), INPUT, "outside the checkpoint"),
    "a linked configuration": (linked(CONFIG), INPUT, "outside the checkpoint"),
    "a link to nothing": (instead(WEIGHTS, lambda p: p.symlink_to("no")), DAMAGED, "dangling"),
    "a link to itself": (instead(WEIGHTS, lambda p: p.symlink_to(p.name)), DAMAGED, "dangling"),
    "an unfinished download": (
        instead(WEIGHTS, lambda p: p.with_suffix(".incomplete").touch()),
        DAMAGED,
        "an unfinished download",
    ),
    "a directory for weights": (instead(WEIGHTS, Path.mkdir), INPUT, "not a regular file"),
    "a directory for words": (instead(CONFIG, Path.mkdir), INPUT, "not a regular file"),
    "a pipe": (instead(WEIGHTS, os.mkfifo), INPUT, "not a regular file"),
    "nothing": (lambda a: shutil.rmtree(a), USAGE, "no such directory"),
}
"""By name: what is done to a good adapter, the status, and words of the one line."""


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base, and adapters of PEFT and of Megatron-Bridge for it."""
    root = tmp_path_factory.mktemp("hostile")
    write_base(root / "base", "distinct")
    write_recorded(root / "peft", records("peft-0.21.2-transformers-5.24.0.json")["bf16"])
    write_recorded(root / "bridge", records("bridge-main.json")["shared"])
    return root


@pytest.fixture
def refused(
    places: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> Callable[..., None]:
    """Converts with an adapter, and inspects it, which end with a status and one line."""

    def run(*words: object) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["gptoss-convert", *map(str, words)])
        status = entry._run()
        return status, capsys.readouterr().err

    def check(adapter: Path, status: int, says: str, inspected: bool) -> None:
        before = sorted(tmp_path.iterdir())
        words = ["--to", "hf", "--workers", "1", "-q", "--adapter", adapter]
        runs = [run("convert", places / "base", tmp_path / "out", *words)]
        if inspected:
            runs.append(run("inspect", adapter, "--base", places / "base"))
        for found, complaint in runs:
            assert (found, complaint.count("\n")) == (status, 1), complaint
            assert complaint.startswith("error: ") and says in complaint
            assert complaint.isprintable() or complaint[:-1].isprintable()
        assert sorted(tmp_path.iterdir()) == before, "something was left behind"
        assert not (tmp_path / "harmed").exists()

    return check


@pytest.mark.parametrize("name", CASES)
def test_a_bad_adapter_ends_in_one_line(
    name: str, places: Path, tmp_path: Path, refused: Callable[..., None]
):
    edit, status, says = CASES[name]
    adapter = tmp_path / "adapter"
    shutil.copytree(places / "peft", adapter)
    edit(adapter)
    # Values are read by those who merge them alone.
    refused(adapter, status, says, name not in {"NaN", "an infinity", "sums beyond BF16"})


def run_config(**changes: Any) -> Edit:
    """run_config.yaml with other values in its section on PEFT."""

    def edit(place: Path) -> None:
        path = place / "iter_0000000" / "run_config.yaml"
        content = yaml.safe_load(path.read_text())
        content["peft"] |= changes
        path.write_text(yaml.safe_dump(content))

    return edit


def aliases(levels: int) -> str:
    """YAML of lists that each hold the one before nine times."""
    lists = (f"a{n + 1}: &a{n + 1} [{', '.join([f'*a{n}'] * 9)}]" for n in range(levels))
    return "\n".join(["a0: &a0 [1]", *lists])


BRIDGE: dict[str, tuple[Edit, int, str]] = {
    "DoRA": (run_config(_target_="megatron.bridge.peft.dora.DoRA"), INPUT, "only LoRA and"),
    "no kind": (run_config(_target_=None), INPUT, "_target_ is None"),
    "an unknown key": (run_config(use_magic=True), INPUT, "'use_magic' is True"),
    "no alpha": (run_config(alpha=None), INPUT, "alpha is None"),
    "alpha is NaN": (run_config(alpha=float("nan")), INPUT, "alpha is nan"),
    "no run_config.yaml": (
        lambda place: (place / "iter_0000000" / "run_config.yaml").unlink(),
        DAMAGED,
        "no run_config.yaml",
    ),
    "a call in it": (
        text("!!python/object/apply:os.mkdir [harmed]", "iter_0000000/run_config.yaml"),
        INPUT,
        "not executed",
    ),
    "aliases without end": (
        text(aliases(12), "iter_0000000/run_config.yaml"),
        INPUT,
        "too many values",
    ),
    "cut metadata": (
        lambda place: os.truncate(place / "iter_0000000" / ".metadata", 200),
        DAMAGED,
        ".metadata",
    ),
    "a pickle that acts": (
        lambda place: (place / "iter_0000000" / ".metadata").write_bytes(
            pickle.dumps((".adapter.", Harm(place.parent / "harmed")))
        ),
        INPUT,
        ".metadata",
    ),
}


@pytest.mark.parametrize("name", BRIDGE)
def test_a_bad_checkpoint_of_megatron_bridge_ends_in_one_line(
    name: str, places: Path, tmp_path: Path, refused: Callable[..., None]
):
    edit, status, says = BRIDGE[name]
    adapter = tmp_path / "adapter"
    shutil.copytree(places / "bridge", adapter)
    edit(adapter)
    refused(adapter, status, says, True)


def test_control_characters_of_an_adapter_reach_no_terminal(
    places: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):
    adapter = tmp_path / "adapter"
    shutil.copytree(places / "peft", adapter)
    told(base_model_name_or_path="\x1b[2Jmine\nerror: none", peft_version="\x1b[31m9")(adapter)
    monkeypatch.setattr(sys, "argv", ["gptoss-convert", "inspect", str(adapter)])
    assert entry._run() == 0
    shown = capsys.readouterr()
    assert "\x1b" not in shown.out + shown.err and "\nerror: none" not in shown.out
