"""Opening an adapter for a base model: its dialect, its strengths, and what each tensor is."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any

from gptoss_convert.errors import GptossError, InputError, IntegrityError, UsageError
from gptoss_convert.formats.adapters import bridge
from gptoss_convert.formats.adapters.adapter import Adapter
from gptoss_convert.formats.adapters.adapter_options import LAYOUTS, ORIENTATIONS, AdapterOptions
from gptoss_convert.formats.adapters.dialects import recognise
from gptoss_convert.formats.adapters.placed import Strength, replaced, rows, updates
from gptoss_convert.formats.adapters.resolve import Found, Resolved, whole_names
from gptoss_convert.formats.adapters.settings import Settings, read_settings
from gptoss_convert.formats.adapters.stored import Stored, read_stored
from gptoss_convert.layouts.extents import Extent, overlap
from gptoss_convert.layouts.model import load_model
from gptoss_convert.layouts.updates import Update

DEFAULT = AdapterOptions()


def open_adapter(
    root: Path, numbers: Mapping[str, int], choices: AdapterOptions = DEFAULT
) -> Adapter:
    """The adapter in `root` for a base of these numbers of a config.json; headers only.

    Every tensor is one half of one update, or a whole parameter, or this raises: UsageError where
    the user must say what the file does not, InputError for what cannot be merged, IntegrityError
    for damage.
    """
    stored = read_stored(root)
    sizes = load_model().sizes(numbers)
    if stored.container == "torch_dist":
        adapter = _open_bridge(stored, sizes, choices)
    else:
        adapter = _open_peft(stored, sizes, choices)
    _require_disjoint(stored.root, adapter.updates)
    if choices.adapter_scale == 1.0:
        return adapter
    if trained := [one.tensor for one in adapter.replaced if one.tensor not in adapter.base_copies]:
        raise UsageError(
            f"--adapter-scale: {root} holds whole tensors, such as {trained[0]}: they have no "
            "strength"
        )
    return adapter.scaled(Fraction(choices.adapter_scale))


def other_readings(adapter: Adapter, numbers: Mapping[str, int]) -> dict[str, Adapter]:
    """The same files by the other answers to what they leave open, by what is said of them."""
    mine = adapter.options
    order, turned = "merged with lora_B read in the other order", "merged with down transposed"
    answers = [(order, replace(mine, adapter_layout=one)) for one in LAYOUTS]
    answers += [(turned, replace(mine, adapter_down=one)) for one in ORIENTATIONS]
    found: dict[str, Adapter] = {}
    for name, options in answers:
        try:
            other = open_adapter(adapter.root, numbers, options)
        except GptossError:
            continue
        if other.dialect != adapter.dialect:
            found[name] = other
    return found


def _open_peft(stored: Stored, sizes: Mapping[str, int], choices: AdapterOptions) -> Adapter:
    root = stored.root
    settings = read_settings(stored.where, stored.config)
    if dora := [
        name for name in stored.tensors if name.endswith("embed_tokens.lora_magnitude_vector")
    ]:
        raise InputError(f"{root}: {dora[0]}: DoRA of the embedding cannot be merged")
    dialect = recognise(stored, sizes, choices)
    _require_saved(settings, dialect.resolved, sizes)
    attached = [_as_attached(one, settings) for one in dialect.resolved.found]
    found = [*updates(root, attached, sizes, _strength(settings, dialect.variant))]
    _require_settings(settings, dialect.resolved)
    tokens = rows(root, dialect.resolved.found, dict(settings.tokens), sizes)
    held = replaced(root, dialect.resolved, stored.tensors, sizes)
    copies = {dialect.resolved.whole[n] for n in stored.tensors if _is_copy(dialect.resolved, n)}
    base = stored.config.get("base_model_name_or_path")
    return Adapter(
        stored.root,
        dialect.variant,
        dialect.written_by,
        base if isinstance(base, str) else None,
        tuple(found),
        _without_rows(held, tokens),
        tuple(sorted(copies)),
        stored.files,
        choices,
        (*dialect.notes, *_remarks(stored, settings)),
        _details(settings.r, settings.alpha, found, settings),
    )


def _as_attached(found: Found, settings: Settings) -> Found:
    """A pair as PEFT attaches it: to a module, or to the module's weight as a parameter."""
    weight = f"{found.name}.weight"
    if found.kind == "module" and "a" in found.held and settings.is_parameter(weight):
        return replace(found, kind="parameter", name=weight)
    return found


def _details(
    r: object, alpha: float, found: Sequence[Update], settings: Settings | None = None
) -> dict[str, Any]:
    """What people want to know: strengths, and where it acts."""

    def indexes(axis: str, updates: Iterable[Update] = found) -> list[int]:
        spans = {one.box[one.axes.index(axis)] for one in updates if axis in one.axes}
        return sorted({index for span in spans for index in range(*span)})

    families = load_model().families
    ranks = sorted({one.rank for one in found if one.rank})
    return {
        "r": r,
        "alpha": alpha,
        "ranks": ranks,
        "rslora": settings is not None and settings.rslora,
        "dora": settings is not None and settings.dora,
        "layers": indexes("layer"),
        "experts": indexes("expert", [one for one in found if families[one.param].encodings]),
    }


def _remarks(stored: Stored, settings: Settings) -> Iterator[str]:
    """What a version of PEFT is known not to have saved."""
    bias = stored.config.get("bias") or "none"
    saved = any(name.endswith(("_proj.bias", "_proj_bias")) for name in stored.tensors)
    if bias == "lora_only" and not saved:
        yield "bias is lora_only: PEFT before 0.21.2 does not save the biases that it trained"
    if bias not in ("none", "lora_only", "all"):
        raise InputError(f"{settings.where}: bias is {bias!r:.80}, expects none, all or lora_only")


def _strength(settings: Settings, variant: str) -> Strength:
    def strength(name: str, rank: int) -> Fraction:
        if variant == "automodel" and ".mlp.experts" in name:
            # Its experts may have a smaller rank than it states; their own counts.
            return Fraction(settings.alpha) / rank
        stated = settings.rank(name)
        if rank and stated != rank:
            raise InputError(
                f"{settings.where}: says rank {stated} for {name}, its tensors have {rank}"
            )
        return settings.scale(name, rank or stated)

    return strength


def _require_saved(settings: Settings, resolved: Resolved, sizes: Mapping[str, int]) -> None:
    """Modules that the configuration says were trained whole are there, if the base has them."""
    held = [f".{name}" for name in resolved.whole.values()]
    for module in settings.saved:
        inside = f".{module}."
        known = any(inside in f".{name}" for name in whole_names(sizes))
        if known and not any(inside in name for name in held):
            raise IntegrityError(
                f"{settings.where}: modules_to_save names {module}, the file holds no tensor of it"
            )


def _require_settings(settings: Settings, resolved: Resolved) -> None:
    """What the configuration announces must be there, and nothing that it does not."""
    roles = Counter(role for one in resolved.found for role in one.held)
    for key, stated, role in (
        ("use_dora", settings.dora, "magnitude"),
        ("lora_bias", settings.lora_bias, "added"),
        ("trainable_token_indices", bool(settings.tokens), "rows"),
    ):
        if stated != bool(roles[role]):
            has = "has such tensors" if roles[role] else "has no such tensor"
            raise InputError(f"{settings.where}: {key} is {str(stated).lower()}, the file {has}")
    for one in resolved.found:
        if settings.dora and "a" in one.held and "magnitude" not in one.held:
            raise InputError(
                f"{settings.where}: use_dora: {one.name} has no magnitude: DoRA of embeddings and "
                "parameters cannot be merged"
            )


def _is_copy(resolved: Resolved, name: str) -> bool:
    """Whether a whole tensor is the base's own, saved beside its LoRA."""
    return name in resolved.whole and ".base_layer." in name and name.endswith(".weight")


def _without_rows(held: Iterable[Extent], rows: Iterable[Extent]) -> tuple[Extent, ...]:
    """Whole tensors and trained rows together; no parameter is held in both ways."""
    whole, single = tuple(held), tuple(rows)
    both = {extent.param: extent.tensor for extent in whole}
    for extent in single:
        if extent.param in both:
            raise InputError(f"{extent.tensor}: {both[extent.param]} holds the same rows")
    return (*whole, *single)


def _open_bridge(stored: Stored, sizes: Mapping[str, int], choices: AdapterOptions) -> Adapter:
    for option, value in (("layout", choices.adapter_layout), ("down", choices.adapter_down)):
        if value is not None:
            raise UsageError(
                f"--adapter-{option} {value}: Megatron-Bridge's own layout leaves nothing open"
            )
    alpha = bridge.alpha(stored)
    variant, resolved = bridge.resolved(stored, sizes)
    strength = lambda name, rank: Fraction(alpha) / rank  # noqa: E731
    found = [*updates(stored.root, resolved.found, sizes, strength)]
    return Adapter(
        stored.root,
        f"bridge-{variant}",
        "Megatron-Bridge",
        bridge.base_model(stored),
        tuple(found),
        (),
        (),
        stored.files,
        choices,
        tuple(bridge.notes(stored, stored.tensors)),
        _details(stored.config.get("dim"), alpha, found),
    )


def _require_disjoint(root: Path, found: Iterable[Update]) -> None:
    """No element is updated twice."""
    by_param: dict[tuple[str, Any], list[Update]] = {}
    for one in found:
        first = one.box[0] if len(one.box) > 1 else None
        for other in by_param.setdefault((one.param, first), []):
            if overlap(one.box, other.box):
                raise InputError(
                    f"{root}: {one.b.tensor} and {other.b.tensor} both update {one.param}"
                )
        by_param[one.param, first].append(one)
