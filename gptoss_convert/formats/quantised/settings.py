"""What quantization_config must say for decoded tensors to be right, key by key.

Every key is read, or has the values listed, or is harmless; another is refused by its name.
Sources: compressed-tensors' QuantizationConfig and QuantizationArgs, ModelOpt's
`convert_hf_quant_config_format`, transformers' BitsAndBytesConfig and FineGrainedFP8Config.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from gptoss_convert.errors import InputError


@dataclass(frozen=True)
class _Keys:
    """What the keys of a section must say."""

    values: Mapping[str, tuple[object, ...]]
    """Those that change what the numbers mean, and the values that are read."""
    harmless: frozenset[str]
    """Those that do not: of activations, caches, the run, and what the tensors say themselves."""

    def check(self, where: str, said: Mapping[str, Any]) -> None:
        """Raise InputError for another value, and for a key that is not known."""
        for key, value in said.items():
            if key in self.values:
                if not any(type(value) is type(v) and value == v for v in self.values[key]):
                    shown = ", ".join(map(json.dumps, self.values[key]))
                    raise InputError(f"{where}: {key} is {value!r:.80}; read: {shown}")
            elif key not in self.harmless:
                raise InputError(f"{where}: {key} is not known here: {value!r:.80}")


_OFF = (None, False)
_ARRANGED = frozenset(("targets", "input_activations", "output_activations", "format"))
_GROUP = _Keys({}, _ARRANGED | {"weights"})
_WEIGHTS = frozenset(
    ("observer", "observer_kwargs", "scale_dtype", "zp_dtype", "group_size", "block_structure")
)
_MODELOPT = _Keys(
    {"quant_method": ("modelopt",), "quant_algo": ("NVFP4",), "group_size": (16, None)},
    frozenset(("config_groups", "ignore", "exclude_modules", "producer"))
    | {"kv_cache_scheme", "kv_cache_quant_algo"},
)
_COMPRESSED = _Keys(
    {
        "quant_method": ("compressed-tensors",),
        "format": (
            *("nvfp4-pack-quantized", "mxfp4-pack-quantized", "float-quantized"),
            *("naive-quantized", "mixed-precision"),
        ),
        "quantization_status": ("compressed",),
        "transform_config": (None, {}),
        "sparsity_config": (None, {}),
    },
    frozenset(
        ("config_groups", "ignore", "kv_cache_scheme", "global_compression_ratio", "version")
    ),
)
_COMPRESSED_WEIGHTS = _Keys(
    {
        "num_bits": (4, 8),
        "type": ("float",),
        "symmetric": (True,),
        "dynamic": (False,),
        "actorder": _OFF,
        "strategy": ("tensor", "channel", "block", "group", "tensor_group"),
    },
    _WEIGHTS,
)
_MODELOPT_WEIGHTS = _Keys(
    {"num_bits": (4,), "type": ("float",), "group_size": (16,), "dynamic": _OFF}, frozenset()
)
_FP8 = _Keys(
    {"quant_method": ("fp8",), "fmt": ("e4m3", "float8_e4m3fn", None)},
    frozenset(("activation_scheme", "weight_block_size", "modules_to_not_convert", "scale_fmt"))
    | {"ignored_layers", "dequantize"},
)
_BITSANDBYTES = _Keys(
    {
        "quant_method": ("bitsandbytes",),
        "load_in_8bit": _OFF,
        "_load_in_8bit": _OFF,
        "bnb_4bit_quant_storage": ("uint8", None),
    },
    frozenset(("load_in_4bit", "_load_in_4bit", "bnb_4bit_compute_dtype", "bnb_4bit_quant_type"))
    | {"bnb_4bit_use_double_quant", "llm_int8_threshold", "llm_int8_has_fp16_weight"}
    | {"llm_int8_enable_fp32_cpu_offload", "llm_int8_skip_modules", "bnb_4bit_target_parameters"},
)


def _groups(where: str, said: Mapping[str, Any], weights: _Keys) -> list[Mapping[str, Any]]:
    """How the weights of each group are stored; each key is known."""
    groups = said.get("config_groups", {})
    found: list[Mapping[str, Any]] = []
    for name, group in groups.items() if isinstance(groups, dict) else ():
        place = f"{where}: config_groups {name}"
        if not isinstance(group, dict):
            raise InputError(f"{place} is {group!r:.80}, expects an object")
        _GROUP.check(place, group)
        stored = group.get("weights")
        if isinstance(stored, dict):
            weights.check(f"{place}: weights", stored)
            found.append(stored)
    return found


def _modelopt(where: str, said: Mapping[str, Any]) -> dict[str, float]:
    _MODELOPT.check(where, said)
    _groups(where, said, _MODELOPT_WEIGHTS)
    return {}


def _compressed(where: str, said: Mapping[str, Any]) -> dict[str, float]:
    """Rows and columns that share an FP8 scale, which must be the same in all groups."""
    _COMPRESSED.check(where, said)
    shared = {
        _shared(where, one)
        for one in _groups(where, said, _COMPRESSED_WEIGHTS)
        if one.get("num_bits") == 8
    }
    if len(shared) > 1:
        raise InputError(f"{where}: groups of {sorted(shared)} rows and columns: one kind is read")
    rows, columns = next(iter(shared), (0, 0))
    return {"block_rows": rows, "block_columns": columns}


def _shared(where: str, weights: Mapping[str, Any]) -> tuple[int, int]:
    strategy = weights.get("strategy")
    if strategy == "block":
        return _block(where, weights.get("block_structure"))
    if strategy not in {"tensor", "channel"}:
        raise InputError(f"{where}: FP8 weights with strategy {strategy!r:.40} are not read")
    return (1, 0) if strategy == "channel" else (0, 0)


def _block(where: str, found: object) -> tuple[int, int]:
    parts = found.split("x") if isinstance(found, str) else found
    if isinstance(parts, list) and len(parts) == 2 and all(str(n).isdecimal() for n in parts):
        rows, columns = (int(n) for n in parts)
        if 0 < min(rows, columns) <= max(rows, columns) < 1 << 20:
            return rows, columns
    raise InputError(f"{where}: blocks of {found!r:.80}, expects rows and columns")


def _fp8(where: str, said: Mapping[str, Any]) -> dict[str, float]:
    _FP8.check(where, said)
    size = said.get("weight_block_size")
    rows, columns = (0, 0) if size is None else _block(where, size)
    return {"block_rows": rows, "block_columns": columns}


def _bitsandbytes(where: str, said: Mapping[str, Any]) -> dict[str, float]:
    _BITSANDBYTES.check(where, said)
    return {}


UNREAD = {
    "quark": "which does not say whether rows of gate and up alternate; have Quark export BF16",
    "gptq": "whose integers no format here holds; dequantise it with its own library, save BF16",
    "awq": "whose integers no format here holds; dequantise it with its own library, save BF16",
    "torchao": "whose tensors are classes of its own; dequantise it with torchao, save BF16",
}
"""Methods that are known and not read: why, and what helps."""

METHODS = {
    "modelopt": _modelopt,
    "compressed-tensors": _compressed,
    "fp8": _fp8,
    "bitsandbytes": _bitsandbytes,
}
"""What must be true of quantization_config, by its quant_method; returns the decoder's numbers."""
