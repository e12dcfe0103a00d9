"""What is installed: every package and table, one version, and imports that cost nothing."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
from importlib import metadata, resources
from pathlib import Path

import pytest

import gptoss_convert

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
HEAVY = ("torch", "transformers", "safetensors", "megatron", "yaml", "rich")


def test_every_folder_with_modules_is_a_package_of_the_wheel() -> None:
    folders = {path.parent.relative_to(ROOT) for path in (ROOT / "gptoss_convert").rglob("*.py")}
    found = {".".join(folder.parts) for folder in folders}
    listed = PROJECT["tool"]["setuptools"]["packages"]
    assert sorted(listed) == sorted(found | {"gptoss_convert.mappings"})


def test_the_installed_tables_are_the_checkout_s() -> None:
    installed = resources.files("gptoss_convert.mappings")
    for folder, least in ((".", 4), ("codecs", 1)):
        places = (ROOT / "mappings" / folder).glob("*.toml")
        tables = {path.name: path.read_bytes() for path in places}
        assert len(tables) >= least
        assert tables == {
            entry.name: entry.read_bytes()
            for entry in installed.joinpath(folder).iterdir()
            if entry.name.endswith(".toml")
        }


def test_the_version_is_the_same_everywhere() -> None:
    assert metadata.version("gptoss-convert") == gptoss_convert.__version__
    shown = subprocess.run(
        [sys.executable, "-m", "gptoss_convert", "--version"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert shown.stdout == f"gptoss-convert, version {gptoss_convert.__version__}\n"


def test_every_dependency_has_a_tested_version() -> None:
    pins = set(re.findall(r"^([\w-]+)==", (ROOT / "constraints.txt").read_text(), re.MULTILINE))
    extras = PROJECT["project"]["optional-dependencies"].values()
    wanted = {
        re.split(r"[\[<>=]", text)[0]
        for text in [*PROJECT["project"]["dependencies"], *(text for e in extras for text in e)]
    }
    missing = wanted - {"gptoss-convert"} - pins - {pin.lower() for pin in pins}
    assert not missing


@pytest.mark.parametrize(
    "statement",
    [
        "import gptoss_convert",
        "import gptoss_convert.cli.main",
        "from gptoss_convert import inspect; inspect('missing')",
    ],
)
def test_start_and_inspect_import_nothing_heavy(statement: str) -> None:
    code = (
        "import sys\n"
        "try:\n"
        f"    exec({statement!r})\n"
        "except Exception as error:\n"
        "    assert type(error).__name__ == 'UsageError', error\n"
        f"print(*(name for name in {HEAVY!r} if name in sys.modules))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60
    )
    assert done.stdout.split() == []


@pytest.mark.parametrize("first", sorted(set(gptoss_convert.__all__) - {"__version__"}))
def test_every_public_name_stays_itself_whatever_is_imported_first(first: str) -> None:
    code = (
        f"from gptoss_convert import {first}\n"
        "import importlib, pkgutil, types, gptoss_convert as package\n"
        "for module in pkgutil.iter_modules(package.__path__):\n"
        "    if module.name != '__main__':\n"
        "        importlib.import_module(f'gptoss_convert.{module.name}')\n"
        "for name in package.__all__:\n"
        "    assert not isinstance(getattr(package, name), types.ModuleType), name\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
