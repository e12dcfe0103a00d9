"""A Hub, or whoever answers in its place, that lies: nothing it says is used unchecked."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from huggingface_hub import constants, get_session

from gptoss_convert import Options, convert, inspect, plan
from gptoss_convert.conversion.run import run
from gptoss_convert.errors import IntegrityError, NetworkError, UsageError
from gptoss_convert.hub import guard, listing
from gptoss_convert.hub.client import resolve
from gptoss_convert.hub.names import repository
from tests.hub_server import Fault, Hub
from tests.test_hub import BF16, NAME, SECRET, hub, published, same_files

__all__ = ["hub", "published"]
SHARD = "/cdn/.*model-00002"


@pytest.fixture(autouse=True)
def fresh(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is known of what was listed before, and nobody waits for long."""
    monkeypatch.setattr(listing, "_listings", {})
    monkeypatch.setattr(listing, "_seen", {})
    monkeypatch.setattr(guard, "_WINDOW", 0.2)


XET = "a" * 64


@pytest.mark.parametrize(
    ("headers", "told"),
    [
        ({"X-Xet-Hash": XET, "X-Xet-Refresh-Route": "{cdn}/steal"}, "names a store elsewhere"),
        ({"X-Xet-Hash": XET, "Link": '<{cdn}/steal>; rel="xet-auth"'}, "names a store elsewhere"),
        ({"X-Xet-Hash": XET, "X-Xet-Refresh-Route": "http://[::"}, "names a store elsewhere"),
        ({"X-Xet-Hash": "../x", "X-Xet-Refresh-Route": "{url}/x"}, "or no hash"),
        ({"X-Xet-Hash": XET, "X-Xet-Refresh-Route": "{url}/api/whoami-v2"}, "Xet headers have not"),
    ],
)
def test_no_store_gets_the_token_but_the_hub_s(
    headers: dict[str, str],
    told: str,
    hub: Hub,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pytest.importorskip("hf_xet")
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", False)
    stated = {name: text.format(cdn=hub.cdn, url=hub.url) for name, text in headers.items()}
    hub.faults.append(Fault("HEAD", "/resolve/", headers=stated))
    with pytest.raises(NetworkError, match=told):
        convert(NAME, tmp_path / "out", BF16)
    assert not hub.asked("GET", "steal")


def test_the_token_goes_to_no_other_address(hub: Hub) -> None:
    with guard.guarded(guard.Expected("x")):
        for place in (hub.url, hub.cdn):
            get_session().get(f"{place}/x", headers={"Authorization": f"Bearer {SECRET}"})
    assert [token for _, _, _, token in hub.requests] == [f"Bearer {SECRET}", None]


@pytest.mark.parametrize("charset", ["zlib", "undefined", "utf-7"])
def test_a_listing_is_utf8_whatever_it_says(charset: str, hub: Hub) -> None:
    kind = {"Content-Type": f"application/json; charset={charset}"}
    hub.faults.append(Fault("GET", "/api/models", 200, kind, body=b'{"sha": "+AD0"}'))
    with pytest.raises(NetworkError, match="no list of files"):
        inspect(NAME)


@pytest.mark.parametrize(
    "revision", ["../../../x", "/x", "..", "a/../../x", "x\0", "-x", "", "a b"]
)
def test_a_revision_is_no_path(revision: str, hub: Hub, tmp_path: Path) -> None:
    hub.repos[NAME].refs[revision] = hub.repos[NAME].refs["main"]
    with pytest.raises(UsageError, match="is no branch, tag or commit"):
        convert(NAME, tmp_path / "out", replace(BF16, revision=revision))
    assert not (tmp_path / "cache").exists() and not hub.requests


def test_what_the_client_says_of_a_short_file_is_not_signed(hub: Hub, tmp_path: Path) -> None:
    planned = plan(NAME, tmp_path / "out", BF16)
    hub.faults.append(Fault("GET", SHARD, body=b"short", whole=True))
    with pytest.raises(NetworkError, match=r"has size 5$"):
        run(planned)


def everything(folder: Path) -> set[Path]:
    return {*folder.rglob("*")}


@pytest.mark.parametrize(
    ("name", "value", "told"),
    [
        ("X-Linked-Etag", '"../../../../stolen"', "ETag"),
        ("X-Linked-Etag", '"/tmp/stolen"', "ETag"),
        ("X-Linked-Etag", '""', "ETag"),
        ("X-Linked-Etag", f'"{"a" * 300}"', "ETag"),
        ("X-Linked-Etag", 'W/".."', "ETag"),
        ("ETag", '"../stolen"', "ETag"),
        ("X-Repo-Commit", "../../stolen", "commit '../../stolen', expected "),
        ("X-Repo-Commit", "0" * 40, "commit '0000"),
        ("X-Linked-Size", "12", "has 12 bytes, the Hub lists "),
        ("X-Linked-Size", "-1", "has -1 bytes, the Hub lists "),
    ],
)
def test_names_and_sizes_of_an_answer_are_no_paths_and_true(
    name: str, value: str, told: str, hub: Hub, tmp_path: Path
) -> None:
    hub.faults.append(Fault("HEAD", "/resolve/", headers={name: value}))
    before = everything(tmp_path)
    with pytest.raises(NetworkError, match=told) as caught:
        convert(NAME, tmp_path / "out", BF16)
    assert "\n" not in str(caught.value)
    cache = tmp_path / "cache"
    assert {p for p in everything(tmp_path) - before if not p.is_relative_to(cache)} == set()
    assert not list(cache.rglob("stolen*"))


def description(hub: Hub) -> dict[str, object]:
    """What the Hub says of the repository, to be made a lie of."""
    import urllib.request

    with urllib.request.urlopen(f"{hub.url}/api/models/{NAME}?blobs=true") as answer:
        return json.load(answer)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("size", -1),
        ("size", "12"),
        ("size", True),
        ("size", 1 << 60),
        ("size", 1 << 52),
        ("rfilename", None),
        ("rfilename", "x" * 5000),
        ("rfilename", ""),
        ("lfs", {"sha256": "../x"}),
        ("lfs", {"sha256": 5}),
        ("blobId", "main"),
    ],
)
def test_a_listing_is_checked(key: str, value: object, hub: Hub) -> None:
    content = description(hub)
    siblings = content["siblings"]
    assert isinstance(siblings, list)
    siblings[0][key] = value
    if key == "blobId":
        siblings[0].pop("lfs", None)
    hub.faults.append(Fault("GET", "/api/models", body=json.dumps(content).encode()))
    with pytest.raises(NetworkError, match=r"no list of files|states"):
        inspect(NAME)


def test_a_listing_names_no_file_twice_and_the_commit_that_was_asked_for(hub: Hub) -> None:
    content = description(hub)
    siblings = content["siblings"]
    assert isinstance(siblings, list)
    again = {**content, "siblings": [*siblings, siblings[0]]}
    hub.faults.append(Fault("GET", "/api/models", body=json.dumps(again).encode(), times=1))
    with pytest.raises(NetworkError, match="twice"):
        inspect(NAME)
    other = {**content, "sha": "1" * 40}
    hub.faults.append(Fault("GET", "/revision/", body=json.dumps(other).encode(), times=1))
    named = repository(f"hf://{NAME}@{content['sha']}")
    assert named is not None
    with pytest.raises(NetworkError, match="asked for commit"):
        resolve(named)


def test_a_listing_does_not_change_its_mind(hub: Hub, tmp_path: Path) -> None:
    planned = plan(NAME, tmp_path / "out", BF16)
    content = description(hub)
    siblings = content["siblings"]
    assert isinstance(siblings, list)
    siblings[1]["size"] += 1
    hub.faults.append(Fault("GET", "/api/models", body=json.dumps(content).encode()))
    with pytest.raises(NetworkError, match=r"lists other files of .* than before"):
        run(planned)


@pytest.mark.parametrize("stream", [False, True])
def test_a_flipped_bit_is_found_and_does_not_stay(
    stream: bool, hub: Hub, published: Path, tmp_path: Path
) -> None:
    options = Options(to="hf", dtype="bf16", stream=stream)
    planned = plan(NAME, tmp_path / "out", options)
    hub.faults.append(Fault("GET", SHARD, flip=True, whole=True, times=1))
    with pytest.raises(IntegrityError, match=r"model-00002.*: SHA-256 is .*, the Hub lists"):
        run(planned)
    assert not (tmp_path / "out").exists()
    convert(NAME, tmp_path / "out", options)
    (tmp_path / "out" / "gptoss-convert.json").unlink()
    convert(published, tmp_path / "straight", Options(to="hf", dtype="bf16", format="hf"))
    (tmp_path / "straight" / "gptoss-convert.json").unlink()
    assert same_files(tmp_path / "out", tmp_path / "straight")


def test_a_small_file_read_by_range_is_held_against_its_digest(hub: Hub) -> None:
    hub.faults.append(Fault("GET", "/resolve/.*/config.json", flip=True))
    with pytest.raises(IntegrityError, match=r"config.json: git's SHA-1 is .*, the Hub lists"):
        inspect(NAME)


@pytest.mark.parametrize("stream", [False, True])
def test_a_header_is_the_same_when_its_file_comes(stream: bool, hub: Hub, tmp_path: Path) -> None:
    """Otherwise the plan would take the values from other places than where they lie."""
    hub.faults.append(Fault("GET", SHARD, body=other_header(hub), times=1))
    with pytest.raises(IntegrityError, match="begins otherwise than what was planned"):
        convert(NAME, tmp_path / "out", Options(to="hf", dtype="bf16", stream=stream))
    assert not (tmp_path / "out").exists()


def other_header(hub: Hub) -> bytes:
    """The second shard with two equal tensors of its header exchanged."""
    (folder,) = hub.repos[NAME].commits.values()
    (shard,) = folder.glob("model-00002-*.safetensors")
    raw = shard.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + length])
    by_form: dict[str, list[str]] = {}
    for name, entry in header.items():
        if name != "__metadata__":
            by_form.setdefault(json.dumps([entry["dtype"], entry["shape"]]), []).append(name)
    one, two = next(names for names in by_form.values() if len(names) > 1)[:2]
    header[one], header[two] = header[two], header[one]
    text = json.dumps(header, separators=(",", ":")).encode()
    return raw[:8] + text.ljust(length) + raw[8 + length :]


@pytest.mark.parametrize(
    "headers",
    [{"Retry-After": "86400"}, {"RateLimit": '"api";r=0;t=86400'}, {"Retry-After": "9" * 40}],
)
def test_nobody_waits_for_a_day(headers: dict[str, str], hub: Hub) -> None:
    hub.faults.append(Fault("GET", "/api/models", 429, headers))
    with pytest.raises(NetworkError, match="asks to wait"):
        inspect(NAME)


@pytest.mark.parametrize("path", ["/api/models", "/resolve/.*/config.json", "/cdn/"])
def test_a_body_that_drips_is_given_up(path: str, hub: Hub) -> None:
    hub.faults.append(Fault("GET", path, drip=0.02))
    with pytest.raises(NetworkError, match=r"sent \d+ bytes in 0 seconds"):
        inspect(NAME)


def test_a_download_that_drips_is_given_up(hub: Hub, tmp_path: Path) -> None:
    planned = plan(NAME, tmp_path / "out", BF16)
    hub.faults.append(Fault("GET", SHARD, drip=0.02))
    with pytest.raises(NetworkError, match=r"sent \d+ bytes in 0 seconds"):
        run(planned)


def test_an_answer_without_end_ends(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gptoss_convert.hub.client.MOST", 1 << 18)
    hub.faults.append(Fault("GET", "/api/models", body=b" " * (1 << 16), endless=True))
    with pytest.raises(NetworkError, match="sends more than 262144 bytes"):
        inspect(NAME)


def test_a_file_without_end_ends(hub: Hub, tmp_path: Path) -> None:
    planned = plan(NAME, tmp_path / "out", BF16)
    hub.faults.append(Fault("GET", SHARD, body=b" " * (1 << 16), endless=True))
    with pytest.raises(NetworkError, match=r"model-00002.*: the server sends more than"):
        run(planned)
    assert not list((tmp_path / "cache").rglob("*.incomplete"))


def test_what_is_compressed_is_refused(hub: Hub) -> None:
    hub.faults.append(Fault("GET", "/resolve/.*/config.json", headers={"Content-Encoding": "gzip"}))
    with pytest.raises(NetworkError, match="compresses"):
        inspect(NAME)


def test_a_password_in_the_endpoint_is_told_nowhere(
    hub: Hub,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    secret = hub.url.replace("://", "://someone:hunter2@")
    monkeypatch.setattr(constants, "ENDPOINT", secret)
    template = secret + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    done = convert(NAME, tmp_path / "out", BF16)
    texts = [json.dumps(done.summary()), (tmp_path / "out" / "gptoss-convert.json").read_text()]
    for fault in (
        Fault("GET", "/api/models", 404, {"X-Error-Code": "RepoNotFound"}),
        Fault("GET", "/api/models", body=b"[]"),
        Fault("GET", "/api/models", 503, times=1),
    ):
        hub.faults[:] = [fault]
        try:
            inspect(NAME)
        except NetworkError as error:
            texts.append(str(error))
    texts.append(capsys.readouterr().err)
    assert len(texts) == 5
    assert not [text for text in texts if "hunter2" in text or "someone" in text]
