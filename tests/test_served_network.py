"""Servers that fail, lie or mean harm: one line, status 3 or 6, bounded memory and time, no key."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
import tracemalloc
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch

from gptoss_convert.errors import GptossError, InputError, NetworkError, UsageError
from gptoss_convert.synth.synth import synth
from gptoss_convert.verify.result import ServedOptions
from gptoss_convert.verify.served import verify_served
from gptoss_convert.witness.hf import HfReader
from gptoss_convert.witness.served.connection import Address, Connection, FailedError, Room
from tests.served_server import Engine, Hostile, running, serving
from tests.test_documents import follows_its_schema
from tests.test_served import computed

KEY = "sk-Zq81-secret/key+value=="
NAME = "SERVED_TEST_KEY"


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("network") / "tiny"
    synth(root, layers=1)
    return root


def completion(prompt: object, logprobs: object = None) -> bytes:
    choice = {"text": "", "prompt_logprobs": prompt, "logprobs": logprobs}
    return json.dumps({"choices": [choice]}).encode()


def echo_key(server: Hostile) -> None:
    """Puts the key it was given into whatever it says."""
    given = server.headers["Authorization"] or ""
    told = {"message": f"Invalid header {given}; did you mean {given[7:20]}?"}
    server.say(json.dumps({"error": told}).encode(), status=400)


def nan_logprobs(server: Hostile) -> None:
    entries = [None, *[{"5": {"logprob": float("nan")}}] * 80]
    server.say(completion(entries))


def impossible(value: str) -> Callable[[Hostile], None]:
    """Log probabilities that are none."""
    entry = '{"%d": {"logprob": ' + value + "}}"

    def act(server: Hostile) -> None:
        listed = ", ".join(["null", *(entry % token for token in server.prompt()[1:])])
        server.say(f'{{"choices": [{{"prompt_logprobs": [{listed}]}}]}}'.encode())

    return act


LIKELY = {"logprob": -0.1}
HOSTILE: dict[str, tuple[Callable[[Hostile], None], int, str]] = {
    "a web page": (
        lambda s: s.say(b"<!doctype html><p>hello", Content_Type="text/html"),
        3,
        "answered a web page, not JSON",
    ),
    "not JSON": (lambda s: s.say(b"{"), 3, "not JSON"),
    "nothing": (lambda s: s.say(b""), 3, "gives no log prob"),
    "no object": (lambda s: s.say(b"[1, 2]"), 3, "expects a JSON object"),
    "no UTF-8": (lambda s: s.say(b'{"a": "\xff"}'), 3, "not UTF-8"),
    "NaN": (nan_logprobs, 3, "NaN is not a JSON number"),
    "infinity": (impossible("-1e999"), 3, "not JSON: -1e999 is no finite number"),
    "a probability above 1": (impossible("3.5"), 3, "expects log probabilities up to 0"),
    "a text for a number": (impossible('"0.5"'), 3, "expects a log probability, found a text"),
    "about other tokens": (
        lambda s: s.say(completion([None, *[{"1": {"logprob": -1.0}}] * (len(s.prompt()) - 1)])),
        3,
        "the server answers about others",
    ),
    "ids beyond the vocabulary": (
        lambda s: s.say(completion([None, *[{"999": {"logprob": -1}}] * (len(s.prompt()) - 1)])),
        3,
        "expects token ids from 0 to 287",
    ),
    "more than 1 in all": (
        lambda s: s.say(
            completion([None, *({f"{t}": LIKELY, "3": LIKELY} for t in s.prompt()[1:])])
        ),
        3,
        "add up to more than 1",
    ),
    "text only": (lambda s: s.say(b'{"choices": [{"text": "hi"}]}'), 3, "gives no log prob"),
    "nested too deep": (lambda s: s.say(b'{"a":' + b"[" * 5000), 3, "nested too deep"),
    "many small values": (
        lambda s: s.say(b'{"a": [' + b"[]," * 300_000 + b"[]]}"),
        3,
        "answered more values than were asked for",
    ),
    "a huge length": (
        lambda s: s.say(b"{}", Content_Length="99999999999"),
        3,
        "announces 99999999999 bytes",
    ),
    "a length too large": (
        lambda s: s.say(b'{"choices": []}', Content_Length="500"),
        6,
        "connection failed|no whole answer|not HTTP",
    ),
    "never ends": (lambda s: s.endless(b"[" * 65536), 3, "answered more than"),
    "drips": (lambda s: s.endless(b" ", pause=0.05), 6, "no whole answer within 1 s"),
    "drips headers": (lambda s: s.drip(), 6, "no whole answer within 1 s"),
    "says nothing": (lambda s: time.sleep(1.5), 6, "no whole answer within 1 s"),
    "no HTTP": (lambda s: s.raw(b"\x00\x01\x02\x03\r\n\r\n"), 6, "not HTTP"),
    "leaves": (lambda s: s.raw(b""), 6, "not HTTP|connection failed"),
    "fails": (lambda s: s.say(b'{"error": "boom"}', status=500), 6, r"failed \(500\): .*boom"),
    "redirects": (
        lambda s: s.say(b"", status=307, Location="http://127.0.0.1:1/"),
        6,
        r"redirects elsewhere \(307\)",
    ),
    "echoes the key": (echo_key, 3, "not shown: it repeats the key"),
}


@pytest.mark.parametrize("fault", HOSTILE)
def test_a_hostile_server_ends_in_one_line(
    tiny: Path, fault: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    act, status, says = HOSTILE[fault]
    monkeypatch.setenv(NAME, KEY)
    options = ServedOptions(device="cpu", timeout=1, api_key_env=NAME)
    began = time.monotonic()
    tracemalloc.start()
    with (
        running(type("Bound", (Hostile,), {"act": act})) as url,
        pytest.raises(GptossError, match=says) as caught,
    ):
        verify_served(tiny, url, options)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert caught.value.exit_code == status
    told = str(caught.value)
    assert "\n" not in told and len(told) < 800
    assert not any(KEY[n : n + 6] in told for n in range(len(KEY) - 5))
    assert peak < 60e6
    assert time.monotonic() - began < 30


def refuses(status: int) -> Callable[[Hostile], None]:
    return lambda server: server.say(b'{"error": {"message": "no"}}', status=status)


@pytest.mark.parametrize("status", [401, 403])
def test_without_access_the_option_is_named(status: int) -> None:
    with running(type("Bound", (Hostile,), {"act": refuses(status)})) as url:
        with pytest.raises(NetworkError, match=rf"refused \({status}\): pass a key by --api-key"):
            Connection(url).post("/x", {}, Room())
        with pytest.raises(NetworkError, match=rf"refused \({status}\): the key is not accepted"):
            Connection(url, KEY).post("/x", {}, Room())


@pytest.mark.parametrize(
    ("status", "headers", "waits"),
    [(429, {}, [1.0, 2.0, 4.0]), (429, {"Retry-After": "3"}, [3.0, 3.0, 4.0]),
     (503, {"Retry-After": "9999"}, [20.0] * 3), (500, {"Retry-After": "soon"}, [1.0, 2.0, 4.0])],
)  # fmt: skip
def test_a_busy_server_is_tried_again_with_patience(
    status: int, headers: dict[str, str], waits: list[float]
) -> None:
    act = lambda server: server.say(b"{}", status=status, **headers)  # noqa: E731
    slept: list[float] = []
    with running(type("Bound", (Hostile,), {"act": act})) as url:
        connection = Connection(url, sleep=slept.append)
        with pytest.raises(FailedError, match=rf"\({status}\).*, 4 times; run the same command"):
            connection.post("/x", {}, Room())
    assert slept == waits


def test_a_server_that_recovers_is_no_failure() -> None:
    left = [503, 429]

    def act(server: Hostile) -> None:
        status = left.pop() if left else 200
        server.say(b'{"fine": 1}', status=status)

    with running(type("Bound", (Hostile,), {"act": act})) as url:
        reply = Connection(url, sleep=lambda seconds: None).post("/x", {}, Room())
    assert (reply.status, reply.content) == (200, {"fine": 1})


def test_where_nothing_listens_it_is_said() -> None:
    with running(BaseHTTPRequestHandler) as url:
        pass
    with pytest.raises(NetworkError, match="nothing listens there, 4 times"):
        Connection(url, sleep=lambda seconds: None).get("/v1/models")


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("http://host:8000", "http://host:8000"),
        ("http://host:8000/v1/", "http://host:8000"),
        ("https://[::1]/route/v1", "https://[::1]/route"),
    ],
)
def test_addresses_are_taken_with_and_without_v1(url: str, shown: str) -> None:
    assert str(Address.of(url)) == shown


@pytest.mark.parametrize(
    "url",
    ["host:8000", "ftp://host", "http://", "http://user:hunter2@host", "http://host/?key=hunter2",
     "http://host/#hunter2", "http://ho st/hunter2", "http://host:port", "http://host/\n"],
)  # fmt: skip
def test_an_address_that_is_none_or_holds_a_secret_is_refused_unseen(url: str) -> None:
    with pytest.raises(UsageError) as caught:
        Address.of(url)
    assert "hunter2" not in str(caught.value)


@pytest.mark.parametrize("key", ["two words", "line\nbreak", "ümlaut", ""])
def test_a_key_that_no_header_holds_is_refused_unseen(
    tiny: Path, key: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(NAME, key)
    with pytest.raises(UsageError) as caught:
        verify_served(tiny, "http://127.0.0.1:1", ServedOptions(api_key_env=NAME))
    assert not key or key not in str(caught.value)


def test_a_key_over_plain_http_to_elsewhere_is_remarked_on() -> None:
    assert Connection("http://127.0.0.1:8000", KEY).notes == []
    assert Connection("https://example.org", KEY).notes == []
    assert "unencrypted" in Connection("http://example.org", KEY).notes[0]


def run(*words: object, key: str | None = None) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"} | ({NAME: key} if key else {})
    return subprocess.run(
        [sys.executable, "-m", "gptoss_convert", *map(str, words)],
        capture_output=True, text=True, timeout=120, env=environment,
    )  # fmt: skip


def test_the_command_writes_every_report_and_the_key_into_none(tiny: Path, tmp_path: Path) -> None:
    reader = HfReader(tiny, torch.device("cpu"))
    engine = Engine(computed(reader), name=f"model {KEY}", key=KEY)
    (tmp_path / "own.jsonl").write_text(json.dumps(list(range(60))))
    with serving("vLLM", engine) as url:
        words = ["verify", tiny, "--served", f"{url}/v1", "--api-key-env", NAME, "--device", "cpu"]
        words += [
            "--tokens",
            tmp_path / "own.jsonl",
            "--every-mistake",
            "--json",
            tmp_path / "v.json",
        ]
        words += ["--junit", tmp_path / "v.xml", "--report", tmp_path / "pages"]
        done = run(*words, key=KEY)
        assert (done.returncode, done.stdout.splitlines()[0][:6]) == (0, "same: "), done.stderr
        refused = run(*words[:4], "--json", "-q", key=None)
        assert refused.returncode == 6
        assert follows_its_schema(refused.stdout)["exit_code"] == 6
    found = follows_its_schema((tmp_path / "v.json").read_text())
    assert found["target"]["path"] == url
    assert found["target"]["model"] == "(not shown: it repeats the key)"
    cases = ElementTree.parse(tmp_path / "v.xml").getroot().findall("testcase")
    assert [case.get("name") for case in cases] == ["header", "served"]
    written = [path.read_text() for path in tmp_path.rglob("*") if path.is_file()]
    assert len(written) == 5
    for text in (done.stdout, done.stderr, *written):
        assert not any(KEY[n : n + 6] in text for n in range(len(KEY) - 5))
    page = (tmp_path / "pages" / "report.md").read_text()
    assert "The server answers as the model does" in page
    assert "Which known mistake" in page
    sent = {headers.get("Authorization") for headers in engine.headers}
    assert sent == {f"Bearer {KEY}", None}


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("a", "Missing argument 'TARGET', or --served URL"),
        ("a b --served http://x", "Give TARGET or --served URL, not both"),
        ("a b --model m", "--model needs --served URL"),
        ("a --served http://x --level values", "--level does not go with --served"),
        ("a --served http://x --from-target hf", "--from-target does not go with --served"),
        ("a --served http://x --rank-log l", "--rank-log does not go with --served"),
    ],
)
def test_options_of_the_other_form_are_refused(line: str, says: str) -> None:
    from click.testing import CliRunner

    from gptoss_convert.cli.main import cli

    done = CliRunner().invoke(cli, ["verify", *line.split()])
    assert done.exit_code == 2
    assert says in done.stderr


def test_a_server_that_answers_honestly_at_first_is_not_trusted_later(tiny: Path) -> None:
    class Turning(Hostile):
        asked = 0

        @staticmethod
        def act(server: Hostile) -> None:
            Turning.asked += 1
            tokens = server.prompt()
            known = [None, *({str(token): {"logprob": -2.0}} for token in tokens[1:])]
            server.say(completion(known if Turning.asked == 1 else known[:-3]))

    with running(Turning) as url, pytest.raises(InputError, match=r"about 189 of 192 tokens"):
        verify_served(tiny, url, ServedOptions(device="cpu"))
