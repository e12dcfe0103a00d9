"""YAML from untrusted files: plain values, no duplicate keys, aliases that do not multiply."""

from __future__ import annotations

from typing import Any

import yaml

from gptoss_convert.containers.budget import YAML, yaml_parts
from gptoss_convert.errors import InputError, IntegrityError

_LONGEST_NUMBER = 18
"""Characters of a key that is a number: longer ones can be chosen to have one hash, and a dict of
them takes quadratic time."""
_LONGEST_INTEGER = 256
"""Bits of a whole number: in base 16, YAML has longer ones than Python prints."""
_MAX_DEPTH = 100
_NUMBERS = frozenset(f"tag:yaml.org,2002:{kind}" for kind in ("int", "float"))


def parse_yaml(where: str, text: str) -> Any:
    """The value that `text` holds, of lists, dicts, strings, numbers and None.

    Raises InputError for tags that name anything else, which are not executed, for merge keys and
    aliases that expand without end; IntegrityError for what is no YAML.
    """
    YAML.require(where, yaml_parts(text))
    try:
        content = yaml.load(text, _Loader)
        return _expanded(content, [YAML.parts], _MAX_DEPTH)
    except (InputError, IntegrityError) as error:
        raise type(error)(f"{where}: {error}") from None
    except yaml.constructor.ConstructorError as error:
        raise InputError(f"{where}: {error.problem}; not executed") from None
    except yaml.MarkedYAMLError as error:
        line = f" in line {error.problem_mark.line + 1}" if error.problem_mark else ""
        raise IntegrityError(f"{where}: not YAML: {error.problem}{line}") from None
    except (yaml.YAMLError, ValueError, OverflowError) as error:
        raise IntegrityError(f"{where}: not YAML: {str(error).splitlines()[0]}") from None
    except RecursionError:
        raise InputError(f"{where}: nested too deep, or expands to too many values") from None


class _Loader(yaml.SafeLoader):
    def flatten_mapping(self, node: yaml.MappingNode) -> None:
        """Refuse merge keys, which multiply what they merge, and keys that stand twice."""
        seen: set[object] = set()
        for key, _ in node.value:
            if key.tag == "tag:yaml.org,2002:merge":
                raise InputError("merge keys ('<<') are not read")
            if isinstance(key, yaml.ScalarNode):
                if key.tag in _NUMBERS and len(key.value) > _LONGEST_NUMBER:
                    raise InputError(f"key {key.value!r:.80} is a number of too many digits")
                if key.value in seen:
                    raise IntegrityError(f"key {key.value!r:.80} appears twice")
                seen.add(key.value)


def _expanded(value: Any, left: list[int], depth: int) -> Any:
    """A copy in which no part is shared; raises RecursionError where that has no end."""
    left[0] -= 1
    if isinstance(value, int) and value.bit_length() > _LONGEST_INTEGER:
        raise InputError("a number of too many digits")
    if left[0] < 0 or depth < 0:
        raise RecursionError
    if isinstance(value, dict):
        return {str(key): _expanded(part, left, depth - 1) for key, part in value.items()}
    if isinstance(value, list | tuple | set):
        return [_expanded(part, left, depth - 1) for part in value]
    return value if isinstance(value, str | int | float | None) else str(value)
