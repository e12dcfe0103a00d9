"""A server's answers held against the model: honest ones pass, each known mistake is named."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer
from torch import Tensor

from gptoss_convert.errors import InputError, UsageError
from gptoss_convert.show.documents import document
from gptoss_convert.synth.synth import synth
from gptoss_convert.verify.result import ServedOptions, Verification
from gptoss_convert.verify.served import verify_served
from gptoss_convert.witness.forward import Numerics
from gptoss_convert.witness.hf import HfReader
from gptoss_convert.witness.mistakes import MISTAKES, Mistake, MistakenReader
from gptoss_convert.witness.oracles import silence
from gptoss_convert.witness.readers import Reader
from gptoss_convert.witness.served.answers import Answer, Prediction
from gptoss_convert.witness.served.distance import Answers, Model, distance
from gptoss_convert.witness.tokens import sequence
from gptoss_convert.witness.walk import Prompts, all_logits
from tests.served_server import FLAVOURS, Engine, Logits, serving
from tests.test_documents import follows_its_schema
from tests.tiny_files import write_hf_bf16, write_hf_mxfp4
from tests.tiny_models import SQUARE, random_weights

CPU = torch.device("cpu")
SHAPE = replace(SQUARE, layers=2)
LENGTHS = {"text": 160, "uniform": 48, "chat": 24}
"""On both sides of the window, 16, and of YaRN's original length, 128."""
TRUNCATED = next(one for one in MISTAKES if "truncate" in one.name)
NO_SINKS = next(one for one in MISTAKES if "sinks" in one.name)


def computed(reader: Reader, dtype: torch.dtype = torch.float32) -> Logits:
    """An engine that computes as the forward pass does, in a dtype."""
    return lambda tokens: all_logits(reader, Prompts.of([tokens], CPU), Numerics(dtype))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model as wide inside as outside, and sequences to ask about."""
    root = tmp_path_factory.mktemp("served")
    write_hf_mxfp4(root / "square", SHAPE, random_weights(SHAPE, seed=1))
    lines = [json.dumps(sequence(name, n, 0, SHAPE.vocab).tokens) for name, n in LENGTHS.items()]
    (root / "tokens.jsonl").write_text("\n".join(lines))
    return root


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with a tokenizer."""
    root = tmp_path_factory.mktemp("tiny") / "tiny"
    synth(root, layers=2)
    return root


def asked(source: Path, flavour: str, engine: Engine, **options: object) -> Verification:
    with serving(flavour, engine) as url:
        chosen = ServedOptions(device="cpu", **options)  # pyright: ignore[reportArgumentType]
        return verify_served(source, url, chosen)


@pytest.mark.parametrize("mistake", MISTAKES, ids=lambda mistake: mistake.name)
def test_every_known_mistake_is_named(folder: Path, mistake: Mistake) -> None:
    """By answers in bfloat16, whose rounding hides what is small."""
    reader = HfReader(folder / "square", CPU)
    engine = Engine(computed(MistakenReader(reader, mistake), torch.bfloat16))
    found = asked(folder / "square", "vLLM", engine, tokens=folder / "tokens.jsonl")
    assert not found.same
    assert found.verdict.startswith(f"different: answers as if {mistake.name}: KL ")
    diagnosis = found.levels[1].numbers["diagnosis"]
    nearest = diagnosis["likenesses"][0]
    assert nearest["near"] and nearest["better"]
    if not mistake.coarse:
        assert nearest["spread"]["kl_median"] < diagnosis["model"]["kl_median"] / 4


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("served", ["mxfp4", "bf16"])
def test_an_honest_server_raises_no_alarm(
    folder: Path, tmp_path: Path, seed: int, dtype: torch.dtype, served: str
) -> None:
    """Twenty runs: five models, files of either encoding, computed in either dtype."""
    weights = random_weights(SHAPE, seed=10 + seed)
    source = write_hf_mxfp4(tmp_path / "mxfp4", SHAPE, weights)
    write_hf_bf16(tmp_path / "bf16", SHAPE, weights)
    # Other blocks of attention than the forward pass has round otherwise.
    reader, numerics = HfReader(tmp_path / served, CPU), Numerics(dtype, 1 << 10)
    engine = Engine(lambda tokens: all_logits(reader, Prompts.of([tokens], CPU), numerics))
    tokens, every = folder / "tokens.jsonl", seed == 0
    found = asked(source, "SGLang", engine, tokens=tokens, every_mistake=every)
    assert found.same, found.verdict
    assert found.verdict.startswith("same: median KL ")
    assert found.verdict.endswith("within the limits 'served'")
    assert (found.levels[1].numbers["diagnosis"] is not None) == every


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_transformers_own_model_is_an_honest_server(
    folder: Path, tmp_path: Path, dtype: torch.dtype
) -> None:
    from transformers import GptOssForCausalLM

    source = write_hf_bf16(tmp_path / "bf16", SHAPE, random_weights(SHAPE, seed=2))
    with silence():
        loaded = GptOssForCausalLM.from_pretrained(source, dtype=dtype, attn_implementation="eager")

    def logits(tokens: Sequence[int]) -> Tensor:
        with torch.inference_mode():
            return loaded(torch.tensor([list(tokens)]), use_cache=False).logits[0]

    engine = Engine(logits, most_new=3)
    found = asked(source, "vLLM", engine, tokens=folder / "tokens.jsonl", every_mistake=True)
    assert found.same, found.verdict
    ranges = {one["name"]: one for one in found.levels[1].numbers["ranges"]}
    assert list(ranges) == ["all", "<16", "16-127", ">=128", "added"]
    typical = ranges["all"]["server"]["kl_median"]
    if dtype == torch.float32:
        assert typical < 1e-9
    else:
        # The floor is what an implementation of its own really differs by.
        assert 0.5 < typical / ranges["all"]["floor"]["kl_median"] < 2


PROTOCOLS = {
    "vLLM": ("vLLM 0.0.test", "prompt_logprobs, prompts as token ids", 20),
    "echo": ("an OpenAI-compatible server", "echo and logprobs, prompts as token ids", 5),
    "SGLang": ("SGLang 0.0.test", "/generate of SGLang, return_logprob", 20),
    "llama.cpp": ("llama.cpp b0-test", "n_probs of the next token", 20),
    "mlx-lm": ("an OpenAI-compatible server", "the next token, prompts as text", 10),
}


@pytest.mark.parametrize("flavour", FLAVOURS)
@pytest.mark.parametrize("mistake", [None, TRUNCATED], ids=["honest", "faulty"])
def test_every_protocol_is_found_by_asking_and_leads_to_the_same_answer(
    tiny: Path, flavour: str, mistake: Mistake | None
) -> None:
    reader, tokenizer = HfReader(tiny, CPU), Tokenizer.from_file(str(tiny / "tokenizer.json"))
    served = reader if mistake is None else MistakenReader(reader, mistake)
    whole = flavour in ("vLLM", "echo", "SGLang")
    engine = Engine(computed(served, torch.bfloat16), tokenizer)
    found = asked(tiny, flavour, engine, sample=400 if whole else 36)
    assert found.same == (mistake is None), found.verdict
    if mistake:
        assert f"answers as if {mistake.name}" in found.verdict
    follows_its_schema(document("verify", found.summary()))
    numbers, (name, protocol, top) = found.levels[1].numbers, PROTOCOLS[flavour]
    assert (numbers["engine"], numbers["top"], found.target["model"]) == (name, top, "tiny")
    assert protocol in numbers["protocol"]
    ranges = {one["name"]: one["positions"] for one in numbers["ranges"]}
    # Beyond the window and YaRN's original length there is always something.
    assert min(ranges[part] for part in ("<16", "16-127", ">=128")) >= 8
    assert numbers["requests"] == (len(numbers["sequences"]) if whole else ranges["all"])


def test_a_mistake_in_what_the_server_adds_itself_is_seen(folder: Path) -> None:
    """Prompts go through other code of an engine than what follows, which comes from a cache."""
    reader = HfReader(folder / "square", CPU)
    right, wrong = computed(reader), computed(MistakenReader(reader, NO_SINKS))
    prompts = {*LENGTHS.values(), 8}
    engine = Engine(lambda t: (right if len(t) in prompts else wrong)(t), most_new=8)
    found = asked(folder / "square", "SGLang", engine, tokens=folder / "tokens.jsonl")
    assert not found.same
    over = {one["name"] for one in found.levels[1].numbers["ranges"] if one["over"]}
    assert over == {"added"}


def test_of_another_model_no_mistake_is_blamed(folder: Path, tmp_path: Path) -> None:
    other = HfReader(write_hf_mxfp4(tmp_path / "x", SHAPE, random_weights(SHAPE, 99)), CPU)
    engine = Engine(computed(other, torch.bfloat16))
    found = asked(folder / "square", "vLLM", engine, tokens=folder / "tokens.jsonl")
    assert not found.same
    assert "answers as if" not in found.verdict
    assert found.levels[1].numbers["agreement"]["everywhere"] < 0.5


def test_a_mistake_within_the_limits_is_named_where_every_one_is_looked_for(folder: Path) -> None:
    """A third of the way to the mistake: rounding could explain it, but not its direction."""
    reader = HfReader(folder / "square", CPU)
    right, wrong = computed(reader), computed(MistakenReader(reader, TRUNCATED))
    coarse = computed(reader, torch.bfloat16)

    def logits(tokens: Sequence[int]) -> Tensor:
        return coarse(tokens).float() + 0.34 * (wrong(tokens) - right(tokens))

    found = asked(
        folder / "square",
        "vLLM",
        Engine(logits),
        tokens=folder / "tokens.jsonl",
        every_mistake=True,
    )
    likenesses = found.levels[1].numbers["diagnosis"]["likenesses"]
    leaning = {one["mistake"]: one["advantage"] for one in likenesses}
    assert max(leaning, key=lambda name: leaning[name]) == TRUNCATED.name
    assert not found.same
    assert TRUNCATED.name in found.verdict


def table_of(logprobs: Sequence[dict[int, float]], tokens: Sequence[int]) -> Answers:
    said = tuple(Prediction(place, one) for place, one in enumerate(logprobs))
    return Answers.of([Answer(tuple(tokens), len(tokens), said)])


def test_kl_is_that_of_the_tokens_told_and_of_all_others_as_one() -> None:
    p, q = (0.5, 0.3, 0.2), (0.4, 0.35, 0.25)
    table = table_of([{0: math.log(q[0]), 1: math.log(q[1])}], [3, 1])
    told = torch.tensor([[math.log(p[0]), math.log(p[1])]], dtype=torch.float64)
    found = distance(Model(told, torch.tensor([0]), torch.ones(1)), table.logprobs, table)
    expected = sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))
    assert found.kl.item() == pytest.approx(expected, rel=1e-6)
    assert found.delta.item() == pytest.approx(abs(math.log(p[1] / q[1])), rel=1e-6)


def test_where_the_token_that_follows_is_not_told_there_is_no_difference_of_it() -> None:
    table = table_of([{0: -0.1}, {2: -0.2}], [0, 1, 2])
    assert table.following.tolist() == [-1, 0]
    told = torch.tensor([[-0.1], [-0.7]], dtype=torch.float64)
    delta = distance(Model(told, torch.tensor([0, 2]), torch.ones(2)), table.logprobs, table).delta
    assert delta[0].isnan()
    assert delta[1].item() == pytest.approx(0.5, rel=1e-6)


def test_what_the_servers_context_does_not_hold_is_not_asked_and_said(tiny: Path) -> None:
    engine = Engine(computed(HfReader(tiny, CPU)), context=120)
    found = asked(tiny, "vLLM", engine)
    assert found.same
    notes = found.target["notes"]
    assert notes[0] == "5 of 11 sequences were too long to ask about; the server's context is 120"
    assert notes[1].startswith("nothing beyond YaRN's original length (128) was asked")
    assert max(len(one["prompt"]) for one in engine.asked) < 120


def test_a_refusal_of_long_prompts_is_told_in_the_servers_words(tiny: Path) -> None:
    reader, tokenizer = HfReader(tiny, CPU), Tokenizer.from_file(str(tiny / "tokenizer.json"))
    engine = Engine(computed(reader), tokenizer, context=100, tells_context=False)
    with pytest.raises(InputError, match=r"context length is 100 tokens.*--max-length") as caught:
        asked(tiny, "vLLM", engine)
    assert caught.value.exit_code == 3


def test_a_context_that_is_cut_off_silently_is_an_error(tiny: Path) -> None:
    engine = Engine(computed(HfReader(tiny, CPU)), keeps=100)
    with pytest.raises(InputError, match=r"about 100 of 192 prompt tokens: the context is cut"):
        asked(tiny, "vLLM", engine)


def test_another_tokenizer_is_an_error(tiny: Path, tmp_path: Path) -> None:
    """One that makes two letters one token."""
    content = json.loads((tiny / "tokenizer.json").read_text())
    content["model"]["vocab"] |= {"th": 287}
    content["model"]["merges"] = [["t", "h"]]
    other = Tokenizer.from_str(json.dumps(content))
    engine = Engine(computed(HfReader(tiny, CPU)), other)
    with pytest.raises(InputError, match="the tokenizer is another one than SOURCE's"):
        asked(tiny, "mlx-lm", engine)


def test_too_few_positions_are_no_answer(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "few.jsonl").write_text("[1, 2, 3]")
    engine = Engine(computed(HfReader(folder / "square", CPU)))
    with pytest.raises(InputError, match="3 positions are too few to judge: 8 are needed"):
        asked(folder / "square", "vLLM", engine, tokens=tmp_path / "few.jsonl")


def test_a_model_that_is_not_served_is_a_wrong_option(folder: Path) -> None:
    engine = Engine(computed(HfReader(folder / "square", CPU)))
    with pytest.raises(UsageError, match=r"--model other: http://127.0.0.1:\d+ serves tiny"):
        asked(folder / "square", "vLLM", engine, model="other")


def test_a_faulty_server_is_named_by_its_answers_about_texts_of_ones_own(
    tiny: Path, tmp_path: Path
) -> None:
    (tmp_path / "own.jsonl").write_text('"It was a dark and stormy night, and nobody was there."')
    reader, tokenizer = HfReader(tiny, CPU), Tokenizer.from_file(str(tiny / "tokenizer.json"))
    engine = Engine(computed(MistakenReader(reader, NO_SINKS)), tokenizer)
    found = asked(tiny, "mlx-lm", engine, tokens=tmp_path / "own.jsonl", sample=30)
    assert "answers as if there were no attention sinks" in found.verdict
    assert all(isinstance(one["prompt"], str) for one in engine.asked[-20:])
