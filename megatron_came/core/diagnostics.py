"""What a step did, in a few figures for each kind of layer, found when somebody asks after it.

A step does nothing for them. Clip divisors follow from the sums of u^2, which stay complete until
the next step. All else is taken of every vector and of ``SAMPLED_ROWS`` rows of each matrix, the
same in every layout: u is computed anew, momentum and weights are read as the step has left them.
"""

import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor

from megatron_came.core import factors, remainders
from megatron_came.core.momentum import MOMENTUM, codec_of
from megatron_came.core.parameter_slice import ParameterSlice, StepInputs
from megatron_came.core.shard import Shard
from megatron_came.core.state import MATRIX_FACTORS, REMAINDER, VECTOR_FACTORS
from megatron_came.core.sums import Request, SumBuffer

# A name has the first kind that fits it.
_KINDS = {
    "norm": r"norm|\bln_",
    "expert": r"(?<!shared_)experts",
    "embedding": r"embed|\bw[tp]e\b|output_layer|lm_head",
    "attention": r"attn|attention",
    "mlp": r"mlp|\bfc\d|ffn|feed_forward",
    "other": "",
}
KINDS = tuple(_KINDS)
SAMPLED_ROWS = 8
# Far from evenly spaced, since rows of attention's heads repeat.
_SPACING = (math.sqrt(5) - 1) / 2

# What is added up: of all tensors (u^2 is "update", elements are counted thrice), and of those that
# are looked at: (lr m / sqrt(S))^2, p^2, elements that stood still, (u^ - m)^2, m^2 and m^2 / S.
_EXACT = ("tensors", "clipped", "divisor", "elements", "update", "rounded", "in_matrices")
_NAMES = (*_EXACT, "applied", "weights", "stale", "instability", "momentum", "confident")
# Of what is computed on the CPU, whatever PyTorch's default device is.
_HERE: Any = {"dtype": torch.float64, "device": "cpu"}


def kind_of(name: str) -> str:
    """Return the kind of layer that a parameter belongs to, by its name."""
    return next(kind for kind, words in _KINDS.items() if re.search(words, name, re.IGNORECASE))


class Sums(NamedTuple):
    """What figures are made of, of what this rank holds; float64, on the CPU."""

    added: Tensor  # (kinds, names), to be added up over ranks that together hold the model once
    largest: Tensor  # (kinds,), clip divisors; the largest over ranks counts

    @classmethod
    def zero(cls) -> Self:
        """Return those of no parameters."""
        zeros = torch.zeros(len(KINDS), len(_NAMES) + 1, **_HERE)
        return cls(zeros[:, 1:], zeros[:, 0])

    def figures(self) -> dict[str, dict[str, float]]:
        """Return the figures of "all" and of each kind that there is; see docs/stability.md."""
        rows = [self.added.sum(0), *self.added], [self.largest.max(), *self.largest]
        return {
            kind: _figures(dict(zip(_NAMES, row.tolist(), strict=True)), float(largest))
            for kind, row, largest in zip(("all", *KINDS), *rows, strict=True)
            if row[0]
        }


def _figures(sums: Mapping[str, float], largest: float) -> dict[str, float]:
    def ratio(name: str, over: str) -> float:
        return sums[name] / sums[over] if sums[over] else math.nan

    found = {
        "update_rms": math.sqrt(ratio("update", "elements")),
        "clipped_share": ratio("clipped", "tensors"),
        "clip_divisor_mean": ratio("divisor", "tensors"),
        "clip_divisor_max": largest,
        "instability": ratio("instability", "in_matrices"),
        "confidence": math.sqrt(ratio("confident", "momentum")),
        "relative_update": math.sqrt(ratio("applied", "weights")),
        "stale_share": ratio("stale", "rounded"),
    }
    return {name: value for name, value in found.items() if not math.isnan(value)}


def measure(
    inputs: Mapping[ParameterSlice, StepInputs],
    totals: Mapping[ParameterSlice, Tensor],
    kinds: Mapping[ParameterSlice, str],
) -> Sums:
    """Measure the last step, with the inputs that it was given and the state that it has left.

    Args:
        inputs: of the step.
        totals: its sums of u^2.
        kinds: of the parameters; of others it is "other".
    """
    exact = [[0.0] * len(_EXACT) for _ in KINDS]
    largest = [0.0] * len(KINDS)
    rows, samples, factors_of = [], [], []
    known = on_cpu([totals[each] for each in inputs])
    for (slice_, given), total in zip(inputs.items(), known, strict=True):
        shard, threshold = slice_.shard, given.settings.hyper.clip_threshold
        divisor = max(math.sqrt(float(total) / shard.full_numel) / threshold, 1.0)
        row, numel = KINDS.index(kinds.get(slice_, "other")), float(shard.full_numel)
        is_rounded = codec_of(given.state[MOMENTUM].dtype).is_rounded and given.settings.hyper.beta1
        own = [1.0, divisor > 1.0, divisor, numel, float(total)]
        own += [numel * bool(is_rounded), numel * (not shard.is_vector)]
        exact[row] = [old + shard.share * new for old, new in zip(exact[row], own, strict=True)]
        largest[row] = max(largest[row], divisor)
        look = (_vector if shard.is_vector else _matrix)(slice_, given) if shard.numel else None
        if look is not None:
            rows.append(row)
            samples.append(_addends(slice_, given, divisor, look))
            weight = look.weight / shard.replicas
            factors_of.append([weight * float(given.settings.lr) ** 2, *[weight] * 5])
    sums = Sums.zero()
    sums.added[:, : len(_EXACT)] = torch.tensor(exact, **_HERE)
    sums.largest.copy_(torch.tensor(largest, **_HERE))
    if rows:
        found = on_cpu(samples) * torch.tensor(factors_of, **_HERE)
        sums.added[:, len(_EXACT) :].index_add_(0, torch.tensor(rows, device="cpu"), found)
    return sums


def measure_whole(
    inputs: Mapping[ParameterSlice, StepInputs],
    totals: Mapping[ParameterSlice, Tensor],
    kinds: Mapping[ParameterSlice, str],
) -> Sums:
    """Measure the last step of whole parameters, the same on all ranks; a collective.

    As :func:`measure`, of inputs in an order that is the same on all ranks, with an all-reduce of
    less than 1 KiB over each of the groups that hold the rest, or copies, of some.
    """
    if not inputs:
        return Sums.zero()
    members: dict[Request, dict[ParameterSlice, StepInputs]] = {}
    for slice_, given in inputs.items():
        members.setdefault(_over_all_holders(slice_.shard), {})[slice_] = given
    devices = [
        next(iter(own)).sums_device for request, own in members.items() if request.summed_over
    ]
    sums = SumBuffer([*members], devices[0] if devices else torch.device("cpu"))
    found = [measure(own, totals, kinds) for own in members.values()]
    for view, own in zip(sums.views, found, strict=True):
        view.copy_(own.added)
    sums.start()
    sums.finish()
    # Clip divisors are those of whole tensors already.
    return Sums(
        torch.stack(sums.views).sum(0).cpu(), torch.stack([own.largest for own in found]).amax(0)
    )


def _over_all_holders(shard: Shard) -> Request:
    """Ask for sums over all ranks that hold some of a tensor, or a copy, whose shares these are."""
    more = [*shard.more_groups, shard.copies_group]
    groups = tuple(group for group in more if group is not None)
    shape = (len(KINDS), len(_NAMES))
    return Request(shape, shard.dp_group, shard.tp_group, more_groups=groups).of_several_ranks()


def on_cpu(tensors: Sequence[Tensor]) -> Tensor:
    """Stack float64 tensors on the CPU, waiting for their devices once."""
    there = [each.to(tensors[0].device) for each in tensors]
    return torch.stack(there).cpu() if there else torch.empty(0, **_HERE)


class _Look(NamedTuple):
    """Elements of a slice."""

    take: Callable[[Tensor], Tensor]  # takes them out of a flat slice
    places: Callable[[], Tensor]  # returns where in it they are
    inside: Tensor | None  # which of them count; None for all
    scale: Tensor  # u / g
    confidence: Tensor | None  # 1 / sqrt(S); None of a vector
    weight: float  # elements of the full tensor that each stands for


def _addends(slice_: ParameterSlice, given: StepInputs, divisor: float, look: _Look) -> Tensor:
    """Return sums over elements, from "applied" on, which is to be multiplied by lr^2 yet."""
    hyper, state, take = given.settings.hyper, given.state, look.take
    weights = take(slice_.param.detach().reshape(-1))
    if REMAINDER in state:
        weights = remainders.join(weights, take(state[REMAINDER].view(-1)))
    momentum, *rounded = codec_of(state[MOMENTUM].dtype).at(state, take, look.places)
    spacing = rounded[0] if rounded else None
    grad = take(given.grad.reshape(-1)).to(momentum.dtype)
    weights = weights.to(momentum.dtype)
    if look.inside is not None:
        weights, momentum, grad = (each * look.inside for each in (weights, momentum, grad))
        spacing = None if spacing is None else spacing * look.inside
    away = (grad * look.scale).div_(divisor).sub_(momentum)
    confident = momentum if look.confidence is None else momentum * look.confidence
    step = confident * (grad.sign() == momentum.sign()) if hyper.cautious else confident
    applied, squared_weights = _squares(step), _squares(weights)
    stale = torch.zeros_like(applied)
    of_matrix = [stale] * 3
    if spacing is not None and hyper.beta1:
        # The step moved m by (1 - b1) (u^ - m_old), which is (1 - b1) / b1 (u^ - m).
        stale = ((1.0 - hyper.beta1) / hyper.beta1 * away.abs() < spacing).sum().to(stale.dtype)
    if look.confidence is not None:
        of_matrix = [*map(_squares, (away, momentum, confident))]
    return torch.stack([applied, squared_weights, stale, *of_matrix]).double()


def _squares(values: Tensor) -> Tensor:
    flat = values.flatten()
    return flat.dot(flat)


def _vector(slice_: ParameterSlice, given: StepInputs) -> _Look:
    """Take all elements."""
    shard = slice_.shard
    first = shard.start + (shard.window[1].start if shard.window else 0)
    scale = given.state[VECTOR_FACTORS[0]].view(-1)[first : first + shard.numel].rsqrt()

    def places() -> Tensor:
        return torch.arange(shard.numel, device=scale.device)

    return _Look(lambda flat: flat, places, None, scale, None, 1.0)


def _matrix(slice_: ParameterSlice, given: StepInputs) -> _Look | None:
    """Take what this rank holds of the sampled rows; None if nothing."""
    shard, device = slice_.shard, slice_.param.device
    window = shard.window or tuple(slice(0, size) for size in shard.local_matrix)
    batches, rows, columns = window
    height, width = rows.stop - rows.start, columns.stop - columns.start
    count, sampled = _sampled_rows(shard)
    here, is_cut = [], False
    for batch, row in sampled:
        place = ((batch - batches.start) * height + row - rows.start) * width
        is_held = batches.start <= batch < batches.stop and rows.start <= row < rows.stop
        if is_held and place + width > shard.start and place < shard.stop:
            here.append((batch, row, place - shard.start))
            is_cut |= place < shard.start or place + width > shard.stop
    if not here:
        return None
    of_batch, of_row, first = torch.tensor(here, device=device).unbind(1)

    def places() -> Tensor:
        unbounded = first.unsqueeze(1) + torch.arange(width, device=device)
        return unbounded.clamp_(0, shard.numel - 1)

    # Whole rows are copied faster than their elements are looked up.
    known = places() if shard.start % width or shard.stop % width else None
    inside: Tensor | None = None
    if known is not None and is_cut:
        inside = known - torch.arange(width, device=device) == first.unsqueeze(1)

    def take(flat: Tensor) -> Tensor:
        return flat.view(-1, width)[first // width] if known is None else flat[known]

    r, c, R, C = (given.state[key].view(shard.local_matrix[0], -1) for key in MATRIX_FACTORS)

    def scale(row: Tensor, column: Tensor) -> Tensor:
        mean = factors.mean_of(column if shard.tp_axis == "rows" else row)
        of_rows, of_columns = factors.scales(row, column, mean)
        return of_rows[of_batch, of_row].unsqueeze(1) * of_columns[of_batch, columns]

    weight = shard.full_numel / (count * shard.full_columns)
    return _Look(take, places, inside, scale(r, c), scale(R, C), weight)


def _sampled_rows(shard: Shard) -> tuple[int, list[tuple[int, int]]]:
    """Return how many rows of the full tensor are sampled; batch and row of those held here."""
    batch, rows, _ = shard.local_matrix
    first_batch, first_row, _ = shard.offsets
    count = shard.full_numel // shard.full_columns
    few = {int(count * (index * _SPACING % 1.0)) for index in range(SAMPLED_ROWS)}
    chosen = range(count) if count <= SAMPLED_ROWS else sorted(few)
    size, jump = shard.row_parts
    found = []
    for number in chosen:
        full_batch, full_row = divmod(number, shard.full_rows)
        part, within = divmod(full_row - first_row, size + jump)
        place = full_batch - first_batch, part * size + within
        if part >= 0 and within < size and place[0] in range(batch) and place[1] < rows:
            found.append(place)
    return len(chosen), found
