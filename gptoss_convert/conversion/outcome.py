"""What a conversion did to the values beyond moving bits, and what it therefore refuses."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping

from gptoss_convert.codecs.stats import EncodeStats
from gptoss_convert.conversion.lossy import HINT
from gptoss_convert.conversion.plan import Conversion
from gptoss_convert.engine.anomalies import is_vector, tensors_of, zero_matrices
from gptoss_convert.engine.records import Done, Effect
from gptoss_convert.errors import CodecError, IntegrityError
from gptoss_convert.layouts.folding import fold
from gptoss_convert.machine.progress import Progress


def outcomes_of(conversion: Conversion, done: Iterable[Done]) -> dict[str, Effect]:
    """What the steps did, by weight."""
    outcomes: dict[str, Effect] = defaultdict(Effect)
    for result in done:
        weight = conversion.plan.steps[result.step].family.weight
        outcomes[weight] += Effect(result.encoded, result.cast_values)
    return dict(outcomes)


def refuse_nonfinite(conversion: Conversion, batch: Iterable[Done]) -> None:
    """Raise IntegrityError for infinities and NaN, unless they are to be kept."""
    for result in batch:
        if result.anomalies.nonfinite and not conversion.options.allow_nonfinite:
            raise IntegrityError(
                f"{conversion.source.place}: {result.anomalies.first}; "
                "pass --allow-nonfinite to keep such values"
            )


def refuse_zeros(conversion: Conversion, done: Mapping[int, Done]) -> None:
    """Raise IntegrityError for weight matrices of zeros, unless they are to be kept."""
    found = {number: result.anomalies for number, result in done.items()}
    zeros = zero_matrices(conversion.plan, found)
    weights = [matrix for matrix in zeros if not is_vector(matrix[0])]
    if weights and not conversion.options.allow_zero:
        raise IntegrityError(
            f"{conversion.source.place}: {len(weights)} weight matrices are zero throughout, in "
            f"{fold(tensors_of(conversion.plan, weights))}; "
            "pass --allow-zero to keep them"
        )


def _update(stats: EncodeStats) -> str:
    """What is left of a fine-tune's update, where the base's scales tell what it changed."""
    if not stats.update:
        return ""
    flipped = stats.flipped / stats.compared
    return (
        f"; update kept {stats.update_kept / stats.update:.2f}, {flipped:.1%} of the codes changed"
    )


def state_losses(
    conversion: Conversion, outcomes: Mapping[str, Effect], progress: Progress
) -> None:
    """Say, by weight, what rounding lost; raise CodecError unless that was asked for."""
    encodings = {step.family.weight: step.recipe.encoding for step in conversion.plan.steps}
    lossy: list[str] = []
    for weight, outcome in outcomes.items():
        if outcome.cast_values:
            progress.note(f"{weight}: {outcome.cast_values} values rounded to BF16")
        stats = outcome.encoded
        if (encoding := encodings[weight]) and stats.inexact_blocks:
            share, form = stats.inexact_blocks / stats.blocks, encoding.codec.name.upper()
            noise = (
                10 * math.log10(stats.squares / stats.squared_error) if stats.squared_error else 0
            )
            lossy.append(
                f"{weight}: {stats.inexact_blocks} of {stats.blocks} blocks ({share:.1%}) are not "
                f"exact in {form}: {stats.inexact_values} values rounded, {stats.clipped} clipped, "
                f"{stats.flushed} flushed to zero, SQNR {noise:.1f} dB{_update(stats)}"
            )
    if lossy and not conversion.options.lossy:
        raise CodecError(
            f"{conversion.source.place}: {'; '.join(lossy)}; pass --lossy to round, nothing was "
            "written"
        )
    for loss in lossy:
        progress.note(loss)
    if lossy and conversion.options.lossy in (True, "stochastic"):
        progress.note(HINT)
