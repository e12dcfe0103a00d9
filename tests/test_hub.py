"""Repositories on the Hub as SOURCE: the real client against a small server on 127.0.0.1."""

from __future__ import annotations

import filecmp
import io
import json
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
from click.testing import CliRunner
from huggingface_hub import close_session, constants

from gptoss_convert import Options, convert, inspect, plan, verify_checkpoints
from gptoss_convert.cli.main import cli
from gptoss_convert.conversion.run import run
from gptoss_convert.errors import (
    DiskError,
    InputError,
    IntegrityError,
    NetworkError,
    RankError,
    UsageError,
)
from gptoss_convert.formats.checkpoint import Choices
from gptoss_convert.formats.repository import Repository
from gptoss_convert.hub import cache
from gptoss_convert.hub.push import destination, push
from gptoss_convert.hub.sources import opening
from gptoss_convert.machine.progress import Advance, Lines
from gptoss_convert.machine.ranks import Ranks
from gptoss_convert.verify.result import VerifyOptions
from tests.hub_server import Fault, Hub, serving
from tests.rank_processes import run_ranks
from tests.stopping import At, HaltError, halt
from tests.test_golden import inventory, published_config, write_header_only
from tests.tiny_adapters import ATTENTION, write_peft
from tests.tiny_files import write_hf_mxfp4, write_openai
from tests.tiny_models import SQUARE, random_weights

NAME = "openai/gpt-oss-20b"
BF16 = Options(to="hf", dtype="bf16")
OPENAI_MXFP4 = Options(to="hf", format="openai")


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A repository as OpenAI's: Hugging Face's files, `original/` and `metal/` beside them."""
    root = tmp_path_factory.mktemp("published") / "repo"
    weights = random_weights(SQUARE, seed=5)
    whole = write_hf_mxfp4(root.parent / "whole", SQUARE, weights)
    convert(whole, root, Options(to="hf", max_shard_size=250_000))
    (root / "gptoss-convert.json").unlink()
    (root / "tokenizer.json").write_text('{"model": {}}')
    (root / "tokenizer_config.json").write_text("{}")
    (root / "README.md").write_text("---\nlicense: apache-2.0\n---\n")
    write_openai(root / "original", SQUARE, weights)
    (root / "metal").mkdir()
    (root / "metal" / "model.bin").write_bytes(bytes(1000))
    return root


@pytest.fixture
def hub(published: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A running server that the client of this process talks to, with an empty cache."""
    with serving(Hub()) as running:
        running.add(NAME, published)
        template = running.url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "ENDPOINT", running.url)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setenv("HF_TOKEN", SECRET)
        yield running


SECRET = "hf_" + "s3cret" * 6


def files(folder: Path) -> set[str]:
    found = (path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    return set(found)


def same_files(one: Path, other: Path) -> bool:
    names = sorted(files(one))
    return files(other) == {*names} and not any(filecmp.cmpfiles(one, other, names, False)[1:])


def test_inspect_reads_headers_alone(hub: Hub, published: Path, tmp_path: Path):
    found = inspect(NAME).summary()
    assert (found["path"], found["format"]) == (NAME, "hf-mxfp4")
    assert found["revision"] == hub.repos[NAME].refs["main"]
    shards = {path.name: path.stat().st_size for path in published.glob("*.safetensors")}
    assert found["files"] == shards and len(shards) > 4
    assert not hub.asked("GET", "original") and not hub.asked("GET", "metal")
    ranges = {asked for _, path, asked, _ in hub.requests if path.startswith("/cdn/")}
    assert all(int((asked or "").removeprefix("bytes=0-")) < 1 << 16 for asked in ranges)
    assert not (tmp_path / "cache").exists()


def test_headers_of_120b_take_little(hub: Hub, tmp_path: Path):
    folder = tmp_path / "120b"
    folder.mkdir()
    write_header_only(folder / "model.safetensors", inventory("120b", "hf-mxfp4"))
    (folder / "config.json").write_text(json.dumps(published_config("120b")))
    (folder / "tokenizer.json").write_bytes(bytes(28 << 20))
    hub.add("openai/gpt-oss-120b", folder)
    planned = plan("openai/gpt-oss-120b", tmp_path / "out", BF16)
    assert planned.write_bytes > 230e9
    assert hub.sent < 1 << 20
    assert not (tmp_path / "out").exists() and not (tmp_path / "cache").exists()


def test_convert_takes_the_files_of_one_format(hub: Hub, published: Path, tmp_path: Path):
    convert(NAME, tmp_path / "hub", BF16)
    convert(published, tmp_path / "local", Options(to="hf", dtype="bf16", format="hf"))
    hub_files = files(tmp_path / "hub") - {"gptoss-convert.json"}
    assert hub_files == files(tmp_path / "local") - {"gptoss-convert.json"}
    assert not filecmp.cmpfiles(tmp_path / "hub", tmp_path / "local", hub_files, False)[1]
    manifest = json.loads((tmp_path / "hub" / "gptoss-convert.json").read_text())
    commit = hub.repos[NAME].refs["main"]
    assert manifest["from"] == {"path": NAME, "format": "hf-mxfp4", "revision": commit}
    assert not hub.asked("GET", "original/") and not hub.asked("GET", "metal/")


def test_from_openai_takes_original_alone(hub: Hub, tmp_path: Path):
    convert(NAME, tmp_path / "out", Options(to="openai", format="openai"))
    got = {path.rpartition("/resolve/")[2] for path in hub.asked("GET", "/resolve/")}
    assert got and all(path.partition("/")[2].startswith("original/") for path in got)


def test_a_branch_that_moves_changes_nothing(hub: Hub, published: Path, tmp_path: Path):
    first = hub.repos[NAME].refs["main"]
    planned = plan(NAME, tmp_path / "out", BF16)
    hub.add(NAME, published / "original")
    run(planned)
    manifest = json.loads((tmp_path / "out" / "gptoss-convert.json").read_text())
    assert manifest["from"]["revision"] == first != hub.repos[NAME].refs["main"]


def test_a_revision_may_be_a_branch_a_tag_or_a_commit(hub: Hub, published: Path):
    commit = hub.repos[NAME].refs["main"]
    hub.add(NAME, published / "original", ref="refs/pr/4")
    assert inspect(NAME, revision=commit).summary()["revision"] == commit
    found = inspect(f"hf://{NAME}@refs/pr/4").summary()
    assert (found["format"], found["revision"]) == ("openai", hub.repos[NAME].refs["refs/pr/4"])
    with pytest.raises(NetworkError, match="no revision 'v2'"):
        inspect(NAME, revision="v2")


def test_what_the_cache_holds_is_enough_offline(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    convert(NAME, tmp_path / "online", BF16)
    asked = len(hub.requests)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    convert(NAME, tmp_path / "offline", BF16)
    assert same_files(tmp_path / "online", tmp_path / "offline")
    assert len(hub.requests) == asked
    with pytest.raises(NetworkError, match=r"openai/other: not in the cache .*HF_HUB_OFFLINE"):
        inspect("openai/other")
    next((tmp_path / "cache").glob("models--*/snapshots/*/model-00002-of-*")).unlink()
    with pytest.raises(NetworkError, match=r"cache lacks model-00002-of-.*HF_HUB_OFFLINE"):
        inspect(NAME)


def test_broken_downloads_are_continued(
    hub: Hub, tmp_path: Path, published: Path, monkeypatch: pytest.MonkeyPatch
):
    """Also by a proxy that ignores ranges, where the file starts anew."""
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 10_000)
    planned = plan(NAME, tmp_path / "out", BF16)
    hub.faults += [
        Fault("GET", "/cdn/.*model-00001", cut=20_000),
        Fault("GET", "/cdn/.*model-00001", cut=30_000, ranges=False, times=1),
    ]
    hub.faults[0].times = 2
    run(planned)
    starts = [asked for _, path, asked, _ in hub.requests if "/cdn/" in path and "00001" in path]
    assert starts[-4:] == [None, "bytes=20000-", "bytes=40000-", "bytes=30000-"]
    convert(published, tmp_path / "local", Options(to="hf", dtype="bf16", format="hf"))
    for name in files(tmp_path / "local") - {"gptoss-convert.json"}:
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "local" / name).read_bytes()


def test_a_proxy_that_ignores_ranges_sends_a_little_more(hub: Hub, tmp_path: Path):
    folder = tmp_path / "120b"
    folder.mkdir()
    write_header_only(folder / "model.safetensors", inventory("120b", "hf-mxfp4"))
    (folder / "config.json").write_text(json.dumps(published_config("120b")))
    hub.add("openai/gpt-oss-120b", folder)
    hub.faults.append(Fault("GET", "/cdn/", ranges=False))
    assert inspect("openai/gpt-oss-120b").tensor_bytes > 60e9
    assert hub.sent < 64 << 20


def test_too_many_requests_are_repeated_after_a_while(hub: Hub):
    hub.faults.append(Fault("GET", "/api/models", 429, {"Retry-After": "0"}, times=1))
    assert inspect(NAME).encoding == "mxfp4"
    assert len(hub.asked("GET", "/api/models")) == 2


def test_tokens_go_to_the_hub_alone(hub: Hub, tmp_path: Path):
    convert(NAME, tmp_path / "out", BF16)
    sent = {path.startswith("/cdn/"): token for _, path, _, token in hub.requests}
    assert sent == {False: f"Bearer {SECRET}", True: None}


@pytest.mark.parametrize(
    ("fault", "expected"),
    [
        (Fault("GET", "/api", 401, {"X-Error-Code": "GatedRepo"}), "gated: accept its conditions"),
        (Fault("GET", "/api", 403, {"X-Error-Code": "GatedRepo"}), "hf auth login"),
        (Fault("GET", "/api", 401), "not authorised (401)"),
        (Fault("GET", "/api", 403), "access refused (403)"),
        (Fault("GET", "/api", 404, {"X-Error-Code": "RepoNotFound"}), "no such repository at"),
        (Fault("GET", "/api", 400), "the server answered 400"),
        (Fault("GET", "/api", body=b"<html>a proxy</html>"), "no list of files"),
        (Fault("GET", "/api", body=b'{"sha": "main", "siblings": []}'), "no list of files"),
        (Fault("GET", "/cdn/", 403), "access refused (403)"),
        (
            Fault("GET", "/cdn/", body=b"version https://git-lfs.github.com/spec/v1\noid x\n"),
            "a Git LFS pointer, not the file",
        ),
        (Fault("GET", "/cdn/", cut=100), "connection broke 3 times"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_failing_network_is_one_line_and_a_status(fault: Fault, expected: str, hub: Hub):
    hub.faults.append(fault)
    with pytest.raises(NetworkError) as caught:
        inspect(NAME)
    text = str(caught.value)
    assert caught.value.exit_code == 6
    assert text.startswith(NAME) and expected in text and "\n" not in text
    assert SECRET not in text and "signature" not in text


@pytest.mark.parametrize("proxy", ["http://me:pw@127.0.0.1:port", "socks5://127.0.0.1:1"])
def test_a_proxy_that_is_none_is_one_line_and_a_status(
    proxy: str, hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    close_session()
    monkeypatch.setenv("ALL_PROXY", proxy)
    monkeypatch.setenv("NO_PROXY", "nowhere")
    try:
        with pytest.raises(NetworkError, match="HF_ENDPOINT or a proxy's address: "):
            inspect(NAME)
    finally:
        close_session()


def test_a_failing_download_is_one_line_and_a_status(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    planned = plan(NAME, tmp_path / "out", BF16)
    hub.faults.append(Fault("GET", "/cdn/.*model-00003", 403))
    with pytest.raises(NetworkError, match=r"model-00003-of-.*: access refused \(403\)"):
        run(planned)
    assert not (tmp_path / "out").exists()


def test_damaged_headers_get_the_message_that_a_directory_gets(
    hub: Hub, published: Path, tmp_path: Path
):
    folder = tmp_path / "damaged"
    folder.mkdir()
    for path in published.glob("*.*"):
        (folder / path.name).write_bytes(path.read_bytes())
    shard = folder / "model-00002-of-00005.safetensors"
    shard = next(folder.glob("model-00002-of-*"))
    shard.write_bytes(shard.read_bytes()[:-4])
    hub.add("someone/damaged", folder)
    with pytest.raises(IntegrityError) as local:
        inspect(folder)
    with pytest.raises(IntegrityError) as remote:
        inspect("someone/damaged")
    assert str(remote.value) == str(local.value).replace(str(folder), "someone/damaged")


def test_a_stream_keeps_two_shards_and_writes_the_same_bytes(
    hub: Hub, published: Path, tmp_path: Path
):
    counts: list[int] = []
    folder = tmp_path / ".streamed.gptoss-convert.shards"
    hub.watch = lambda path: counts.append(
        sum(1 for _ in folder.rglob("*.safetensors")) + ("/cdn/" in path)
    )
    convert(NAME, tmp_path / "streamed", Options(to="hf", dtype="bf16", stream=True))
    assert len(list(published.glob("model-*.safetensors"))) > 4
    assert 1 <= max(counts) <= 2
    assert not folder.exists() and not any((tmp_path / "cache").rglob("*.safetensors"))
    convert(NAME, tmp_path / "whole", BF16)
    assert same_files(tmp_path / "streamed", tmp_path / "whole")


def test_a_stream_goes_on_with_the_shards_it_still_needs(hub: Hub, tmp_path: Path):
    options = Options(to="hf", dtype="bf16", stream=True, workers=1)
    with pytest.raises(HaltError):
        convert(NAME, tmp_path / "out", options, At(40, halt))
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / ".out.gptoss-convert.shards").exists()
    before = len(hub.asked("GET", "/cdn/"))
    report = convert(NAME, tmp_path / "out", options)
    assert report.resumed_steps > 0
    convert(NAME, tmp_path / "whole", BF16)
    assert same_files(tmp_path / "out", tmp_path / "whole")
    assert before


def test_a_stream_that_breaks_ends_with_one_line(hub: Hub, tmp_path: Path):
    hub.faults.append(Fault("GET", "/cdn/.*model-00003", 404, whole=True))
    options = Options(to="hf", dtype="bf16", stream=True)
    with pytest.raises(NetworkError, match="model-00003"):
        convert(NAME, tmp_path / "out", options)


def test_the_command_honours_the_environment_and_hides_what_is_signed(hub: Hub, tmp_path: Path):
    """A whole run, by variables alone: HF_ENDPOINT, HF_HOME, HF_TOKEN."""
    known = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    variables = {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "home"), "HF_TOKEN": SECRET}
    hub.faults.append(Fault("GET", "/cdn/.*model-00001", whole=True, cut=0, times=1))
    done = subprocess.run(
        [sys.executable, "-m", "gptoss_convert", "convert", NAME, "out", "--to", "hf"],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env=known | variables | {"HF_HUB_DISABLE_XET": "1"},
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert "Trying to resume" in done.stderr
    assert "signature" not in done.stderr and SECRET not in done.stderr
    assert any((tmp_path / "home" / "hub").rglob("model-00001-of-*"))
    assert ("GET", f"Bearer {SECRET}") in {(method, token) for method, _, _, token in hub.requests}


def test_repositories_are_compared_with_directories(hub: Hub, published: Path, tmp_path: Path):
    convert(published, tmp_path / "bf16", Options(to="hf", dtype="bf16", format="hf"))
    found = verify_checkpoints(NAME, tmp_path / "bf16", VerifyOptions(level="header"))
    assert found.same and found.source["path"] == NAME
    assert not (tmp_path / "cache").exists()
    found = verify_checkpoints(NAME, tmp_path / "bf16", VerifyOptions(level="values"))
    assert found.same, found.verdict
    done = CliRunner().invoke(cli, ["diff", str(tmp_path / "bf16"), NAME])
    assert done.exit_code == 0, done.output


@pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")
def test_a_finished_target_is_pushed(hub: Hub, published: Path, tmp_path: Path):
    hub.add("store", tmp_path / "store")
    hub.token = SECRET
    target = convert(published, tmp_path / "out", OPENAI_MXFP4) and tmp_path / "out"
    address = push(target, files(target), destination("lab/mine"), public=False)
    assert address == f"{hub.url}/lab/mine"
    repo = hub.repos["lab/mine"]
    assert repo.private
    assert same_files(repo.commits[repo.refs["main"]], target)
    assert inspect("lab/mine").encoding == "mxfp4"
    with pytest.raises(UsageError, match=r"holds weights already: model.safetensors;"):
        destination("lab/mine")


def test_pushing_needs_a_login_and_an_owner(hub: Hub, monkeypatch: pytest.MonkeyPatch):
    hub.token = "another"
    with pytest.raises(NetworkError, match=r"lab/mine: not authorised \(401\): log in"):
        destination("lab/mine")
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(NetworkError, match="lab/mine: not logged in: log in"):
        destination("lab/mine")
    with pytest.raises(UsageError, match="expects hf://owner/name"):
        destination("mine")


@pytest.mark.parametrize("role", ["read", "write", "fineGrained", 5])
def test_a_token_that_may_only_read_is_told_before_the_work(role: object, hub: Hub) -> None:
    who = {"name": "someone", "auth": {"accessToken": {"role": role}}}
    hub.faults.append(Fault("GET", "/api/whoami-v2", body=json.dumps(who).encode()))
    if role == "read":
        with pytest.raises(NetworkError, match="this token may only read; log in"):
            destination("lab/mine")
    else:
        assert str(destination("lab/mine")) == "lab/mine"


@pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")
def test_an_upload_that_fails_says_how_to_go_on(hub: Hub, published: Path, tmp_path: Path):
    hub.faults.append(Fault("POST", "/commit/", 403))
    with pytest.raises(NetworkError) as caught:
        folder = published / "original"
        push(folder, files(folder), Repository("lab/mine"), public=True)
    assert not hub.repos["lab/mine"].private
    assert str(caught.value) == (
        f"lab/mine: access refused (403): the token lacks the permission; {published}/original is "
        f"complete, upload it with: hf upload lab/mine {published}/original"
    )


@pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")
def test_nothing_is_pushed_but_what_was_written(hub: Hub, published: Path, tmp_path: Path):
    """Neither what comes into TARGET later, nor what is exchanged for a link during the upload."""
    hub.add("store", tmp_path / "store")
    conversion = plan(published, tmp_path / "out", OPENAI_MXFP4)
    target = run(conversion) and tmp_path / "out"
    shutil.copytree(target, tmp_path / "written")
    (target / "secret").write_text("secret")
    (target / "more").symlink_to(tmp_path / "secrets")
    (tmp_path / "secrets").mkdir()

    def exchange(path: str) -> None:
        if "preupload" in path:
            for name in conversion.names:
                (target / name).unlink()
                (target / name).symlink_to(target / "secret")

    hub.watch = exchange
    push(target, conversion.names, Repository("lab/mine"), public=False)
    assert (target / "config.json").is_symlink()
    repo = hub.repos["lab/mine"]
    assert same_files(repo.commits[repo.refs["main"]], tmp_path / "written")
    with pytest.raises(InputError, match="outside the checkpoint"):
        (target / "secret").rename(tmp_path / "elsewhere")
        (target / "config.json").unlink()
        (target / "config.json").symlink_to(tmp_path / "elsewhere")
        push(target, ["config.json"], Repository("lab/other"), public=False)


def test_a_directory_is_not_streamed(published: Path, tmp_path: Path):
    with pytest.raises(UsageError, match=r"--stream: .* is not a repository on the Hub"):
        plan(published, tmp_path / "out", Options(to="hf", stream=True))


def test_an_adapter_of_a_repository_is_merged_into_a_repository(
    hub: Hub, published: Path, tmp_path: Path
):
    lora = write_peft(tmp_path / "lora", SQUARE, [ATTENTION])
    (lora / "training_args.bin").write_bytes(bytes(100))
    commit = hub.add("lab/lora", lora)
    keep = Options(to="hf", format="hf")
    convert(NAME, tmp_path / "hub", replace(keep, adapter="lab/lora"))
    convert(published, tmp_path / "local", replace(keep, adapter=str(lora)))
    names = files(tmp_path / "hub")
    odd = filecmp.cmpfiles(tmp_path / "hub", tmp_path / "local", names, False)[1]
    assert names == files(tmp_path / "local") and odd == ["gptoss-convert.json"]
    made, local = (
        json.loads((tmp_path / place / "gptoss-convert.json").read_text())["adapter"]
        for place in ("hub", "local")
    )
    assert made == local | {"path": f"hf://lab/lora@{commit}"}
    assert not hub.asked("GET", "training_args")
    options = VerifyOptions(level="values", adapter="lab/lora")
    assert verify_checkpoints(NAME, tmp_path / "hub", options).same
    streamed = replace(keep, adapter=f"hf://lab/lora@{commit}", stream=True)
    convert(NAME, tmp_path / "streamed", streamed)
    assert same_files(tmp_path / "hub", tmp_path / "streamed")


def test_an_adapter_is_inspected_at_the_revision_that_was_asked_for(hub: Hub, tmp_path: Path):
    for branch, alpha in (("main", 12), ("v2", 99)):
        folder = write_peft(tmp_path / branch, SQUARE, [ATTENTION], lora_alpha=alpha)
        hub.add("lab/lora", folder, branch)
        shown = CliRunner().invoke(cli, ["inspect", "lab/lora", "--revision", branch, "--json"])
        assert json.loads(shown.stdout)["alpha"] == alpha


def test_what_is_found_inside_files_is_read_from_directories_only(hub: Hub, tmp_path: Path):
    """Of a repository headers alone are there: the rest would look damaged."""
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "pytorch_model.bin").write_bytes(bytes(1000))
    hub.add("lab/old", tmp_path)
    with pytest.raises(UsageError, match="torch-save is read from a directory only; run: hf down"):
        inspect("lab/old")


def test_an_answer_that_the_client_cannot_use_is_one_line(hub: Hub, published: Path):
    """It asks for the model card's check first, and takes the answer for JSON."""
    hub.faults.append(Fault("POST", "/api/validate-yaml", body=b"<html>a proxy's page</html>"))
    with pytest.raises(NetworkError, match=r"answered what the client cannot use: .*hf upload lab"):
        push(published, ["README.md", "config.json"], Repository("lab/mine"), public=False)


def test_an_adapter_of_a_repository_is_inspected_and_refused_by_name(
    hub: Hub, published: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    lora = write_peft(tmp_path / "lora", SQUARE, [ATTENTION])
    hub.add("lab/lora", lora)
    shown = CliRunner().invoke(cli, ["inspect", "lab/lora", "--base", NAME, "--json"])
    assert shown.exit_code == 0, shown.output
    found = json.loads(shown.stdout)
    assert (found["dialect"], found["fits"], found["ranks"]) == ("peft", NAME, [3])
    (lora / "adapter_model.safetensors").rename(lora / "adapter_model.bin")
    hub.add("lab/pickle", lora)
    for name, error, words in (
        ("lab/pickle", InputError, "adapter_model.bin is pickled, and never loaded"),
        ("lab/none", NetworkError, "lab/none"),
        (NAME, InputError, "lacks adapter_config.json and adapter_model.safetensors"),
    ):
        with pytest.raises(error, match=words):
            convert(NAME, tmp_path / "out", Options(to="hf", format="hf", adapter=name))
    assert not (tmp_path / "out").exists()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(NetworkError, match="lab/pickle: not in the cache"):
        convert(published, tmp_path / "out", Options(to="hf", format="hf", adapter="lab/pickle"))
    convert(published, tmp_path / "out", Options(to="hf", format="hf", adapter="lab/lora"))


def test_what_fails_while_a_repository_is_open_names_it_and_keeps_its_status(hub: Hub):
    with (
        pytest.raises(RankError) as failed,
        opening(Repository(NAME), Choices(format="hf")) as opened,
    ):
        raise RankError(f"rank 1: {opened.root}: gone", 5)
    assert (str(failed.value), failed.value.exit_code) == (f"rank 1: {NAME}: gone", 5)


class Watching(Lines):
    """Progress that says when the first step is done."""

    def __init__(self) -> None:
        super().__init__(io.StringIO())
        self.converted = threading.Event()

    @contextmanager
    def phase(self, what: str, nbytes: int, steps: int) -> Iterator[Advance]:
        with super().phase(what, nbytes, steps) as advance:

            def told(done: int) -> None:
                self.converted.set()
                advance(done)

            yield told if what == "converting" else advance


def test_steps_are_done_while_other_shards_are_on_their_way(
    hub: Hub, published: Path, tmp_path: Path
):
    progress, found = Watching(), []
    shards = sorted(path.name for path in published.glob("model-*.safetensors"))

    def watch(path: str) -> None:
        if "/cdn/" in path and shards[-1] in path:
            found.append(progress.converted.wait(30))

    planned = plan(NAME, tmp_path / "out", BF16)
    hub.watch = watch
    run(planned, progress)
    assert found == [True]
    assert {path.name for path in (tmp_path / "cache").rglob("model-*.safetensors")} == {*shards}
    asked = len(hub.asked("GET", "/cdn/"))
    hub.watch = lambda path: None
    convert(NAME, tmp_path / "again", BF16)
    assert len(hub.asked("GET", "/cdn/")) == asked  # all of it is in the cache
    convert(published, tmp_path / "local", replace(BF16, format="hf"))
    assert weights(tmp_path / "out") == weights(tmp_path / "again") == weights(tmp_path / "local")


def weights(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.glob("*.safetensors")}


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_ranks_download_what_their_own_steps_need(hub: Hub, published: Path, tmp_path: Path):
    planned = plan(NAME, tmp_path / "out", BF16)

    def own_cache(ranks: Ranks) -> None:
        constants.HF_HUB_CACHE = str(tmp_path / f"cache-{ranks.rank}")

    ended = run_ranks(planned, 2, in_child=own_cache)
    assert [one.status for one in ended] == [0, 0], ended
    convert(published, tmp_path / "local", replace(BF16, format="hf"))
    assert weights(tmp_path / "out") == weights(tmp_path / "local")
    every = {path.name for path in published.glob("model-*.safetensors")}
    held = [
        {path.name for path in (tmp_path / f"cache-{rank}").rglob("model-*.safetensors")}
        for rank in range(2)
    ]
    assert held[0] | held[1] == every
    assert len(held[0]) + len(held[1]) < 2 * len(every)


def test_shards_that_change_or_find_no_room_in_the_cache_end_the_run(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def touch() -> None:
        for path in (tmp_path / "cache").rglob("model-*.safetensors"):
            os.utime(path, (1, 1))

    with pytest.raises(IntegrityError, match="changed while it was being read"):
        convert(NAME, tmp_path / "out", replace(BF16, workers=1), At(10, touch))
    shutil.rmtree(tmp_path / "cache")
    monkeypatch.setattr(cache.resources, "check_disk", no_room)
    with pytest.raises(DiskError, match="no room"):
        convert(NAME, tmp_path / "other", BF16)
    assert not list((tmp_path / "cache").rglob("model-*.safetensors"))


def no_room(folder: Path, needed: int) -> None:
    """Room for a target and for small files, not for the shards."""
    if "cache" in folder.parts and needed > 1_000_000:
        raise DiskError("no room")


def test_a_stream_is_for_one_process(hub: Hub, tmp_path: Path):
    planned = plan(NAME, tmp_path / "out", Options(to="hf", dtype="bf16", stream=True))
    with pytest.raises(UsageError, match="--stream: for one process"):
        run(planned, ranks=Ranks(1, 2, 1, 2))
