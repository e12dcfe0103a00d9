"""Oracles load what was read and checked, whatever lies there by then, and unpickle none of it."""

from __future__ import annotations

import io
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch.distributed.checkpoint.metadata import BytesStorageMetadata

from gptoss_convert.conversion.options import Options
from gptoss_convert.conversion.plan import plan
from gptoss_convert.conversion.run import run
from gptoss_convert.errors import InputError, IntegrityError
from gptoss_convert.formats.registry import open_checkpoint
from gptoss_convert.verify.oracle_level import oracle_logits
from gptoss_convert.verify.sides import open_reader
from gptoss_convert.witness.fetch import Fetcher
from tests.test_canaries import MakeDirectory
from tests.test_forward import CPU
from tests.tiny_files import write_hf_mxfp4
from tests.tiny_models import SQUARE, random_weights

TOKENS = [[1, 2, 3]]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("oracles")
    write_hf_mxfp4(folder / "hf", SQUARE, random_weights(SQUARE, seed=2))
    run(plan(folder / "hf", folder / "megatron", Options("megatron", workers=1)))
    return folder


def metadata(root: Path, canary: Path) -> None:
    (root / "iter_0000001" / ".metadata").write_bytes(pickle.dumps(MakeDirectory(canary)))


def common(root: Path, canary: Path) -> None:
    path = root / "iter_0000001" / "common.pt"
    torch.save({"checkpoint_version": 3.0, "iteration": 1, "mine": MakeDirectory(canary)}, path)


def objects(root: Path, canary: Path) -> None:
    """Every object of the `.distcp` files, which Megatron loads with its layers."""
    iteration = root / "iter_0000001"
    content = pickle.loads((iteration / ".metadata").read_bytes())
    payload = io.BytesIO()
    torch.save(MakeDirectory(canary), payload)
    kinds = content.state_dict_metadata
    for index, place in content.storage_data.items():
        if isinstance(kinds[index.fqn], BytesStorageMetadata):
            with (iteration / place.relative_path).open("ab") as file:
                place.offset, place.length = file.tell(), len(payload.getvalue())
                file.write(payload.getvalue())
    (iteration / ".metadata").write_bytes(pickle.dumps(content))


@pytest.mark.parametrize(
    ("hostile", "later"),
    [(common, False), (objects, False), (metadata, True), (common, True), (objects, True)],
)
def test_megatron_core_unpickles_nothing_of_source(
    made: Path, tmp_path: Path, hostile: Callable[[Path, Path], None], later: bool
) -> None:
    root, canary = tmp_path / "megatron", tmp_path / "canary"
    shutil.copytree(made / "megatron", root)
    if not later:
        hostile(root, canary)
    opened = open_checkpoint(root)
    reader = open_reader(opened, Fetcher(CPU), None)
    if later:
        hostile(root, canary)
    try:
        logits = oracle_logits(opened, reader.config, TOKENS, CPU)
        assert not isinstance(logits, str), logits
    except (InputError, IntegrityError):
        assert later
    assert not canary.exists()


def test_transformers_loads_the_files_whose_headers_were_read(made: Path, tmp_path: Path) -> None:
    root = Path(shutil.copytree(made / "hf", tmp_path / "hf"))
    opened = open_checkpoint(root)
    reader = open_reader(opened, Fetcher(CPU), None)
    expected = oracle_logits(opened, reader.config, TOKENS, CPU)
    # What comes later is not looked at: an adapter, other numbers, remote code.
    (root / "adapter_config.json").write_text("{}")
    (root / "config.json").write_text('{"model_type": "llama", "auto_map": {"AutoModel": "x.Y"}}')
    again = oracle_logits(opened, reader.config, TOKENS, CPU)
    assert not isinstance(expected, str) and not isinstance(again, str)
    assert torch.equal(expected[0], again[0])
    shard = next(root.glob("*.safetensors"))
    shutil.copy(shard, root / "new")
    (root / "new").rename(shard)
    with pytest.raises(IntegrityError, match=r"changed since its header was read"):
        oracle_logits(opened, reader.config, TOKENS, CPU)
