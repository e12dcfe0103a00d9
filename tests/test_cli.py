"""The command line as its users meet it: results, notes, one-line errors, exit statuses."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import click
import pytest

from gptoss_convert.cli.main import cli
from gptoss_convert.cli.options import Choice, Size
from gptoss_convert.errors import EXIT_CODES, GptossError
from gptoss_convert.synth.synth import synth
from tests.test_docs import parse_line
from tests.tiny_files import write_hf_bf16, write_hf_mxfp4
from tests.tiny_models import SQUARE, random_weights


@pytest.fixture(scope="module")
def given(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("cli")
    weights = random_weights(SQUARE, seed=3)
    write_hf_mxfp4(root / "mxfp4", SQUARE, weights)
    write_hf_bf16(root / "bf16", SQUARE, weights)
    return root


def command(*arguments: str | Path, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "gptoss_convert", *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=120,
        cwd=cwd,
    )


def test_every_command_and_the_program_itself_explain_themselves():
    for name in ("", *cli.commands):
        for flag in ("-h", "--help"):
            done = command(*filter(None, (name, flag)))
            assert done.returncode == 0
            assert done.stdout.startswith("Usage: ")
            assert done.stderr == ""
            assert max(map(len, done.stdout.splitlines())) <= 100


@pytest.mark.parametrize("name", cli.commands)
def test_every_option_has_a_text_and_shows_its_default(name: str):
    for parameter in cli.commands[name].params:
        if isinstance(parameter, click.Option) and not parameter.is_flag:
            record = parameter.get_help_record(click.Context(cli.commands[name]))
            assert record is not None
            assert record[1].strip(), f"{name} {parameter.opts[0]} has no text"


@pytest.mark.parametrize("name", cli.commands)
def test_help_shows_examples_that_parse(name: str):
    text = command(name, "--help").stdout
    examples = text.partition("\n  Examples:\n")[2].partition("\n\n")[0].splitlines()
    assert examples
    for line in examples:
        assert parse_line(line)
        assert line.startswith(f"    gptoss-convert {name} ")


@pytest.mark.parametrize(
    ("line", "meant"),
    [
        ("inspct x", "inspect"),
        ("convert a b --to hf --overwite", "--overwrite"),
        ("convert a b --to hf --dtype bfloat16", "bf16"),
        ("verify a b --level value", "values"),
        ("completion fsh", "fish"),
    ],
)
def test_a_slip_is_answered_with_what_was_meant(line: str, meant: str):
    done = command(*line.split())
    assert done.returncode == 2
    assert re.search(f"Did you mean (one of: )?'{meant}'", done.stderr)


@pytest.mark.parametrize("name", cli.commands)
def test_every_choice_knows_what_was_meant(name: str):
    for parameter in cli.commands[name].params:
        assert not isinstance(parameter.type, click.Choice) or isinstance(parameter.type, Choice)


def test_help_lists_every_exit_status():
    text = command("convert", "--help").stdout
    for code, why in EXIT_CODES.items():
        assert f"  {code:<4}{why}" in text


def kinds(base: type[GptossError]) -> list[type[GptossError]]:
    return [base, *(kind for child in base.__subclasses__() for kind in kinds(child))]


def test_every_error_has_a_documented_status():
    for kind in kinds(GptossError):
        assert kind.exit_code in EXIT_CODES
        assert kind.exit_code not in {0, 1, 130, 143}


def test_version_is_one_line():
    done = command("--version")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("gptoss-convert, version ")


@pytest.mark.parametrize(
    ("text", "nbytes"),
    [
        ("5GB", 5_000_000_000),
        ("256MB", 256_000_000),
        ("4GiB", 4 << 30),
        ("1.5 kB", 1500),
        ("1k", 1000),
        ("7", 7),
        ("2Ti", 2 << 40),
    ],
)
def test_sizes_are_read_in_decimal_and_binary_units(text: str, nbytes: int):
    assert Size().convert(text, None, None) == nbytes


@pytest.mark.parametrize("text", ["", "GB", "-1GB", "5XB", "1e9", "five"])
def test_what_is_no_size_is_refused_with_the_form(text: str):
    with pytest.raises(click.BadParameter, match=r"is no size; write for example 5GB"):
        Size().convert(text, None, None)


def test_a_conversion_prints_its_result_on_stdout(given: Path, tmp_path: Path):
    out = tmp_path / "out"
    done = command("convert", given / "mxfp4", out, "--to", "hf", "--dtype", "bf16")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"{out}: ")
    assert len(done.stdout.splitlines()) == 1
    assert "no tokenizer.json" in done.stderr
    assert "\x1b" not in done.stdout + done.stderr


def test_json_is_the_only_thing_on_stdout(given: Path, tmp_path: Path):
    arguments = ("convert", given / "mxfp4", tmp_path / "out", "--to", "hf", "--json", "-v")
    planned = json.loads(command(*arguments, "--dry-run").stdout)
    assert not (tmp_path / "out").exists()
    done = json.loads(command(*arguments).stdout)
    common = planned.keys() & done.keys()
    assert planned.keys() - common == {"estimated_seconds"}
    common -= {"schema"}
    assert {key: done[key] for key in common} == {key: planned[key] for key in common}
    written = {path.name: path.stat().st_size for path in (tmp_path / "out").glob("*.safetensors")}
    assert done["target"]["files"] == written
    inspected = json.loads(command("inspect", tmp_path / "out", "--json").stdout)
    assert inspected["files"] == written
    assert inspected["encoding"] == "mxfp4"


def test_quiet_commands_print_nothing_but_errors(given: Path, tmp_path: Path):
    out = tmp_path / "out"
    for words in (
        ("convert", given / "mxfp4", out, "--to", "hf", "--dry-run"),
        ("convert", given / "mxfp4", out, "--to", "hf"),
        ("synth", tmp_path / "synthetic", "--layers", "1"),
        ("check", out, "--read-data"),
        ("verify", given / "mxfp4", out, "--level", "values"),
    ):
        done = command(*words, "--quiet")
        assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    done = command("verify", tmp_path / "synthetic", out, "--level", "header", "-q")
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("different: ")
    (out / "config.json").unlink()
    done = command("check", out, "-q")
    assert (done.returncode, done.stdout) == (3, "")
    assert len(done.stderr.splitlines()) == 1


USAGE = {
    "no such directory": ("convert nowhere out --to hf", 2, "error: nowhere: no such directory"),
    "no parent": (
        "convert {mxfp4} absent/out --to hf",
        2,
        "error: absent/out: its parent directory does not exist",
    ),
    "inside": (
        "convert {mxfp4} {mxfp4}/out --to hf",
        2,
        "error: {mxfp4}/out: SOURCE and TARGET lie in each other",
    ),
    "the same": (
        "convert {mxfp4} {mxfp4}/../mxfp4 --to hf",
        2,
        "error: {mxfp4}/../mxfp4: SOURCE and TARGET lie in each other",
    ),
    "around": (
        "convert {mxfp4} {root} --to hf --overwrite",
        2,
        "error: {root}: SOURCE and TARGET lie in each other",
    ),
    "impossible": (
        "convert {mxfp4} out --to openai --dtype bf16",
        2,
        "error: --to openai --dtype bf16: OpenAI's layout has MXFP4 experts only",
    ),
    "published bf16": (
        "convert {bf16} out --to hf --shards published",
        2,
        "error: --shards published: OpenAI published MXFP4 only; add --dtype mxfp4",
    ),
    "a file": (
        "convert {mxfp4}/config.json out --to hf",
        2,
        "error: {mxfp4}/config.json: not a directory",
    ),
    "exists": (
        "convert {mxfp4} {bf16} --to hf",
        8,
        "error: {bf16}: exists; pass --overwrite to replace it when all is written",
    ),
    "is a file": (
        "convert {mxfp4} {bf16}/config.json --to hf",
        8,
        "error: {bf16}/config.json: exists and is not a directory",
    ),
    "little memory": (
        "convert {mxfp4} out --to hf --max-memory 10MB",
        7,
        "error: one worker needs ",
    ),
    "not a checkpoint": (
        "inspect {root}",
        3,
        "error: {root}: not a GPT-OSS checkpoint: no weights in a known form",
    ),
    "another format": (
        "inspect {mxfp4} --from openai",
        2,
        "error: {mxfp4}: --from openai: holds hf; name one of these, or omit it",
    ),
    "an option of another format": (
        "inspect {mxfp4} --iteration 7",
        2,
        "error: {mxfp4}: --iteration is for megatron, this is hf",
    ),
    "no such configuration": (
        "inspect {mxfp4} --config nowhere.json",
        2,
        "error: --config nowhere.json: no such file",
    ),
    "a repository to check": (
        "check owner/name",
        2,
        "error: owner/name: a repository on the Hub, or no such directory; check reads directories",
    ),
    "a page of the Hub": (
        "inspect https://huggingface.co/openai/gpt-oss-20b/tree/main",
        2,
        "error: https://huggingface.co/openai/gpt-oss-20b/tree/main: an address; for the "
        "repository write openai/gpt-oss-20b",
    ),
    "bytes of memory": (
        "convert {mxfp4} out --to hf --max-memory 5",
        7,
        "error: one worker needs ",
    ),
    "no directory for a report": (
        "verify {mxfp4} {bf16} --level header --junit no/x.xml",
        2,
        "error: --junit no/x.xml: no directory no",
    ),
    "a directory for a report": (
        "verify {mxfp4} {bf16} --level header --json {root}",
        2,
        "error: --json {root}: a directory; name a file in it",
    ),
    "a file for a folder of reports": (
        "verify {mxfp4} {bf16} --level header --report {bf16}/config.json",
        2,
        "error: --report {bf16}/config.json: not a directory",
    ),
}


@pytest.mark.parametrize("fault", USAGE)
def test_an_error_is_one_line_and_a_status(given: Path, tmp_path: Path, fault: str):
    line, status, message = USAGE[fault]
    places = {"mxfp4": given / "mxfp4", "bf16": given / "bf16", "root": given}
    done = command(*shlex.split(line.format(**places)), cwd=tmp_path)
    assert done.returncode == status, done.stderr
    assert done.stdout == ""
    *notes, last = done.stderr.splitlines()
    assert last.startswith(message.format(**places))
    assert not any(note.startswith("error") for note in notes)
    assert not any(tmp_path.iterdir())
    assert not any(given.glob(".*"))


@pytest.mark.parametrize(
    "line",
    ["convert", "convert a b", "convert a b --to zip", "convert a b --to hf --no", "nothing", "-x"],
)
def test_wrong_usage_is_status_2_with_a_hint(line: str):
    done = command(*shlex.split(line))
    assert done.returncode == 2
    assert done.stderr.startswith("Usage: ")
    assert "Error: " in done.stderr


LEAVING = {
    "inspect {mxfp4} --json | head -1": (0, "{\n", ""),
    "convert --help | true": (0, "", ""),
    "verify {mxfp4} {bf16} --level header --json | true": (0, "", ""),
    "verify {mxfp4} {other} --level header | true": (1, "", ""),
    "inspect {root} --json | true": (3, "", "error: {root}: not a GPT-OSS checkpoint: "),
}


@pytest.mark.parametrize("command", LEAVING)
def test_a_reader_that_leaves_early_changes_no_status(given: Path, tmp_path: Path, command: str):
    synth(tmp_path / "other", layers=1)
    places = {"mxfp4": given / "mxfp4", "bf16": given / "bf16", "root": given}
    line = command.format(**places, other=tmp_path / "other")
    shell = ["bash", "-o", "pipefail", "-c", f"{sys.executable} -m gptoss_convert {line}"]
    done = subprocess.run(shell, capture_output=True, text=True, timeout=60)
    status, out, error = LEAVING[command]
    assert (done.returncode, done.stdout) == (status, out)
    assert done.stderr.startswith(error.format(**places))
    assert len(done.stderr.splitlines()) == bool(error)


def test_names_of_others_cannot_break_the_line(tmp_path: Path):
    source = tmp_path / "evil\n\x1b[31m"
    source.mkdir()
    done = command("inspect", source)
    assert done.returncode == 3
    assert "\x1b" not in done.stderr
    assert len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize("name", ["with space", "ümlaut", "-dash"])
def test_odd_paths_work_in_any_locale(given: Path, tmp_path: Path, name: str):
    (tmp_path / name).symlink_to(given / "mxfp4")
    done = subprocess.run(
        [sys.executable, "-m", "gptoss_convert", "convert", "--to", "openai", "--", name, "out"],
        capture_output=True,
        cwd=tmp_path,
        env={"LC_ALL": "C", "PATH": "/usr/bin:/bin"},
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "out" / "dtypes.json").is_file()


@pytest.mark.parametrize(
    ("words", "on_stdout"),
    [
        ("inspect missing --json", True),
        ("inspect missing", False),
        ("verify missing missing --json", True),
        ("verify missing missing --json -q", True),
        ("verify --json report.json missing missing", False),
        ("verify missing missing --json report.json", False),
        ("verify missing missing -q -- --json", False),
    ],
)
def test_an_error_is_json_where_json_goes_to_stdout(
    words: str, on_stdout: bool, tmp_path: Path
) -> None:
    done = command(*words.split(), cwd=tmp_path)
    assert done.returncode in (2, 3)
    assert bool(done.stdout) == on_stdout
    if on_stdout:
        assert json.loads(done.stdout)["exit_code"] == done.returncode
