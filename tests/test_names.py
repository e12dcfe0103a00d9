"""Names as trainers save them: wrappers' parts, prefixes, what lies beside weights."""

from __future__ import annotations

import pytest

from gptoss_convert.containers import Chunk
from gptoss_convert.errors import InputError, IntegrityError, UsageError
from gptoss_convert.formats.names import Names, read_names
from gptoss_convert.formats.trained import trainer_tables
from tests.tiny_models import DISTINCT, hf_bf16_tensors, random_weights

MODEL = sorted(hf_bf16_tensors(random_weights(DISTINCT)))
PREFIXES = [
    *("", "module.", "_orig_mod.", "base_model.model.", "model.", "_fsdp_wrapped_module."),
    *(
        "policy.",
        "llm.",
        "module.module.",
        "student.",
        "app.model.",
        "model.module.",
        "model.model.",
    ),
]


def read(names: list[str], *drop: str) -> Names:
    return read_names("here", names, trainer_tables(), drop)


@pytest.mark.parametrize("prefix", PREFIXES)
def test_a_model_is_found_behind_any_prefix(prefix: str):
    found = read([prefix + name for name in MODEL])
    assert [table.format for table in found.tables] == ["hf"]
    assert found.weights == {prefix + name: name for name in MODEL}


@pytest.mark.parametrize("part", ["_checkpoint_wrapped_module", "_orig_mod", "module"])
def test_a_wrapper_within_a_name_is_taken_away(part: str):
    stored = {name.replace(".mlp.", f".{part}.mlp."): name for name in MODEL}
    found = read([*stored])
    assert found.weights == stored
    assert found.wrappers == (part,)


def test_unsloth_s_router_is_the_router():
    stored = {name.replace("mlp.router.", "mlp.router.linear."): name for name in MODEL}
    assert read([*stored]).weights == stored


def test_what_lies_beside_weights_is_counted_and_skipped():
    beside = [
        *(f"optim.state.{name}.exp_avg" for name in MODEL),
        *("lr_scheduler.last_lr", "train_state.step", "app.rng.cuda"),
    ]
    found = read([f"model.{name}" for name in MODEL] + beside)
    assert found.skipped == {
        "optimizer": len(MODEL),
        "scheduler": 1,
        "training state": 1,
        "random state": 1,
    }
    assert set(found.weights.values()) == set(MODEL)


def test_what_the_model_has_not_keeps_its_name_until_it_is_dropped():
    names = [*(f"pretrained_model.{name}" for name in MODEL), "v_head.summary.weight"]
    found = read(names)
    assert found.prefix == "pretrained_model."
    assert found.weights["v_head.summary.weight"] == "v_head.summary.weight"
    found = read(names, "v_head.*")
    assert "v_head.summary.weight" not in found.weights
    assert found.skipped == {"dropped": 1}


def test_two_models_are_told_and_one_can_be_dropped():
    names = [prefix + name for prefix in ("policy.", "reference.") for name in MODEL]
    with pytest.raises(InputError) as refused:
        read(names)
    assert str(refused.value) == (
        "here: holds 2 models, behind 'policy.' and 'reference.'; pass --drop for all but one, for "
        "example --drop 'reference.*'"
    )
    assert read(names, "reference.*").prefix == "policy."


def test_one_tensor_under_two_names_is_damage():
    with pytest.raises(IntegrityError, match="the same tensor twice"):
        read([*MODEL, f"module.{MODEL[0]}"])


def test_a_pattern_that_matches_nothing_is_a_mistake():
    with pytest.raises(UsageError, match=r"--drop 'v_haed.\*': no tensor has such a name"):
        read(MODEL, "v_haed.*")


def test_chunks_get_the_tables_names():
    found = read([f"module.{name}" for name in MODEL] + ["optim.x"])
    chunks = [
        Chunk(name, "BF16", (1,), (0,), (1,), "f", 0) for name in (f"module.{MODEL[0]}", "optim.x")
    ]
    assert [chunk.tensor for chunk in found.chunks(chunks)] == [MODEL[0]]
