"""What lies in a checkpoint leads nowhere else, and is what it was when it was planned."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from gptoss_convert.containers import refs, safetensors
from gptoss_convert.containers.paths import create_inside, folder_inside, open_inside, settled
from gptoss_convert.containers.refs import Identity
from gptoss_convert.conversion.options import Options
from gptoss_convert.conversion.plan import plan
from gptoss_convert.conversion.run import run
from gptoss_convert.errors import (
    DiskError,
    GptossError,
    InputError,
    IntegrityError,
    TargetError,
    UsageError,
)
from gptoss_convert.formats.checkpoint import Checkpoint
from gptoss_convert.formats.config import MXFP4_CONFIG
from gptoss_convert.synth.synth import synth
from gptoss_convert.verify import values_level
from gptoss_convert.verify.gate import verify_checkpoints
from gptoss_convert.verify.result import VerifyOptions
from tests.stopping import At, HaltError, halt

HF = Options("hf", workers=1)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model in three formats, with a tokenizer and its like beside it."""
    folder = tmp_path_factory.mktemp("trees")
    synth(folder / "hf", layers=1)
    (folder / "hf" / "README.md").write_text("a model")
    (folder / "hf" / "tokenizer.json").write_text("{}")
    run(plan(folder / "hf", folder / "megatron", Options("megatron", workers=1)))
    (folder / "openai").mkdir()
    run(plan(folder / "hf", folder / "openai" / "original", Options("openai", workers=1)))
    return folder


def copied(made: Path, name: str, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made / name, tmp_path / name, copy_function=shutil.copy2))


def linked_away(root: Path, name: str, elsewhere: Path) -> None:
    """A folder's content lies elsewhere, and a link in its place."""
    (root / name).rename(elsewhere)
    (root / name).symlink_to(elsewhere)


@pytest.mark.parametrize(
    ("source", "folder"),
    [
        ("megatron", "hf"),
        ("megatron", "iter_0000001"),
        ("megatron", "iter_0000001/tokenizer"),
        ("megatron", "iter_0000001/hf"),
        ("megatron", "mxfp4-scales"),
        ("openai", "original"),
        ("openai", "original/hf"),
    ],
)
def test_a_folder_that_is_a_link_leads_out_only_when_asked(
    made: Path, tmp_path: Path, source: str, folder: str
) -> None:
    root = copied(made, source, tmp_path)
    if not (root / folder).exists():
        (root / folder).mkdir()
        (root / folder / "config.json").write_bytes((made / "hf" / "config.json").read_bytes())
    (root / folder / "NOTICE").write_text("somebody's secret")
    linked_away(root, folder, tmp_path / "elsewhere")
    with pytest.raises(InputError, match=r"outside the checkpoint; pass --follow-links"):
        run(plan(root, tmp_path / "target", HF))
    assert {path.name for path in tmp_path.iterdir()} == {source, "elsewhere"}
    run(plan(root, tmp_path / "target", replace(HF, follow_links=True)))
    assert (tmp_path / "target" / "config.json").is_file()


def test_links_on_the_way_to_source_and_target_are_their_user_s(made: Path, tmp_path: Path) -> None:
    (tmp_path / "here").symlink_to(made)
    (tmp_path / "there").mkdir()
    (tmp_path / "out").symlink_to("there")
    run(plan(tmp_path / "here" / "hf", tmp_path / "out" / "target", HF))
    assert (tmp_path / "there" / "target" / "README.md").read_text() == "a model"


def test_links_within_the_checkpoint_are_followed(made: Path, tmp_path: Path) -> None:
    root = copied(made, "megatron", tmp_path)
    (root / "hf").rename(root / "carried")
    (root / "hf").symlink_to(root / "carried")
    (root / "iter_0000001").rename(root / "release-1")
    (root / "iter_0000001").symlink_to("./iter_x/../release-1")
    (root / "iter_x").mkdir()
    shard = root / "carried" / "README.md"
    shard.rename(root / "carried" / "text")
    shard.symlink_to("text")
    run(plan(root, tmp_path / "target", HF))
    assert (tmp_path / "target" / "README.md").read_text() == "a model"


@pytest.mark.parametrize("link", ["../x", "/x", "a/../../x", "a/../../root/../x", "b/x", ".."])
def test_no_way_of_writing_a_link_leads_above_its_directory(tmp_path: Path, link: str) -> None:
    root = tmp_path / "root"
    (root / "a").mkdir(parents=True)
    (root / "b").symlink_to(tmp_path)
    (tmp_path / "x").write_text("outside")
    (root / "name").symlink_to(f"{tmp_path}{link}" if link.startswith("/") else link)
    for call in (open_inside, folder_inside):
        with pytest.raises(InputError, match=r"name: links to .*, outside the checkpoint"):
            call(root, "name")


def exchanging(
    monkeypatch: pytest.MonkeyPatch, point: int, exchange: Callable[[], None]
) -> Callable[[], bool]:
    """Exchange something right before this system call on the way to a file; tells if it was."""
    left = [point]

    def counted(call: Callable[..., Any]) -> Callable[..., Any]:
        def counting(*arguments: Any, **named: Any) -> Any:
            left[0] -= 1
            if left[0] == 0:
                exchange()
            return call(*arguments, **named)

        return counting

    for name in ("open", "readlink", "mkdir"):
        monkeypatch.setattr(os, name, counted(getattr(os, name)))
    return lambda: left[0] <= 0


@pytest.mark.parametrize("writing", [False, True])
@pytest.mark.parametrize("part", ["sub", "sub/deep", "sub/deep/file"])
def test_what_is_exchanged_for_a_link_meanwhile_is_not_followed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, part: str, writing: bool
) -> None:
    """At every moment: before each system call of a read and of a write."""
    reached, point = True, 0
    while reached:
        point += 1
        turn = tmp_path / str(point)
        for name, text in (("root", "inside"), ("other", "outside")):
            (turn / name / "sub" / "deep").mkdir(parents=True)
            (turn / name / "sub" / "deep" / "file").write_text(text)
        place = turn / "root" / part

        def exchange(place: Path = place, other: Path = turn / "other" / part) -> None:
            place.rename(place.with_name("real"))
            place.symlink_to(other)

        with monkeypatch.context() as patched:
            was = exchanging(patched, point, exchange)
            for root, name in ((turn / "root", "sub/deep/file"), (place.parent, place.name)):
                if writing:
                    with suppress(GptossError, OSError):
                        descriptor = create_inside(root, name, os.O_WRONLY)
                        os.write(descriptor, b"written")
                        os.close(descriptor)
                else:
                    with suppress(GptossError), open_inside(root, name) as file:
                        assert file.read() == b"inside"
            reached = was()
        assert (turn / "other" / "sub" / "deep" / "file").read_text() == "outside"
    assert point > 8


def test_what_is_written_has_one_name_alone(tmp_path: Path) -> None:
    (tmp_path / "precious").write_text("precious")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "file").hardlink_to(tmp_path / "precious")
    with pytest.raises(TargetError, match=r"out/file: not a file of one name alone"):
        create_inside(tmp_path / "out", "file", os.O_RDWR)
    assert (tmp_path / "precious").read_text() == "precious"


def test_a_plain_path_stays_as_its_user_wrote_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a").mkdir()
    assert str(settled(Path("a"))) == "a"
    assert settled(Path("a/../a")) == Path("a/../a")


def rewritten(path: Path) -> None:
    """Other bytes in the same file, its size and time of writing as before."""
    before = path.stat()
    with path.open("r+b") as file:
        file.seek(-4, os.SEEK_END)
        last = file.read()
        file.seek(-4, os.SEEK_END)
        file.write(bytes(byte ^ 1 for byte in last))
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def renamed_over(path: Path) -> None:
    """Another file in its place, of the same size and time of writing."""
    shutil.copy2(path, path.with_name("new"))
    rewritten(path.with_name("new"))
    path.with_name("new").rename(path)


CHANGES = [rewritten, renamed_over]


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("name", ["model.safetensors", "README.md"])
def test_a_source_that_changed_after_the_plan_is_not_mixed_into_it(
    made: Path, tmp_path: Path, change: Callable[[Path], None], name: str
) -> None:
    root = copied(made, "hf", tmp_path)
    conversion = plan(root, tmp_path / "target", HF)
    change(root / name)
    with pytest.raises(IntegrityError, match=rf"{name}: changed since its header was read"):
        run(conversion)
    assert {path.name for path in tmp_path.iterdir()} == {"hf"}


BESIDE = [
    ("hf", "config.json"),
    ("megatron", "iter_0000001/.metadata"),
    ("megatron", "iter_0000001/common.pt"),
    ("megatron", "iter_0000001/run_config.yaml"),
    ("megatron", "hf/config.json"),
    ("openai/original", "config.json"),
]
"""What decides what the weights mean."""


@pytest.mark.parametrize(("source", "name"), BESIDE)
def test_what_a_plan_was_made_from_is_the_same_at_the_end(
    made: Path, tmp_path: Path, source: str, name: str
) -> None:
    root = copied(made, source, tmp_path)
    conversion = plan(root, tmp_path / "target", HF)
    renamed_over(root / name)
    with pytest.raises(IntegrityError, match=rf"{name}: changed (since|while)"):
        run(conversion)
    assert not (tmp_path / "target").exists()


def test_a_directory_that_is_exchanged_while_it_is_planned_is_no_mixture(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The configuration of one save, the weights of the next."""
    root = copied(made, "hf", tmp_path)
    synth(tmp_path / "next", layers=1, seed=5)
    read = safetensors.read_directory

    def exchanging(*words: Any) -> Any:
        if not (tmp_path / "before").exists():
            root.rename(tmp_path / "before")
            (tmp_path / "next").rename(root)
        return read(*words)

    monkeypatch.setattr(safetensors, "read_directory", exchanging)
    with pytest.raises(IntegrityError, match=r"config\.json: changed (since|while)"):
        run(plan(root, tmp_path / "target", HF))


def test_a_tracker_may_name_another_iteration_by_then(made: Path, tmp_path: Path) -> None:
    root = copied(made, "megatron", tmp_path)
    conversion = plan(root, tmp_path / "target", HF)
    (root / "latest_checkpointed_iteration.txt").write_text("7")
    run(conversion)


def test_both_readers_of_a_verification_see_the_same_files(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("torch")
    compared = values_level.values_level

    def changing(ours: Checkpoint, *words: Any) -> Any:
        renamed_over(ours.root / "config.json")
        return compared(ours, *words)

    monkeypatch.setattr(values_level, "values_level", changing)
    for level in ("values", "logits"):
        root = copied(made, "hf", tmp_path / level)
        with pytest.raises(IntegrityError, match=r"config\.json: changed (since|while)"):
            verify_checkpoints(root, made / "hf", VerifyOptions(level=level, max_length=4))


@pytest.mark.parametrize("change", CHANGES)
def test_a_megatron_source_that_changed_after_the_plan_is_found_out(
    made: Path, tmp_path: Path, change: Callable[[Path], None]
) -> None:
    root = copied(made, "megatron", tmp_path)
    conversion = plan(root, tmp_path / "target", HF)
    change(max((root / "iter_0000001").glob("*.distcp"), key=lambda path: path.stat().st_size))
    with pytest.raises(IntegrityError, match=r"distcp: changed since its header was read"):
        run(conversion)


@pytest.mark.parametrize("change", CHANGES)
def test_a_source_that_changed_between_stop_and_going_on_is_refused(
    made: Path, tmp_path: Path, change: Callable[[Path], None]
) -> None:
    root = copied(made, "hf", tmp_path)
    with pytest.raises(HaltError):
        run(plan(root, tmp_path / "target", HF), At(3, halt))
    change(root / "model.safetensors")
    with pytest.raises(UsageError, match=r"source model\.safetensors: .* then, .* now"):
        run(plan(root, tmp_path / "target", HF))
    assert not (tmp_path / "target").exists()


def test_a_target_that_source_leads_into_is_not_replaced(made: Path, tmp_path: Path) -> None:
    """The only copy of a shard would be gone."""
    root, target = copied(made, "hf", tmp_path), tmp_path / "target"
    target.mkdir()
    (root / "model.safetensors").rename(target / "model.safetensors")
    (root / "model.safetensors").symlink_to(target / "model.safetensors")
    options = Options("hf", "bf16", follow_links=True, overwrite=True, workers=1)
    with pytest.raises(UsageError, match=r"model.safetensors: lies in TARGET, which is replaced"):
        run(plan(root, target, options))
    run(plan(root, tmp_path / "other", options))


@pytest.mark.parametrize("named", ["", "original"])
def test_openai_s_files_in_the_hub_s_cache_are_read(made: Path, tmp_path: Path, named: str) -> None:
    """`snapshots/<commit>/original/` is of links to the blobs, two folders above."""
    cached = tmp_path / "models--openai--gpt-oss-20b"
    inside = cached / "snapshots" / ("0" * 40) / "original"
    inside.mkdir(parents=True)
    (cached / "blobs").mkdir()
    for number, file in enumerate(sorted((made / "openai" / "original").iterdir())):
        if file.is_file():
            shutil.copy(file, cached / "blobs" / f"{number:064x}")
            (inside / file.name).symlink_to(f"../../../blobs/{number:064x}")
    run(plan(inside.parent / named, tmp_path / "target", HF))
    run(plan(made / "openai", tmp_path / "straight", HF))
    shards = [tmp_path / name / "model.safetensors" for name in ("target", "straight")]
    assert shards[0].read_bytes() == shards[1].read_bytes()
    (inside / "config.json").unlink()
    (cached / "blobs" / "x").symlink_to(made / "openai" / "original" / "config.json")
    (inside / "config.json").symlink_to("../../../blobs/x")
    with pytest.raises((InputError, DiskError)):
        plan(inside, tmp_path / "again", HF)


def test_a_sidecar_does_not_decide_how_the_experts_are_said_to_be_stored(
    made: Path, tmp_path: Path
) -> None:
    run(plan(made / "hf", tmp_path / "bf16", Options("hf", "bf16", workers=1)))
    path = tmp_path / "bf16" / "mxfp4-scales" / "origin.json"
    origin = json.loads(path.read_text())
    config = json.loads(origin["config"])
    config["quantization_config"] = {"quant_method": "mxfp4", "modules_to_not_convert": []}
    path.write_text(json.dumps(origin | {"config": json.dumps(config)}))
    run(plan(tmp_path / "bf16", tmp_path / "back", Options("hf", "mxfp4", workers=1)))
    stated = json.loads((tmp_path / "back" / "config.json").read_text())
    assert stated["quantization_config"] == MXFP4_CONFIG


def test_inodes_say_nothing_where_they_are_given_anew(tmp_path: Path) -> None:
    """On FUSE, a file that was not changed may have another inode after a while."""
    (tmp_path / "file").write_text("")
    with (tmp_path / "file").open("rb") as file:
        assert Identity.of(file.fileno()).inode == (tmp_path / "file").stat().st_ino
        with pytest.MonkeyPatch.context() as patched:
            patched.setattr(refs, "_numbered_anew", lambda device: True)
            assert Identity.of(file.fileno()).inode == 0
