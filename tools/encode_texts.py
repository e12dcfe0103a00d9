"""Token ids of the texts that checkpoints are compared on: `pip install tiktoken`, then
`python tools/encode_texts.py`. To be run after a change of gptoss_convert/witness/texts/*.txt.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import tiktoken

TEXTS = Path(__file__).parents[1] / "gptoss_convert" / "witness" / "texts"
END = "<|endoftext|>"


def main() -> None:
    """Write ids.json: for each text the SHA-256 of its file and the ids of each passage."""
    encoding = tiktoken.get_encoding("o200k_harmony")
    entries = []
    for path in sorted(TEXTS.glob("*.txt")):
        content = path.read_bytes()
        # The line break after a passage is for the eye.
        passages = content.decode().removesuffix("\n").split(f"{END}\n")
        passages = [f"{passage.removesuffix(END)}{END}" for passage in passages]
        ids = [encoding.encode(passage, allowed_special="all") for passage in passages]
        assert [encoding.decode(one) for one in ids] == passages, path
        lines = ",\n    ".join(json.dumps(one, separators=(",", ":")) for one in ids)
        digest = hashlib.sha256(content).hexdigest()
        entries.append(f'"{path.stem}": {{"sha256": "{digest}", "passages": [\n    {lines}]}}')
    (TEXTS / "ids.json").write_text("{" + ",\n".join(entries) + "}\n", encoding="utf-8")


if __name__ == "__main__":
    main()
