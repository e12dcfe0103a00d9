"""What must be known of a TARGET before it is published: that its texts tell nothing private."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from gptoss_convert.containers import content_size
from gptoss_convert.containers.budget import TEXT
from gptoss_convert.conversion.plan import Conversion
from gptoss_convert.errors import UsageError
from gptoss_convert.errors.secrets import holds_secret
from gptoss_convert.machine.small_files import pieces

_LOCAL = re.compile(r"(?<![\w./])(?:/(?:home|Users)/[\w.-]+|/root)/[\w.-]+")
"""Where people's own files lie."""
_TEXTS = (".json", ".md", ".txt", ".jinja", ".yaml", ".cff")
_WORDS = ("tokenizer.json", "vocab.json", "merges.txt")
"""Lists of words, which may look like anything."""


def require_shareable(conversion: Conversion) -> None:
    """Raise UsageError if a text of TARGET tells a secret or where something lies on this machine:
    what is uploaded cannot be taken back."""
    source, target = conversion.source.base.absolute(), conversion.target.absolute().parent
    own = {str(place) for place in (Path("~").expanduser(), Path.cwd(), source, target)}
    for name, text in _texts(conversion):
        found = next((place for place in own if len(place) > 1 and f"{place}/" in text), None)
        found = found or ((match := _LOCAL.search(text)) and match[0])
        if not found and not holds_secret(text):
            continue
        what = f"the local path {found}" if found else "a token or password"
        raise UsageError(
            f"--push-to: {name} would publish {what}; take it out of SOURCE's file, or convert "
            "without --push-to and upload what you have looked at: hf upload"
        )


def _texts(conversion: Conversion) -> Iterator[tuple[str, str]]:
    """The texts that TARGET will hold, by the names of their files."""
    for file in conversion.image.files:
        for _, content in file.fixed:
            yield file.name, content.decode(errors="replace")
    for name, content in conversion.image.closing:
        words = name.endswith(_TEXTS) and not name.endswith(_WORDS)
        # What a repository carries is public there, and not at hand yet.
        known = isinstance(content, bytes) or conversion.source.outline is None
        if words and known and content_size(content) <= TEXT.nbytes:
            held = b"".join(pieces(content, conversion.places))
            yield name, held.decode(errors="replace")
