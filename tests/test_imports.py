"""Who may import whom, and what stays unimported where an answer must come at once."""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

from gptoss_convert.synth.synth import synth
from tests.test_golden import COUNTS, inventory, published_config, write_header_only

ROOT = Path(__file__).parents[1] / "gptoss_convert"
MODULES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts): path for path in ROOT.rglob("*.py")
}


def imported(path: Path) -> Iterator[str]:
    """The modules of this package that a file imports, anywhere in it."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module:
            inside = node.module.removeprefix("gptoss_convert").removeprefix(".")
            if node.module == "gptoss_convert" or inside != node.module:
                for alias in node.names:
                    name = f"{inside}.{alias.name}".strip(".")
                    yield name if name in MODULES or f"{name}.__init__" in MODULES else inside


def others(path: Path) -> set[str]:
    """The packages of other people that a file imports at its top level."""
    names: set[str] = set()
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Import):
            names |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names.add(node.module.partition(".")[0])
    return names - set(sys.stdlib_module_names) - {"gptoss_convert"}


TABLES = {"layouts", "formats", "engine", "conversion", "compare", "codecs", "quantise"}
ARROWS: dict[str, set[str]] = {
    "witness": TABLES,
    "codecs": {"containers", "machine", "witness", *(TABLES - {"codecs"})},
    "containers": {"machine", "witness", *TABLES},
    "layouts": {"codecs.mxfp4", "witness", *(TABLES - {"layouts", "codecs"})},
    "engine": {"formats", "conversion", "compare", "quantise", "witness"},
    "compare": {"hub", "witness", "verify", "conversion"},
    # The one room that stands on both the tables and the witness: it rounds by a forward pass.
    "quantise": {"conversion", "compare", "check", "show"},
    "quantise.layers": {"witness", "verify"},
    "quantise.rounding": {"witness", "verify"},
    "verify": {"quantise"},
    "engine.steps": {"engine.execute", "engine.work", "machine", "codecs"},
    "engine.derivations": {"engine.execute", "machine"},
    "engine.records": {"engine", "machine", "layouts"},
    "machine": {"witness", *TABLES},
    "errors": {"containers", *TABLES},
}
"""What every module of a folder must never import."""


@pytest.mark.parametrize("importer", ARROWS)
def test_layers_import_downwards_only(importer: str):
    paths = {
        name: path
        for name, path in MODULES.items()
        if name == importer or name.startswith(f"{importer}.")
    }
    assert paths
    for name, path in paths.items():
        for target in imported(path):
            parts = target.split(".")
            above = {".".join(parts[: i + 1]) for i in range(len(parts))}
            assert not above & ARROWS[importer], f"{name} imports {target}"


def test_nothing_imports_the_command_line_but_its_entry():
    for name, path in MODULES.items():
        if name != "__main__" and not name.startswith("cli"):
            for target in imported(path):
                assert not target.startswith("cli.") and target != "show.report", name


def test_only_these_layers_import_numbers_at_once():
    """All else answers without numpy; torch is imported by what computes logits alone."""
    numpy = {name for name, path in MODULES.items() if "numpy" in others(path)}
    torch = {name for name, path in MODULES.items() if "torch" in others(path)}
    assert torch and all(name.startswith(("witness.", "verify.", "quantise.")) for name in torch)
    plain = {"quantise.blocks", "quantise.layers", "quantise.report", "quantise.rounding"}
    assert not torch & {*plain, "quantise.rules"}
    without = ("cli.", "layouts.", "formats.", "hub.", "show.")
    assert not [name for name in numpy if name.startswith(without)]
    assert not numpy & {"conversion.plan", "check.inspection", "engine.steps"}
    assert not numpy & {"containers.safetensors", "containers.paths"}


def test_folders_form_few_layers_and_no_circle():
    """What a reader can hold in mind: 11 layers, 110 arrows; a circle raises CycleError."""
    uses: dict[str, set[str]] = {}
    for name, path in MODULES.items():
        folder = name.partition(".")[0]
        found = {target.partition(".")[0] for target in imported(path)}
        uses.setdefault(folder, set()).update(found - {folder, "", "mappings"})
    layers = TopologicalSorter(uses)
    layers.prepare()
    count = 0
    while layers.is_active():
        layers.done(*layers.get_ready())
        count += 1
    assert count <= 11
    assert sum(map(len, uses.values())) <= 110


PACKAGES = {
    *("click", "huggingface_hub", "isal", "numpy", "rich", "yaml"),
    *("torch", "transformers", "megatron", "safetensors", "tokenizers", "jinja2", "matplotlib"),
}
"""What other people wrote, and some command imports."""
RARE = (
    *("containers.torch_dist", "containers.torch_saves", "formats.megatron.opening"),
    *("formats.adapters.opening", "formats.adapters.dialects", "hub.client", "hub.stream"),
    *("quantise", "witness", "machine.introduction"),
)
"""Parts of this package that only some checkpoints or options need."""
SLOW = ("concurrent.futures", "importlib.resources", "logging", "socket", "subprocess", "tempfile")
"""Modules of Python that take milliseconds each, and that nothing usual needs."""


def loaded_by(*arguments: object) -> tuple[str, set[str]]:
    """What a command prints, and all modules that are loaded when it ends."""
    code = (
        "import sys\n"
        "from gptoss_convert.cli.main import cli\n"
        "try:\n"
        f"    cli.main({[*map(str, arguments)]!r}, standalone_mode=False)\n"
        "finally:\n"
        "    print(*sys.modules, file=sys.stderr)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return done.stdout, set(done.stderr.splitlines()[-1].split())


def needless(modules: set[str]) -> set[str]:
    """Those of some loaded modules that no command needs for a plain checkpoint on disk."""
    return modules & {*SLOW, *(f"gptoss_convert.{name}" for name in RARE)}


@pytest.mark.parametrize("arguments", [["--help"], ["--version"]])
def test_help_imports_no_format_and_click_alone(arguments: list[str]):
    _, modules = loaded_by(*arguments)
    assert modules & PACKAGES == {"click"}
    assert not needless(modules)
    assert not [name for name in modules if name.startswith("gptoss_convert.containers")]


def test_help_of_a_command_knows_the_formats():
    text, modules = loaded_by("convert", "--help")
    assert "SOURCE TARGET" in text
    assert "[hf|openai|megatron]" in text
    assert modules & PACKAGES == {"click"}
    assert not needless(modules)


def test_a_small_conversion_loads_what_it_needs(tmp_path: Path):
    source = tmp_path / "source"
    synth(source, layers=1, workers=1)
    for number, to in enumerate(("hf", "openai")):
        target = tmp_path / str(number)
        _, modules = loaded_by("convert", source, target, "--to", to, "--dtype", "mxfp4")
        assert (target / "gptoss-convert.json").exists()
        assert modules & PACKAGES == {"click", "isal", "numpy"}
        assert not needless(modules)
    _, modules = loaded_by("verify", source, tmp_path / "0", "--level", "values", "--quiet")
    assert modules & PACKAGES == {"click", "isal", "numpy"}
    assert not needless(modules)


def test_plans_and_inspections_of_120b_import_nothing_heavy(tmp_path: Path):
    source = tmp_path / "gpt-oss-120b"
    source.mkdir()
    write_header_only(source / "model.safetensors", inventory("120b", "hf-mxfp4"))
    (source / "config.json").write_text(json.dumps(published_config("120b")))
    for to, dtype in (("hf", "bf16"), ("openai", "mxfp4"), ("hf", "keep"), ("megatron", "keep")):
        text, modules = loaded_by(
            *("convert", source, tmp_path / "out", "--to", to, "--dtype", dtype),
            *("--dry-run", "--json"),
        )
        assert modules & PACKAGES <= {"click", "isal", "numpy", "yaml"}
        assert json.loads(text)["read_bytes"] == COUNTS["120b", "hf-mxfp4"][1]
    text, modules = loaded_by("inspect", source, "--json")
    assert modules & PACKAGES == {"click"}
    assert not needless(modules)
    assert json.loads(text)["parameters"] == 116_829_156_672
    assert [path.name for path in tmp_path.iterdir()] == ["gpt-oss-120b"]


def test_megatron_is_written_and_read_where_torch_cannot_be_imported(tmp_path: Path):
    (tmp_path / "torch.py").write_text('raise ImportError("this machine has no torch")')
    synth(tmp_path / "before", layers=2, workers=1)
    paths = os.pathsep.join((str(tmp_path), str(ROOT.parent)))

    def python(*words: object) -> tuple[int, str]:
        done = subprocess.run(
            [sys.executable, *map(str, words)],
            env={**os.environ, "PYTHONPATH": paths},
            capture_output=True,
            text=True,
            timeout=120,
        )
        return done.returncode, done.stderr

    assert "this machine has no torch" in python("-c", "import torch")[1]
    convert = ("-m", "gptoss_convert", "convert", "--quiet")
    there = (tmp_path / "before", tmp_path / "megatron", "--to", "megatron")
    back = (tmp_path / "megatron", tmp_path / "back", "--to", "hf", "--dtype", "mxfp4")
    assert python(*convert, *there) == python(*convert, *back) == (0, "")
    weights = [tmp_path / folder / "model.safetensors" for folder in ("before", "back")]
    assert weights[0].read_bytes() == weights[1].read_bytes()
