"""adapter_config.json: what it decides, what it must not say, and what in it is harmless."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

from gptoss_convert.errors import InputError

CONFIG = "adapter_config.json"
MAX_RANK = 1 << 14
_MAX_PATTERNS = 10_000
_HARMLESS = frozenset(
    (
        *("auto_mapping", "base_model_name_or_path", "bias", "ensure_weight_tying", "eva_config"),
        *("exclude_modules", "inference_mode", "layers_pattern", "layers_to_transform"),
        *("lora_dropout", "megatron_config", "megatron_core", "peft_type"),
        *("peft_version", "qalora_group_size", "revision", "runtime_config", "target_modules"),
        *("task_type", "velora_config"),
        *("lora_B_layout", "unsloth_fused_expert_lora", "unsloth_fixed"),
        # They prepare the start of a training; what `init_lora_weights` says of it is checked.
        *("corda_config", "loftq_config", "lora_ga_config"),
    )
)
"""Keys whose value changes nothing that is not in the tensors, or is read elsewhere."""
_READ = frozenset(
    (
        *("alpha_pattern", "fan_in_fan_out", "init_lora_weights", "lora_alpha", "lora_bias", "r"),
        *("modules_to_save", "rank_pattern", "target_parameters", "trainable_token_indices"),
        *("use_dora", "use_rslora"),
    )
)
_REFUSED = {
    "alora_invocation_tokens": "an activated LoRA (aLoRA) acts after certain tokens only",
    "arrow_config": "Arrow chooses among adapters for each token",
    "kasa_config": "KaSA is not a low-rank sum",
    "layer_replication": "layer_replication changes the number of layers",
    "monteclora_config": "MonteCLoRA is not a low-rank sum",
    "use_bdlora": "BD-LoRA has block-diagonal halves",
    "use_qalora": "QALoRA pools its input by groups",
}
"""Keys that make the adapter something that no sum to the weights equals."""
_CHANGED_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")
"""Beginnings of `init_lora_weights` after which the base that was trained is not the published."""
_STARTS = frozenset((None, True, False, "gaussian", "eva", "orthogonal", "mica"))
"""The values of `init_lora_weights` that leave the base as it was."""
_PATTERN = re.compile(r"[\w.\\|()\[\]^$*+?-]{1,300}")
_BEFORE = r"(.*\.)?("
"""PEFT matches a pattern against the whole name, or against its end behind a dot."""
_MAX_COST = 100_000


@dataclass(frozen=True)
class Settings:
    """What adapter_config.json says about ranks and strengths."""

    where: str
    r: int
    alpha: float
    rslora: bool = False
    dora: bool = False
    lora_bias: bool = False
    ranks: tuple[tuple[re.Pattern[str], int], ...] = ()
    alphas: tuple[tuple[re.Pattern[str], float], ...] = ()
    tokens: tuple[tuple[str, tuple[int, ...]], ...] = ()
    """The rows that trained tokens replace, by module."""
    parameters: tuple[str, ...] = ()
    """The ends of the names of parameters that are adapted as such, not as modules' weights."""

    saved: tuple[str, ...] = ()
    """The modules that were trained and saved whole."""

    def is_parameter(self, name: str) -> bool:
        """Whether a parameter of this full name is adapted as such, as PEFT matches it."""
        return any(name == end or name.endswith(f".{end}") for end in self.parameters)

    def rank(self, name: str) -> int:
        """The rank of a module or parameter of this full name."""
        return self._pattern(self.ranks, name, "rank_pattern") or self.r

    def scale(self, name: str, rank: int) -> Fraction:
        """What the product of its halves is multiplied by."""
        alpha = self._pattern(self.alphas, name, "alpha_pattern")
        alpha = self.alpha if alpha is None else alpha
        return Fraction(alpha / math.sqrt(rank)) if self.rslora else Fraction(alpha) / rank

    def _pattern(self, patterns: Sequence[tuple[re.Pattern[str], Any]], name: str, key: str) -> Any:
        """The value of the patterns that match; PEFT takes the first in an order that saving
        changes, so all must say the same.
        """
        hits = [(p, v) for p, v in patterns if p.match(name)]
        if len({value for _, value in hits}) > 1:
            said = ", ".join(f"{p.pattern[len(_BEFORE) : -2]!r}: {v}" for p, v in hits)
            raise InputError(
                f"{self.where}: {key}: {name} matches {said}; PEFT takes the first in an order "
                "that saving changes: keep one"
            )
        return hits[0][1] if hits else None


def read_settings(where: str, content: Mapping[str, Any]) -> Settings:
    """The settings of an adapter; raises InputError naming the key that cannot be merged."""
    # Tinker names no kind.
    if (kind := content.get("peft_type", "LORA")) != "LORA":
        raise InputError(f"{where}: peft_type {kind!r:.80}; supported: 'LORA'")
    _refuse(where, content)
    for key in ("use_dora", "lora_bias", "use_rslora", "fan_in_fan_out"):
        if not isinstance(content.get(key, False), bool | None):
            raise InputError(f"{where}: {key} is {content[key]!r:.80}, expects true or false")
    if content.get("fan_in_fan_out"):
        raise InputError(f"{where}: fan_in_fan_out is true; GPT-OSS has no such module")
    return Settings(
        where,
        _rank(where, "r", content.get("r")),
        _alpha(where, "lora_alpha", content.get("lora_alpha")),
        bool(content.get("use_rslora")),
        bool(content.get("use_dora")),
        bool(content.get("lora_bias")),
        tuple(_patterns(where, content, "rank_pattern", _rank)),
        tuple(_patterns(where, content, "alpha_pattern", _alpha)),
        tuple(_tokens(where, content.get("trainable_token_indices"))),
        _names(where, "target_parameters", content.get("target_parameters")),
        _names(where, "modules_to_save", content.get("modules_to_save")),
    )


def _refuse(where: str, content: Mapping[str, Any]) -> None:
    for key, value in content.items():
        if key in _REFUSED and value:
            raise InputError(f"{where}: {key}: {_REFUSED[key]}: it cannot be merged")
        if value and key not in _HARMLESS | _READ | _REFUSED.keys():
            raise InputError(
                f"{where}: {key!r:.80} is {value!r:.80}: this version does not know what it "
                "changes, so it cannot be merged"
            )
    start = content.get("init_lora_weights", True)
    if not isinstance(start, str | bool | None):
        raise InputError(f"{where}: init_lora_weights is {start!r:.80}, expects a word")
    if isinstance(start, str) and start.lower().startswith(_CHANGED_BASE):
        raise InputError(
            f"{where}: init_lora_weights is {start!r:.40}: training changed the base, so that the "
            "published one does not fit; save it converted (path_initial_model_for_weight_"
            "conversion) and merge that"
        )
    if start not in _STARTS:
        raise InputError(
            f"{where}: init_lora_weights is {start!r:.80}: this version does not know whether that "
            "changed the base, so it cannot be merged"
        )


def _rank(where: str, key: str, value: Any) -> int:
    if type(value) is not int or not 0 < value <= MAX_RANK:
        raise InputError(f"{where}: {key} is {value!r:.80}, expects a rank of 1 to {MAX_RANK}")
    return value


def _alpha(where: str, key: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < abs(value) < 1e6:
        raise InputError(f"{where}: {key} is {value!r:.80}, expects a number other than 0")
    return value


def _patterns(where: str, content: Mapping[str, Any], key: str, check: Any):
    patterns = content.get(key) or {}
    if not isinstance(patterns, dict) or len(patterns) > _MAX_PATTERNS:
        raise InputError(
            f"{where}: {key} is {patterns!r:.80}, expects an object of at most {_MAX_PATTERNS} "
            "patterns"
        )
    left = _MAX_COST
    for pattern, value in patterns.items():
        compiled = _compiled(pattern)
        left -= _cost(pattern)
        if compiled is None or left < 0:
            why = "is no pattern that is read here" if left >= 0 else "could take too long to match"
            raise InputError(f"{where}: {key}: {pattern!r:.80} {why}")
        yield compiled, check(where, f"{key}: {pattern}", value)


def _compiled(pattern: str) -> re.Pattern[str] | None:
    """A plain regular expression as PEFT matches it, None for any other."""
    if not _PATTERN.fullmatch(pattern) or re.search(r"[)*+?][*+?]", pattern):
        return None
    try:
        return re.compile(f"{_BEFORE}{pattern})$")
    except re.error:
        return None


def _cost(pattern: str) -> int:
    """How many ways there are at most to match a name with a pattern without nested repetition."""
    repeated = len(re.findall(r"(?<!\\)[*+]", pattern))
    # Each group or option multiplies what the others allow; a name has some forty characters.
    choices = [part.count("|") + 1 for part in re.split(r"[()]", pattern)]
    return 40**repeated * 2 ** len(re.findall(r"(?<!\\)\?", pattern)) * math.prod(choices)


def _names(where: str, key: str, value: Any) -> tuple[str, ...]:
    names = value or []
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise InputError(f"{where}: {key} is {value!r:.80}, expects a list of names")
    return tuple(names)


def _tokens(where: str, value: Any):
    """The rows of each module; a list means the embedding's."""
    modules = {"embed_tokens": value} if isinstance(value, list) else value or {}
    if not isinstance(modules, dict):
        raise InputError(f"{where}: trainable_token_indices is {value!r:.80}, expects a list")
    for module, rows in modules.items():
        plain = isinstance(rows, list) and all(type(row) is int and row >= 0 for row in rows)
        if not plain or len(set(rows)) != len(rows):
            raise InputError(
                f"{where}: trainable_token_indices: {module:.80}: expects different row numbers"
            )
        yield module.rpartition(".")[2], tuple(rows)
