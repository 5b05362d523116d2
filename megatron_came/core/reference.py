"""CAME on whole tensors, in the letters of the paper (Luo et al., ACL 2023, algorithm 2).

Read this first. Whoever knows Adam needs nothing else to follow it, and everything else in this
package computes the same numbers: of slices of a matrix, on many ranks, in kernels, in fewer bytes.
It is slow, takes copies of the matrix, and is used by tests alone.

Three things stand otherwise than in the paper, as in the authors' own code: statistics are means
where the paper has sums, which cancels; weight decay is decoupled; and vectors have a full second
moment and no confidence, since a vector has no second axis to factor over. There is no bias
correction, unless it is asked for.
"""

import torch
from torch import Tensor


def update(
    theta: Tensor,
    g: Tensor,
    state: dict[str, Tensor],
    *,
    bias_correction: bool = False,
    cautious: bool = False,
    no_confidence: bool = False,
    **settings: float,
) -> None:
    """Take one step: update the weights and the state, both in place.

    Args:
        theta: weights, (n, m), (..., n, m) for a batch of matrices, or (n,) for a vector.
        g: gradient, of the same shape.
        state: empty before the first step; then ``t``, ``m`` and, of a matrix, ``r``, ``c``, ``R``
            and ``C``, of a vector ``v``.
        bias_correction: divide averages by what of their weights there is after t steps, 1 - b^t;
            not the momentum in the instability, which would be zero at t = 1.
        cautious: leave out elements that would move against their gradient.
        no_confidence: take the momentum as it is, as Adafactor does.
        settings: eta (learning rate), b1, b2, b3, eps1, eps2, d (clip threshold) and weight_decay.
    """
    eta, b1, b2, b3 = (settings[name] for name in ("eta", "b1", "b2", "b3"))
    eps1, eps2, d = (settings[name] for name in ("eps1", "eps2", "d"))
    t = state["t"] = state.get("t", torch.tensor(0)) + 1

    def corrected(average: Tensor, decay: float) -> Tensor:
        return average / (1 - decay ** int(t)) if bias_correction else average

    # Second moment: of a matrix its row and column means, whose product stands for all of it.
    if g.dim() < 2:
        v = corrected(average(state, "v", g**2 + eps1, b2), b2)
    else:
        r = corrected(average(state, "r", (g**2 + eps1).mean(-1), b2), b2)
        c = corrected(average(state, "c", (g**2 + eps1).mean(-2), b2), b2)
        v = outer(r, c)

    # Clipped update: its root mean square, over the whole tensor, is at most d.
    u = g / v.sqrt()
    u_hat = u / max(1.0, rms(u) / d)
    m = average(state, "m", u_hat, b1)

    # Confidence: where the update keeps away from its average, the step is smaller.
    step = corrected(m, b1)
    if g.dim() >= 2 and not no_confidence:
        instability = (u_hat - m) ** 2
        R = corrected(average(state, "R", (instability + eps2).mean(-1), b3), b3)
        C = corrected(average(state, "C", (instability + eps2).mean(-2), b3), b3)
        step = step / outer(R, C).sqrt()
    if cautious:
        step = step * (m * g > 0)

    theta -= eta * settings["weight_decay"] * theta
    theta -= eta * step


def average(state: dict[str, Tensor], name: str, value: Tensor, decay: float) -> Tensor:
    """Return the exponential moving average of a value, which begins at zero."""
    state[name] = decay * state.get(name, torch.zeros_like(value)) + (1 - decay) * value
    return state[name]


def outer(rows: Tensor, columns: Tensor) -> Tensor:
    """Return the matrix that row and column means stand for: ``rows columns / mean(rows)``."""
    normalized = rows / rows.mean(-1, keepdim=True)
    return normalized.unsqueeze(-1) * columns.unsqueeze(-2)


def rms(values: Tensor) -> float:
    """Return the root mean square of all elements."""
    return float(values.square().mean().sqrt())
