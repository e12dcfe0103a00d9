"""Where TARGET may lie, and that it appears at once or not at all."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from gptoss_convert.conversion.publish import check_absent, check_target, workspace
from gptoss_convert.errors import DiskError, GptossError, InputError, TargetError, UsageError


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
    assert refusal(source, tmp_path / "link") == (TargetError, "exists and is not a directory")
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
    with workspace(tmp_path / "out", restart=False) as space:
        space.open()
        (space.work / "file").write_text("new")
        assert "out" not in names(tmp_path)
        space.publish()
    assert names(tmp_path) == {"out"}
    assert (tmp_path / "out" / "file").read_text() == "new"


def test_what_is_replaced_stays_until_the_new_one_is_there(tmp_path: Path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "file").write_text("old")
    with workspace(tmp_path / "out", restart=False) as space:
        space.open()
        (space.work / "file").write_text("new")
        assert (tmp_path / "out" / "file").read_text() == "old"
        space.publish()
    assert names(tmp_path) == {"out"}
    assert (tmp_path / "out" / "file").read_text() == "new"


@pytest.mark.parametrize("name", ["plain", "with space", "n" * 200])
def test_a_refused_input_leaves_nothing(tmp_path: Path, name: str):
    with pytest.raises(InputError), workspace(tmp_path / name, restart=False) as space:
        space.open()
        raise InputError("bad")
    assert names(tmp_path) == set()


def test_a_full_disk_leaves_what_the_same_command_goes_on_with(tmp_path: Path):
    with pytest.raises(DiskError), workspace(tmp_path / "out", restart=False) as space:
        space.open()
        os.write(space.journal, b"x")
        raise DiskError("full")
    assert names(tmp_path) == {".out.gptoss-convert", ".out.gptoss-convert.journal"}
    with workspace(tmp_path / "out", restart=False) as space:
        assert not space.fresh
    with workspace(tmp_path / "out", restart=True) as space:
        assert space.fresh
        space.discard()
    assert names(tmp_path) == set()


def test_a_second_writer_is_refused_and_harms_nothing(tmp_path: Path):
    with workspace(tmp_path / "out", restart=False) as first:
        first.open()
        with (
            pytest.raises(TargetError, match=r"out: another process is writing it"),
            workspace(tmp_path / "out", restart=True),
        ):
            raise AssertionError("two writers at once")
        assert first.work.is_dir()
        first.publish()
    assert names(tmp_path) == {"out"}


def test_a_name_too_long_for_the_hidden_directory_is_a_disk_error(tmp_path: Path):
    with (
        pytest.raises(DiskError, match=r"File name too long"),
        workspace(tmp_path / ("n" * 250), restart=False),
    ):
        raise AssertionError("the journal cannot lie there")
