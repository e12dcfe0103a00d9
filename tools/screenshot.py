"""Usage: .venv/bin/python tools/screenshot.py

Write docs/images/terminal.svg: what commands really print on a terminal, taken as it is. The 20b
that is inspected has the published names, dtypes and shapes and holes instead of weights.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from io import StringIO
from pathlib import Path

from rich.console import Console
from rich.text import Text

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from tests.test_golden import inventory, published_config, write_header_only  # noqa: E402

WIDTH = 80
COMMANDS = (
    "gptoss-convert inspect gpt-oss-20b",
    "gptoss-convert verify tiny tiny-bf16 --level values",
)
# Rich's own frame without its web font: a picture in a repository must load nothing.
_FRAME = """\
<svg class="{unique_id}" viewBox="0 0 {terminal_width} {terminal_height}"
 xmlns="http://www.w3.org/2000/svg">
<style>
.{unique_id}-matrix {{
  font-family: ui-monospace, Menlo, Consolas, "DejaVu Sans Mono", monospace;
  font-size: {char_height}px; line-height: {line_height}px;
}}
{styles}
</style>
<defs><clipPath id="{unique_id}-clip-terminal">
<rect x="0" y="0" width="{terminal_width}" height="{terminal_height}"/>
</clipPath>{lines}</defs>
<rect fill="#292929" width="{terminal_width}" height="{terminal_height}" rx="8"/>
<g transform="translate({terminal_x}, 18)" clip-path="url(#{unique_id}-clip-terminal)">
{backgrounds}
<g class="{unique_id}-matrix" xml:space="preserve">
{matrix}
</g>
</g>
</svg>
"""


def main() -> None:
    """Run the commands in an empty directory and write the picture."""
    console = Console(record=True, width=WIDTH, file=StringIO(), force_terminal=True)
    with tempfile.TemporaryDirectory() as place:
        source = Path(place) / "gpt-oss-20b"
        source.mkdir()
        write_header_only(source / "model.safetensors", inventory("20b", "hf-mxfp4"))
        (source / "config.json").write_text(json.dumps(published_config("20b")))
        printed_by("gptoss-convert synth tiny", place)
        printed_by("gptoss-convert convert tiny tiny-bf16 --to hf --dtype bf16", place)
        for command in COMMANDS:
            console.print(Text.assemble(("$ ", "bold green"), (command, "bold")))
            console.print(Text.from_ansi(printed_by(command, place)), "")
    svg = console.export_svg(code_format=_FRAME, unique_id="terminal")
    (ROOT / "docs" / "images" / "terminal.svg").write_text(svg, encoding="utf-8")


def printed_by(command: str, place: str) -> str:
    """What a command prints on a terminal of this width."""
    variables = {"FORCE_COLOR": "1", "TERM": "xterm-256color", "COLUMNS": str(WIDTH)}
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    return subprocess.run(
        command.split(),
        cwd=place,
        env={**os.environ, **variables, "PATH": path},
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        check=True,
    ).stdout


if __name__ == "__main__":
    main()
