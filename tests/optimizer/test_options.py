"""What the authors' class has not: bias correction, cautious updates, none of the confidence."""

import copy
import io

import came_pytorch
import pytest
import torch

from megatron_came import CAME, Shard, voice
from scripts.cases.slices import Layout
from tests.support.oracle import (
    BETAS,
    DEVICES,
    TOLERANCE,
    distance,
    gradient_history,
    on_every_path,
    reference_updates,
    with_all_kernels,
)
from tests.support.slices import MID_ROW, worst_distance

SETTINGS = {"lr": 1e-2, "weight_decay": 0.1}
OPTIONS = [
    ("bias_correction",),
    ("cautious",),
    ("no_confidence",),
    ("bias_correction", "cautious"),
    ("bias_correction", "no_confidence", "cautious"),
]
with_options = pytest.mark.parametrize("options", OPTIONS, ids="-".join)


def history_of(shape, kind="normal", steps=12, dtype=torch.float64, seed=0):
    return gradient_history(shape, steps, kind, dtype, torch.Generator().manual_seed(seed))


def train(optimizer, param, gradients):
    for gradient in gradients:
        param.grad = gradient.to(param)
        optimizer.step()


def parameter(shape, dtype=torch.float64, kernels="plain", seed=1):
    start = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return torch.nn.Parameter(start.to(DEVICES[kernels], dtype))


@on_every_path
@with_options
@pytest.mark.parametrize("kind", ["wakes", "tiny"])
@pytest.mark.parametrize("shape", [(300,), (48, 80), (4, 33, 7)], ids=str)
def test_it_is_the_formula_on_whole_tensors(shape, kind, options, dtype, kernels):
    options = dict.fromkeys(options, True)
    param = parameter(shape, dtype, kernels)
    start, history = param.detach().cpu().double().clone(), history_of(shape, kind, dtype=dtype)
    train(CAME([param], betas=BETAS[0], kernels=kernels, **SETTINGS, **options), param, history)
    history = [gradient.double() for gradient in history]
    theirs = reference_updates(start, history, betas=BETAS[0], **SETTINGS, **options)[-1]
    assert distance(param.detach().cpu(), theirs, start) <= TOLERANCE[dtype]


CASES = {
    "matrix": Layout((48, 80), None, MID_ROW),
    "rows": Layout((48, 80), 0, MID_ROW),
    "columns": Layout((48, 80), 1, MID_ROW),
    "vector": Layout((98,), 0, MID_ROW),
    "batch": Layout((6, 14, 10), 0, MID_ROW),
    "batch-of-columns": Layout((6, 14, 10), 2, MID_ROW),
}


@on_every_path
@with_options
@pytest.mark.parametrize("case", CASES)
def test_slices_that_split_rows(case, options, dtype, kernels):
    worst = worst_distance(
        2,
        4,
        [CASES[case]],
        BETAS[1],
        "spikes",
        dtype,
        kernels,
        seed=3,
        **dict.fromkeys(options, True),
    )
    assert worst <= TOLERANCE[dtype]


@pytest.mark.parametrize("shape", [(), (7,), (6, 5), (3, 6, 5)], ids=str)
def test_the_first_corrected_update_forgets_all_decays(shape):
    """r, c, R and C are those of one step, m is u^: whatever the betas, but for 1 / beta1."""
    (gradient,) = history_of(shape, steps=1)
    moved = []
    for betas in BETAS:
        param = torch.nn.Parameter(torch.zeros(shape, dtype=torch.float64))
        train(CAME([param], lr=1.0, betas=betas, bias_correction=True), param, [gradient])
        moved.append(param.detach())
    torch.testing.assert_close(*moved, rtol=1e-9, atol=0)
    if len(shape) < 2:
        torch.testing.assert_close(moved[0], -gradient.sign(), rtol=1e-9, atol=0)


def test_long_corrected_runs_become_uncorrected_ones():
    betas = 0.9, 0.95, 0.98
    both = [parameter((6, 5)), parameter((6, 5))]
    optimizers = [
        CAME([param], betas=betas, bias_correction=flag, **SETTINGS)
        for param, flag in zip(both, (True, False), strict=True)
    ]
    history = history_of((6, 5), steps=2000)
    for param, optimizer in zip(both, optimizers, strict=True):
        train(optimizer, param, history)
    for key, value in optimizers[1].state[both[1]].items():
        torch.testing.assert_close(optimizers[0].state[both[0]][key], value, rtol=1e-9, atol=0)


def test_without_confidence_the_momentum_is_the_update():
    param = parameter((6, 5))
    optimizer = CAME([param], lr=0.5, no_confidence=True)
    for gradient in history_of((6, 5)):
        before = param.detach().clone()
        train(optimizer, param, [gradient])
        state = optimizer.state[param]
        torch.testing.assert_close(before - param, 0.5 * state["exp_avg"])
        assert all((state[f"exp_avg_res_{axis}"] == 1).all() for axis in ("row", "col"))


@with_all_kernels
def test_a_cautious_update_follows_each_gradient(kernels):
    param = parameter((6, 50), torch.float32, kernels)
    optimizer = CAME([param], lr=1e-2, cautious=True, kernels=kernels)
    kept = []
    for gradient in history_of((6, 50), steps=40):
        before = param.detach().clone()
        train(optimizer, param, [gradient])
        moved = (before - param).cpu()
        agrees = optimizer.state[param]["exp_avg"].cpu() * gradient > 0
        assert ((moved * gradient) >= 0).all()
        assert torch.equal(moved != 0, agrees)
        kept.append(agrees.double().mean().item())
    # Of noise: 1/2 + arcsin(sqrt(1 - beta1^2)) / pi of the elements; docs/algorithm.md.
    assert sum(kept[20:]) / 20 == pytest.approx(0.644, abs=0.02)


@pytest.mark.parametrize("kernels", ["plain", "numba"])
def test_a_matrix_may_be_said_to_be_a_vector(kernels):
    """A whole second moment, and no confidence."""
    param = parameter((6, 5), torch.float32, kernels)
    start, history = param.detach().double().clone(), history_of((6, 5))
    optimizer = CAME([param], kernels=kernels, shards={param: Shard.whole((30,))}, **SETTINGS)
    train(optimizer, param, history)
    flat = [gradient.flatten() for gradient in history]
    theirs = reference_updates(start.flatten(), flat, betas=BETAS[0], **SETTINGS)[-1]
    assert distance(param.detach(), theirs.view(6, 5), start) <= TOLERANCE[torch.float32]
    assert set(optimizer.state[param]) == {"exp_avg", "exp_avg_sq"}


@with_options
def test_options_may_be_set_from_one_step_to_the_next(options):
    """Kernels and plain PyTorch do the same; cautious updates go from one to the other."""
    both = [parameter((48, 80), torch.float32) for _ in range(2)]
    for param, kernels in zip(both, ("plain", "numba"), strict=True):
        optimizer = CAME([param], kernels=kernels, **SETTINGS)
        for number, gradient in enumerate(history_of((48, 80))):
            optimizer.param_groups[0].update(dict.fromkeys(options, number % 4 >= 2))
            train(optimizer, param, [gradient])
    assert distance(*both, parameter((48, 80), torch.float32)) <= TOLERANCE[torch.float32]


def test_a_line_says_that_kernels_leave_cautious_updates(caplog):
    voice.warn_once.cache_clear()
    param = parameter((6, 5), torch.float32)
    groups = [{"params": [param], "cautious": True}, {"params": [parameter((4,), torch.float32)]}]
    optimizer = CAME(groups, lr=1e-2, kernels="numba")
    train(optimizer, param, history_of((6, 5), steps=1))
    (line,) = caplog.messages
    assert "plain PyTorch, which is slower, for 1 of 2 parameters: 1 with cautious updates." in line


@pytest.mark.parametrize("name", ["bias_correction", "cautious", "no_confidence"])
@pytest.mark.parametrize("value", ["yes", 1, None, 0.5], ids=repr)
def test_what_is_no_switch_is_refused(name, value):
    for where in ({"lr": 1e-3, name: value}, {"lr": 1e-3}):
        with pytest.raises(ValueError, match=f"CAME: {name} = {value!r} is .* be True or False"):
            CAME([{"params": [parameter((3,))], name: value}], **where)


def test_a_state_dictionary_goes_on_bit_for_bit():
    history = history_of((6, 5))
    options = {"bias_correction": True, "no_confidence": True, "cautious": True}
    straight, resumed = parameter((6, 5)), parameter((6, 5))
    train(CAME([straight], **SETTINGS, **options), straight, history)
    first = CAME([resumed], **SETTINGS, **options)
    train(first, resumed, history[:5])
    file = io.BytesIO()
    torch.save(first.state_dict(), file)
    file.seek(0)
    second = CAME([resumed], lr=1.0)
    second.load_state_dict(torch.load(file, weights_only=True))
    train(second, resumed, history[5:])
    assert torch.equal(straight, resumed)


@with_all_kernels
def test_bias_correction_goes_by_the_steps_that_a_parameter_has_taken(kernels):
    """One that is unfrozen late, or has no gradient at times, is what it is alone."""
    shapes, takes = [(6, 5), (6, 5), (7,), (6, 5)], ["111111", "000111", "101011", "110101"]
    history = history_of((6, 7), steps=6)
    options = {**SETTINGS, "bias_correction": True, "kernels": kernels}

    def run(numbers, reload_at=None, init=False):
        params = [parameter(shapes[n], torch.float32, kernels, seed=n) for n in numbers]
        optimizer = CAME(params, **options)
        if init:
            optimizer.init_state()
        for at, gradient in enumerate(history):
            for state in optimizer.state.values():  # others may put other tensors in its place
                state |= {key: value.clone() for key, value in state.items()}
            if at == reload_at:
                saved = optimizer.state_dict()
                optimizer = CAME(params, **options)
                optimizer.load_state_dict(saved)
            for number, param in zip(numbers, params, strict=True):
                grad = gradient.flatten()[: param.numel()].view(param.shape).to(param)
                param.grad = grad if takes[number][at] == "1" else None
            if any(param.grad is not None for param in params):
                optimizer.step()
        return params

    for reload_at in (None, 2, 4):
        for number, param in enumerate(run(range(4), reload_at, init=reload_at is None)):
            assert torch.equal(param, *run([number]))


def test_state_of_the_authors_class_knows_how_many_steps_it_has():
    """A state that counted as none would be forgotten at the next step."""
    history, param = history_of((6, 5), steps=300), parameter((6, 5))
    theirs = came_pytorch.CAME([param], betas=(0.9, 0.9, 0.9), **SETTINGS)
    train(theirs, param, history)
    saved, at = theirs.state_dict(), param.detach().clone()
    ours = CAME([param], lr=1.0, bias_correction=True)
    ours.load_state_dict(copy.deepcopy(saved))
    assert ours.param_groups[0]["step"] == 300
    assert ours.param_groups[0]["bias_correction"] is True
    train(ours, param, history[:1])
    moved = param.detach().clone()
    param.data.copy_(at)
    train(theirs, param, history[:1])
    torch.testing.assert_close(moved, param.detach(), rtol=1e-9, atol=1e-12)
