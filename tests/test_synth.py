from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer

from gptoss_convert.containers.refs import FileRef
from gptoss_convert.conversion import manifest
from gptoss_convert.conversion.options import Options
from gptoss_convert.conversion.run import convert
from gptoss_convert.errors import TargetError, UsageError
from gptoss_convert.machine.arena import Arena
from gptoss_convert.synth.synth import MODELS, plan_synth, special_tokens, synth, virtual_checkpoint
from gptoss_convert.synth.values import SyntheticBytes, distributions, tensors_of
from tests.tiny_files import known

BLOCKS = "model.layers.1.mlp.experts.gate_up_proj_blocks"
SCALES = "model.layers.1.mlp.experts.gate_up_proj_scales"
Bytes = npt.NDArray[np.uint8]


def contents(folder: Path) -> dict[str, bytes]:
    """All files but the manifest, which tells where the weights came from."""
    return {p.name: p.read_bytes() for p in sorted(folder.iterdir()) if p.name != manifest.NAME}


def read(source: SyntheticBytes, name: str, offset: int, nbytes: int) -> Bytes:
    arena = Arena(nbytes + 4096)
    source.read(FileRef(Path(), name), offset, nbytes, arena, offset % 4096)
    return np.frombuffer(arena.memory, np.uint8, nbytes, offset % 4096).copy()


@pytest.fixture(scope="module")
def source() -> SyntheticBytes:
    return SyntheticBytes(MODELS["tiny"], 0)


@pytest.fixture(scope="module")
def large() -> SyntheticBytes:
    return SyntheticBytes(MODELS["20b"], 0)


@pytest.fixture(scope="module")
def hf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("synth") / "hf"
    synth(target, workers=3)
    return target


def test_one_worker_writes_the_bytes_that_three_write(hf: Path, tmp_path: Path) -> None:
    synth(tmp_path / "one", workers=1)
    assert contents(tmp_path / "one") == contents(hf)


def test_ranges_read_piece_by_piece_are_the_whole(large: SyntheticBytes) -> None:
    rng = np.random.default_rng(1)
    for name in ("lm_head.weight", BLOCKS, SCALES):
        start, length = 7 * 65536 + 1234, 3 * 65536
        whole = read(large, name, start, length)
        for first, last in np.sort(rng.integers(0, length, (40, 2)), axis=1).tolist():
            assert np.array_equal(
                read(large, name, start + first, last - first), whole[first:last]
            ), (name, first, last)


def test_openai_files_hold_the_model_of_the_hugging_face_files(hf: Path, tmp_path: Path) -> None:
    synth(tmp_path / "openai", format="openai")
    convert(tmp_path / "openai", tmp_path / "hf", Options("hf"))
    assert contents(tmp_path / "hf")["model.safetensors"] == contents(hf)["model.safetensors"]


def test_bf16_files_are_the_decoded_mxfp4_files(hf: Path, tmp_path: Path) -> None:
    synth(tmp_path / "bf16", dtype="bf16")
    convert(hf, tmp_path / "decoded", Options("hf", dtype="bf16", keep_scales=False))
    assert contents(tmp_path / "bf16") == contents(tmp_path / "decoded")


def test_torch_dist_files_hold_the_same_model_and_tokenizer(hf: Path, tmp_path: Path) -> None:
    synth(tmp_path / "megatron", format="megatron")
    convert(tmp_path / "megatron", tmp_path / "back", Options("hf"))
    convert(hf, tmp_path / "decoded", Options("hf", dtype="bf16", keep_scales=False))
    assert contents(tmp_path / "back") == contents(tmp_path / "decoded")


def test_fewer_layers_are_the_first_layers(hf: Path, tmp_path: Path) -> None:
    synth(tmp_path / "two", layers=2)
    fewer, all_layers = (load_file(f / "model.safetensors") for f in (tmp_path / "two", hf))
    assert len(all_layers) - len(fewer) == 2 * 19
    assert all(torch.equal(fewer[name], all_layers[name]) for name in fewer)


def test_another_seed_is_another_model(source: SyntheticBytes) -> None:
    other = SyntheticBytes(MODELS["tiny"], 1)
    for tensor in tensors_of(MODELS["tiny"]):
        nbytes = int(np.prod(tensor.shape)) * (1 if tensor.dtype == "U8" else 2)
        mine, others = (read(s, tensor.name, 0, nbytes) for s in (source, other))
        assert not np.array_equal(mine, others), tensor.name


@pytest.mark.parametrize("format", ["hf", "openai", "megatron"])
def test_an_interrupted_run_of_another_seed_is_another_plan(tmp_path: Path, format: str) -> None:
    plans = [plan_synth(tmp_path / "t", format=format, seed=seed) for seed in (0, 0, 1)]
    first, same, other = (plan.header for plan in plans)
    assert first == same
    assert first != other


def test_the_bytes_are_the_same_on_every_machine(source: SyntheticBytes) -> None:
    digest = hashlib.sha256()
    for tensor in tensors_of(MODELS["tiny"]):
        nbytes = int(np.prod(tensor.shape)) * (1 if tensor.dtype == "U8" else 2)
        digest.update(read(source, tensor.name, 0, nbytes).tobytes())
    assert digest.hexdigest() == "715818711cd7b1c5c20685b61d558c2c97bc5915956e397bc4c43b49dff39403"


@pytest.mark.parametrize(
    ("format", "sizes"),
    [
        (
            "hf",
            {
                "model-00000-of-00002.safetensors": 4792272488,
                "model-00001-of-00002.safetensors": 4798702184,
                "model-00002-of-00002.safetensors": 4170342232,
            },
        ),
        ("openai", {"model.safetensors": 13761300984}),
    ],
)
def test_20b_has_the_published_files(tmp_path: Path, format: str, sizes: dict[str, int]) -> None:
    plan = plan_synth(tmp_path / "20b", model="20b", format=format)
    assert {file.name: file.size for file in plan.image.files} == sizes
    assert plan.plan.write_bytes == 13761264768
    assert not (tmp_path / "20b").exists()


def test_120b_has_the_published_number_of_tensors_and_bytes(tmp_path: Path) -> None:
    plan = plan_synth(tmp_path / "120b", model="120b")
    assert len(plan.image.files) == 15
    assert len({chunk.tensor for chunk in plan.image.chunks}) == 687
    assert plan.plan.write_bytes == 65248815744


def test_no_two_tensors_rows_of_experts_or_pages_are_equal(hf: Path, large: SyntheticBytes) -> None:
    seen: dict[bytes, str] = {}

    def add(where: str, content: bytes) -> None:
        assert seen.setdefault(content, where) == where

    for name, tensor in load_file(hf / "model.safetensors").items():
        bits = tensor.view(torch.uint8) if tensor.dtype == torch.bfloat16 else tensor
        add(name, bits.numpy().tobytes())
        if ".experts." in name:
            for expert in range(tensor.shape[0]):
                add(f"{name}[{expert}]", bits[expert].numpy().tobytes())
    for name, page in ((BLOCKS, 65536), (SCALES, 4096), ("lm_head.weight", 65536)):
        part = read(large, name, 0, 800 * page)
        for i in range(800):
            add(f"{name}: page {i}", part[i * page : (i + 1) * page].tobytes())


def codes_of(blocks: Bytes) -> Bytes:
    """E2M1 codes [n, 32] of block bytes [n * 16]."""
    rows = blocks.reshape(-1, 16)
    return np.stack([rows & np.uint8(15), rows // np.uint8(16)], axis=-1).reshape(-1, 32)


def test_blocks_and_scales_are_those_of_a_quantised_weight(large: SyntheticBytes) -> None:
    count = 1 << 17
    codes = codes_of(read(large, BLOCKS, 0, 16 * count))
    scales = read(large, SCALES, 0, count)
    largest = (codes & 7).max(axis=-1)
    zero = largest == 0
    assert 1e-4 < zero.mean() < 5e-3
    assert np.any(zero & (scales == 0))
    assert np.any(zero & (scales > 100))
    assert np.all(codes[zero] == 0)
    assert np.all(zero[scales == 0])
    assert 0.15 < (largest[~zero] <= 5).mean() < 0.35
    shares = np.bincount(codes.reshape(-1), minlength=16) / codes.size
    assert shares.min() > 0.005
    assert np.allclose(shares[:8], shares[8:], atol=0.003)
    exponents = scales[scales > 0].astype(int) - 127
    assert 14 <= np.ptp(exponents) + 1 <= 19
    assert ((exponents >= -8) & (exponents <= -5)).mean() > 0.95
    grid = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6])
    values = grid[codes & 7] * 2.0 ** (scales.astype(int) - 127)[:, None]
    assert 0.02 < np.sqrt((values**2).mean()) < 0.05


def test_every_weight_has_a_distribution() -> None:
    held = {
        param.removesuffix(".blocks").removesuffix(".scales")
        for tensor in tensors_of(MODELS["20b"])
        for param in tensor.rule.params
    }
    assert held == set(distributions(MODELS["20b"]))


def test_biases_sinks_and_norms_have_their_extremes(large: SyntheticBytes) -> None:
    def values(name: str, count: int) -> npt.NDArray[np.float32]:
        bits = read(large, name, 0, 2 * count).view(np.uint16)
        return (bits.astype(np.uint32) << 16).view(np.float32)

    norm = values("model.norm.weight", 2880)
    assert 0.9 < np.median(norm) < 1.1
    assert norm.min() > 0
    assert norm.max() > 3
    bias = values("model.layers.0.mlp.experts.gate_up_proj_bias", 32 * 5760)
    assert np.abs(bias).max() > 7
    assert np.abs(np.median(bias)) < 0.1
    sinks = np.concatenate([values(f"model.layers.{n}.self_attn.sinks", 64) for n in range(24)])
    assert 0.3 < sinks.mean() < 0.7
    assert 1.2 < sinks.std() < 1.8


def test_transformers_loads_the_directory_and_routes_to_every_expert(hf: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(
        hf, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    routed: list[torch.Tensor] = []
    for layer in model.model.layers:
        router = layer.mlp.router
        router.register_forward_hook(
            lambda router, inputs, _: routed.append(
                torch.nn.functional.linear(inputs[0], router.weight, router.bias).reshape(-1, 8)
            )
        )
    tokens = torch.randint(0, 256, (1, 300), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        logits = model(tokens).logits[0]
    assert torch.isfinite(logits).all()
    assert 1 < logits.std() < 5
    assert logits.argmax(-1).unique().numel() > 100
    for router_logits in routed:
        best, experts = router_logits.topk(4)
        assert experts.unique().numel() == 8
        assert (best.softmax(-1)[:, 0] > 0.4).float().mean() > 0.6
    tokenizer = AutoTokenizer.from_pretrained(hf)
    assert tokenizer.eos_token_id == model.config.eos_token_id
    message = [{"role": "user", "content": "Grüße"}]
    prompt = tokenizer.apply_chat_template(message, add_generation_prompt=True, tokenize=False)
    assert prompt == "<|start|>user<|message|>Grüße<|end|><|start|>assistant"
    assert tokenizer.decode(tokenizer(prompt)["input_ids"]) == prompt


@pytest.mark.parametrize("model", ["tiny", "20b"])
def test_the_tokenizer_has_bytes_and_special_tokens_at_their_ids(
    tmp_path: Path, model: str
) -> None:
    closing = known(plan_synth(tmp_path / "hf", model=model).image)
    tokenizer = Tokenizer.from_str(closing["tokenizer.json"].decode())
    config = json.loads(closing["config.json"])
    assert tokenizer.encode("a\n\xff<|return|>").ids == [
        0x61,
        0x0A,
        *"\xff".encode(),
        config["eos_token_id"],
    ]
    for token, index in special_tokens(MODELS[model]).items():
        assert tokenizer.token_to_id(token) == index
        assert index < MODELS[model].vocab_size
    generation = json.loads(closing["generation_config.json"])
    assert generation["eos_token_id"][0] == config["eos_token_id"]
    assert generation["pad_token_id"] == config["pad_token_id"]


def test_20b_special_tokens_are_the_released_ones(tmp_path: Path) -> None:
    closing = known(plan_synth(tmp_path / "hf", model="20b").image)
    assert json.loads(closing["generation_config.json"]) == {
        "bos_token_id": 199998,
        "do_sample": True,
        "eos_token_id": [200002, 199999, 200012],
        "pad_token_id": 199999,
        "transformers_version": "4.55.0.dev0",
    }
    assert json.loads(closing["config.json"])["pad_token_id"] == 199999


def test_an_empty_range_is_nothing(source: SyntheticBytes) -> None:
    assert read(source, BLOCKS, 65536, 0).size == 0


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda t: synth(t, model="7b"), "--model 7b: choose tiny, 20b, 120b"),
        (lambda t: synth(t, layers=0), "--layers 0: choose 1 to 36"),
        (lambda t: synth(t, layers=37), "--layers 37: choose 1 to 36"),
        (lambda t: synth(t, dtype="fp8"), "--dtype fp8: choose keep, mxfp4, bf16"),
        (lambda t: synth(t, shards="big"), "--shards big: choose auto, size, published"),
    ],
)
def test_a_wrong_choice_is_refused_with_the_right_ones(
    tmp_path: Path, call: Callable[[Path], object], message: str
) -> None:
    with pytest.raises(UsageError, match=f"^{message}$"):
        call(tmp_path / "target")
    assert not (tmp_path / "target").exists()


def test_an_existing_target_stays_unless_overwrite_is_asked_for(hf: Path, tmp_path: Path) -> None:
    target = tmp_path / "target"
    synth(target, layers=1)
    with pytest.raises(TargetError, match="exists; pass --overwrite"):
        synth(target)
    synth(target, overwrite=True)
    assert contents(target) == contents(hf)


def test_the_virtual_checkpoint_has_the_tensors_of_the_table() -> None:
    assert len(virtual_checkpoint("20b").chunks) == 459
    assert len(virtual_checkpoint("120b", 1).chunks) == 22
