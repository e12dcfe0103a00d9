"""The numbers that define a GPT-OSS model; a Config that exists can be computed with."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from gptoss_convert.errors import InputError

_SIZES = {20: (24, 32), 120: (36, 128)}
LARGEST = {"num_hidden_layers": 1 << 10, "num_local_experts": 1 << 12, "num_experts": 1 << 12}
"""Limits of what is counted out, so that no number makes a plan of endless length."""
MOST_EXPERTS = 1 << 14
"""Of all layers together, each of which may have tensors of its own; 120b has 4608."""


@dataclass(frozen=True)
class Config:
    """The model's numbers, under the names of Hugging Face's config.json.

    Raises InputError where no model can have them together.
    """

    num_hidden_layers: int
    num_local_experts: int
    num_experts_per_tok: int
    hidden_size: int
    intermediate_size: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    vocab_size: int
    sliding_window: int
    max_position_embeddings: int
    original_max_position_embeddings: int
    swiglu_limit: float
    rms_norm_eps: float
    rope_theta: float
    rope_factor: float
    beta_fast: float
    beta_slow: float
    rope_truncate: bool = False
    """Whether YaRN's range is rounded to whole frequencies; that of the released models is not."""
    attention_factor: float | None = None
    """Factor of the rotary cosines and sines; None is YaRN's own, 0.1 ln(factor) + 1."""
    notes: tuple[str, ...] = ()
    """Defaults that were filled in because the source leaves them out."""

    def __post_init__(self) -> None:
        if problem := self._impossible():
            raise InputError(problem)

    def _impossible(self) -> str | None:
        """What no model can have, found and expected."""
        if self.num_experts_per_tok > self.num_local_experts:
            return (
                f"num_experts_per_tok is {self.num_experts_per_tok}, expects at most "
                f"num_local_experts, {self.num_local_experts}"
            )
        if self.num_hidden_layers * self.num_local_experts > MOST_EXPERTS:
            return (
                f"num_hidden_layers times num_local_experts is "
                f"{self.num_hidden_layers * self.num_local_experts}, expects at most {MOST_EXPERTS}"
            )
        if self.num_attention_heads % self.num_key_value_heads:
            return (
                f"num_attention_heads is {self.num_attention_heads}, expects a multiple of "
                f"num_key_value_heads, {self.num_key_value_heads}"
            )
        if self.head_dim % 2:
            return f"head_dim is {self.head_dim}, expects an even number: rope turns pairs"
        if self.rope_theta <= 1:
            return f"rope_theta is {self.rope_theta:g}, expects more than 1"
        if self.rope_factor < 1:
            return f"rope factor is {self.rope_factor:g}, expects at least 1"
        return None

    @property
    def numbers(self) -> dict[str, int]:
        """The whole numbers, by key: what the lengths of the model's axes are computed from."""
        return {k: v for k, v in vars(self).items() if type(v) is int}

    @property
    def size(self) -> str:
        """`20b`, `120b`, or a description of another size."""
        shape = (self.num_hidden_layers, self.num_local_experts)
        for name, released in _SIZES.items():
            if shape == released and self.hidden_size == 2880:
                return f"{name}b"
        return f"{shape[0]} layers, {shape[1]} experts, hidden {self.hidden_size}"


def layer_types(layers: int) -> list[str]:
    """Sliding window on even layers (counted from 0), full attention on odd ones."""
    return ["full_attention" if layer % 2 else "sliding_attention" for layer in range(layers)]


def number(where: str, content: Mapping[str, Any], key: str, kind: type) -> Any:
    """The value of `key`, an int or, for `float`, any number; more than 0 and not endless."""
    if key not in content:
        raise InputError(f"{where}: no {key!r}")
    value = content[key]
    if type(value) is not int and (kind is int or type(value) is not float):
        raise InputError(
            f"{where}: {key} is {value!r:.80}, expects {'a whole' if kind is int else 'a'} number"
        )
    limit = LARGEST.get(key, 1 << 40)
    if not 0 < value <= limit:
        raise InputError(f"{where}: {key} is {value!r}, expects more than 0 and at most {limit}")
    return value


def made(where: str, **numbers: Any) -> Config:
    """A Config; raises InputError that begins with `where` if its numbers are impossible."""
    try:
        return Config(**numbers)
    except InputError as error:
        raise InputError(f"{where}: {error}") from None


def kind_of(name: str) -> type[int] | type[float]:
    """Whether a number of `Config` is whole."""
    return int if name in _WHOLE else float


_WHOLE = frozenset(field.name for field in fields(Config) if field.type == "int")
