"""Record adapters that PEFT itself saves and merges, for tests that need PEFT not installed.

    python tools/record_adapters.py tests/adapters/peft-0.21.2-transformers-5.24.0.json

Run it in an environment of the versions to be recorded, with torch on a CPU and safetensors. Each
variant is made by `get_peft_model`, saved by `save_pretrained`, given values by the formula of
`tests/adapter_values.py`, loaded by `PeftModel.from_pretrained` and merged by `merge_and_unload`.
Recorded are the configuration, the names, dtypes and shapes of the tensors, the versions of the
model card, and the CRC-32 of each merged tensor that differs from the base's.
"""

from __future__ import annotations

import json
import re
import sys
import tempfile
import warnings
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from adapter_values import adapter_values, base_shapes, base_values, config

ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
GATE_UP, DOWN = "mlp.experts.gate_up_proj", "mlp.experts.down_proj"
R = {"r": 4, "lora_alpha": 8}
VARIANTS: dict[str, dict[str, Any]] = {
    "attention": R | {"target_modules": ATTENTION},
    "all-linear": R | {"target_modules": "all-linear"},
    "rslora": R | {"target_modules": ATTENTION, "use_rslora": True},
    "alpha 3, rank 5": {"r": 5, "lora_alpha": 3, "target_modules": ATTENTION},
    "patterns": R
    | {
        "target_modules": ATTENTION,
        "rank_pattern": {"layers.0.self_attn.q_proj": 2, "k_proj": 3},
        "alpha_pattern": {r"layers.1.self_attn.(q|o)_proj": 16, "k_proj": 5},
    },
    "rslora patterns": R
    | {
        "target_modules": ATTENTION,
        "use_rslora": True,
        "rank_pattern": {"o_proj": 2},
        "alpha_pattern": {"v_proj": 7},
    },
    "layers 1": R | {"target_modules": ATTENTION, "layers_to_transform": [1]},
    "gaussian": R | {"target_modules": ["q_proj"], "init_lora_weights": "gaussian"},
    "orthogonal": R | {"target_modules": ["q_proj"], "init_lora_weights": "orthogonal"},
    "dora": R | {"target_modules": ATTENTION, "use_dora": True},
    "lora_bias": R | {"target_modules": ATTENTION, "lora_bias": True},
    "dora, lora_bias": R | {"target_modules": ["o_proj"], "use_dora": True, "lora_bias": True},
    "bias all": R | {"target_modules": ["q_proj"], "bias": "all"},
    "bias lora_only": R | {"target_modules": ["q_proj"], "bias": "lora_only"},
    "lm_head": R | {"target_modules": ["lm_head", "q_proj"]},
    "embedding": R | {"target_modules": ["embed_tokens", "q_proj"]},
    "save lm_head": R | {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
    "save router": R | {"target_modules": ["q_proj"], "modules_to_save": ["router"]},
    "save experts": R | {"target_modules": ["q_proj"], "modules_to_save": ["experts"]},
    "save norms": R
    | {"target_modules": ["q_proj"], "modules_to_save": ["norm", "input_layernorm"]},
    "tokens": R | {"target_modules": ["q_proj"], "trainable_token_indices": [3, 149, 7]},
    "tokens of both": R
    | {
        "target_modules": ["q_proj"],
        "trainable_token_indices": {"embed_tokens": [5, 1], "lm_head": [2, 148, 9]},
    },
    "tokens by full name": R
    | {"target_modules": ["q_proj"], "trainable_token_indices": {"model.embed_tokens": [9, 2]}},
    "attention as parameters": R
    | {
        "target_modules": ["v_proj"],
        "target_parameters": ["self_attn.q_proj.weight", "o_proj.weight"],
        "alpha_pattern": {"q_proj.weight": 32},
        "rank_pattern": {"o_proj.weight": 2},
    },
    "vocabulary as parameters": R
    | {"target_modules": [], "target_parameters": ["embed_tokens.weight", "lm_head.weight"]},
    "down biases": R | {"target_modules": [], "target_parameters": [f"{DOWN}_bias"]},
    "router": R | {"target_modules": [], "target_parameters": ["mlp.router.weight"]},
    "gate_up": R | {"target_modules": [], "target_parameters": [GATE_UP]},
    "down": R | {"target_modules": [], "target_parameters": [DOWN]},
    "experts": R | {"target_modules": [], "target_parameters": [GATE_UP, DOWN]},
    "experts, other order": R | {"target_modules": [], "target_parameters": [DOWN, GATE_UP]},
    "experts patterns": R
    | {
        "target_modules": ["q_proj"],
        "target_parameters": [GATE_UP, DOWN],
        "rank_pattern": {"experts.down_proj": 2, "0.mlp.experts.gate_up_proj": 3},
        "alpha_pattern": {"gate_up_proj": 4},
    },
    "experts rslora": R
    | {"target_modules": [], "target_parameters": [GATE_UP, DOWN], "use_rslora": True},
    "experts biases": R
    | {
        "target_modules": [],
        "target_parameters": [GATE_UP, DOWN, f"{GATE_UP}_bias", f"{DOWN}_bias"],
    },
    "everything": R
    | {
        "target_modules": [*ATTENTION, "lm_head", "embed_tokens"],
        "target_parameters": [GATE_UP, DOWN, "mlp.router.weight"],
    },
    "bf16": R | {"target_modules": ATTENTION, "target_parameters": [GATE_UP, DOWN]},
    "f16": R | {"target_modules": ATTENTION, "target_parameters": [GATE_UP, DOWN]},
}
SQUARE = {"gate_up", "down", "experts"}
DTYPES = {"bf16": torch.bfloat16, "f16": torch.float16}


def base_model(base: str):
    """A BF16 model with the formula's values, by transformers."""
    from transformers import AutoModelForCausalLM, GptOssConfig

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder)
        (path / "config.json").write_text(json.dumps(config(base)))
        found = GptOssConfig.from_pretrained(folder)
    model = AutoModelForCausalLM.from_config(found, torch_dtype=torch.bfloat16)
    values = {name: base_values(name, shape) for name, shape in base_shapes(base).items()}
    state = {name: torch.from_numpy(value).bfloat16() for name, value in values.items()}
    model.load_state_dict(state, strict=True)
    return model.to(torch.bfloat16)


def record(base: str, name: str, options: dict[str, Any]) -> dict[str, Any]:
    """One variant: what was saved, and what it merges to."""
    from peft import LoraConfig, PeftModel, get_peft_model
    from safetensors import safe_open
    from safetensors.torch import save_file

    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        kwargs = {"autocast_adapter_dtype": name not in DTYPES}
        made = get_peft_model(
            base_model(base), LoraConfig(task_type="CAUSAL_LM", **options), **kwargs
        )
        if name in DTYPES:
            for parameter in made.parameters():
                parameter.data = parameter.data.to(DTYPES[name])
        made.save_pretrained(folder)
        path = Path(folder, "adapter_model.safetensors")
        with safe_open(path, "pt") as file:
            metadata = file.metadata()
            stored = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        for key, tensor in stored.items():
            if ".base_layer.weight" not in key:
                value = torch.from_numpy(adapter_values(key, tuple(tensor.shape)))
                stored[key] = value.to(tensor.dtype)
            assert torch.isfinite(stored[key].float()).all()
        save_file(stored, path, metadata)
        readme = Path(folder, "README.md").read_text()
        merged = PeftModel.from_pretrained(base_model(base), folder).merge_and_unload().state_dict()
        settings = json.loads(Path(folder, "adapter_config.json").read_text())
    return {
        "base": base,
        "config": settings,
        "metadata": metadata,
        "readme": re.findall(r"(?m)^- [A-Z]\w+:? \d.*$", readme),
        "tensors": {key: [str(t.dtype), list(t.shape)] for key, t in stored.items()},
        "merged": changed(base, merged),
    }


def changed(base: str, merged: dict[str, torch.Tensor]) -> dict[str, str]:
    """The CRC-32 of the BF16 bits of each tensor that is not the base's."""
    found = {}
    for name, shape in base_shapes(base).items():
        before = torch.from_numpy(base_values(name, shape)).bfloat16()
        after = merged[name].to(torch.bfloat16)
        if not torch.equal(before.view(torch.int16), after.view(torch.int16)):
            content = after.contiguous().view(torch.int16).numpy().astype("<i2").tobytes()
            found[name] = f"{zlib.crc32(content):08x}"
    return found


def main(target: str) -> None:
    """Record every variant that these versions can make; the others with what they say."""
    import peft
    import transformers

    torch.set_num_threads(1)
    np.seterr(all="raise")
    versions = {"peft": peft.__version__, "transformers": transformers.__version__}
    variants: dict[str, Any] = {}
    for base in ("distinct", "square"):
        for name, options in VARIANTS.items():
            if base == "square" and name not in SQUARE:
                continue
            key = name if base == "distinct" else f"{name}, square"
            try:
                variants[key] = record(base, name, options)
            except Exception as error:
                variants[key] = {"error": f"{type(error).__name__}: {error}"[:200]}
                print(key, variants[key]["error"], file=sys.stderr)
    content = {"versions": versions | {"torch": torch.__version__}, "variants": variants}
    Path(target).write_text(json.dumps(content, indent=None, sort_keys=True) + "\n")


if __name__ == "__main__":
    main(sys.argv[1])
