"""The peak memory that is reported is this program's own, not its parent's."""

import subprocess
import sys

PARENT = """
import subprocess, sys
ballast = b"x" * 400_000_000
child = "from gptoss_convert.resources import peak_memory; print(peak_memory())"
print(subprocess.run([sys.executable, "-c", child], capture_output=True, text=True).stdout)
"""


def test_a_large_parent_does_not_count() -> None:
    said = subprocess.run([sys.executable, "-c", PARENT], capture_output=True, text=True)
    assert 1_000_000 < int(said.stdout) < 300_000_000
