"""Megatron-LM's own parser, as recorded, and the lines that this project prints for it. No tests.

`recorded()` is what `tools/record_megatron_arguments.py` wrote: every option of each version, and
what became of each case, parsed and validated by Megatron-LM itself. `parser(version)` is that
parser again, without Megatron-LM.
"""

from __future__ import annotations

import json
import lzma
import re
import shlex
from argparse import ArgumentParser
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import Any

from gptoss_convert.formats.config import Config
from gptoss_convert.formats.megatron.launch import arguments, launch_page
from gptoss_convert.formats.megatron.state import common_state

ROOT = Path(__file__).parent.parent
RECORD = ROOT / "tests" / "recorded" / "megatron-arguments.json.xz"
RANKS = 8

SMALL = Config(
    num_hidden_layers=24,
    num_local_experts=32,
    num_experts_per_tok=4,
    hidden_size=2880,
    intermediate_size=2880,
    num_attention_heads=64,
    num_key_value_heads=8,
    head_dim=64,
    vocab_size=201088,
    sliding_window=128,
    max_position_embeddings=131072,
    original_max_position_embeddings=4096,
    rope_theta=150000.0,
    rope_factor=32.0,
    beta_fast=32.0,
    beta_slow=1.0,
    swiglu_limit=7.0,
    rms_norm_eps=1e-05,
)
CONFIGS = {
    "20b": SMALL,
    "120b": replace(SMALL, num_hidden_layers=36, num_local_experts=128),
    "odd": replace(
        SMALL,
        num_hidden_layers=6,
        num_local_experts=16,
        num_experts_per_tok=3,
        hidden_size=224,
        intermediate_size=192,
        num_attention_heads=15,
        num_key_value_heads=5,
        head_dim=20,
        vocab_size=352,
        sliding_window=23,
        max_position_embeddings=672,
        original_max_position_embeddings=96,
        rope_theta=12345.0,
        rope_factor=7.0,
        beta_fast=8.0,
        beta_slow=0.5,
        swiglu_limit=5.5,
        rms_norm_eps=1e-06,
        rope_truncate=True,
    ),
}


@dataclass(frozen=True)
class Case:
    """One start of Megatron-LM: its words, and the `args` of the checkpoint that it loads."""

    words: list[str]
    args: dict[str, Any]

    def plain(self) -> dict[str, Any]:
        """The same as JSON has it."""
        return json.loads(json.dumps({"words": self.words, "args": self.args}))


def cases() -> dict[str, Case]:
    """What our pages say to start, and one start that must not work."""
    recipe = recipe_words()
    found: dict[str, Case] = {}
    for name, config in CONFIGS.items():
        args = vars(common_state(config, "stacked")["args"])
        found[name] = Case([*page_words(config), *recipe], args)
    wrong = {**found["20b"].args, "add_position_embedding": False}
    found["no position embedding"] = Case(found["20b"].words, wrong)
    return found


def page_words(config: Config) -> list[str]:
    """The arguments on the page that lies in every checkpoint, as a shell gives them."""
    inside = launch_page(config).partition("ARGS=(")[2].partition("\n)\n")[0]
    words = shlex.split(inside.replace("\\\n", " "))
    assert words == shlex.split(" ".join(arguments(config)))
    return words


def recipe_words() -> list[str]:
    """What docs/recipes.md adds to them to train."""
    text = (ROOT / "docs" / "recipes.md").read_text(encoding="utf-8")
    section = text.partition("\n## Fine-tune with Megatron-LM")[2].partition("\n## ")[0]
    arrays = dict(re.findall(r"^(\w+)=\((.*?)\)", section, re.MULTILINE))
    assert arrays.keys() == {"ARGS", "SIZES", "TRAIN", "SAVE"}
    return [word for name in ("SIZES", "TRAIN", "SAVE") for word in shlex.split(arrays[name])]


@cache
def recorded() -> dict[str, Any]:
    """By version: commit, options, and what became of the cases."""
    return json.loads(lzma.decompress(RECORD.read_bytes()))


class _Parser(ArgumentParser):
    def error(self, message: str) -> Any:
        raise ValueError(message)


_TYPES: dict[str, Any] = {"int": int, "float": float, "str": str, "bool": bool}


@cache
def parser(version: str) -> ArgumentParser:
    """The parser of a version, its options and their types as recorded."""
    found = _Parser(allow_abbrev=False)
    for option in recorded()["versions"][version]["options"]:
        add = partial(found.add_argument, *option["names"], dest=option["dest"])
        if option["kind"] in ("store_true", "store_false"):
            add(action=option["kind"])
        else:
            kind = _TYPES.get(option["type"], str)
            add(type=kind, nargs=option["nargs"], choices=option["choices"])
    return found
