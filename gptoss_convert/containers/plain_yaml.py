"""YAML from untrusted files: plain values, no duplicate keys, aliases that do not multiply."""

from __future__ import annotations

from typing import Any

import yaml

from gptoss_convert.errors import InputError, IntegrityError

_MAX_VALUES = 1 << 16
_MAX_DEPTH = 100


def parse_yaml(where: str, text: str) -> Any:
    """The value that `text` holds, of lists, dicts, strings, numbers and None.

    Raises InputError for tags that name anything else, which are not executed, for merge keys and
    aliases that expand without end; IntegrityError for what is no YAML.
    """
    try:
        content = yaml.load(text, _Loader)
        return _expanded(content, [_MAX_VALUES], _MAX_DEPTH)
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
                if key.value in seen:
                    raise IntegrityError(f"key {key.value!r:.80} appears twice")
                seen.add(key.value)


def _expanded(value: Any, left: list[int], depth: int) -> Any:
    """A copy in which no part is shared; raises RecursionError where that has no end."""
    left[0] -= 1
    if left[0] < 0 or depth < 0:
        raise RecursionError
    if isinstance(value, dict):
        return {str(key): _expanded(part, left, depth - 1) for key, part in value.items()}
    if isinstance(value, list | tuple | set):
        return [_expanded(part, left, depth - 1) for part in value]
    return value if isinstance(value, str | int | float | None) else str(value)
