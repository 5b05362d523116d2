"""Whether a run's warm-up is long enough for its beta3.

CAME has no bias correction, unless it is asked for. The momentum and the instability that it is
divided by both start at zero, and the instability grows more slowly, so iteration t's update is
about 1/sqrt(1 - beta3^t) times as large as later ones. A warm-up keeps the rate small meanwhile.
"""

import argparse
import dataclasses
import math
from collections.abc import Iterator
from itertools import count, islice
from pathlib import Path

from megatron_came.core.hyperparameters import Hyperparameters
from megatron_came.rules import Settings

# Largest root mean square of an update that is no cause for a warning, in units of the learning
# rate. AdamW's first update is 1, its later ones on noise 0.23, CAME's later ones 0.25.
LIMIT = 2.0

_TRY = 10  # a run of so few iterations is a try, whose curve nobody keeps
_FARTHEST = 100_000  # iterations looked at
_SHORTER = (0.9995, 0.999, 0.995, 0.99, 0.98, 0.95)  # beta3 to offer to a short run


def update_sizes(settings: Hyperparameters) -> Iterator[float]:
    """The root mean square of the updates at iterations 1, 2, ..., in units of the rate.

    Of gradients that are independent noise; a steady gradient makes larger updates, cautious ones
    are smaller. It follows the variances of momentum and of u - m, whose elements are then sums of
    independent numbers: u - m_t = beta1 (u - m_(t-1)).

    Args:
        settings: the betas and the clip threshold, which sets the scale of u while its own
            statistics, without correction as well, are young.
    """
    beta1 = settings.beta1
    moment, momentum, instability = 0.0, 0.0, float(settings.no_confidence)
    for iteration in count(1):
        now = settings.at(iteration)
        moment = now.beta2 * moment + 1 - now.beta2
        # The variance of u, whose root mean square is clipped; g^2 counts as 1.
        update = min(settings.clip_threshold**2, 1 / moment)
        square = beta1**2 * (update + momentum)
        instability = now.beta3 * instability + (1 - now.beta3) * square
        momentum = beta1**2 * momentum + (1 - beta1) ** 2 * update
        size = math.sqrt(momentum / instability) if instability else math.inf
        yield size / settings.momentum_weight(iteration)


def largest_update(settings: Hyperparameters, warmup: float, start: float = 0.0) -> float:
    """The largest of the updates while the rate rises, in units of the peak rate.

    It rises from ``start`` over the warm-up's iterations, as Megatron counts them: the first
    iteration of a run with a warm-up has that rate.
    """
    shown = islice(update_sizes(settings), min(int(warmup), _FARTHEST) + 1)
    return max(
        size * (min(start + (1 - start) * done / warmup, 1.0) if warmup > 0 else 1.0)
        for done, size in enumerate(shown)
    )


def sufficient_warmup(settings: Hyperparameters) -> int | None:
    """The fewest iterations of warm-up with which no update is larger than ``LIMIT`` rates.

    None if there are none: with a small beta1 even later updates are larger.
    """
    sizes = islice(update_sizes(settings), _FARTHEST)
    # Its last iteration, which has the full rate, has the largest update of the warm-up.
    return next((done for done, size in enumerate(sizes) if size <= LIMIT), None)


def warning(args: argparse.Namespace, settings: Hyperparameters) -> str | None:
    """One sentence, if a run's first updates are too large for its rate; of validated arguments."""
    run = Settings(args)
    # Samples of an iteration at the start, where the batch may still grow.
    batch = int(run.rampup_batch_size[0] if run.rampup_batch_size else run.global_batch_size or 1)
    iterations = int(run.train_iters or (run.train_samples or 0) // batch)
    iterations = min(iterations, int(run.exit_interval or iterations))
    anew = not run.load or run.finetune or run.no_load_optim
    # A run that goes on from an optimizer's state has statistics that are no longer young.
    resumes = not anew and Path(run.load, "latest_checkpointed_iteration.txt").exists()
    if iterations <= _TRY or resumes or settings.bias_correction:
        return None
    warmup = _warmup(run, iterations, batch)
    largest = largest_update(settings, warmup, (run.lr_warmup_init or 0.0) / (run.lr or 1.0))
    if largest <= LIMIT:
        return None
    return (
        f"--came-beta3 {settings.beta3:g} with a warm-up of {warmup:.0f} iterations makes the "
        f"first updates up to about {largest:.1f} times --lr in RMS, as CAME has no bias "
        "correction, where AdamW's are at most 1 and CAME's later ones 0.25: "
        f"{_remedy(run, batch, settings, max(int(warmup), iterations // 10))} (or "
        "--came-bias-correction), see docs/tuning.md."
    )


def _remedy(run: Settings, batch: int, settings: Hyperparameters, room: int) -> str:
    """What to do in a run that has room for so many iterations of warm-up."""
    enough = sufficient_warmup(settings)
    if enough is None:
        return "use a smaller --came-beta3 or a larger --came-beta1"
    digits: int = 10 ** max(len(str(enough)) - 2, 0)  # a recommendation: two of them do
    unit, each = ("samples", batch) if run.train_samples else ("iters", 1)
    said = f"use --lr-warmup-{unit} {-(-enough // digits) * digits * each} or more"
    if run.lr_warmup_fraction is not None:  # Megatron takes one of them
        said += " in place of --lr-warmup-fraction"
    if run.lr_warmup_init:
        said += " with --lr-warmup-init 0"
    for beta3 in _SHORTER if enough > room else ():
        if settings.beta2 <= beta3 < settings.beta3:
            needed = sufficient_warmup(dataclasses.replace(settings, beta3=beta3))
            if needed is not None and needed <= room:
                return f"{said}, or --came-beta3 {beta3:g} with {max(needed, 1) * each} or more"
    return said


def _warmup(run: Settings, iterations: int, batch: int) -> float:
    """Iterations over which the rate rises to its peak."""
    if run.lr_warmup_fraction is not None:
        decay = run.lr_decay_iters or (run.lr_decay_samples or 0) / batch
        return float(run.lr_warmup_fraction * (decay or iterations))
    if run.train_samples:
        return float((run.lr_warmup_samples or 0) / batch)
    return float((run.lr_warmup_iters or 0) * (run.global_batch_size or 1) / batch)
