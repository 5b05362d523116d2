"""The bounds of docs/stability.md: random search finds nothing beyond, examples reach them."""

import itertools
import math
from typing import NamedTuple

import pytest
import torch

from megatron_came import CAME
from megatron_came.core.reference import outer, rms, update

BETAS = 0.9, 0.999, 0.9999
SLACK = 1 + 1e-9  # what float64 may round away


class Step(NamedTuple):
    """A step as the page names its numbers; the rate is 1."""

    t: int
    u_hat: torch.Tensor
    m: torch.Tensor
    Q: torch.Tensor
    R: torch.Tensor
    C: torch.Tensor
    update: torch.Tensor


def steps_of(gradients, betas=BETAS, threshold=1.0, eps2=1e-16, **options):
    """Run the reference; Q, the average of (u^ - m)^2 that is not factored, is followed here."""
    b1, b2, b3 = betas
    letters = {"eta": 1.0, "b1": b1, "b2": b2, "b3": b3, "eps1": 1e-30, "eps2": eps2}
    letters |= {"d": threshold, "weight_decay": 0.0, **options}
    theta, state, Q, m = torch.zeros_like(gradients[0]), {}, 0.0, 0.0
    for t, gradient in enumerate(gradients, 1):
        before = theta.clone()
        update(theta, gradient, state, **letters)
        u_hat, m = (state["m"] - b1 * m) / (1 - b1), state["m"]
        Q = b3 * Q + (1 - b3) * (u_hat - m) ** 2
        yield Step(t, u_hat, m, Q, state.get("R"), state.get("C"), before - theta)


def largest_ratio(t, b1, _, b3, corrected=False):
    """B_t: the largest |m| / sqrt(Q), of averages that are corrected or not."""
    ratio = (1 - b1) / b1 * math.sqrt(b3 * (b3**-t - 1)) / (1 - b3)
    return ratio * (math.sqrt(1 - b3**t) / (1 - b1**t) if corrected else 1)


def least_instability(t, betas, threshold, eps2, corrected=False):
    b1, _, b3 = betas
    least = eps2**2 / ((b1 * threshold * (2 - b1 ** (t - 1))) ** 2 + eps2)
    return least if corrected else (1 - b3**t) * least


def drawn():
    """Gradients of any shape, with zeros, sizes that jump, and steady ones; and settings."""
    for seed in range(150):
        generator = torch.Generator().manual_seed(seed)

        def rand(*shape, generator=generator):
            return torch.rand(shape, generator=generator, dtype=torch.float64)

        shape = tuple((1 + rand(2) * 6).long().tolist())
        noise = torch.randn((25, *shape), generator=generator, dtype=torch.float64)
        steady = torch.randn(shape, generator=generator, dtype=torch.float64)
        mask = rand(25, *shape) < (0.2, 0.6, 1.1)[seed % 3]
        sizes = 10 ** (rand(25, 1, 1) * (0, 4)[seed % 2])
        gradients = list((noise * rand() + steady * rand()) * mask * sizes)
        betas = tuple(1 - 10 ** -(0.3 + rand(3) * 3.5))
        settings = {"betas": tuple(map(float, betas)), "threshold": float(10 ** (2 * rand() - 1))}
        settings["eps2"] = (1e-16, 1e-6, 1e-2)[seed % 3]
        yield gradients, settings


@pytest.mark.parametrize("corrected", [False, True], ids=["plain", "bias correction"])
def test_nothing_is_found_beyond_the_bounds(corrected):
    for gradients, settings in drawn():
        betas, threshold = settings["betas"], settings["threshold"]
        for step in steps_of(gradients, **settings, bias_correction=corrected):
            assert rms(step.u_hat) <= threshold * SLACK
            assert rms(step.m) <= threshold * (1 - betas[0] ** step.t) * SLACK
            m, Q, R, C = step.m, step.Q, step.R, step.C
            if corrected:
                m = m / (1 - betas[0] ** step.t)
                Q, R, C = (each / (1 - betas[2] ** step.t) for each in (Q, R, C))
            largest = largest_ratio(step.t, *betas, corrected)
            assert (m.abs() <= largest * Q.sqrt() * SLACK + 1e-12 * threshold).all()
            S = outer(R, C)
            rows, columns = S.shape
            most = torch.minimum(columns * C.mean() / C, (rows * R.mean() / R).unsqueeze(-1))
            assert (most * S * SLACK >= Q).all()
            least = least_instability(step.t, betas, threshold, settings["eps2"], corrected)
            assert (least <= S * SLACK).all()
            assert (step.update.abs() <= largest * most.sqrt() * SLACK + 1e-9).all()


def test_vectors_and_updates_without_confidence_are_bound_by_the_threshold():
    for (gradients, settings), correction in itertools.product(drawn(), (False, True)):
        flat = [gradient.flatten() for gradient in gradients]
        for some, more in ((flat, {}), (gradients, {"no_confidence": True})):
            for step in steps_of(some, **settings, **more, bias_correction=correction):
                most = 1.0 if correction else 1 - settings["betas"][0] ** step.t
                assert rms(step.update) <= settings["threshold"] * most * SLACK


def test_cautious_makes_updates_smaller_only():
    few = itertools.islice(drawn(), 30)
    for (gradients, settings), corrected in itertools.product(few, (False, True)):
        options = {**settings, "bias_correction": corrected}
        both = (steps_of(gradients, cautious=each, **options) for each in (False, True))
        for usual, step in zip(*both, strict=True):
            kept = (step.update == usual.update) | (step.update == 0)
            close = (step.update - usual.update).abs() <= 1e-9 * usual.update.abs()
            assert (kept | close).all()


def test_the_threshold_of_each_group_bounds_what_has_no_confidence():
    """As rules and groups set it, of the optimizer itself, at a rate of one."""
    generator = torch.Generator().manual_seed(4)
    thresholds = itertools.cycle((0.1, 1.0, 3.0))
    for corrected, cautious in itertools.product((False, True), repeat=2):
        switches = {"bias_correction": corrected, "cautious": cautious}
        groups = []
        for own in ({"factored": False}, {"no_confidence": True}, {"shape": (30,)}):
            shape = own.pop("shape", (5, 6))
            param = torch.nn.Parameter(torch.zeros(shape, dtype=torch.float64))
            betas = tuple(1 - 10 ** -(0.3 + 3 * torch.rand(3, generator=generator)).double())
            groups.append(
                {
                    **{"params": [param], "clip_threshold": next(thresholds)},
                    **{"betas": tuple(map(float, betas)), **switches, **own},
                }
            )
        optimizer = CAME(groups, lr=1.0, kernels="plain")
        for t in range(1, 30):
            before = [group["params"][0].detach().clone() for group in groups]
            for group in groups:
                (param,) = group["params"]
                noise = torch.randn(param.shape, dtype=torch.float64, generator=generator)
                param.grad = (noise + 1) * 10.0 ** (t % 7)
            optimizer.step()
            for group, old in zip(groups, before, strict=True):
                most = 1.0 if corrected else 1 - group["betas"][0] ** t
                moved = rms(group["params"][0].detach() - old)
                assert moved <= group["clip_threshold"] * most * SLACK


@pytest.mark.parametrize("beta2", [0.95, 0.999])
def test_the_raw_update_of_a_vector_is_largest_of_a_spike(beta2):
    noise = torch.randn(60, 20, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    noise[40] *= 1e12
    sizes = [rms(step.u_hat) for step in steps_of(noise, (0.9, beta2, 0.9999), threshold=1e9)]
    assert max(sizes) == sizes[40] == pytest.approx((1 - beta2) ** -0.5, rel=1e-6)


def test_a_spike_and_a_steady_gradient_reach_the_threshold():
    calm, spike = torch.full((4, 5), 1e-3).double(), torch.full((4, 5), 1e3).double()
    *_, last = steps_of([calm, calm, spike], threshold=0.7)
    assert rms(last.u_hat) == pytest.approx(0.7, rel=1e-12)
    for step in steps_of([calm] * 20):
        assert rms(step.m) == pytest.approx(1 - 0.9**step.t, rel=1e-9)


@pytest.mark.parametrize(
    ("betas", "expected"),
    [
        (BETAS, {1: 11.1, 10: 35.1, 100: 111, 1000: 360}),
        ((0.9, 0.95, 0.995), {1: 1.6, 10: 5.0, 100: 18, 1000: 271}),
    ],
    ids=str,
)
def test_the_table_of_the_largest_ratios(betas, expected):
    digits = {t: 1 if t <= 10 else 0 for t in expected}
    assert {t: round(largest_ratio(t, *betas), digits[t]) for t in expected} == expected
    corrected = {t: round(largest_ratio(t, *betas, True), digits[t]) for t in (10, 100)}
    assert corrected == {10: 1.7, 100: 11}
    assert largest_ratio(1, *betas, True) == pytest.approx(1 / betas[0])


def test_no_smaller_ratio_of_momentum_and_instability_holds():
    """Where u^ - m shrinks with beta3; of its own, without a threshold that forbids it."""
    b1, _, b3 = BETAS
    m = Q = 0.0
    for t in range(1, 200):
        x = b3**t
        m, Q = m + (1 - b1) / b1 * x, b3 * Q + (1 - b3) * x**2
        assert m / math.sqrt(Q) == pytest.approx(largest_ratio(t, *BETAS), rel=1e-6)


@pytest.mark.parametrize("threshold", [0.1, 1.0, 50.0])
@pytest.mark.parametrize("betas", [BETAS, (0.9, 0.95, 0.995)], ids=str)
def test_the_first_update_of_a_gradient_of_rank_one(betas, threshold):
    """The whole bound at t = 1: 11.1 times the rate, whatever the gradient's size and beta2."""
    gradient = torch.outer(torch.rand(5) - 0.5, torch.rand(7) - 0.5).double() * 1e-3
    (step,) = steps_of([gradient], betas, threshold, eps2=1e-30)
    torch.testing.assert_close(step.update, gradient.sign() * largest_ratio(1, *betas))
    (step,) = steps_of([gradient], betas, threshold, eps2=1e-30, bias_correction=True)
    torch.testing.assert_close(step.update, gradient.sign() / betas[0])


@pytest.mark.parametrize("small", [0.1, 1e-3])
def test_elements_alone_in_row_and_column_move_more(small):
    gradient = torch.diag(torch.tensor([1.0, small], dtype=torch.float64))
    (step,) = steps_of([gradient])
    first = largest_ratio(1, *BETAS)
    assert rms(step.update) == pytest.approx(first * (1 + small**2) / (2 * small), rel=1e-9)
    share = 2 * step.C.mean() / step.C
    torch.testing.assert_close(step.update.diag(), first * share.sqrt())


def test_rows_and_columns_without_gradient_have_the_least_instability():
    gradient = torch.zeros(3, 3, dtype=torch.float64)
    gradient[0, 0] = 1.0
    (step,) = steps_of([gradient], eps2=1e-4, threshold=2.0)
    expected = least_instability(1, BETAS, 2.0, 1e-4)
    # The mean is that of u^, whose root mean square is the threshold.
    assert float(outer(step.R, step.C)[1, 1]) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize(
    ("betas", "sizes"),
    [
        (BETAS, {10: 33.7, 100: 48.7, 1000: 50.9, 5000: 62.2}),
        ((0.9, 0.95, 0.995), {10: 4.8, 100: 8.7, 1000: 82.9}),
    ],
    ids=str,
)
def test_a_steady_gradient_moves_further_and_further(betas, sizes):
    gradient = torch.ones(2, 2, dtype=torch.float64)
    found = {step.t: rms(step.update) for step in steps_of([gradient] * max(sizes), betas)}
    assert {t: round(found[t], 1) for t in sizes} == sizes


def test_a_large_eps2_bounds_a_steady_gradient():
    steps = steps_of([torch.ones(2, 2, dtype=torch.float64)] * 4000, (0.9, 0.95, 0.995), eps2=1e-2)
    *_, last = steps
    assert rms(last.update) == pytest.approx(10, rel=1e-6)
