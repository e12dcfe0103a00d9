"""Where TARGET may lie, and that it appears at once or not at all."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import zlib
from collections.abc import Callable
from pathlib import Path

import pytest

from gptoss_convert.conversion import publish
from gptoss_convert.conversion.options import Options
from gptoss_convert.conversion.plan import plan
from gptoss_convert.conversion.target import check_absent, check_input, check_target
from gptoss_convert.conversion.workspace import workspace
from gptoss_convert.errors import DiskError, GptossError, InputError, TargetError, UsageError
from gptoss_convert.machine.private import make_marked
from gptoss_convert.synth.synth import synth
from tests.stopping import command

NAMES = frozenset(("file",))


@pytest.fixture
def source(tmp_path: Path) -> Path:
    (tmp_path / "source").mkdir()
    (tmp_path / "source" / "config.json").write_text("{}")
    return tmp_path / "source"


def refusal(source: Path, target: Path) -> tuple[type[GptossError], str]:
    with pytest.raises(GptossError) as refused:
        check_target(source, target)
    return refused.type, str(refused.value).removeprefix(f"{target}: ")


def test_source_and_target_never_lie_in_each_other(source: Path, tmp_path: Path):
    inside = (UsageError, "SOURCE and TARGET lie in each other")
    (tmp_path / "link").symlink_to(source)
    (source / "deep").mkdir()
    for target in (
        source,
        source / "out",
        source / "deep" / "out",
        tmp_path / "link" / "out",
        source / "deep" / ".." / "out",
        tmp_path,
    ):
        assert refusal(source, target) == inside
    assert refusal(tmp_path / "link", source / "out") == inside
    check_target(source, tmp_path / "source2")
    check_target(source, tmp_path / "sour")


def test_target_needs_a_place_and_a_name(source: Path, tmp_path: Path):
    assert refusal(source, tmp_path / "absent" / "out") == (
        UsageError,
        "its parent directory does not exist",
    )
    (tmp_path / "file").write_text("")
    assert refusal(source, tmp_path / "file") == (TargetError, "exists and is not a directory")
    assert refusal(source, tmp_path / "file" / "out")[0] is UsageError
    (tmp_path / "link").symlink_to(tmp_path / "elsewhere")
    assert refusal(source, tmp_path / "link")[1].startswith("a link, which would be replaced")
    (tmp_path / "a").mkdir()
    assert refusal(source, tmp_path / "a" / "..")[0] is UsageError


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_read_only_parent_is_a_disk_error(source: Path, tmp_path: Path):
    (tmp_path / "fixed").mkdir(mode=0o555)
    assert refusal(source, tmp_path / "fixed" / "out") == (
        DiskError,
        "its parent directory is not writable",
    )


def test_only_an_empty_directory_may_be_taken(tmp_path: Path):
    check_absent(tmp_path / "absent")
    (tmp_path / "empty").mkdir()
    check_absent(tmp_path / "empty")
    (tmp_path / "empty" / ".hidden").write_text("")
    with pytest.raises(TargetError, match=r"empty: exists; pass --overwrite"):
        check_absent(tmp_path / "empty")


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_what_was_made_appears_at_once_and_nothing_else_stays(tmp_path: Path):
    with workspace(tmp_path / "out", restart=False, names=NAMES) as space:
        space.open()
        (space.work / "file").write_text("new")
        assert "out" not in names(tmp_path)
        publish.publish(space, space.replaces())
    assert names(tmp_path) == {"out"}
    assert (tmp_path / "out" / "file").read_text() == "new"


def test_what_is_replaced_stays_until_the_new_one_is_there(tmp_path: Path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "file").write_text("old")
    with workspace(tmp_path / "out", restart=False, names=NAMES) as space:
        space.open()
        (space.work / "file").write_text("new")
        assert (tmp_path / "out" / "file").read_text() == "old"
        publish.publish(space, space.replaces())
    assert names(tmp_path) == {"out"}
    assert (tmp_path / "out" / "file").read_text() == "new"


@pytest.mark.parametrize("name", ["plain", "with space", "n" * 200])
def test_a_refused_input_leaves_nothing(tmp_path: Path, name: str):
    with pytest.raises(InputError), workspace(tmp_path / name, restart=False, names=NAMES) as space:
        space.open()
        raise InputError("bad")
    assert names(tmp_path) == set()


def test_a_full_disk_leaves_what_the_same_command_goes_on_with(tmp_path: Path):
    with pytest.raises(DiskError), workspace(tmp_path / "out", restart=False, names=NAMES) as space:
        space.open()
        os.write(space.journal, b"x")
        raise DiskError("full")
    assert names(tmp_path) == {".out.gptoss-convert", ".out.gptoss-convert.journal"}
    with workspace(tmp_path / "out", restart=False, names=NAMES) as space:
        assert not space.fresh
    with workspace(tmp_path / "out", restart=True, names=NAMES) as space:
        assert space.fresh
        space.discard()
    assert names(tmp_path) == set()


def test_a_second_writer_is_refused_and_harms_nothing(tmp_path: Path):
    with workspace(tmp_path / "out", restart=False, names=NAMES) as first:
        first.open()
        with (
            pytest.raises(TargetError, match=r"out: another process is writing it"),
            workspace(tmp_path / "out", restart=True, names=NAMES),
        ):
            raise AssertionError("two writers at once")
        assert first.work.is_dir()
        (first.work / "file").write_text("first")
        publish.publish(first, first.replaces())
    assert names(tmp_path) == {"out"}


def test_a_name_too_long_for_the_hidden_directory_is_a_disk_error(tmp_path: Path):
    with (
        pytest.raises(DiskError, match=r"File name too long"),
        workspace(tmp_path / ("n" * 250), restart=False, names=NAMES),
    ):
        raise AssertionError("the journal cannot lie there")


def begun(folder: Path, *, names: frozenset[str] = NAMES) -> Path:
    """What a run leaves that was killed under way; returns its hidden directory."""
    with pytest.raises(KeyError), workspace(folder / "out", restart=False, names=names) as space:
        line = json.dumps({"work": space.open()}).encode()
        os.write(space.journal, b"%08x %s\n" % (zlib.crc32(line), line))
        (space.work / "file").write_text("half")
        raise KeyError
    return folder / ".out.gptoss-convert"


def going_on(folder: Path, restart: bool = False) -> None:
    with workspace(folder / "out", restart=restart, names=NAMES) as space:
        space.open()
        (space.work / "file").write_text("whole")
        publish.publish(space, space.replaces())


def foreign_file(work: Path) -> None:
    (work / "modeling_gpt_oss.py").write_text("import os")


def foreign_folder(work: Path) -> None:
    (work / "more").mkdir()


def second_name(work: Path) -> None:
    (work.parent / "precious").hardlink_to(work / "file")


def link(work: Path) -> None:
    (work / "file").unlink()
    (work / "file").symlink_to(work.parent / "precious")


@pytest.mark.parametrize("foreign", [foreign_file, foreign_folder, second_name, link])
def test_what_is_foreign_in_the_hidden_directory_is_neither_published_nor_removed(
    tmp_path: Path, foreign: Callable[[Path], None]
) -> None:
    work = begun(tmp_path)
    foreign(work)
    before = {path: path.lstat().st_ino for path in work.rglob("*")}
    with pytest.raises(
        TargetError, match=r"\.out\.gptoss-convert/(file|more|modeling_gpt_oss\.py)"
    ):
        going_on(tmp_path)
    assert {path: path.lstat().st_ino for path in work.rglob("*")} == before
    assert not (tmp_path / "out").exists()


def test_what_comes_into_the_hidden_directory_under_way_is_not_published(tmp_path: Path) -> None:
    with (
        pytest.raises(TargetError, match=r"modeling_gpt_oss\.py: not of this conversion"),
        workspace(tmp_path / "out", restart=False, names=NAMES) as space,
    ):
        space.open()
        (space.work / "file").write_text("whole")
        foreign_file(space.work)
        publish.publish(space, space.replaces())
    assert (tmp_path / ".out.gptoss-convert" / "modeling_gpt_oss.py").exists()
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("restart", [False, True])
def test_a_directory_that_no_journal_speaks_of_is_neither_taken_nor_removed(
    tmp_path: Path, restart: bool
) -> None:
    """Made first by somebody else, or put in place of the one that was made."""
    work = tmp_path / ".out.gptoss-convert"
    for arrange in (lambda: work.mkdir(), lambda: begun(tmp_path).rename(tmp_path / "moved")):
        arrange()
        work.mkdir(exist_ok=True)
        (work / "file").write_text("mine")
        with pytest.raises(TargetError, match=r"not the directory of an interrupted run"):
            going_on(tmp_path, restart)
        assert (work / "file").read_text() == "mine"
        (work / "file").unlink()
        work.rmdir()


@pytest.mark.parametrize("name", ["", ".journal", ".rounded"], ids=["work", "journal", "rounded"])
@pytest.mark.skipif(os.geteuid() != 0, reason="only root may give files away")
def test_what_another_user_made_first_is_refused(tmp_path: Path, name: str) -> None:
    place = tmp_path / f".out.gptoss-convert{name}"
    if name == ".journal":
        place.write_bytes(b"")
    else:
        place.mkdir()
    os.chown(place, 4711, 4711)
    with pytest.raises(TargetError, match=r"belongs to another user"):
        make_marked(place) if name == ".rounded" else going_on(tmp_path)
    assert place.exists()


def test_what_others_may_write_to_is_refused(tmp_path: Path) -> None:
    begun(tmp_path).chmod(0o777)
    with pytest.raises(TargetError, match=r"others may write to it"):
        going_on(tmp_path)
    assert not list(tmp_path.glob(".gptoss-convert-*"))


def test_a_journal_with_a_second_name_is_not_written(tmp_path: Path) -> None:
    (tmp_path / "precious").write_text("precious")
    (tmp_path / ".out.gptoss-convert.journal").hardlink_to(tmp_path / "precious")
    with pytest.raises(TargetError, match=r"journal: not a file of one name alone"):
        going_on(tmp_path, restart=True)
    assert (tmp_path / "precious").read_text() == "precious"


def test_only_a_marked_directory_is_emptied(tmp_path: Path) -> None:
    place = tmp_path / ".out.gptoss-convert.shards"
    place.mkdir()
    (place / "precious").write_text("precious")
    with pytest.raises(TargetError, match=r"not a directory of an interrupted run"):
        make_marked(place)
    assert (place / "precious").read_text() == "precious"
    (place / "precious").unlink()
    make_marked(place)
    (place / "shard").write_text("")
    make_marked(place)
    assert not (place / "shard").exists()
    assert place.stat().st_mode & 0o777 == 0o700


@pytest.mark.parametrize("place", ["", "model", "../.out.gptoss-convert.old/model"])
def test_nothing_is_read_from_where_target_is_made(tmp_path: Path, place: str) -> None:
    found = tmp_path / ".out.gptoss-convert" / place
    with pytest.raises(UsageError, match=r"lies in the hidden directory of .*out"):
        check_target(found, tmp_path / "out")
    with pytest.raises(UsageError, match=r"--tokenizer lies in the hidden directory of .*out"):
        check_input("--tokenizer", found, tmp_path / "out")
    with pytest.raises(UsageError, match=r"--scales and TARGET lie in each other"):
        check_input("--scales", tmp_path / "out" / "x", tmp_path / "out")


@pytest.mark.parametrize(
    "option", ["adapter", "scales", "base", "tokenizer", "config", "calibrate"]
)
def test_no_option_names_what_a_replaced_target_holds(tmp_path: Path, option: str) -> None:
    place = tmp_path / "out" / "read"
    place.mkdir(parents=True)
    options = Options("hf", overwrite=True, **{option: place})  # pyright: ignore[reportArgumentType]
    with pytest.raises(UsageError, match=rf"--{option} and TARGET lie in each other"):
        plan(tmp_path / "source", tmp_path / "out", options)


@pytest.mark.parametrize("exchange", [True, False])
def test_what_could_not_be_removed_of_a_replaced_target_is_said_and_not_taken_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, exchange: bool
) -> None:
    if not exchange:
        monkeypatch.setattr(publish, "_exchange", lambda *_: False)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "old").write_text("old")
    with monkeypatch.context() as stuck:
        stuck.setattr(shutil, "rmtree", lambda *_, **__: None)
        with workspace(tmp_path / "out", restart=False, names=NAMES) as space:
            space.open()
            (space.work / "file").write_text("new")
            left = publish.publish(space, space.replaces())
    assert left is not None
    assert (left / "old").read_text() == "old"
    assert names(tmp_path / "out") == {"file"}
    with pytest.raises(TargetError):
        going_on(tmp_path)
    assert (left / "old").read_text() == "old"


def mounted(*words: str | Path) -> Callable[[], None]:
    """Mount something; returns what ends that."""
    if subprocess.run(["mount", *map(str, words)], capture_output=True, check=False).returncode:
        pytest.skip("mounting needs root")
    return lambda: subprocess.run(["umount", "-l", str(words[-1])], check=True) and None


@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
def test_a_mount_point_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    synth(tmp_path / "a", layers=1)
    for name in ("out", "out/inner", "elsewhere"):
        (tmp_path / name).mkdir()
    (tmp_path / "elsewhere" / "precious").write_text("precious")
    for place, problem in (("out", "a mount point, which"), ("out/inner", r"out/inner in it is a")):
        unmount = mounted("--bind", tmp_path / "elsewhere", tmp_path / place)
        try:
            with (
                pytest.raises(TargetError, match=problem),
                workspace(tmp_path / "out", restart=False, names=NAMES) as space,
            ):
                publish.require_replaceable(space)
            assert (tmp_path / place / "precious").exists()
            told = command("convert", tmp_path / "a", tmp_path / "out", "--to", "hf", "--dry-run")
            assert told.status == TargetError.exit_code and problem.partition("/")[2] in told.error
        finally:
            unmount()
    assert names(tmp_path) == {"a", "out", "elsewhere"}


def test_a_lower_layer_is_refused_unless_target_is_empty(tmp_path: Path) -> None:
    for name in ("low/out", "low/empty", "up", "work", "m"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "low" / "out" / "old").write_text("old")
    layers = f"lowerdir={tmp_path}/low,upperdir={tmp_path}/up,workdir={tmp_path}/work"
    unmount = mounted("-t", "overlay", "overlay", "-o", layers, tmp_path / "m")
    try:
        with (
            pytest.raises(TargetError, match="lies in a lower layer of an overlay"),
            workspace(tmp_path / "m" / "out", restart=False, names=NAMES) as space,
        ):
            publish.require_replaceable(space)
        (tmp_path / "m" / "upper").mkdir()
        (tmp_path / "m" / "upper" / "old").write_text("old")
        for name in ("empty", "upper", "new"):
            with workspace(tmp_path / "m" / name, restart=False, names=NAMES) as space:
                publish.require_replaceable(space)
                space.open()
                (space.work / "file").write_text("new")
                assert publish.publish(space, space.replaces()) is None
            assert names(tmp_path / "m" / name) == {"file"}
        assert names(tmp_path / "m") == {"out", "empty", "upper", "new"}
    finally:
        unmount()


def test_a_target_that_becomes_a_link_under_way_stays_one(tmp_path: Path) -> None:
    """And what was made is kept for the same command to go on with."""
    (tmp_path / "elsewhere").mkdir()
    with (
        pytest.raises(TargetError, match=r"out is a link to elsewhere by now"),
        workspace(tmp_path / "out", restart=False, names=NAMES) as space,
    ):
        space.open()
        (space.work / "file").write_text("new")
        (tmp_path / "out").symlink_to("elsewhere")
        publish.publish(space, space.replaces())
    assert (tmp_path / "out").is_symlink()
    assert names(tmp_path / "elsewhere") == set()
    assert names(tmp_path / ".out.gptoss-convert") == {"file"}
