"""What a file of others may cost, in one place: its bytes, and the parts that a parser makes of it.

Each part is an object of some 50 to 100 bytes and takes microseconds, so that a number of them is
a limit of memory and of time; whatever the file says is read only after it has been counted.
Genuine files of 120b stay below a tenth of each.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from gptoss_convert.errors import InputError


@dataclass(frozen=True, slots=True)
class Budget:
    """Most bytes of a file, and most parts."""

    nbytes: int
    parts: int

    def require(self, where: str, parts: int) -> None:
        """Raise InputError beyond so many parts."""
        if parts > self.parts:
            raise InputError(f"{where}: {parts} or more values, at most {self.parts} are read")


TEXT = Budget(4 << 20, 200_000)
"""config.json, adapter_config.json and the like."""
HEADER = Budget(100_000_000, 2_000_000)
"""The headers of all shards of a directory together, and an index: 200,000 tensors."""
RECORD = Budget(64 << 20, 2_000_000)
"""What this program writes itself: manifests, origin.json, journals, states of a calibration."""
ANSWER = Budget(16 << 20, 1_000_000)
"""What a Hub answers: a repository of 100,000 files."""
YAML = Budget(256 << 10, 20_000)
"""run_config.yaml; a value of YAML takes a hundred times as long as one of JSON."""
PICKLE = Budget(128 << 20, 24_000_000)
"""`.metadata`; the parts are its operations."""
COMMON = Budget(16 << 20, PICKLE.parts)
"""common.pt."""
OBJECTS = 6_000_000
"""Containers and strings that a pickle may build, and entries of its memo."""
TOKENIZER = Budget(64 << 20, 0)
"""tokenizer.json, which its library reads; the released one has 28 MB."""

PROMPTS = Budget(16 << 20, 2_000_000)
"""Texts and token ids to compute with; a calibration uses 131,072 tokens."""

_JSON_PARTS = ",:[{"
_YAML_PARTS = re.compile(r"[\n,\[{:?&*-]")


def json_parts(text: str) -> int:
    """At least as many as the values that a JSON text holds, counted without parsing it."""
    return sum(map(text.count, _JSON_PARTS))


def yaml_parts(text: str) -> int:
    """At least as many as the values that a YAML text holds."""
    return sum(1 for _ in _YAML_PARTS.finditer(text))
