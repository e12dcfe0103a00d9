"""Faults of the machine and of the call: permissions, limits, links, other settings, pipes."""

from __future__ import annotations

import errno
import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from benchmarks.memory import Group
from gptoss_convert.conversion.manifest import NAME
from gptoss_convert.conversion.options import Options
from gptoss_convert.conversion.plan import plan
from gptoss_convert.conversion.run import run
from gptoss_convert.errors import DiskError, TargetError, UsageError
from gptoss_convert.show.texts import write_text
from gptoss_convert.synth.synth import synth
from tests.failing import needs_seccomp, refuse
from tests.faults.cases import SHARD, bytes_of, overwrite
from tests.killing import contents
from tests.stopping import command

TO_HF = ("--to", "hf", "--workers", "1")
NOBODY = 65534

pytestmark = pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
as_root = pytest.mark.skipif(os.geteuid() != 0, reason="mounting and changing users need root")


@pytest.fixture
def source(tmp_path: Path) -> Path:
    synth(tmp_path / "source", layers=1, workers=1)
    return tmp_path / "source"


@pytest.fixture
def read_only(tmp_path: Path) -> Iterator[Path]:
    place = tmp_path / "read-only"
    place.mkdir()
    words = ["mount", "-t", "tmpfs", "-o", "size=4m,ro", "tmpfs", str(place)]
    if subprocess.run(words, capture_output=True, check=False).returncode:
        pytest.skip("mounting is not allowed")
    yield place
    subprocess.run(["umount", "-l", str(place)], check=True)


def test_a_read_only_source_is_converted(source: Path, tmp_path: Path) -> None:
    for path in [*source.iterdir(), source]:
        path.chmod(0o555 if path.is_dir() else 0o444)
    assert command("convert", source, tmp_path / "target", *TO_HF).status == 0


@as_root
def test_a_read_only_file_system_is_refused_before_any_work(source: Path, read_only: Path) -> None:
    ended = command("convert", source, read_only / "target", *TO_HF)
    assert ended.error == f"error: {read_only}/target: its parent directory is not writable\n"
    assert ended.status == 5


@as_root
def test_a_parent_without_permission_is_refused(source: Path, tmp_path: Path) -> None:
    locked = tmp_path / "locked"
    locked.mkdir(mode=0o555)
    for folder in [tmp_path, *tmp_path.parents[:-2]]:
        folder.chmod(0o755)

    def become_nobody() -> None:
        os.setresuid(NOBODY, NOBODY, NOBODY)

    ended = command("convert", source, locked / "target", *TO_HF, before=become_nobody)
    assert (ended.status, ended.error) == (
        5,
        f"error: {locked}/target: its parent directory is not writable\n",
    )
    (source / SHARD).chmod(0)
    ended = command("inspect", source, before=become_nobody)
    assert (ended.status, ended.error) == (5, f"error: {source}/{SHARD}: Permission denied\n")


@pytest.mark.parametrize("name", ["source/inside", "link/inside", "source"])
def test_a_target_in_the_source_is_refused(source: Path, tmp_path: Path, name: str) -> None:
    (tmp_path / "link").symlink_to(source)
    with pytest.raises(UsageError, match="SOURCE and TARGET lie in each other"):
        plan(source, tmp_path / name, Options("hf"))


def test_a_source_in_the_target_is_refused(source: Path, tmp_path: Path) -> None:
    (tmp_path / "outer").mkdir()
    shutil.move(source, tmp_path / "outer" / "source")
    (tmp_path / "link").symlink_to(tmp_path / "outer" / "source")
    with pytest.raises(UsageError, match="SOURCE and TARGET lie in each other"):
        plan(tmp_path / "link", tmp_path / "outer", Options("hf", overwrite=True))


def test_a_target_that_is_a_link_is_refused(source: Path, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "target").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(TargetError, match="a link, which would be replaced"):
        plan(source, tmp_path / "target", Options("hf", overwrite=True))


def test_a_snapshot_of_the_hub_s_cache_is_read(source: Path, tmp_path: Path) -> None:
    repository = tmp_path / "models--openai--gpt-oss-20b"
    snapshot, blobs = repository / "snapshots" / "abc", repository / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for number, path in enumerate(sorted(source.iterdir())):
        path.rename(blobs / str(number))
        (snapshot / path.name).symlink_to(Path("..", "..", "blobs", str(number)))
    assert command("check", snapshot, "--read-data").status == 0


@pytest.mark.parametrize("limit", [256, 64])
def test_few_file_descriptors_are_enough_or_named(tmp_path: Path, limit: int) -> None:
    synth(tmp_path / "source", layers=9, workers=1)
    target = tmp_path / "target"

    def few() -> None:
        resource.setrlimit(resource.RLIMIT_NOFILE, (limit, limit))

    words = ("convert", tmp_path / "source", target, *TO_HF, "--max-shard-size", "1kB")
    ended = command(*words, before=few)
    if limit == 256:
        assert ended.status == 0, ended.error
        assert len(list(target.glob("*.safetensors"))) > 128
    else:
        assert ended.status == 5
        assert "Too many open files; allow more open files (ulimit -n 4096)" in ended.error


@needs_seccomp
@pytest.mark.parametrize(
    ("call", "error", "said"),
    [
        ("flock", errno.ENOLCK, "the file system knows no locks; convert to a local disk, then"),
        ("flock", errno.ENOSYS, "the file system knows no locks; convert to a local disk, then"),
        ("fsync", errno.EDQUOT, "Disk quota exceeded; the quota is used up"),
        ("fsync", errno.EIO, "Input/output error"),
        ("pwrite64", errno.ENOSPC, "No space left on device; free some space and run the same"),
        ("pwrite64", errno.EDQUOT, "Disk quota exceeded; the quota is used up"),
        ("pwrite64", errno.EFBIG, "File too large; the file system or a limit allows no file of"),
    ],
)
def test_what_the_kernel_refuses_is_status_5_and_the_run_goes_on(
    source: Path, tmp_path: Path, call: str, error: int, said: str
) -> None:
    words = ("convert", source, tmp_path / "target", *TO_HF)
    ended = command(*words, before=lambda: refuse(call, error))
    assert ended.status == 5
    assert said in ended.error
    assert ended.error.count("\n") == 1
    assert not (tmp_path / "target").exists()
    assert command(*words).status == 0


@as_root
def test_the_limit_of_a_cgroup_is_named_before_any_work(source: Path, tmp_path: Path) -> None:
    try:
        group = Group(64_000_000)
    except OSError:
        pytest.skip("memory cgroups cannot be made here")
    try:
        ended = command("convert", source, tmp_path / "target", *TO_HF, before=group.join)
        assert re.search(r"needs \d+ MB, the machine or its container allows 64 MB", ended.error)
        assert ended.status == 7
        assert sorted(path.name for path in tmp_path.iterdir()) == ["source"]
    finally:
        group.close()


@needs_seccomp
def test_a_target_is_replaced_where_directories_cannot_be_exchanged(
    source: Path, tmp_path: Path
) -> None:
    (tmp_path / "target").mkdir()
    (tmp_path / "target" / "old").touch()
    words = ("convert", source, tmp_path / "target", *TO_HF, "--overwrite")
    assert command(*words, before=lambda: refuse("renameat2", errno.EINVAL)).status == 0
    assert "old" not in contents(tmp_path / "target")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["source", "target"]


def test_a_very_deep_directory_works(source: Path, tmp_path: Path) -> None:
    deep = tmp_path.joinpath(*["x" * 200] * 15)
    deep.mkdir(parents=True)
    source.rename(deep / "source")
    assert command("convert", deep / "source", deep / "target", *TO_HF).status == 0


def test_a_name_that_is_no_utf8_works(source: Path, tmp_path: Path) -> None:
    odd = Path(os.fsdecode(bytes(tmp_path) + b"/caf\xe9"))
    source.rename(odd)
    target = odd.with_name(f"{odd.name} out")
    for words in (["convert", odd, target, *TO_HF], ["check", target], ["inspect", target]):
        line = [sys.executable, "-m", "gptoss_convert", *words]
        for environment in ({"LC_ALL": "C", "PYTHONUTF8": "0"}, {"LC_ALL": "C.UTF-8"}):
            done = subprocess.run(line, capture_output=True, env={**os.environ, **environment})
            assert done.returncode in {0, 8}, done.stderr
            assert b"Traceback" not in done.stderr


@pytest.mark.parametrize("name", ["with a space", "ünïcödé", "x" * 200, "-dash", "a\nb"])
def test_odd_names_of_directories_work(source: Path, tmp_path: Path, name: str) -> None:
    odd = tmp_path / name
    source.rename(odd)
    assert command("convert", odd, tmp_path / f"{name} out", *TO_HF).status == 0


def test_the_locale_and_the_umask_do_not_matter(source: Path, tmp_path: Path) -> None:
    words = [sys.executable, "-m", "gptoss_convert", "convert", source, tmp_path / "t", *TO_HF]
    environment = {**os.environ, "LC_ALL": "C", "PYTHONUTF8": "0", "LANG": "C"}
    subprocess.run(words, check=True, capture_output=True, env=environment, umask=0o022)
    run(plan(source, tmp_path / "expected", Options("hf", workers=1)))
    assert contents(tmp_path / "t") == contents(tmp_path / "expected")
    modes = {path.stat().st_mode & 0o777 for path in (tmp_path / "t").iterdir()}
    assert modes == {0o644}


@pytest.mark.parametrize(("mask", "files", "folders"), [(0, 0o644, 0o755), (0o077, 0o600, 0o700)])
def test_nothing_is_writable_for_all(
    source: Path, tmp_path: Path, mask: int, files: int, folders: int
) -> None:
    target = tmp_path / "target"
    words = ("convert", source, target, "--to", "hf", "--dtype", "bf16", "--workers", "1")
    assert command(*words, before=lambda: os.umask(mask) and None).status == 0
    made = [target, *target.rglob("*")]
    assert {path.stat().st_mode & 0o777 for path in made if path.is_file()} == {files}
    assert {path.stat().st_mode & 0o777 for path in made if path.is_dir()} == {folders}


def test_reports_are_whole_or_as_before_and_not_writable_for_all(tmp_path: Path) -> None:
    """What a gate writes for others: on a disk that is full it neither ends early nor is lost."""
    path = tmp_path / "result.json"
    path.write_text("before")

    def write(text: str, limit: int) -> int:
        child = os.fork()
        if child == 0:
            os.umask(0)
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            try:
                write_text(path, text)
            except DiskError as error:
                os._exit(error.exit_code if str(path) in str(error) else 1)
            os._exit(0)
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])

    assert write("x" * 5000, 1000) == 5
    assert path.read_text() == "before"
    assert write("x" * 5000, 9000) == 0
    assert path.read_text() == "x" * 5000
    assert [(one.name, one.stat().st_mode & 0o777) for one in tmp_path.iterdir()] == [
        ("result.json", 0o644)
    ]


def test_a_reader_that_leaves_ends_the_command_quietly(source: Path) -> None:
    words = f"{sys.executable} -m gptoss_convert inspect {source} --json | head -1"
    done = subprocess.run(
        ["bash", "-c", f"set -o pipefail; {words}"], capture_output=True, text=True, check=False
    )
    assert done.stderr == ""
    assert done.returncode == 0


def test_zeros_and_infinities_are_kept_and_counted_when_asked_for(
    source: Path, tmp_path: Path
) -> None:
    shard, bias = source / SHARD, "model.layers.0.self_attn.q_proj.bias"
    overwrite(shard, "lm_head.weight", bytes(bytes_of(shard, "lm_head.weight")))
    overwrite(shard, bias, bytes(bytes_of(shard, bias)))
    overwrite(shard, "model.norm.weight", b"\x80\x7f\xc0\xff")
    allowed = Options("hf", workers=1, allow_zero=True, allow_nonfinite=True)
    run(plan(source, tmp_path / "target", allowed))
    assert json.loads((tmp_path / "target" / NAME).read_text())["oddities"] == {
        "attention.q.bias": {"nonfinite": 0, "zero": 1},
        "norm.weight": {"nonfinite": 2, "zero": 0},
        "unembedding.weight": {"nonfinite": 0, "zero": 1},
    }


def test_a_bias_of_zeros_is_no_fault(source: Path, tmp_path: Path) -> None:
    bias = "model.layers.0.self_attn.q_proj.bias"
    overwrite(source / SHARD, bias, bytes(bytes_of(source / SHARD, bias)))
    assert command("convert", source, tmp_path / "target", *TO_HF).status == 0
