"""What Megatron-Bridge and Megatron-LM save comes back, as it lies, to the bit."""

from __future__ import annotations

import io
import json
import re
import shutil
from argparse import Namespace
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from click.testing import CliRunner
from safetensors.torch import load_file

from gptoss_convert import Options, convert, inspect, plan
from gptoss_convert.cli.main import cli
from gptoss_convert.containers import Chunk
from gptoss_convert.errors import CodecError, InputError, UsageError
from gptoss_convert.formats.checkpoint import Choices
from gptoss_convert.formats.megatron import interleave
from gptoss_convert.witness.configs import read_json
from gptoss_convert.witness.hf_config import hf_config
from gptoss_convert.witness.megatron_oracle import megatron_logits
from tests.megatron_witness import assert_same
from tests.recorded import unpack

BRIDGE = ("bridge-0.4.2", "bridge-0.5.1", "bridge-0.6.0")
MEGATRON_LM = ("megatron-lm-0.18.2", "megatron-lm-0.19.0")
REFUSED = {
    "bridge-0.3.1": "window_size is [128, 0], a window of 129 tokens, as Megatron-Bridge up to",
    "megatron-lm-0.16.1": "position_embedding_type is 'rope', GPT-OSS here has 'yarn'",
}
TO_BF16 = Options(to="hf", dtype="bf16")
FORMATS = {
    "hf-bf16": TO_BF16,
    "hf-mxfp4": Options(to="hf", dtype="mxfp4"),
    "openai": Options(to="openai", dtype="mxfp4"),
    "megatron": Options(to="megatron"),
}
"""The weights of the saves of Megatron-LM are no MXFP4 values, and must be rounded to it."""


@pytest.fixture(scope="module")
def saves(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return unpack("megatron-saves.tar.xz", tmp_path_factory.mktemp("recorded"))


def source_of(saves: Path, name: str) -> Path:
    """The Hugging Face directory whose weights a save holds."""
    return saves / f"hf-bf16-of-{name.rpartition('-')[0]}"


def weights(folder: Path) -> dict[str, torch.Tensor]:
    (file,) = folder.glob("*.safetensors")
    return load_file(file)


def numbers(config: Path) -> dict[str, Any]:
    """What config.json says of the model, whatever form it says it in."""
    content = json.loads(config.read_text())
    names = ("sliding_window", "rope_theta", "rms_norm_eps", "num_experts_per_tok", "vocab_size")
    names += ("num_local_experts", "swiglu_limit", "max_position_embeddings", "rope_scaling")
    return {name: content[name] for name in names}


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("name", [*BRIDGE, *MEGATRON_LM])
def test_a_save_converts_to_every_format_without_options(
    saves: Path, tmp_path: Path, name: str, form: str
) -> None:
    options = replace(FORMATS[form], lossy=name in MEGATRON_LM and "mxfp4" in FORMATS[form].dtype)
    report = convert(saves / name, tmp_path / "t", options)
    assert not [note for note in report.conversion.notes if "released" in note]
    source = source_of(saves, name)
    if options.lossy:
        convert(source, tmp_path / "s", options)
        assert_same(weights(tmp_path / "t"), weights(tmp_path / "s"))
        return
    back = tmp_path / "t"
    if form != "hf-bf16":
        back = tmp_path / "back"
        convert(tmp_path / "t", back, TO_BF16)
    assert_same(weights(back), weights(source))
    assert numbers(back / "config.json") == numbers(source / "config.json")


@pytest.mark.parametrize("name", MEGATRON_LM)
def test_to_mxfp4_only_what_is_no_mxfp4_value_needs_an_option(
    saves: Path, tmp_path: Path, name: str
) -> None:
    with pytest.raises(CodecError, match="not exact in MXFP4"):
        convert(saves / name, tmp_path / "t", FORMATS["hf-mxfp4"])


@pytest.mark.parametrize("name", [*BRIDGE, *MEGATRON_LM, *REFUSED])
def test_verify_finds_a_save_to_be_its_source(saves: Path, name: str) -> None:
    source = source_of(saves, name)
    words = ["verify", str(source), str(saves / name), "--sample", "100"]
    words += ["--config-target", str(source / "config.json")] if name in REFUSED else []
    done = CliRunner().invoke(cli, words)
    assert done.exit_code == 0, done.output
    assert done.stdout.startswith("same: max |Δlogit| 0 ")


@pytest.mark.parametrize("name", [*BRIDGE, *MEGATRON_LM])
def test_inspect_tells_what_a_save_is(saves: Path, name: str) -> None:
    found = inspect(saves / name).summary()
    config = found["config"]
    assert (config["num_hidden_layers"], config["num_local_experts"]) == (4, 8)
    assert (config["sliding_window"], config["vocab_size"]) == (8, 160)
    assert (config["rope_factor"], config["original_max_position_embeddings"]) == (32.0, 4096)
    assert (config["rope_theta"], config["max_position_embeddings"]) == (150000.0, 131072)
    by = "Megatron-Bridge" if name in BRIDGE else "Megatron-LM"
    assert found["details"]["saved_by"] == by
    assert found["details"]["skipped"] == {"extra_state": 81}
    # Bridge states no context; a carried config.json does.
    context = ["max_position_embeddings is not stated"] * (name in BRIDGE)
    assert [note.partition(":")[0] for note in found["notes"]] == context


@pytest.mark.parametrize("name", REFUSED)
def test_a_save_of_another_model_is_refused_for_that_alone(
    saves: Path, tmp_path: Path, name: str
) -> None:
    with pytest.raises(InputError) as caught:
        plan(saves / name, tmp_path / "t", TO_BF16)
    (problem,) = re.findall(r": (\w+ is .*); if the weights are right", str(caught.value))
    assert problem.startswith(REFUSED[name]) and " is " not in problem[len(REFUSED[name]) :]
    source = source_of(saves, name)
    given = replace(TO_BF16, config=source / "config.json")
    report = convert(saves / name, tmp_path / "t", given)
    field = REFUSED[name].partition(",")[0]
    (note,) = (note for note in report.conversion.notes if "going by" in note)
    assert field in note and ";" not in note.partition("; going by")[0]
    config = inspect(saves / name, Choices(config=source / "config.json")).summary()["config"]
    assert (config["sliding_window"], config["rope_factor"], config["vocab_size"]) == (8, 32.0, 160)
    assert_same(weights(tmp_path / "t"), weights(source))


@pytest.mark.parametrize("name", ["bridge-0.6.0", "megatron-lm-0.18.2"])
def test_megatron_core_loads_a_save_of_any_version_for_the_oracle(
    saves: Path, tmp_path: Path, name: str
) -> None:
    """Their common state is not what the installed version expects, or holds classes of its own."""
    source = source_of(saves, name)
    convert(source, tmp_path / "t", FORMATS["megatron"])
    config = hf_config(read_json(source / "config.json"))
    tokens = [list(range(3, 40))]
    found = []
    for root in (saves / name, tmp_path / "t"):
        (iteration,) = root.glob("iter_*")
        found += megatron_logits(iteration, config, tokens, torch.device("cpu"))
    ours, theirs = found
    assert torch.equal(ours, theirs)


def change_run_config(root: Path, **changes: Any) -> None:
    (path,) = root.glob("iter_*/run_config.yaml")
    content = yaml.safe_load(path.read_text())
    content["model"] |= changes
    path.write_text(yaml.safe_dump(content))


def change_args(root: Path, **changes: Any) -> None:
    """Put changed arguments into common.pt, where every version of Megatron looks first."""
    (iteration,) = root.glob("iter_*")
    found = inspect(root).checkpoint
    assert found.root == iteration
    state = io.BytesIO()
    args = {**stored_args(iteration), **changes}
    torch.save({"args": Namespace(**args), "iteration": 7}, state)
    (iteration / "common.pt").write_bytes(state.getvalue())


def stored_args(iteration: Path) -> dict[str, Any]:
    from gptoss_convert.containers import torch_dist

    args = torch_dist.read(iteration).common["args"]
    assert isinstance(args, dict)
    return args


WRONG = {
    "window": ({"window_size": [127, 0]}, "window_size is [127, 0], GPT-OSS here has [7, 0]"),
    "base": ({"rotary_base": 10000}, "rotary_base is 10000, GPT-OSS here has 150000"),
    "YaRN length": (
        {"yarn_original_max_position_embeddings": 131072},
        "yarn_original_max_position_embeddings is 131072, GPT-OSS here has 4096",
    ),
    "top-k": ({"moe_router_topk": 2}, "moe_router_topk is 2, GPT-OSS here has 4"),
}
CHANGES: dict[str, Callable[..., None]] = {
    **dict.fromkeys(BRIDGE, change_run_config),
    **dict.fromkeys(MEGATRON_LM, change_args),
}
NEWEST = ("bridge-0.6.0", "megatron-lm-0.19.0")


@pytest.mark.parametrize("what", WRONG)
@pytest.mark.parametrize("name", CHANGES)
def test_a_wrong_field_is_refused_where_a_configuration_is_carried(
    saves: Path, tmp_path: Path, name: str, what: str
) -> None:
    changes, message = WRONG[what]
    root = shutil.copytree(saves / name, tmp_path / name)
    (root / "hf").mkdir(exist_ok=True)
    shutil.copy(source_of(saves, name) / "config.json", root / "hf" / "config.json")
    CHANGES[name](root, **changes)
    with pytest.raises(InputError) as caught:
        plan(root, tmp_path / "t", TO_BF16)
    assert message in str(caught.value)


@pytest.mark.parametrize("what", WRONG)
@pytest.mark.parametrize("name", NEWEST)
def test_a_wrong_field_is_taken_at_its_word_or_refused_and_verify_finds_it(
    saves: Path, tmp_path: Path, name: str, what: str
) -> None:
    """Without any Hugging Face configuration a save is what it says it is: another model."""
    changes, _ = WRONG[what]
    root = shutil.copytree(saves / name, tmp_path / name)
    CHANGES[name](root, **changes)
    shutil.rmtree(root / "hf", ignore_errors=True)
    words = ["verify", str(source_of(saves, name)), str(root), "--level", "header"]
    done = CliRunner().invoke(cli, words)
    if what == "YaRN length":
        assert isinstance(done.exception, InputError)
        assert "as Megatron-LM's --enable-gpt-oss" in str(done.exception)
    else:
        assert done.exit_code == 1, done.output
        assert "different: " in done.output


def interleaved(root: Path, run: int) -> None:
    """Rewrite the rows of fc1 as core's grouped experts hold them: gate and up in turn."""
    from gptoss_convert.containers import torch_dist

    (iteration,) = root.glob("iter_*")
    for suffix, width in (("weight", 96), ("bias", 1)):
        name = f"decoder.layers.mlp.experts.experts.linear_fc1.{suffix}"
        chunks = [chunk for chunk in torch_dist.read(iteration).chunks if chunk.tensor == name]
        whole = torch.empty(4, 8, 128, width, dtype=torch.bfloat16)
        places = {}
        for chunk in chunks:
            nbytes = 2 * width * chunk.extent[2]
            content = (iteration / chunk.file).read_bytes()[chunk.offset : chunk.offset + nbytes]
            rows = torch.frombuffer(bytearray(content), dtype=torch.bfloat16).view(-1, width)
            layer, expert, first = chunk.start[:3]
            whole[layer, expert, first : first + len(rows)] = rows
            places[layer, expert, first, len(rows)] = (chunk.file, chunk.offset)
        turned = whole.unflatten(2, (2, 64 // run, run)).transpose(2, 3).flatten(2, 4)
        for (layer, expert, first, count), (file, offset) in places.items():
            rows = turned[layer, expert, first : first + count].contiguous()
            with (iteration / file).open("r+b") as stream:
                stream.seek(offset)
                stream.write(rows.view(torch.int16).numpy().tobytes())


@pytest.mark.parametrize("run", [8, 32])
@pytest.mark.parametrize("name", NEWEST)
def test_interleaved_rows_of_fc1_are_put_in_order(
    saves: Path, tmp_path: Path, name: str, run: int
) -> None:
    root = shutil.copytree(saves / name, tmp_path / name)
    CHANGES[name](root, moe_mlp_glu_interleave_size=run)
    interleaved(root, run)
    options = TO_BF16
    if name.startswith("bridge"):
        with pytest.raises(UsageError, match=f"pass --glu-interleave {run} if they alternate"):
            plan(root, tmp_path / "t", TO_BF16)
        with pytest.raises(UsageError, match="--glu-interleave is 5"):
            plan(root, tmp_path / "t", replace(TO_BF16, glu_interleave=5))
        options = replace(TO_BF16, glu_interleave=run)
    convert(root, tmp_path / "t", options)
    assert_same(weights(tmp_path / "t"), weights(source_of(saves, name)))
    words = ["verify", str(source_of(saves, name)), str(root), "--sample", "100"]
    words += ["--glu-interleave-target", str(run)] if name.startswith("bridge") else []
    done = CliRunner().invoke(cli, words)
    assert done.exit_code == 0, done.output
    assert done.stdout.startswith("same: max |Δlogit| 0 ")


@pytest.mark.parametrize("name", NEWEST)
def test_the_logits_know_rows_by_themselves(
    saves: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """A mistake in the rows is in the values of both sides, and in the logits of one."""
    root = shutil.copytree(saves / name, tmp_path / name)
    CHANGES[name](root, moe_mlp_glu_interleave_size=8)
    interleaved(root, 8)
    right = interleave.contiguous

    def wrong(chunks: Sequence[Chunk], run: int) -> tuple[Chunk, ...]:
        return right(chunks, 2 * run)

    monkeypatch.setattr(interleave, "contiguous", wrong)
    given = 8 if name.startswith("bridge") else None
    convert(root, tmp_path / "t", replace(TO_BF16, glu_interleave=given))
    words = ["verify", str(root), str(tmp_path / "t"), "--sample", "100"]
    words += ["--glu-interleave-source", "8"] if given else []
    assert CliRunner().invoke(cli, [*words, "--level", "values"]).exit_code == 0
    done = CliRunner().invoke(cli, words)
    assert done.exit_code == 1, done.output
    assert done.stdout.startswith("different: layer 0 experts: ")


def test_rows_that_are_said_to_alternate_and_do_not_are_found(saves: Path, tmp_path: Path) -> None:
    root = shutil.copytree(saves / "megatron-lm-0.19.0", tmp_path / "m")
    change_args(root, moe_mlp_glu_interleave_size=32)
    words = ["verify", str(source_of(saves, "megatron-lm-0.19.0")), str(root), "--sample", "100"]
    done = CliRunner().invoke(cli, words)
    assert done.exit_code == 1, done.output
    assert "linear_fc1" in done.output or "gate" in done.output


def test_rows_that_bridge_put_in_order_stay_so(saves: Path, tmp_path: Path) -> None:
    root = shutil.copytree(saves / "bridge-0.6.0", tmp_path / "m")
    change_run_config(root, moe_mlp_glu_interleave_size=32)
    convert(root, tmp_path / "t", replace(TO_BF16, glu_interleave=0))
    assert_same(weights(tmp_path / "t"), weights(source_of(saves, "bridge-0.6.0")))


def test_experts_one_by_one_do_not_interleave(saves: Path, tmp_path: Path) -> None:
    root = shutil.copytree(saves / "megatron-lm-0.19.0", tmp_path / "m")
    change_args(root, moe_mlp_glu_interleave_size=32, moe_grouped_gemm=False)
    convert(root, tmp_path / "t", TO_BF16)
    assert_same(weights(tmp_path / "t"), weights(source_of(saves, "megatron-lm-0.19.0")))


def test_runs_that_do_not_divide_the_rows_are_refused(saves: Path, tmp_path: Path) -> None:
    root = shutil.copytree(saves / "megatron-lm-0.19.0", tmp_path / "m")
    change_args(root, moe_mlp_glu_interleave_size=24)
    with pytest.raises(InputError, match="64 rows of gate are no multiple of 24"):
        plan(root, tmp_path / "t", TO_BF16)
