"""The closed list of globals that genuine checkpoints name, and the neutral value of each.

One vocabulary per kind of pickle. Nothing here imports torch or megatron: classes become `Record`s,
enums and dtypes become strings. No stand-in copies its arguments: the memo lets a short pickle
repeat a long string or list without end.
"""

from __future__ import annotations

from dataclasses import dataclass

from gptoss_convert.containers.torch_dist.pickle_state import Construct, Vocabulary, recorded
from gptoss_convert.errors import InputError

DTYPE_NAMES: dict[str, str] = {
    "torch.bfloat16": "BF16",
    "torch.float16": "F16",
    "torch.float32": "F32",
    "torch.uint8": "U8",
}
"""torch dtypes that a weight may have, and their names in a chunk."""

_OTHER_DTYPES = (
    *("torch.float64", "torch.int8", "torch.int16", "torch.int32", "torch.int64", "torch.bool"),
    *("torch.uint16", "torch.uint32", "torch.uint64", "torch.complex64", "torch.complex128"),
    *("torch.float8_e4m3fn", "torch.float8_e5m2", "torch.float8_e4m3fnuz"),
    *("torch.float8_e5m2fnuz", "torch.float8_e8m0fnu", "torch.float4_e2m1fn_x2"),
)

_STORAGES: dict[str, str] = {
    "torch.BFloat16Storage": "torch.bfloat16",
    "torch.HalfStorage": "torch.float16",
    "torch.FloatStorage": "torch.float32",
    "torch.DoubleStorage": "torch.float64",
    "torch.ByteStorage": "torch.uint8",
    "torch.CharStorage": "torch.int8",
    "torch.ShortStorage": "torch.int16",
    "torch.IntStorage": "torch.int32",
    "torch.LongStorage": "torch.int64",
    "torch.BoolStorage": "torch.bool",
}


@dataclass(frozen=True, slots=True, eq=False)
class Storage:
    """The stand-in of a typed storage class."""

    dtype: str


PATH = "pathlib.PurePath"
"""Name of a path's `Record`, whose arguments are the path's parts."""


def _records(module: str, *names: str) -> dict[str, object]:
    return {f"{module}.{name}": recorded(f"{module}.{name}") for name in names}


def _enums(module: str, *names: str) -> dict[str, object]:
    """Enums are rebuilt from their value: that value, after the class, is their string."""

    def make(name: str) -> Construct:
        return Construct(name, lambda args: f"{name}({_scalar(args)})")

    return {f"{module}.{name}": make(name) for name in names}


def _scalar(args: tuple[object, ...]) -> int | str:
    if len(args) != 1 or not isinstance(args[0], int | str) or len(str(args[0])) > 100:
        raise InputError("pickle rebuilds an enum from other than one integer or short string")
    return args[0]


def _size(args: tuple[object, ...]) -> object:
    if len(args) == 1 and isinstance(args[0], tuple):
        dims = args[0]
        if all(type(dim) is int for dim in dims):
            return dims
    raise InputError("pickle rebuilds torch.Size from other than a tuple of integers")


def _mapping(args: tuple[object, ...]) -> dict[object, object]:
    if args:
        raise InputError("pickle rebuilds a mapping from arguments")
    return {}


def _items(args: tuple[object, ...]) -> list[object]:
    """A set as protocol 2 writes it: rebuilt from one list, which stands for it uncopied."""
    if len(args) == 1 and type(args[0]) is list:
        return args[0]
    raise InputError("pickle rebuilds a set from other than one list")


def _encoded(args: tuple[object, ...]) -> str:
    """Bytes as protocol 2 writes them: a latin-1 string, which stands for them uncopied."""
    if len(args) == 2 and isinstance(args[0], str) and args[1] == "latin1":
        return args[0]
    raise InputError("pickle rebuilds bytes from other than a latin-1 string")


def _layout(args: tuple[object, ...]) -> str:
    return str(_scalar(args))


_DCP = "torch.distributed.checkpoint"
_DTYPES: dict[str, object] = {name: name for name in (*DTYPE_NAMES, *_OTHER_DTYPES)}
_PATHS: dict[str, object] = {
    f"{module}.{name}": recorded(PATH)
    for module in ("pathlib", "pathlib._local")
    for name in ("PosixPath", "PurePosixPath")
}
_SHARED: dict[str, object] = {
    **_DTYPES,
    **_PATHS,
    "torch.Size": Construct("torch.Size", _size),
    "collections.OrderedDict": Construct("OrderedDict", _mapping),
}

METADATA: Vocabulary = {
    **_SHARED,
    **_records(
        f"{_DCP}.metadata",
        *("Metadata", "MetadataIndex", "TensorStorageMetadata", "BytesStorageMetadata"),
        *("ChunkStorageMetadata", "TensorProperties", "StorageMeta"),
    ),
    **_enums(f"{_DCP}.metadata", "_MEM_FORMAT_ENCODING"),
    **_records(f"{_DCP}.filesystem", "_StorageInfo", "_StoragePrefix"),
    **_records(f"{_DCP}.planner", "SavePlan", "WriteItem", "TensorWriteData", "BytesIOWriteData"),
    **_enums(f"{_DCP}.planner", "WriteItemType"),
    **_records(
        "megatron.core.dist_checkpointing.strategies.torch", "MCoreMetadata", "MCoreSavePlan"
    ),
    "torch.serialization._get_layout": Construct("_get_layout", _layout),
}
"""Globals of a `.metadata` file."""

TENSOR: Vocabulary = {
    **{name: Storage(dtype) for name, dtype in _STORAGES.items()},
    "torch._utils._rebuild_tensor_v2": recorded("tensor"),
    "collections.OrderedDict": Construct("OrderedDict", _mapping),
}
"""Globals of a tensor written by `torch.save`."""

COMMON: Vocabulary = {
    **_SHARED,
    **TENSOR,
    **_records("argparse", "Namespace"),
    **_records("types", "SimpleNamespace"),
    **_records("io", "BytesIO"),
    **_records("_io", "BytesIO"),
    **_records("megatron.core.optimizer", "OptimizerConfig"),
    **_records("megatron.core.optimizer.optimizer_config", "OptimizerConfig"),
    **_records("megatron.core.rerun_state_machine", "RerunDiagnostic"),
    **_enums("megatron.core.rerun_state_machine", "RerunMode", "RerunState"),
    **_enums("megatron.core.enums", "ModelType"),
    **_enums("megatron.core.transformer.enums", "AttnBackend", "CudaGraphScope"),
    **_enums("signal", "Signals"),
    **{f"signal.{s}": s for s in ("SIGTERM", "SIGINT", "SIGHUP", "SIGUSR1", "SIGUSR2")},
    **_records("numpy", "dtype", "ndarray"),
    **_records("numpy.dtypes", "UInt32DType"),
    **_records("numpy.core.multiarray", "_reconstruct", "scalar"),
    **_records("numpy._core.multiarray", "_reconstruct", "scalar"),
    **{
        f"{m}.{n}": Construct(n, _items)
        for m in ("__builtin__", "builtins")
        for n in ("set", "frozenset")
    },
    **_records("__builtin__", "bytes", "bytearray", "complex"),
    "_codecs.encode": Construct("_codecs.encode", _encoded),
    "torch.device": Construct("torch.device", _layout),
    "torch.Tensor": "torch.Tensor",
}
"""Globals of `common.pt` and of the `common_state` object: training arguments and run state."""
