"""Which rounding `--lossy` and the options beside it ask for, and how it enters a plan."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, cast

from gptoss_convert.conversion.options import Options
from gptoss_convert.conversion.target import rounded_path
from gptoss_convert.engine.changes import Changes
from gptoss_convert.errors import UsageError
from gptoss_convert.formats.checkpoint import Checkpoint
from gptoss_convert.layouts.extents import Extent
from gptoss_convert.layouts.model import load_model
from gptoss_convert.machine.failures import absent

if TYPE_CHECKING:
    from gptoss_convert.machine.progress import Progress
    from gptoss_convert.quantise.layers import RoundedLayers
    from gptoss_convert.quantise.report import Calibrated
    from gptoss_convert.quantise.rules import Rule

CALIBRATED = "calibrated"
_NEAREST_RULE = "ceil"
"""As OpenAI's kernels, ModelOpt and Megatron-Bridge choose scales."""
HINT = (
    "--lossy alone rounds stochastically, which keeps an update on average; --lossy calibrated, "
    "with torch and best on a GPU, keeps a strong update with a third of the noise"
)


def rule_of(options: Options) -> str | None:
    """The rule that rounds, `calibrated`, or None where rounding is refused.

    Raises UsageError for options that do not go together.
    """
    asked = "stochastic" if options.lossy is True else options.lossy or None
    if options.scale_rule is not None and asked != "nearest":
        raise UsageError("--scale-rule goes with --lossy nearest")
    for name, value in (("--calibrate", options.calibrate), ("--base", options.base)):
        if value is not None and asked != CALIBRATED:
            raise UsageError(f"{name} goes with --lossy calibrated")
    if asked == "nearest":
        return options.scale_rule or _NEAREST_RULE
    return cast("str | None", asked)


def with_rounding(changes: Changes, held: Sequence[Extent], rule: str | None) -> Changes:
    """The changes of a plan, with rounding by a rule added after those of each weight.

    With a calibration, weights that can be encoded have none: it has changed and rounded them.
    """
    if rule is None:
        return changes
    from gptoss_convert.quantise import rounding

    model = load_model()
    if rule == CALIBRATED:
        families = model.families.values()
        before = {one.weight for one in families if rounding.encoding_of(one) is not None}
        left = {name: some for name, some in changes.by_weight.items() if name not in before}
        return replace(changes, by_weight=left)
    rounds = rounding.changes(model, frozenset(extent.param for extent in held), cast("Rule", rule))
    both = {name: [*changes.by_weight.get(name, ()), *some] for name, some in rounds.items()}
    return replace(changes, by_weight={**changes.by_weight, **both})


def rounded_layers(
    source: Checkpoint, target: Path, encodes: bool, sizes: Mapping[str, int]
) -> RoundedLayers:
    """Where a calibration puts what it rounds; UsageError if that is impossible or needless."""
    from gptoss_convert.quantise.layers import RoundedLayers

    tuned = source.adapter is not None and source.adapter.changes_experts
    if source.encoding == "mxfp4" and not tuned:
        raise UsageError(f"--lossy calibrated: {source.place} is MXFP4, nothing is to be rounded")
    if not encodes:
        raise UsageError("--lossy calibrated: TARGET has BF16 experts; pass --dtype mxfp4")
    if source.repository is not None:
        raise UsageError(
            f"--lossy calibrated needs SOURCE in a directory: run hf download {source.place} first"
        )
    return RoundedLayers(rounded_path(target), sizes)


def with_rounded(held: Sequence[Extent], layers: RoundedLayers) -> list[Extent]:
    """The source's extents, with the experts from a calibration instead of its own."""
    lent = layers.extents()
    made = {extent.param for extent in lent}
    families = load_model().families.values()
    replaced = {
        param for family in families if made & {*family.members} for param in family.members
    }
    return [*(extent for extent in held if extent.param not in replaced), *lent]


def calibrate(
    source: Checkpoint, layers: RoundedLayers, options: Options, progress: Progress
) -> Calibrated:
    """Fill the layers: round SOURCE's experts on the text or tokens that the options name."""
    try:
        import torch  # noqa: F401
    except ImportError as error:
        needed = "needs torch (pip install 'gptoss-convert[verify]')"
        raise absent(
            f"--lossy calibrated {needed}; plain --lossy needs nothing more", error
        ) from None
    from gptoss_convert.quantise.run import calibrate_checkpoint

    return calibrate_checkpoint(
        source,
        layers,
        text=options.calibrate,
        base=options.base or options.scales,
        device=options.device,
        follow_links=options.follow_links,
        restart=options.restart,
        progress=progress,
    )
