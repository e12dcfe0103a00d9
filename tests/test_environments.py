"""Environments times commands: status 1 is the answer 'different', and nothing else is."""

from __future__ import annotations

import errno
import json
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import wait
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from gptoss_convert.__main__ import StoppedError
from gptoss_convert.__main__ import _last_words as last_words
from gptoss_convert.cli import main as commands
from gptoss_convert.conversion.options import Options
from gptoss_convert.conversion.run import convert
from gptoss_convert.machine.failures import meaning
from gptoss_convert.synth.synth import synth
from tests.failing import needs_seccomp, refuse
from tests.stopping import Ended, command

pytestmark = pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
START = [sys.executable, "-m", "gptoss_convert"]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("environments")
    synth(root / "a", layers=1, workers=1)
    convert(root / "a", root / "b", Options("hf", "bf16", workers=1))
    synth(root / "c", layers=1, workers=1, seed=5)
    return root


def onto(number: int, path: str) -> None:
    opened = os.open(path, os.O_WRONLY)
    os.dup2(opened, number)
    os.close(opened)


def closed(*numbers: int) -> None:
    """As Python finds them where the shell has closed them: no descriptor, no stream."""
    for number in numbers:
        os.close(number)
        setattr(sys, ("stdin", "stdout", "stderr")[number], None)


def without_threads() -> None:
    refuse("clone3", errno.EAGAIN)
    refuse("clone", errno.EAGAIN)


def little_memory() -> None:
    """Less than what a forked child has already."""
    resource.setrlimit(resource.RLIMIT_AS, (60_000_000, 60_000_000))


COMMANDS: dict[str, tuple[str, ...]] = {
    "inspect": ("inspect", "a"),
    "check": ("check", "a", "--read-data", "--workers", "1"),
    "same": ("verify", "a", "b", "--level", "values"),
    "different": ("verify", "a", "c", "--level", "values", "--workers", "1"),
    "diff": ("diff", "a", "c", "--workers", "1"),
    "convert": ("convert", "a", "out", "--to", "hf", "--workers", "1", "--overwrite"),
    "nothing": ("inspect", "nothing", "--json"),
    "mistake": ("inspect", "--no-such-option"),
}
USUAL = {"different": 1, "diff": 1, "nothing": 2, "mistake": 2}
ENVIRONMENTS: dict[str, tuple[Callable[[], object], dict[str, int]]] = {
    "usual": (lambda: None, USUAL),
    "stderr on a full disk": (lambda: onto(2, "/dev/full"), USUAL),
    "stderr closed": (lambda: closed(2), USUAL),
    "stdout closed": (lambda: closed(1), USUAL),
    "all closed": (lambda: closed(0, 1, 2), USUAL),
    # What was to be said cannot be; what ends with another status has said so on stderr.
    "stdout on a full disk": (
        lambda: onto(1, "/dev/full"),
        {**dict.fromkeys(COMMANDS, 5), "nothing": 2, "mistake": 2},
    ),
    "both on a full disk": (
        lambda: (onto(1, "/dev/full"), onto(2, "/dev/full")),
        {**dict.fromkeys(COMMANDS, 5), "nothing": 2, "mistake": 2},
    ),
    "little memory": (little_memory, dict.fromkeys(COMMANDS, 7)),
    "no threads": (without_threads, {**dict.fromkeys(COMMANDS, 7), **USUAL, "inspect": 0}),
}
NEED_THREADS = {"different", "diff"}


@needs_seccomp
@pytest.mark.parametrize("environment", ENVIRONMENTS)
def test_no_environment_makes_a_command_say_different(
    environment: str, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(place)
    spoil, expected = ENVIRONMENTS[environment]
    if environment == "no threads":
        expected = {**expected, **dict.fromkeys(NEED_THREADS, 7)}
    found: dict[str, int] = {}
    for name, words in COMMANDS.items():
        ended = command(*words, before=spoil)
        assert "Traceback" not in ended.error
        found[name] = ended.status
    assert found == {name: expected.get(name, 0) for name in COMMANDS}


@pytest.mark.parametrize(
    ("shell", "status"),
    [
        ("exec {} inspect a >&- 2>&-", 0),
        ("exec {} diff a c <&- >&- 2>&-", 1),
        ("ulimit -v 120000; exec {} diff a b", 7),
        ("exec {} diff a b >/dev/full 2>/dev/full", 5),
    ],
)
def test_a_shell_starts_it_so(shell: str, status: int, place: Path) -> None:
    line = shell.format(" ".join(START))
    done = subprocess.run(["bash", "-c", line], cwd=place, capture_output=True, timeout=60)
    assert done.returncode == status
    assert b"Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("variables", "status"),
    [
        ({"PYTHONINSPECT": "1"}, {"diff a b": 0, "diff a c": 1}),
        ({"TORCHELASTIC_RUN_ID": "x", "WORLD_SIZE": "two"}, {"verify a b --level values": 2}),
        ({"TORCHELASTIC_RUN_ID": "x", "WORLD_SIZE": "2"}, {"verify a b --level values": 2}),
    ],
)
def test_variables_decide_no_status(
    variables: dict[str, str], status: dict[str, int], place: Path
) -> None:
    for words, expected in status.items():
        done = subprocess.run(
            [*START, *words.split()],
            cwd=place,
            env={**os.environ, **variables},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=60,
        )
        assert done.returncode == expected
        assert b"Traceback" not in done.stderr


def test_a_result_that_is_written_in_part_is_an_error(place: Path) -> None:
    """Also where Python does not buffer: it would drop the rest, without a word."""
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    with suppress(BlockingIOError):
        while True:
            os.write(writing, bytes(4096))
    done = subprocess.run(
        [*START, "completion", "bash"],
        env={**os.environ, "PYTHONUNBUFFERED": "1"},
        stdout=writing,
        stderr=subprocess.PIPE,
        timeout=60,
    )
    os.close(reading)
    os.close(writing)
    assert done.returncode == 5 and b"error: stdout: " in done.stderr


def test_a_descriptor_that_was_closed_is_given_to_no_file(place: Path) -> None:
    """Else a library's words on stderr would land in the checkpoint that is being written."""

    def spoil() -> None:
        closed(1, 2)
        before = commands.convert.callback
        assert before is not None

        def speaking(*words: object, **more: object) -> object:
            os.write(2, b"a library's words")
            return before(*words, **more)

        commands.convert.callback = speaking

    ended = command("convert", place / "a", place / "silent", "--to", "hf", before=spoil)
    assert ended.status == 0
    assert command("check", place / "silent", "--read-data", "--workers", "1").status == 0


def failing(error: BaseException) -> Ended:
    def spoil() -> None:
        def fail(*words: object, **more: object) -> object:
            raise error

        commands.inspect.callback = fail  # pyright: ignore[reportAttributeAccessIssue]

    return command("inspect", ".", before=spoil)


def panic(text: str) -> BaseException:
    """As libraries in Rust raise it."""
    return type("PanicException", (BaseException,), {})(text)


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (panic("index out of bounds"), 3),
        (MemoryError(), 7),
        (ImportError("libx.so: failed to map segment from shared object"), 7),
        (RuntimeError("can't start new thread"), 7),
        (OSError(errno.ENOMEM, os.strerror(errno.ENOMEM)), 7),
        (OSError(errno.EAGAIN, os.strerror(errno.EAGAIN)), 7),
        (OSError(errno.EIO, os.strerror(errno.EIO), "a"), 5),
        (GeneratorExit("odd"), 70),
        (ValueError("a bug"), 70),
        (KeyboardInterrupt(), 130),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, BaseException) else str(value),
)
def test_whatever_is_raised_has_its_status(error: BaseException, status: int) -> None:
    ended = failing(error)
    assert ended.status == status
    assert ("Traceback" in ended.error) == (status == 70)


def test_a_bug_tells_no_secret(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_the-token-itself")
    ended = failing(ValueError("https://me:hunter2@hub/x?sig=abc hf_the-token-itself"))
    assert "Traceback" in ended.error and "https://***@hub/x?***" in ended.error
    assert not [one for one in ("hunter2", "abc", "the-token") if one in ended.error]


@needs_seccomp
def test_threads_that_openmp_cannot_start_are_status_7(place: Path) -> None:
    """OpenMP ends a process with status 1, which means 'different'."""
    torch = pytest.importorskip("torch")
    from gptoss_convert.verify import logits_level
    from gptoss_convert.witness import fetch

    def spoil() -> None:
        torch.set_num_threads(4)
        level = logits_level.logits_level
        fetch._threads.cache_clear()  # those of the process that was forked are not here
        # The threads that read are there already.
        wait([fetch._threads().submit(time.sleep, 0.1) for _ in range(16)])

        def alone(*words: Any, **more: Any) -> Any:
            without_threads()
            return level(*words, **more)

        logits_level.logits_level = alone

    words = ("verify", place / "a", place / "b", "--max-length", "8")
    assert command(*words, before=spoil).status == 7


def test_a_tokenizer_that_makes_its_library_panic_is_bad_input(place: Path, tmp_path: Path) -> None:
    pytest.importorskip("tokenizers")
    from gptoss_convert.errors import InputError
    from gptoss_convert.formats.checkpoint import Choices
    from gptoss_convert.formats.registry import open_checkpoint
    from gptoss_convert.verify.prompts import load_tokenizer

    path = tmp_path / "tokenizer.json"
    for file in (place / "b").iterdir():
        if file.is_file() and file.name != path.name:
            (tmp_path / file.name).symlink_to(file)
    content = json.loads((place / "b" / "tokenizer.json").read_text())
    content["normalizer"] = {"type": "Precompiled", "precompiled_charsmap": "AAAA"}
    path.write_text(json.dumps(content))
    from gptoss_convert.containers.paths import Followed

    with pytest.raises(InputError, match="no tokenizer: Precompiled"):
        load_tokenizer([open_checkpoint(Followed(tmp_path), Choices(follow_links=True))])


def test_an_error_of_our_own_stays_what_it_is() -> None:
    for raised in (MemoryError(), ValueError()):
        known = meaning(raised)
        assert (known is None) == isinstance(raised, ValueError)


@pytest.mark.parametrize(
    ("number", "module"),
    [
        (signal.SIGINT, "gptoss_convert.machine.standard_streams"),
        (signal.SIGTERM, "click"),
        (signal.SIGINT, "gptoss_convert.show.report"),
    ],
)
def test_a_signal_while_it_begins_ends_it_with_its_status(
    number: signal.Signals, module: str, place: Path
) -> None:
    """Sent when a module of its beginning is looked for."""
    code = f"""
import os, sys
class Signalling:
    @staticmethod
    def find_spec(name, path=None, target=None):
        if name == {module!r}:
            os.kill(os.getpid(), {int(number)})
sys.meta_path.insert(0, Signalling)
sys.argv = ["gptoss-convert", "inspect", "a"]
from gptoss_convert.__main__ import main
main()
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=place, capture_output=True, timeout=60)
    assert b"Traceback" not in done.stderr
    assert b"terminated" in done.stderr or b"interrupted" in done.stderr
    assert (done.returncode, done.stdout) == (128 + number, b"")


@pytest.mark.parametrize(
    ("error", "status", "said"),
    [
        (StoppedError(signal.SIGINT), 130, "error: interrupted\n"),
        (StoppedError(signal.SIGTERM), 143, "error: terminated\n"),
        (KeyboardInterrupt(), 130, "error: interrupted\n"),
        (MemoryError(), 7, "error: out of memory\n"),
    ],
)
def test_last_words_say_what_ended_it(
    error: BaseException, status: int, said: str, capfd: pytest.CaptureFixture[str]
) -> None:
    """A signal may come between two steps of the beginning, where nothing else tells."""
    assert last_words(error) == status
    assert capfd.readouterr().err == said
