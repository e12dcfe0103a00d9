"""Several threads write to one file of a RAM disk: which bytes arrive, and what stops none."""

from __future__ import annotations

import ctypes
import errno
import itertools
import os
import random
import resource
import subprocess
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from gptoss_convert.conversion.options import Options
from gptoss_convert.conversion.run import convert
from gptoss_convert.errors import DiskError
from gptoss_convert.machine.arena import PAGE, Arena
from gptoss_convert.machine.ram_disk import SharedPages, lies_in_memory
from gptoss_convert.machine.target_files import TargetFiles
from gptoss_convert.synth.synth import synth
from tests.failing import needs_seccomp, refuse
from tests.killing import contents
from tests.stopping import At, command

SHARED = Path("/dev/shm")


def kind_of(path: Path) -> str:
    """The file system that holds a path, by the table of mounts."""
    number = path.stat().st_dev
    device = f"{os.major(number)}:{os.minor(number)}"
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        if line.split()[2] == device:
            return line.partition(" - ")[2].split()[0]
    raise AssertionError(f"{path}: on no file system that is mounted")


@pytest.fixture
def ram_disk() -> Iterator[Path]:
    if not os.access(SHARED, os.W_OK) or kind_of(SHARED) != "tmpfs":
        pytest.skip("no tmpfs at /dev/shm that may be written")
    with tempfile.TemporaryDirectory(prefix="gptoss-test-", dir=SHARED) as folder:
        yield Path(folder)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("ram-disk") / "source"
    synth(place, layers=1)
    return place


def mounted(place: Path, kind: str, options: str) -> Iterator[Path]:
    place.mkdir()
    line = ["mount", "-t", kind, "-o", options, "none", str(place)]
    if subprocess.run(line, capture_output=True, check=False).returncode:
        pytest.skip("mounting needs root")
    yield place
    subprocess.run(["umount", "-l", str(place)], check=True)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    yield from mounted(tmp_path / "small", "tmpfs", "size=24m")


@pytest.fixture
def ramfs(tmp_path: Path) -> Iterator[Path]:
    yield from mounted(tmp_path / "ramfs", "ramfs", "mode=700")


@pytest.fixture
def held(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """As if others always used write(2); collects what the maps answer."""
    answers: list[bool] = []
    write, new = SharedPages.write, SharedPages.__init__

    def holding(pages: SharedPages, descriptor: int, nbytes: int) -> None:
        new(pages, descriptor, nbytes)
        assert all(pages.turns.acquire(timeout=5) for _ in range(2))

    def telling(pages: SharedPages, source: memoryview, offset: int) -> bool:
        answers.append(write(pages, source, offset))
        return answers[-1]

    monkeypatch.setattr(SharedPages, "__init__", holding)
    monkeypatch.setattr(SharedPages, "write", telling)
    return answers


def filled(content: bytes) -> Arena:
    arena = Arena(len(content))
    arena.memory[: len(content)] = content
    return arena


def lines_of_maps(path: Path, key: str) -> list[str]:
    """What proc(5) says under a key of each map of a file."""
    found: list[str] = []
    inside = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if "-" in line.partition(" ")[0]:
            inside = line.endswith(str(path))
        elif inside and line.startswith(f"{key}:"):
            found.append(line.split(None, 1)[1])
    return found


def test_what_lies_in_memory_is_what_the_mounts_say(ram_disk: Path, tmp_path: Path) -> None:
    for folder in (ram_disk, tmp_path, Path(__file__).parent, Path("/proc")):
        descriptor = os.open(folder, os.O_RDONLY)
        assert lies_in_memory(descriptor) == (kind_of(folder) in {"tmpfs", "ramfs"})
        os.close(descriptor)
    reader, writer = os.pipe()
    assert not lies_in_memory(reader)
    os.close(reader)
    os.close(writer)
    assert not lies_in_memory(reader)


@pytest.mark.parametrize("where", ["ram_disk", "ramfs"])
def test_parts_that_share_pages_arrive_whole_from_several_threads(
    where: str, request: pytest.FixtureRequest, held: list[bool]
) -> None:
    folder: Path = request.getfixturevalue(where)
    draw = random.Random(0)
    size = 5_000_003
    content = draw.randbytes(size)
    cuts = sorted({0, size, *draw.sample(range(1, size), 300)})
    parts = list(itertools.pairwise(cuts))
    draw.shuffle(parts)
    with TargetFiles(folder) as files:
        files.create("file", size)

        def write(mine: list[tuple[int, int]]) -> None:
            arena = filled(content)
            for start, stop in mine:
                files.write("file", start, stop - start, arena, start)

        threads = [threading.Thread(target=write, args=(parts[n::4],)) for n in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        # What the process holds of the map is given back, and the file keeps it.
        assert lines_of_maps(folder / "file", "Rss") == ["0 kB"]
    assert (folder / "file").read_bytes() == content
    assert held == [True] * len(parts)
    assert not lines_of_maps(folder / "file", "Size")


def test_one_thread_writes_one_waits_and_the_others_use_the_map(
    ram_disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here, leave = threading.Semaphore(0), threading.Event()
    pwrite = os.pwrite

    class Announced:
        """A lock that tells of everybody who comes for it."""

        def __init__(self) -> None:
            self._lock = threading.Lock()

        def __enter__(self) -> None:
            here.release()
            self._lock.acquire()

        def __exit__(self, *failure: object) -> None:
            self._lock.release()

    def slow(descriptor: int, view: memoryview, offset: int) -> int:
        assert leave.wait(60)
        return pwrite(descriptor, view, offset)

    monkeypatch.setattr(os, "pwrite", slow)
    arena = filled(bytes(range(256)) * 64)
    with TargetFiles(ram_disk) as files:
        files.create("file", 4 * PAGE)
        pages = files._open["file"].pages
        assert pages is not None
        pages.writing = Announced()  # pyright: ignore[reportAttributeAccessIssue]
        threads = [
            threading.Thread(target=files.write, args=("file", at, PAGE, arena, at))
            for at in (0, PAGE)
        ]
        for thread in threads:
            thread.start()
            assert here.acquire(timeout=20)
        files.write("file", 2 * PAGE, 2 * PAGE, arena, 2 * PAGE)
        half = (ram_disk / "file").read_bytes()
        leave.set()
        for thread in threads:
            thread.join()
    assert half == bytes(2 * PAGE) + arena.memory[2 * PAGE :]
    assert (ram_disk / "file").read_bytes() == arena.memory[:]


def test_nobody_needs_a_map_who_writes_alone(ram_disk: Path) -> None:
    arena = filled(b"xyz" * PAGE)
    with TargetFiles(ram_disk) as files:
        files.create("file", 3 * PAGE)
        for offset in (0, PAGE, 2 * PAGE):
            files.write("file", offset, PAGE, arena, offset)
        assert not lines_of_maps(ram_disk / "file", "Size")
    assert (ram_disk / "file").read_bytes() == arena.memory[:]


def test_a_file_that_somebody_cuts_is_no_signal(ram_disk: Path, held: list[bool]) -> None:
    """What would be written beyond its end is written as without a map."""
    arena = filled(b"x" * 4 * PAGE)
    with TargetFiles(ram_disk) as files:
        files.create("file", 4 * PAGE)
        files.write("file", 0, PAGE, arena, 0)
        os.truncate(ram_disk / "file", PAGE)
        files.write("file", PAGE, 3 * PAGE, arena, PAGE)
    assert held == [True, False]
    assert (ram_disk / "file").read_bytes() == arena.memory[:]


def test_where_addresses_are_limited_no_file_is_mapped(ram_disk: Path, held: list[bool]) -> None:
    arena = filled(b"x" * PAGE)
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (1 << 45, before[1]))
    try:
        with TargetFiles(ram_disk) as files:
            files.create("file", PAGE)
            files.write("file", 0, PAGE, arena, 0)
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)
    assert held == [False]
    assert (ram_disk / "file").read_bytes() == arena.memory[:]


@pytest.mark.parametrize(
    ("access", "offset"), [(os.O_RDONLY, 0), (os.O_RDWR, 1), (os.O_RDWR, -1), (os.O_RDWR, PAGE)]
)
def test_what_cannot_be_mapped_or_lies_beyond_is_not_written(
    access: int, offset: int, ram_disk: Path
) -> None:
    (ram_disk / "file").write_bytes(b"y" * PAGE)
    descriptor = os.open(ram_disk / "file", access)
    pages = SharedPages(descriptor, PAGE)
    assert not pages.write(memoryview(bytearray(PAGE)), offset)
    pages.close()
    os.close(descriptor)
    assert (ram_disk / "file").read_bytes() == b"y" * PAGE


def test_a_full_disk_is_an_error_and_no_signal(small_disk: Path, held: list[bool]) -> None:
    arena = filled(b"x" * (4 << 20))
    with TargetFiles(small_disk) as files:
        files.create("file", 64 << 20)
        with pytest.raises(DiskError, match=r"file: No space left on device; free some space"):
            for offset in range(0, 64 << 20, 4 << 20):
                files.write("file", offset, 4 << 20, arena, 0)
    assert held[:5] == [True] * 5
    assert not held[-1]


@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
def test_a_conversion_whose_disk_fills_up_has_status_5(
    source: Path, small_disk: Path, held: list[bool]
) -> None:
    def fill() -> None:
        with (small_disk / "filler").open("wb") as stream, pytest.raises(OSError, match="No space"):
            while True:
                stream.write(bytes(1 << 16))
                stream.flush()

    words = ("convert", source, small_disk / "target", "--to", "hf", "--workers", "2", "--quiet")
    ended = command(*words, at=At(3, fill))
    assert ended.status == DiskError.exit_code, ended.error
    assert "No space left on device; free some space" in ended.error
    (small_disk / "filler").unlink()
    assert command(*words).status == 0
    assert command("check", small_disk / "target", "--read-data", "--quiet").status == 0


@needs_seccomp
@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
def test_a_sandbox_that_forbids_the_call_costs_speed_alone(
    source: Path, ram_disk: Path, held: list[bool]
) -> None:
    def forbid() -> None:
        refuse("process_vm_writev", errno.EPERM)
        assert ctypes.CDLL(None).process_vm_writev(os.getpid(), None, 0, None, 0, 0) == -1

    words = ("convert", source, ram_disk / "target", "--to", "hf", "--workers", "2", "--quiet")
    ended = command(*words, before=forbid)
    assert ended.status == 0, ended.error
    assert command("check", ram_disk / "target", "--read-data", "--quiet").status == 0


@pytest.mark.parametrize(
    ("to", "dtype"), [("hf", "bf16"), ("hf", "mxfp4"), ("openai", "keep"), ("megatron", "keep")]
)
def test_a_conversion_writes_the_same_bytes_as_on_a_disk(
    to: str, dtype: str, source: Path, tmp_path: Path, ram_disk: Path, held: list[bool]
) -> None:
    options = Options(to, dtype, workers=4)
    if kind_of(tmp_path) == "tmpfs":
        pytest.skip("the folder of temporary files is no disk")
    convert(source, tmp_path / "target", options)
    assert not held
    convert(source, ram_disk / "target", options)
    assert held and all(held)
    found = contents(ram_disk / "target")
    assert found == contents(tmp_path / "target")
