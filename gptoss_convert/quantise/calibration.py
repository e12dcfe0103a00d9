"""A layer's experts, rounded so that their outputs stay what the tuned model's are.

A matrix is rounded for the inputs that it will get, which are those of the rounded model, and aims
at the outputs that it has in the tuned model. So each expert's output also compensates what the
layers before it changed. Held-out tokens are used only for what is reported.

Shape suffixes as in `witness.forward` and `calibrated`; J stands for both halves of gate_up, gate's
rows before up's.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from gptoss_convert.errors import IntegrityError
from gptoss_convert.quantise.calibrated import Moments, nearest, round_matrices
from gptoss_convert.quantise.matrices import Rounded, exact_form
from gptoss_convert.quantise.passages import Met, Walk
from gptoss_convert.quantise.report import MatrixReport
from gptoss_convert.witness import forward
from gptoss_convert.witness.model import LayerWeights, ModelConfig

GROUP_BYTES = 16_000_000_000
"""What a layer's BF16 experts and the float32 work on a group of them may take."""


@dataclass(frozen=True)
class Former:
    """What a matrix was before it was tuned, as far as it is known: [E, B, N] and [E, K, N]."""

    scales: Tensor | None = None
    codes: Tensor | None = None

    def of(self, experts: Tensor) -> Former:
        """The same of some experts."""
        return Former(*(part if part is None else part[experts] for part in vars(self).values()))


@dataclass(frozen=True)
class RoundedLayer:
    """A layer's experts in MXFP4, and what rounding did: `gate_up` [E, D, J], `down` [E, F, D]."""

    gate_up: Rounded
    down: Rounded
    reports: tuple[MatrixReport, ...] = ()


@dataclass(frozen=True)
class _Matrix:
    """One matrix of several experts, `[E, K, N]`, with what goes into it and should come out."""

    name: str
    weights: Tensor
    former: Former
    inputs: Callable[[int, Met], Tensor]
    """`[T, K]` of the expert at this place in the group."""
    outputs: Callable[[int, Met], Tensor]
    """`[T, N]`, biases aside."""


def round_layer(
    walk: Walk,
    layer: int,
    weights: LayerWeights,
    config: ModelConfig,
    former: tuple[Former, Former],
) -> RoundedLayer:
    """Round a layer's experts, a group of them at a time; `walk` stands behind its attention."""
    size = group_size(config)
    groups = [
        _round_group(walk, layer, weights, config, former, experts)
        for experts in torch.arange(config.experts).split(size)
    ]
    gate_ups, downs, reports = zip(*groups, strict=True)
    return RoundedLayer(
        _joined(gate_ups),
        _joined(downs),
        tuple(map(MatrixReport.joined, zip(*reports))),  # noqa: B905
    )


def group_size(config: ModelConfig) -> int:
    """Experts that are rounded at once: a function of the model alone, as bits may depend on it."""
    matrix = config.hidden * 2 * config.inter
    held = config.experts * 3 * config.hidden * config.inter * 2
    one = 4 * (7 * matrix + 8 * max(config.hidden, config.inter) ** 2)
    most = max(1, min(config.experts, (GROUP_BYTES - held) // one))
    return next(n for n in range(most, 0, -1) if config.experts % n == 0)


def _round_group(
    walk: Walk,
    layer: int,
    weights: LayerWeights,
    config: ModelConfig,
    former: tuple[Former, Former],
    experts: Tensor,
) -> tuple[Rounded, Rounded, tuple[MatrixReport, MatrixReport]]:
    numbers = experts.tolist()
    place = f"layer {layer}"
    gate_up_EDJ = torch.stack([_input_major(weights, e) for e in numbers])
    down_EFD = torch.stack(
        [forward.dense(weights.down_weight[e], torch.float32).T for e in numbers]
    )
    bias_EJ = torch.cat((weights.gate_bias, weights.up_bias), 1).float()[experts]

    def inner(matrix_DJ: Tensor, place: int, x_TD: Tensor) -> Tensor:
        gate, up = (x_TD @ matrix_DJ + bias_EJ[place]).chunk(2, dim=1)
        return forward.swiglu(gate, up, config)

    first = _Matrix(
        "gate_up.weight",
        gate_up_EDJ,
        former[0].of(experts),
        lambda e, met: met.rounded,
        lambda e, met: met.tuned @ gate_up_EDJ[e],
    )
    rounded, first_report = _round(
        walk, weights, first, numbers, _seeds(config, layer, 0, experts), place
    )
    values_EDJ = rounded.values(torch.float32)
    second = _Matrix(
        "down.weight",
        down_EFD,
        former[1].of(experts),
        lambda e, met: inner(values_EDJ[e], e, met.rounded),
        lambda e, met: inner(gate_up_EDJ[e], e, met.tuned) @ down_EFD[e] + met.missing,
    )
    last, last_report = _round(
        walk, weights, second, numbers, _seeds(config, layer, 1, experts), place
    )
    return rounded, last, (first_report, last_report)


def _seeds(config: ModelConfig, layer: int, matrix: int, experts: Tensor) -> Tensor:
    """A number for each matrix of the model."""
    return (2 * layer + matrix) * config.experts + experts


def _input_major(weights: LayerWeights, expert: int) -> Tensor:
    """gate_up of one expert, [D, J]."""
    halves = (weights.gate_weight[expert], weights.up_weight[expert])
    return torch.cat([forward.dense(half, torch.float32) for half in halves]).T


def _round(
    walk: Walk,
    weights: LayerWeights,
    matrix: _Matrix,
    experts: Sequence[int],
    seeds_E: Tensor,
    place: str,
) -> tuple[Rounded, MatrixReport]:
    """Round one matrix of a group; experts whose values MXFP4 holds keep them, byte for byte."""
    if not matrix.weights.isfinite().all():
        raise IntegrityError(f"{place}: {matrix.name}: infinite or NaN")
    result, exact_E = exact_form(matrix.weights, matrix.former.scales)
    left = (~exact_E).nonzero().flatten()
    device = matrix.weights.device
    tokens_E = torch.zeros(len(experts), dtype=torch.int64, device=device)
    if len(left):
        moments = _moments(walk, weights, matrix, experts, left.tolist())
        hints = matrix.former.of(left).scales
        made = round_matrices(matrix.weights[left], moments, hints, seeds_E.to(device)[left])
        result.codes[left], result.scales[left] = made.codes, made.scales
        tokens_E[left] = moments.tokens
    measured = _measured(walk, weights, matrix, result, experts, left.tolist())
    report = MatrixReport(
        matrix.name,
        exact=tuple(exact_E.tolist()),
        tokens=tuple(tokens_E.tolist()),
        **measured,
    )
    return result, report


def _moments(
    walk: Walk,
    weights: LayerWeights,
    matrix: _Matrix,
    experts: Sequence[int],
    left: Sequence[int],
) -> Moments:
    """What the calibration tokens show of the experts at the places `left` of the group."""
    columns, rows = matrix.weights.shape[1:]
    moments = Moments(
        matrix.weights.new_zeros(len(left), columns, columns),
        matrix.weights.new_zeros(len(left), columns, rows),
        torch.zeros(len(left), dtype=torch.int64, device=matrix.weights.device),
    )
    for passage in walk.passages(weights, held_out=False):
        for n, e in enumerate(left):
            if (met := passage.met(experts[e])) is None:
                continue
            x_TK = matrix.inputs(e, met).float()
            weighed_KT = (x_TK * met.weight.float()).T
            moments.inputs[n].addmm_(weighed_KT, x_TK)
            moments.outputs[n].addmm_(weighed_KT, matrix.outputs(e, met).float())
            moments.tokens[n] += len(x_TK)
    return moments


def _measured(
    walk: Walk,
    weights: LayerWeights,
    matrix: _Matrix,
    result: Rounded,
    experts: Sequence[int],
    left: Sequence[int],
) -> dict[str, tuple[float, ...]]:
    """For each expert of the group: share of the update kept, of error, and of codes flipped.

    Against the base where that is known, else against rounding to nearest.
    """
    kept, error, flips = ([math.nan] * len(experts) for _ in range(3))
    before = {e: _former_values(matrix, e) for e in left}
    sums = torch.zeros(len(experts), 3, dtype=torch.float64, device=matrix.weights.device)
    made = {
        e: Rounded(result.codes[[e]], result.scales[[e]]).values(torch.float32)[0] for e in left
    }
    for passage in walk.passages(weights, held_out=True):
        for e in left:
            if (met := passage.met(experts[e])) is None:
                continue
            x_TK = matrix.inputs(e, met).float() * met.weight.float().sqrt()
            update_TN = x_TK @ (matrix.weights[e] - before[e])
            change_TN = x_TK @ (made[e] - before[e])
            products = (update_TN.square(), update_TN * change_TN, (change_TN - update_TN).square())
            sums[e] += torch.stack([product.double().sum() for product in products])
    for e in left:
        size, common, missed = sums[e].tolist()
        flips[e] = float((made[e] != before[e]).float().mean())
        if size > 0:
            kept[e], error[e] = common / size, math.sqrt(missed / size)
    return {"kept": tuple(kept), "error": tuple(error), "flips": tuple(flips)}


def _former_values(matrix: _Matrix, e: int) -> Tensor:
    one = matrix.former.of(torch.tensor([e]))
    if one.codes is not None and one.scales is not None:
        return Rounded(one.codes, one.scales).values(torch.float32)[0]
    return nearest(matrix.weights[[e]], one.scales)[0]


def _joined(parts: Sequence[Rounded]) -> Rounded:
    return Rounded(torch.cat([p.codes for p in parts]), torch.cat([p.scales for p in parts]))
