"""What must not leave: one scrubber, and every way on which text leaves."""

from __future__ import annotations

import json
import logging
import shutil
import time
from pathlib import Path
from xml.etree import ElementTree

import pytest
from huggingface_hub import get_session, snapshot_download

from gptoss_convert import Options, plan
from gptoss_convert.conversion.run import run
from gptoss_convert.conversion.shareable import require_shareable
from gptoss_convert.errors import GptossError, NetworkError, UsageError, secrets
from gptoss_convert.errors.secrets import keep, nameable, scrub
from gptoss_convert.formats.repository import Repository
from gptoss_convert.hub.client import resolve, translated
from gptoss_convert.machine.progress import Lines
from gptoss_convert.show import report
from gptoss_convert.show.texts import write_text
from gptoss_convert.synth.synth import synth

TOKEN = "hf_" + "aB3" * 11


@pytest.fixture(autouse=True)
def own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(secrets, "_kept", set())
    for name, value in (
        ("HF_ENDPOINT", "https://user:pa/ss@w0rd%21@hub.example"),
        ("HTTPS_PROXY", "http://me:pr0xy-word@proxy:8"),
        ("NO_SCHEME_PROXY", "me:bare-word@proxy:8"),
        ("HF_TOKEN", "the-token-itself"),
        ("WORK_API_KEY", "sk-key-of-work"),
        ("TOKENIZERS_PARALLELISM", "parallel-or-not"),
        ("HF_TOKEN_PATH", "/etc/hub/token"),
    ):
        monkeypatch.setenv(name, value)


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("https://user:pw@hub/x: 404", "https://***@hub/x: 404"),
        ("'https://cdn/a?signature=1&x=2' thrown", "'https://cdn/a?***' thrown"),
        ('{"url": "http://h:8/a?key=1"}', '{"url": "http://h:8/a?***"}'),
        ("https://h/a#access_token=1 z", "https://h/a#*** z"),
        ("https://h?token=1", "https://h?***"),
        (
            "size 79 ((…)apter_model.safetensors?X-Sig=secret&b=1).",
            "size 79 ((…)apter_model.safetensors?***).",
        ),
        ("https:/me:pw@h/x?sig=1: no such directory", "https:/***@h/x?***"),
        ("ftp://me:pw@h", "ftp://***@h"),
        ("HTTPS://A:B@H", "HTTPS://***@H"),
        ("cannot reach https://user:pa/ss@w0rd%21@hub.example/x", "cannot reach https://***@hub"),
        ("decoded: pa/ss@w0rd!", "decoded: ***"),
        ("proxy says pr0xy-word", "proxy says ***"),
        ("and the other one bare-word", "and the other one ***"),
        ("Authorization: Bearer abc.def-9", "Authorization: Bearer ***"),
        (f"token {TOKEN} x", "token *** x"),
        ("the-token-itself and sk-key-of-work", "*** and ***"),
    ],
)
def test_secrets_are_hidden(text: str, shown: str) -> None:
    assert scrub(text).startswith(shown)


@pytest.mark.parametrize(
    "text",
    [
        "hf://owner/name@main",
        "hf://openai/gpt-oss-20b: no revision 'v1'",
        "http://[::1]:8000/v1 answered",
        "see https://hub.example/docs?",
        "hf_checkpoint/model.safetensors: truncated",
        "someone@example.org wrote /etc/hub/token, parallel-or-not",
        "file:///home/x/model",
        "x/model:/y@z: odd",
        "no such file? name=x",
    ],
)
def test_what_is_no_secret_stays(text: str) -> None:
    assert scrub(text) == text


def test_a_long_text_takes_no_time() -> None:
    """What is scrubbed may repeat a file of others."""
    texts = ("a" * 400_000 + "://x", "http://a/b?c " * 30_000, "http://" * 60_000, "a:/" * 100_000)
    began = time.process_time()
    for text in texts:
        scrub(text)
    assert time.process_time() - began < 3


def test_what_is_kept_is_hidden() -> None:
    assert scrub("abcdef") == "abcdef"
    keep("abcdef")
    assert scrub("xabcdefx") == "x***x"


def test_no_error_holds_a_secret() -> None:
    for kind in (GptossError, NetworkError):
        assert str(kind("https://a:b@h/x?y=1")) == "https://***@h/x?***"


def test_notes_and_files_hold_no_secret(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Lines().note("https://a:bcdefg@h/x")
    assert capsys.readouterr().err == "note: https://***@h/x\n"
    write_text(tmp_path / "x", "https://a:bcdefg@h/x the-token-itself \udcff")
    assert (tmp_path / "x").read_text() == "https://***@h/x *** \\udcff"


def test_junit_is_xml_whatever_it_repeats() -> None:
    odd = "a\x00\x1b[31m\ud800\ufffe\x0b<&'\""
    level = {"name": "values", "same": False, "findings": [odd, "two"], "seconds": 1.0}
    summary = {"source": {"path": odd}, "target": {"path": "b"}, "levels": [level]}
    suite = ElementTree.fromstring(report.junit(summary).encode())
    shown = "a\\x00\\x1b[31m\\ud800\\ufffe\\x0b<&'\""
    assert suite.attrib["name"] == f"{shown} against b"
    failure = suite.find("testcase/failure")
    assert failure is not None and failure.attrib["message"] == shown
    assert failure.text == f"{shown}\ntwo"


def test_warnings_of_the_client_hold_no_secret(capsys: pytest.CaptureFixture[str]) -> None:
    assert get_session and snapshot_download
    with translated(Repository("a/b")):
        logging.getLogger("huggingface_hub.utils._http").warning(
            "retry %s", "https://user:pa/ss@w0rd%21@hub.example/x?sig=1"
        )
    said = capsys.readouterr().err
    assert not [one for one in ("w0rd", "sig=1") if one in said]


FORMATS = {
    "hf": Options("hf", "bf16", workers=1),
    "openai": Options("openai", "mxfp4", workers=1),
    "megatron": Options("megatron", workers=1),
}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("secrets") / "source"
    synth(place, layers=1, workers=1)
    return place


@pytest.mark.parametrize("to", FORMATS)
def test_nothing_that_is_written_tells_where_it_was_made(
    to: str, source: Path, tmp_path: Path
) -> None:
    planned = plan(source.absolute(), tmp_path / "out", FORMATS[to])
    require_shareable(planned)
    run(planned)
    for path in (tmp_path / "out").rglob("*"):
        content = path.read_bytes() if path.is_file() else b""
        for place in (source.parent, tmp_path):
            assert str(place).encode() not in content, path
    manifest = json.loads((tmp_path / "out" / "gptoss-convert.json").read_text())
    assert manifest["from"]["path"] == "source"


def test_paths_are_named_by_their_last_part() -> None:
    given = {"path": "/home/a/b", "base": "~/x/y", "kept": ["org/name", 3, "../up/z"], "no": None}
    kept = {"path": "b", "base": "y", "kept": ["org/name", 3, "z"], "no": None}
    assert nameable(given) == kept


@pytest.mark.parametrize(
    ("said", "told"),
    [
        ("tuned from /home/alice/models/x", "the local path /home/alice/models"),
        ("see {source}/notes", "the local path "),
        ("export HF_TOKEN=the-token-itself", "a token or password"),
        (f"my token is {TOKEN}", "a token or password"),
    ],
)
def test_what_would_tell_too_much_is_not_pushed(
    said: str, told: str, source: Path, tmp_path: Path
) -> None:
    place = tmp_path / "source"
    shutil.copytree(source, place)
    (place / "README.md").write_text(said.format(source=place))
    planned = plan(place, tmp_path / "out", FORMATS["hf"])
    with pytest.raises(UsageError, match=f"--push-to: README.md would publish {told}"):
        require_shareable(planned)


@pytest.mark.parametrize("address", ["https://user:pa/ss@hub", "hub.example", "https://h:x1y2", ""])
def test_an_endpoint_that_is_no_address_is_named_and_not_shown(
    address: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_ENDPOINT", address)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(GptossError) as caught:
        resolve(Repository("no/where"))
    assert (caught.value.exit_code == 2) == bool(address)
    assert (
        not address or str(caught.value) == "HF_ENDPOINT: expects https://HOST or https://HOST:PORT"
    )
