"""Record adapters of other writers, merged by their own functions, as `record_adapters.py` does.

    python tools/record_dialects.py tinker SOURCES tests/adapters/tinker.json
    python tools/record_dialects.py unsloth SOURCES tests/adapters/unsloth.json
    python tools/record_dialects.py automodel SOURCES tests/adapters/automodel.json

SOURCES is a checkout of tinker-cookbook, unsloth-zoo or NeMo Automodel. Of the first, the functions
that plan and apply a merge run; of the second, those that take fused halves apart for the forward
pass and fold the 4-bit experts' pairs; of the third, the forward pass of an experts layer, on one
input for each column. Names, shapes and configurations are what these projects save.
"""

from __future__ import annotations

import ast
import importlib
import json
import re
import sys
import types
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
sys.path.insert(0, str(Path(__file__).parent))
from adapter_values import BASES, LAYERS, adapter_values, base_shapes, base_values
from record_adapters import changed

RANK, ALPHA = 4, 8
SHAPE = BASES["distinct"]
HIDDEN, INTER, EXPERTS = SHAPE["hidden"], SHAPE["inter"], SHAPE["experts"]
Q, KV = SHAPE["heads"] * SHAPE["head_dim"], SHAPE["kv_heads"] * SHAPE["head_dim"]
Shapes = dict[str, tuple[int, ...]]


def base() -> dict[str, Tensor]:
    """The BF16 tensors of the tiny base."""
    shapes = base_shapes("distinct")
    return {n: torch.from_numpy(base_values(n, shape)).bfloat16() for n, shape in shapes.items()}


def values(shapes: Shapes) -> dict[str, Tensor]:
    """An adapter's tensors with the formula's values."""
    return {name: torch.from_numpy(adapter_values(name, shape)) for name, shape in shapes.items()}


def record(
    shapes: Shapes, config: Mapping[str, Any], merged: Mapping[str, Tensor]
) -> dict[str, Any]:
    """What a test needs."""
    return {
        "base": "distinct",
        "config": dict(config),
        "metadata": {"format": "pt"},
        "readme": [],
        "tensors": {name: ["torch.float32", list(shape)] for name, shape in shapes.items()},
        "merged": changed("distinct", dict(merged)),
    }


def attention(prefix: str, module: str) -> Iterator[tuple[str, tuple[int, int]]]:
    """The pairs of q, k, v and o."""
    for p, rows, columns in (
        ("q", Q, HIDDEN),
        ("k", KV, HIDDEN),
        ("v", KV, HIDDEN),
        ("o", HIDDEN, Q),
    ):
        yield f"{prefix}.{module}.{p}_proj.lora_A.weight", (RANK, columns)
        yield f"{prefix}.{module}.{p}_proj.lora_B.weight", (rows, RANK)


def tinker(sources: Path) -> dict[str, Any]:
    """tinker_cookbook.weights: `plan_merge_ops` and `apply_merge_op`."""
    sys.modules["tinker"] = types.ModuleType("tinker")
    sys.path.insert(0, str(sources))
    merge = importlib.import_module("tinker_cookbook.weights._merge")
    shapes: Shapes = {}
    for n in range(LAYERS):
        prefix = f"base_model.model.model.layers.{n}"
        shapes |= dict(attention(prefix, "attn"))
        for name, rows, columns in (
            ("w1", INTER, HIDDEN),
            ("w3", INTER, HIDDEN),
            ("w2", HIDDEN, INTER),
        ):
            shared = (1, EXPERTS) if name != "w2" else (EXPERTS, 1)
            stem = f"{prefix}.mlp.experts.{name}"
            shapes[f"{stem}.lora_A.weight"] = (shared[0], RANK, columns)
            shapes[f"{stem}.lora_B.weight"] = (shared[1], rows, RANK)
    shapes["base_model.model.model.unembed_tokens.lora_A.weight"] = (RANK, HIDDEN)
    shapes["base_model.model.model.unembed_tokens.lora_B.weight"] = (150, RANK)
    config = {"lora_alpha": ALPHA, "r": RANK}
    model = base()
    profile = merge.detect_merge_profile({"architectures": ["GptOssForCausalLM"]}, set(model))
    planned = merge.plan_merge_ops(values(shapes), config, set(model), profile)
    for operations in planned.values():
        for operation in operations:
            merge.apply_merge_op(model, operation)
    return {"all": record(shapes, config, model)}


def functions(path: Path, *names: str) -> SimpleNamespace:
    """Some functions of a module whose imports are not needed for them."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    kept = [n for n in tree.body if isinstance(n, ast.FunctionDef) and n.name in names]
    for function in kept:
        function.decorator_list, function.returns = [], None
    scope: dict[str, Any] = {"torch": torch, "re": re, "Tuple": tuple, "Optional": Any}
    exec(compile(ast.Module(kept, []), str(path), "exec"), scope)
    return SimpleNamespace(scope=scope, **{name: scope[name] for name in names})


def unsloth(sources: Path) -> dict[str, Any]:
    """unsloth_zoo: `_canonical_lora_weights_for_grouped_mm`, `_fold_perexpert_lora_into_fused`."""
    zoo = sources / "unsloth_zoo"
    settings = {
        "auto_mapping": {"base_model_class": "GptOssForCausalLM", "unsloth_fixed": True},
        "base_model_name_or_path": "unsloth/gpt-oss-20b",
        "lora_alpha": ALPHA,
        "peft_type": "LORA",
        "peft_version": "0.18.1",
        "r": RANK,
        "task_type": "CAUSAL_LM",
    }
    name = "_canonical_lora_weights_for_grouped_mm"
    take_apart = functions(zoo / "temporary_patches" / "moe_utils.py", name)
    fused = fused_experts(getattr(take_apart, name), settings)
    fold = functions(zoo / "saving_utils.py", "_merge_lora", "_fold_perexpert_lora_into_fused")
    fold.scope |= {"_active_merge_device": lambda: "cpu", "_refuse_dora_on_moe": lambda one: None}
    return {"fused": fused, "4-bit": separate_experts(fold, settings)}


def fused_experts(take_apart: Any, settings: Mapping[str, Any]) -> dict[str, Any]:
    """All experts of a layer in one pair, taken apart as for the forward pass."""
    shapes: Shapes = {}
    model = base()
    for n in range(LAYERS):
        experts = f"base_model.model.model.layers.{n}.mlp.experts"
        for name, wrapper, rows, columns in (
            ("gate_up_proj", ".base_layer", 2 * INTER, HIDDEN),
            ("down_proj", "", HIDDEN, INTER),
        ):
            pair = {
                f"{experts}{wrapper}.lora_A.weight": (EXPERTS * RANK, columns),
                f"{experts}{wrapper}.lora_B.weight": (rows, EXPERTS * RANK),
            }
            shapes |= pair
            a, b = values(pair).values()
            first, second = take_apart(a, b, EXPERTS, RANK, columns, rows)
            target = f"model.layers.{n}.mlp.experts.{name}"
            update = first @ second * (ALPHA / RANK)
            model[target] = (model[target].float() + update).bfloat16()
    target = {"target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]}
    return record(shapes, {**settings, **target}, model)


def separate_experts(fold: Any, settings: Mapping[str, Any]) -> dict[str, Any]:
    """A pair for each expert, as the 4-bit experts have them, folded into the fused weight."""
    shapes: Shapes = {}
    model = base()
    for n in range(LAYERS):
        experts = f"model.layers.{n}.mlp.experts"
        for name, rows, columns in (
            ("gate_up_proj", 2 * INTER, HIDDEN),
            ("down_proj", HIDDEN, INTER),
        ):
            pairs: dict[str, Any] = {}
            for expert in range(EXPERTS):
                stem = f"{experts}.{name}s.{expert}"
                pair = {
                    f"base_model.model.{stem}.lora_A.weight": (RANK, columns),
                    f"base_model.model.{stem}.lora_B.weight": (rows, RANK),
                }
                shapes |= pair
                a, b = values(pair).values()
                pairs[stem] = SimpleNamespace(
                    lora_A=a, lora_B=b, alpha=ALPHA / RANK, magnitude=None, module=None
                )
            target = f"{experts}.{name}"
            folded = fold._fold_perexpert_lora_into_fused(model[target], target, pairs)
            assert folded == EXPERTS
    return record(shapes, settings, model)


def automodel(sources: Path) -> dict[str, Any]:
    """nemo_automodel: the loop of `GroupedExpertsLoRA`, which multiplies one row at a time."""
    sys.path.insert(0, str(sources))
    module = importlib.import_module("nemo_automodel.components._peft.lora_experts")
    layer = module.GroupedExpertsLoRA
    shapes: Shapes = {}
    model = base()
    for n in range(LAYERS):
        prefix = f"base_model.model.model.layers.{n}"
        shapes |= dict(attention(prefix, "self_attn"))
        stem = f"{prefix}.mlp.experts.lora"
        pairs = {
            f"{stem}_gate_and_up_A": (EXPERTS, HIDDEN, RANK),
            f"{stem}_gate_and_up_B": (EXPERTS, RANK, 2 * INTER),
            f"{stem}_down_A": (EXPERTS, INTER, RANK),
            f"{stem}_down_B": (EXPERTS, RANK, HIDDEN),
        }
        shapes |= pairs
        gate_up_a, gate_up_b, down_a, down_b = values(pairs).values()
        gate_up = update_of(layer, (gate_up_a, gate_up_b), None)
        down = update_of(layer, None, (down_a, down_b))
        for name, update in (("gate_up_proj", gate_up), ("down_proj", down)):
            target = f"model.layers.{n}.mlp.experts.{name}"
            model[target] = (model[target].float() + update).bfloat16()
        for p in "qkvo":
            target = f"model.layers.{n}.self_attn.{p}_proj"
            halves = {h: f"base_model.model.{target}.lora_{h}.weight" for h in "AB"}
            held = values({name: shapes[name] for name in halves.values()})
            update = held[halves["B"]] @ held[halves["A"]] * (ALPHA / RANK)
            name = f"{target}.weight"
            model[name] = (model[name].float() + update).bfloat16()
    config = {
        "task_type": "CAUSAL_LM",
        "peft_type": "LORA",
        "r": RANK,
        "lora_alpha": ALPHA,
        "use_dora": False,
        "target_modules": ["q_proj", "k_proj", "v_proj", "o_proj"],
        "bias": "none",
        "base_model_name_or_path": "openai/gpt-oss-20b",
    }
    return {"experts": record(shapes, config, model)}


Halves = tuple[Tensor, Tensor]


def update_of(layer: Any, gate_up: Halves | None, down: Halves | None) -> Tensor:
    """The update that the layer's own loop adds to a matrix, `[expert, in, out]`.

    The loop maps rows of HIDDEN to rows of HIDDEN. With unit rows, no weights, an identity for an
    activation and a window of an identity for the other matrix, it shows one window of the update
    after the other.
    """
    middle = 2 * INTER if gate_up else INTER
    zeros = torch.zeros(EXPERTS, HIDDEN, 1), torch.zeros(EXPERTS, 1, middle)
    others = torch.zeros(EXPERTS, middle, 1), torch.zeros(EXPERTS, 1, HIDDEN)
    windows: list[Tensor] = []
    for start in range(0, middle, HIDDEN):
        window = torch.eye(middle)[:, start : start + HIDDEN]
        window = torch.nn.functional.pad(window, (0, HIDDEN - window.shape[1]))
        into = torch.zeros(HIDDEN, middle) if gate_up else window.T
        out = window if gate_up else torch.zeros(middle, HIDDEN)
        shown = [
            layer._forward_loop(
                SimpleNamespace(
                    scale=ALPHA / RANK,
                    expert_bias=False,
                    expert_activation_grouped=lambda values, weight: values * weight,
                ),
                torch.eye(HIDDEN),
                torch.ones(HIDDEN, 1),
                torch.full((HIDDEN, 1), expert),
                torch.ones(HIDDEN, dtype=torch.bool),
                into.expand(EXPERTS, -1, -1),
                out.expand(EXPERTS, -1, -1),
                *(gate_up or zeros),
                *(down or others),
                EXPERTS,
                0,
                EXPERTS,
            )
            for expert in range(EXPERTS)
        ]
        windows.append(torch.stack(shown))
    return torch.cat(windows, dim=2 if gate_up else 1)[:, : HIDDEN if gate_up else INTER, :middle]


def main(writer: str, sources: str, target: str) -> None:
    """Record all variants of one writer."""
    torch.set_num_threads(1)
    variants = {"tinker": tinker, "unsloth": unsloth, "automodel": automodel}[writer](Path(sources))
    content = {"versions": {"torch": torch.__version__}, "variants": variants}
    Path(target).write_text(json.dumps(content, sort_keys=True) + "\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
