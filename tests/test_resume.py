"""A stopped conversion goes on with the same bytes, or says why it cannot."""

from __future__ import annotations

import errno
import json
import os
import resource
import shutil
import signal
import subprocess
import time
import zlib
from collections.abc import Callable, Iterator
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

from gptoss_convert.cli import ending
from gptoss_convert.cli.main import cli
from gptoss_convert.containers.json_records import from_json
from gptoss_convert.conversion.options import Options
from gptoss_convert.conversion.plan import Conversion, plan
from gptoss_convert.conversion.resume import _plausible
from gptoss_convert.conversion.run import run
from gptoss_convert.conversion.work_files import _gaps
from gptoss_convert.engine.records import Done
from gptoss_convert.errors import DiskError, IntegrityError, TargetError, UsageError
from gptoss_convert.synth.synth import synth
from tests.killing import contents
from tests.stopping import At, HaltError, command, halt

OPTIONS = Options("hf", "bf16", workers=1)

pytestmark = pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A source and the result of an uninterrupted run."""
    folder = tmp_path_factory.mktemp("resume")
    synth(folder / "source", layers=2)
    run(plan(folder / "source", folder / "expected", OPTIONS))
    return folder


@pytest.fixture
def expected(made: Path) -> dict[str, bytes]:
    # The manifest names the source, not the target: it is the same for every target.
    return contents(made / "expected")


@pytest.fixture
def conversion(made: Path, tmp_path: Path) -> Conversion:
    shutil.copytree(made / "source", tmp_path / "source", copy_function=shutil.copy2)
    return plan(tmp_path / "source", tmp_path / "target", OPTIONS)


def stop(conversion: Conversion, after: int = 5) -> Path:
    """Interrupt after some steps; returns the hidden work directory."""
    with pytest.raises(HaltError):
        run(conversion, At(after, halt))
    assert not conversion.target.exists()
    return conversion.target.parent / f".{conversion.target.name}.gptoss-convert"


def journal_of(work: Path) -> Path:
    return work.with_name(f"{work.name}.journal")


def same_weights(target: Path, expected: dict[str, bytes]) -> bool:
    """The sources lie in other folders, which the manifest names: compare all else."""
    found = contents(target)
    mine, other = (
        json.loads(files.pop("gptoss-convert.json")) for files in (found, dict(expected))
    )
    del mine["from"], other["from"]
    del mine["plan"], other["plan"]
    return mine == other and found == {k: v for k, v in expected.items() if k in found}


def test_what_is_done_is_not_done_again(conversion: Conversion, expected: dict[str, bytes]) -> None:
    work = stop(conversion, after=7)
    assert work.is_dir()
    report = run(conversion)
    assert report.resumed_steps == 7
    assert same_weights(conversion.target, expected)
    assert [path.name for path in conversion.target.parent.iterdir()] in (
        ["source", "target"],
        ["target", "source"],
    )


def test_steps_whose_bytes_changed_are_done_again(
    conversion: Conversion, expected: dict[str, bytes]
) -> None:
    work = stop(conversion, after=7)
    shard = work / "model.safetensors"
    regions = [json.loads(line[9:]) for line in journal_of(work).read_bytes().splitlines()[1:]]
    offset, length = next(
        (offset, length) for file, offset, length, _ in regions[2][1] if file == shard.name
    )
    with shard.open("r+b") as stream:
        stream.seek(offset + length // 2)
        stream.write(b"behind the journal's back")
    progress = At(0, halt)
    report = run(conversion, progress)
    assert report.resumed_steps < 7
    assert any("no longer as they were written" in note for note in progress.notes)
    assert same_weights(conversion.target, expected)


def test_a_trusted_journal_is_not_read_back(conversion: Conversion) -> None:
    stop(conversion, after=7)
    trusting = replace(conversion, options=replace(conversion.options, trust_journal=True))
    progress = At(0, halt)
    assert run(trusting, progress).resumed_steps == 7
    assert not any("going on" in note for note in progress.notes)


def test_a_vanished_work_directory_is_made_again(
    conversion: Conversion, expected: dict[str, bytes]
) -> None:
    shutil.rmtree(stop(conversion))
    assert run(conversion).resumed_steps == 0
    assert same_weights(conversion.target, expected)


def torn(content: bytes) -> bytes:
    return content[:-5]


def garbage(content: bytes) -> bytes:
    return content + b"\x00" * 300


def altered(content: bytes) -> bytes:
    """Another fingerprint in a line, which only the line's checksum can tell."""
    lines = content.splitlines(keepends=True)
    record = json.loads(lines[2][9:])
    record[2] ^= 1
    lines[2] = lines[2][:9] + json.dumps(record, separators=(",", ":")).encode() + b"\n"
    return b"".join(lines)


def invented(content: bytes) -> bytes:
    """Lines with a right checksum that say nothing of use."""
    odd = [b"[]", b"[1,2,3]", b"nonsense", b"{}", b'[1,[["../x",0,9,0]],1,[],[],0,[]]', b"[" * 9999]
    odd += [b'[0,[["model.safetensors",0,8,0]],1,[0,0,0,255,0],[0],0,[0,"",[]]]', b"1e999"]
    return content + b"".join(b"%08x %s\n" % (zlib.crc32(text), text) for text in odd)


@pytest.mark.parametrize("damage", [torn, garbage, altered, invented])
def test_a_damaged_journal_costs_work_not_bytes(
    conversion: Conversion, expected: dict[str, bytes], damage: Callable[[bytes], bytes]
) -> None:
    journal = journal_of(stop(conversion, after=7))
    journal.write_bytes(damage(journal.read_bytes()))
    assert run(conversion).resumed_steps <= 7
    assert same_weights(conversion.target, expected)


def test_a_journal_of_another_form_is_refused_and_kept(conversion: Conversion) -> None:
    journal = journal_of(stop(conversion))
    first, *others = journal.read_bytes().splitlines(keepends=True)
    header = json.loads(first[9:]) | {"journal": 1}
    text = json.dumps(header, separators=(",", ":")).encode()
    journal.write_bytes(b"%08x %s\n" % (zlib.crc32(text), text) + b"".join(others))
    before = journal.read_bytes()
    with pytest.raises(UsageError, match=r"journal: 1 then, 4 now.*--restart"):
        run(conversion)
    assert journal.read_bytes() == before
    restarting = replace(conversion, options=replace(conversion.options, restart=True))
    assert run(restarting).resumed_steps == 0


def test_other_options_are_refused_and_discard_nothing(
    conversion: Conversion, expected: dict[str, bytes]
) -> None:
    stop(conversion, after=7)
    other = plan(
        conversion.source.root, conversion.target, replace(OPTIONS, max_shard_size=3_000_000)
    )
    with pytest.raises(UsageError, match=r"options max_shard_size: 5000000000 then, 3000000 now"):
        run(other)
    assert run(conversion).resumed_steps == 7
    assert same_weights(conversion.target, expected)


def test_another_version_is_refused(
    conversion: Conversion, monkeypatch: pytest.MonkeyPatch
) -> None:
    stop(conversion)
    monkeypatch.setattr("gptoss_convert.conversion.plan.VERSION", "99.0")
    other = plan(conversion.source.root, conversion.target, OPTIONS)
    with pytest.raises(UsageError, match=r"tool: 'gptoss-convert .*' then, 'gptoss-convert 99\.0'"):
        run(other)


def test_a_source_that_changed_in_between_is_refused(conversion: Conversion) -> None:
    stop(conversion)
    os.utime(conversion.source.root / "model.safetensors", (1, 1))
    other = plan(conversion.source.root, conversion.target, OPTIONS)
    with pytest.raises(UsageError, match=r"source model\.safetensors: .* then, .* now"):
        run(other)


def test_a_source_that_changes_under_way_publishes_nothing(conversion: Conversion) -> None:
    shard = conversion.source.root / "model.safetensors"
    with pytest.raises(IntegrityError, match="changed while it was being read"):
        run(conversion, At(3, lambda: os.utime(shard, (1, 1))))
    assert [path.name for path in conversion.target.parent.iterdir()] == ["source"]


def test_a_source_that_is_replaced_under_way_publishes_nothing(conversion: Conversion) -> None:
    shard = conversion.source.root / "model.safetensors"

    def exchange() -> None:
        shutil.copy2(shard, shard.with_suffix(".new"))
        shard.with_suffix(".new").replace(shard)

    with pytest.raises(IntegrityError, match="changed while it was being read"):
        run(conversion, At(3, exchange))


def test_a_source_that_is_truncated_under_way_publishes_nothing(conversion: Conversion) -> None:
    shard = conversion.source.root / "model.safetensors"
    with pytest.raises(IntegrityError, match=r"truncated|changed while"):
        run(conversion, At(3, lambda: os.truncate(shard, 10_000)))
    assert not conversion.target.exists()


def test_a_second_writer_is_refused(conversion: Conversion, expected: dict[str, bytes]) -> None:
    refused: list[str] = []

    def again() -> None:
        with pytest.raises(TargetError) as error:
            run(conversion)
        refused.append(str(error.value))

    run(conversion, At(3, again))
    assert refused == [f"{conversion.target}: another process is writing it"]
    assert same_weights(conversion.target, expected)


def test_a_target_that_appears_meanwhile_is_no_obstacle_to_going_on(
    conversion: Conversion,
) -> None:
    stop(conversion, after=7)
    conversion.target.mkdir()
    (conversion.target / "mine").write_text("mine")
    with pytest.raises(TargetError, match="exists; pass --overwrite"):
        run(conversion)
    (conversion.target / "mine").unlink()
    assert run(conversion).resumed_steps == 7


def test_a_link_in_place_of_the_work_directory_is_not_followed(
    conversion: Conversion, tmp_path: Path
) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (tmp_path / ".target.gptoss-convert").symlink_to(elsewhere)
    with pytest.raises(TargetError, match="not a directory of an interrupted run"):
        run(conversion)
    assert list(elsewhere.iterdir()) == []


def test_a_link_in_the_work_directory_is_not_followed(
    conversion: Conversion, tmp_path: Path
) -> None:
    elsewhere, work = tmp_path / "elsewhere", stop(conversion)
    elsewhere.mkdir()
    shutil.rmtree(work / "mxfp4-scales")
    (work / "mxfp4-scales").symlink_to(elsewhere)
    with pytest.raises(TargetError, match="mxfp4-scales: a link, which no conversion makes"):
        run(conversion)
    assert list(elsewhere.iterdir()) == []


def words(conversion: Conversion) -> tuple[str | Path, ...]:
    source, target = conversion.source.root, conversion.target
    return ("convert", source, target, "--to", "hf", "--dtype", "bf16", "--workers", "1")


@pytest.mark.parametrize(
    ("number", "status", "how"),
    [(signal.SIGINT, 130, "interrupted"), (signal.SIGTERM, 143, "terminated")],
)
def test_a_signal_ends_with_its_status_and_the_command_to_go_on(
    conversion: Conversion, expected: dict[str, bytes], number: int, status: int, how: str
) -> None:
    ended = command(*words(conversion), at=At(5, lambda: os.kill(os.getpid(), number)))
    shown = " ".join(map(str, words(conversion)))
    assert ended.error == (
        f"{how}: nothing was published; the same command goes on: gptoss-convert {shown}\n"
    )
    assert ended.status == status
    assert not conversion.target.exists()
    assert 5 <= run(conversion).resumed_steps < len(conversion.plan.steps)
    assert same_weights(conversion.target, expected)


@pytest.mark.parametrize(
    ("words", "there", "said"),
    [
        ("check x", "", "interrupted: run it again: gptoss-convert check x"),
        ("synth x", "", "interrupted: nothing was published; the same command goes on: gptoss-"),
        ("convert x y --push-to o/n", "y is complete", "interrupted: y is complete\n"),
    ],
)
def test_what_is_said_of_a_stop_is_true_of_the_command(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    words: str,
    there: str,
    said: str,
) -> None:
    """A check has nothing to publish, and an upload begins when TARGET is there."""
    monkeypatch.setattr("sys.argv", ["gptoss-convert", *words.split()])
    monkeypatch.setattr(ending, "_there", [])
    if there:
        ending.is_there(there)
    assert ending.stopped(signal.SIGINT) == 130
    assert capsys.readouterr().err.startswith(said)


SWALLOWS = """
import os, signal
try:
    os.kill(os.getpid(), signal.SIGTERM)
    [None for _ in range(1000)]
except BaseException:
    pass
"""


def test_a_signal_is_not_lost_in_an_import(
    conversion: Conversion, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As Python's own import loses one that comes while it forgets a module's lock."""
    (tmp_path / "swallows.py").write_text(SWALLOWS)
    monkeypatch.syspath_prepend(tmp_path)
    main = cli.main

    def importing(*, standalone_mode: bool) -> None:
        import_module("swallows")
        time.sleep(1)
        main(standalone_mode=standalone_mode)

    monkeypatch.setattr(cli, "main", importing)
    ended = command(*words(conversion))
    assert ended.error.startswith("terminated: nothing was published; the same command goes on: ")
    assert ended.status == 143
    assert not conversion.target.exists()


def test_a_signal_does_not_cut_off_the_last_words(
    conversion: Conversion, monkeypatch: pytest.MonkeyPatch
) -> None:
    """torchrun terminates all ranks as soon as one has ended."""
    complain = ending.complain

    def terminated(text: str) -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        complain(text)

    monkeypatch.setattr(ending, "complain", terminated)
    ended = command("convert", conversion.source.root / "nothing", conversion.target, "--to", "hf")
    assert ended.error.startswith("error: ")
    assert ended.status == 2


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 24 MB in memory."""
    place = tmp_path / "small"
    place.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=24m", "tmpfs", str(place)],
        capture_output=True,
        check=False,
    )
    if mounted.returncode:
        pytest.skip("mounting needs root")
    yield place
    subprocess.run(["umount", "-l", str(place)], check=True)


def test_a_full_disk_is_status_5_and_the_run_goes_on_after_freeing(
    conversion: Conversion, small_disk: Path, expected: dict[str, bytes]
) -> None:
    full = replace(conversion, target=small_disk / "target")
    filler = small_disk / "filler"

    def fill() -> None:
        with filler.open("wb", buffering=0) as stream:
            while True:
                try:
                    stream.write(bytes(1 << 16))
                except OSError as error:
                    assert error.errno == errno.ENOSPC
                    return

    with pytest.raises(DiskError, match=r"No space left.*free some space and run the same command"):
        run(full, At(3, fill))
    with pytest.raises(DiskError, match=r"needed, .* free; free some space|No space left"):
        run(full)
    filler.unlink()
    assert run(full).resumed_steps >= 3
    assert same_weights(full.target, expected)


def test_too_little_space_is_refused_before_anything_is_written(
    conversion: Conversion, small_disk: Path
) -> None:
    with (small_disk / "filler").open("wb") as stream:
        stream.write(bytes(22 << 20))
    with pytest.raises(DiskError, match=r"\d\.\d\d MB needed, \d\.\d\d MB free"):
        run(replace(conversion, target=small_disk / "target"))


def test_a_limit_on_file_sizes_is_status_5(
    conversion: Conversion, expected: dict[str, bytes]
) -> None:
    limit = (1_000_000, resource.RLIM_INFINITY)
    ended = command(
        *words(conversion), before=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    )
    assert ended.status == 5
    assert "File too large; the file system or a limit allows no file of this size" in ended.error
    run(conversion)
    assert same_weights(conversion.target, expected)


def leaves(value: object, way: tuple[int, ...] = ()) -> Iterator[tuple[int, ...]]:
    if isinstance(value, list):
        for place, inner in enumerate(value):
            yield from leaves(inner, (*way, place))
    else:
        yield way


def with_leaf(value: Any, way: tuple[int, ...], leaf: object) -> Any:
    if not way:
        return leaf
    return [with_leaf(v, way[1:], leaf) if n == way[0] else v for n, v in enumerate(value)]


def test_no_odd_value_in_a_journal_reaches_the_manifest(
    conversion: Conversion, expected: dict[str, bytes]
) -> None:
    """Lines with a right checksum: every field of a step, negative, absent or of another kind."""
    lines = journal_of(stop(conversion, after=7)).read_bytes().splitlines()
    step = next(n for n, line in enumerate(lines) if line[9:10] == b"[") + 2
    record = json.loads(lines[step][9:])
    known = from_json(Done, record)
    assert _plausible(conversion.plan.steps[known.step], known)
    for way in leaves(record):
        for odd in (-1, None, True, 1 << 70, -0.5, "x", {}, -(1 << 63)):
            try:
                done = from_json(Done, with_leaf(record, way, odd))
            except ValueError:
                continue
            if 0 <= done.step < len(conversion.plan.steps):
                same = done == known or (done.encoded != known.encoded and odd == -1)
                assert same or not _plausible(conversion.plan.steps[done.step], done), (way, odd)
    assert run(conversion).resumed_steps == 7
    assert same_weights(conversion.target, expected)


def test_what_lies_between_items_is_zero_whoever_wrote_there(made: Path, tmp_path: Path) -> None:
    options = Options("megatron", workers=1)
    run(plan(made / "source", tmp_path / "expected", options))
    conversion = plan(made / "source", tmp_path / "target", options)
    work = stop(conversion)
    gaps = [(name, *gap) for name, found in _gaps(conversion).items() for gap in found]
    assert gaps
    for name, offset, length in gaps:
        with (work / name).open("r+b") as file:
            file.seek(offset)
            file.write(b"\x01" * length)
    assert run(conversion).resumed_steps >= 5
    assert contents(conversion.target) == contents(tmp_path / "expected")
