"""A format is one value in the registry: one that the package has never heard of works as well."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from gptoss_convert import Options, convert, inspect
from gptoss_convert.compare.values import compare_values
from gptoss_convert.containers import Image, safetensors
from gptoss_convert.formats import config as configs
from gptoss_convert.formats import shards
from gptoss_convert.formats.checkpoint import Checkpoint, Choices, Format, best_variant
from gptoss_convert.formats.image_options import ImageOptions
from gptoss_convert.formats.registry import FORMATS, formats_in, open_checkpoint
from gptoss_convert.layouts.model import load_model
from gptoss_convert.layouts.table_files import load_table, parse_table
from gptoss_convert.layouts.tables import Table
from tests.tiny_files import write_hf_bf16, write_hf_mxfp4
from tests.tiny_models import DISTINCT, random_weights

MARK = "toy.json"


@cache
def table() -> Table:
    """The names of OpenAI's table with a prefix; BF16 experts, gate and up in halves."""
    hf = load_table("hf").variants["bf16"]
    experts = {"gate_up.weight": "expert (glu inter) hidden", "down.weight": "hidden expert inter"}
    rules = {
        f"toy.{rule.name}": {
            "param": [*rule.params],
            "layout": experts.get(rule.params[0], rule.layout.text),
        }
        for rule in hf
    }
    content = {"container": "safetensors", "variants": {"toy": ["all"]}, "all": rules}
    return parse_table("toy", content, load_model())


def recognise(path: Path) -> Path | None:
    return path if (path / MARK).exists() else None


def open_toy(root: Path, choices: Choices) -> Checkpoint:
    text = (root / MARK).read_text()
    config = configs.from_hf(MARK, json.loads(text))
    chunks, headers = safetensors.read_directory(root)
    variant = best_variant(table(), config, chunks)
    return Checkpoint(TOY, variant, root, config, text, chunks, headers)


def image(
    source: Checkpoint, variant: str, options: ImageOptions
) -> tuple[Image, list[str]]:  # fmt: skip
    style = shards.Style("toy", "-", "\n", lambda config: {})
    weights = shards.image(style, table(), source, variant, options)
    mark = (MARK, configs.hf_json(source.config, None, mxfp4=False))
    return Image(weights.files, weights.chunks, (mark, *weights.closing)), []


TOY = Format(
    "toy", table, recognise, open_toy, lambda names: set(), lambda encoding, options: "toy", image
)


def tensors_in(folder: Path) -> dict[str, torch.Tensor]:
    files = sorted(folder.glob("*.safetensors"))
    return {name: one for file in files for name, one in load_file(file).items()}


@pytest.fixture
def toy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(FORMATS, "toy", TOY)


@pytest.mark.usefixtures("toy")
def test_a_format_of_the_tests_own_is_converted_to_and_from(tmp_path: Path) -> None:
    weights = random_weights(DISTINCT, seed=3)
    packed = write_hf_mxfp4(tmp_path / "mxfp4", DISTINCT, weights)
    plain = write_hf_bf16(tmp_path / "bf16", DISTINCT, weights)
    made, back = tmp_path / "toy", tmp_path / "back"
    convert(packed, made, Options(to="toy", keep_scales=False))
    assert formats_in(made) == {"toy": made}
    assert inspect(made).checkpoint.label == "toy"
    expected, found = tensors_in(plain), tensors_in(made)
    gate_up = expected["model.layers.1.mlp.experts.gate_up_proj"]
    halves = torch.cat((gate_up[..., ::2], gate_up[..., 1::2]), -1).transpose(1, 2)
    assert torch.equal(found["toy.model.layers.1.mlp.experts.gate_up_proj"], halves)
    down = expected["model.layers.0.mlp.experts.down_proj"].permute(2, 0, 1)
    assert torch.equal(found["toy.model.layers.0.mlp.experts.down_proj"], down)
    convert(made, back, Options(to="hf", dtype="mxfp4"))
    report = compare_values(open_checkpoint(packed), open_checkpoint(back))
    assert report.same


@pytest.mark.usefixtures("toy")
def test_a_directory_of_two_formats_is_asked_about(tmp_path: Path) -> None:
    both = write_hf_bf16(tmp_path / "both", DISTINCT, random_weights(DISTINCT, seed=3))
    (both / MARK).write_text("{}")
    assert [*formats_in(both)] == ["hf", "toy"]
    with pytest.raises(Exception, match="holds hf and toy; choose one with --from"):
        open_checkpoint(both)
