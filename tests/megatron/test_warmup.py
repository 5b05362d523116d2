"""How large the first updates are, and which launches are told to warm up."""

import math
import re
import shlex
import subprocess
import sys
from argparse import Namespace
from itertools import islice, pairwise
from pathlib import Path

import pytest
import torch

from megatron_came import CAME
from megatron_came.core.hyperparameters import Hyperparameters
from megatron_came.megatron import warmup
from megatron_came.quickstart.settings import OPTIMIZERS, Settings
from tests.support.examples import write_checkout

ROOT = Path(__file__).parents[2]
ITERATIONS = (1, 2, 3, 10, 30, 100)


def settings(beta1=0.9, beta2=0.999, beta3=0.9999, clip=1.0, **options):
    return Hyperparameters(beta1=beta1, beta2=beta2, beta3=beta3, clip_threshold=clip, **options)


def train(chosen, rates, size=96):
    """The RMS of each update of the optimizer itself, on gradients that are noise."""
    param = torch.nn.Parameter(torch.zeros(size, size))
    optimizer = CAME([param], lr=1.0, kernels="plain", **chosen.as_group())
    sizes = []
    for rate in rates:
        param.data.zero_()
        param.grad = torch.randn(size, size) * 1e-3
        optimizer.param_groups[0]["lr"] = rate
        optimizer.step()
        sizes.append(param.detach().square().mean().sqrt().item())
    return sizes


@pytest.mark.parametrize(
    "chosen",
    [
        settings(),
        settings(beta2=0.95, beta3=0.995),
        settings(beta1=0.5),
        settings(beta1=0.95, beta3=0.9995),
        settings(clip=10.0),
        settings(clip=0.5),
        settings(beta3=0.99995),
        settings(bias_correction=True),
        settings(no_confidence=True),
        settings(bias_correction=True, no_confidence=True),
    ],
    ids=str,
)
def test_sizes_are_those_of_the_optimizer(chosen):
    measured = train(chosen, [1.0] * max(ITERATIONS))
    expected = list(islice(warmup.update_sizes(chosen), max(ITERATIONS)))
    for iteration in ITERATIONS:
        assert measured[iteration - 1] == pytest.approx(expected[iteration - 1], rel=0.04)


def test_sizes_that_were_measured_long_ago():
    sizes = list(islice(warmup.update_sizes(settings()), 1000))
    seen = [sizes[iteration - 1] for iteration in (1, 10, 100, 1000)]
    assert seen == pytest.approx([11.1, 7.4, 2.5, 0.8], rel=0.02)


@pytest.mark.parametrize("length", [0, 1, 5, 40])
def test_the_largest_update_of_a_warm_up_is_that_of_the_optimizer(length):
    rates = [min(done / length, 1.0) if length else 1.0 for done in range(length + 10)]
    expected = warmup.largest_update(settings(), length)
    assert max(train(settings(), rates)) == pytest.approx(expected, rel=0.04)


@pytest.mark.parametrize(
    "chosen", [settings(), settings(beta3=0.9995), settings(beta2=0.95, beta3=0.999)], ids=str
)
def test_what_is_recommended_is_enough_and_no_less_is(chosen):
    enough = warmup.sufficient_warmup(chosen)
    assert warmup.largest_update(chosen, enough) <= warmup.LIMIT
    assert warmup.largest_update(chosen, enough - 1) > warmup.LIMIT
    args = Namespace(train_iters=10**6, lr_warmup_iters=enough - 1)
    said = warmup.warning(args, chosen)
    args.lr_warmup_iters = int(re.search(r"--lr-warmup-iters (\d+)", said)[1])
    assert warmup.warning(args, chosen) is None


@pytest.mark.parametrize(
    ("args", "chosen", "words"),
    [
        (
            {"train_iters": 1000, "lr_warmup_iters": 5},
            settings(),
            ["--came-beta3 0.9999", "warm-up of 5 iterations", "8.7 times", "iters 160 or more"],
        ),
        ({"train_iters": 10**6}, settings(), ["of 0 iterations", "11.1 times"]),
        (
            {"train_iters": 400, "lr_warmup_iters": 20},
            settings(),
            ["--came-beta3 0.9995 with 31 or more"],
        ),
        (
            {"train_iters": 10**5, "lr_warmup_fraction": 0.0005},
            settings(),
            ["warm-up of 50 iterations"],
        ),
        (
            {"train_samples": 10**6, "lr_warmup_samples": 640, "global_batch_size": 64},
            settings(),
            ["warm-up of 10 iterations", "use --lr-warmup-samples 10240 or more"],
        ),
        (
            {"train_iters": 1000, "lr_warmup_fraction": 0.005},
            settings(),
            ["use --lr-warmup-iters 160 or more in place of --lr-warmup-fraction, or"],
        ),
        (
            {"train_iters": 1000, "lr_warmup_iters": 200, "lr_warmup_init": 1e-3, "lr": 1e-3},
            settings(),
            ["11.1 times", "use --lr-warmup-iters 160 or more with --lr-warmup-init 0"],
        ),
        ({"train_iters": 1000}, settings(beta1=0.0), ["a larger --came-beta1"]),
        ({"train_iters": 1000}, settings(beta2=0.95, beta3=0.999), ["3.5 times", "iters 15 or"]),
        ({"train_iters": 1000, "lr_warmup_iters": 160}, settings(), None),
        ({"train_iters": 1000}, settings(beta2=0.95, beta3=0.995), None),
        ({"train_iters": 1000}, settings(beta2=0.95, beta3=0.95), None),
        ({"train_iters": 1000}, settings(bias_correction=True), None),
        ({"train_iters": 1000}, settings(no_confidence=True), None),
        ({"train_iters": 10**5, "lr_warmup_fraction": 0.01}, settings(), None),
        # The batch grows from 8 to 64: 20 iterations at its end are 160 at its beginning.
        (
            {
                "train_iters": 1000,
                "lr_warmup_iters": 20,
                "global_batch_size": 64,
                "rampup_batch_size": ["8", "8", "100000"],
            },
            settings(),
            None,
        ),
        ({"train_iters": 10}, settings(), None),
        ({"train_iters": 1000, "exit_interval": 4}, settings(), None),
    ],
    ids=str,
)
def test_who_is_warned(args, chosen, words):
    said = warmup.warning(Namespace(**args), chosen)
    if words is None:
        assert said is None
    else:
        assert "docs/tuning.md" in said
        assert [word for word in words if word not in said] == []
        assert "\n" not in said


def test_a_resumed_run_is_past_its_first_updates(tmp_path):
    args = Namespace(train_iters=1000, lr_warmup_iters=5, load=str(tmp_path))
    assert warmup.warning(args, settings())  # there is nothing to resume from
    (tmp_path / "latest_checkpointed_iteration.txt").write_text("500")
    assert warmup.warning(args, settings()) is None
    for anew in ({"finetune": True}, {"no_load_optim": True}):
        assert warmup.warning(Namespace(**vars(args), **anew), settings())


def values(words):
    """Flags of a command by name, as far as the schedule and the optimizer go."""
    pairs = dict(pairwise(words))
    names = {"train-iters": int, "lr-warmup-iters": int, "exit-interval": int}
    args = {
        name.replace("-", "_"): kind(pairs[f"--{name}"])
        for name, kind in names.items()
        if f"--{name}" in pairs
    }
    betas = {
        f"beta{number}": float(pairs[f"--came-beta{number}"])
        for number in (1, 2, 3)
        if f"--came-beta{number}" in pairs
    }
    return Namespace(**args), Hyperparameters(**betas)


@pytest.mark.parametrize("smoke", ["0", "1"])
@pytest.mark.parametrize("script", sorted((ROOT / "examples").glob("*/train_*.sh")), ids=str)
def test_no_example_is_warned(tmp_path, script, smoke):
    variables = {"DRY_RUN": "1", "SMOKE": smoke, "MEGATRON_CAME_CPU": "1"}
    variables["MEGATRON_LM"] = str(write_checkout(tmp_path))
    done = subprocess.run(
        ["bash", str(script)],
        env={"PATH": f"{Path(sys.executable).parent}:/usr/bin:/bin", **variables},
        capture_output=True,
        text=True,
        check=True,
    )
    args, chosen = values(shlex.split(done.stdout.replace("\\\n", "")))
    assert args.lr_warmup_iters
    assert warmup.warning(args, chosen) is None


@pytest.mark.parametrize("iterations", [20, 50, 100, 1000])
def test_no_quick_start_is_warned(iterations):
    (came,) = (each for each in OPTIMIZERS if each.key == "came")
    args, chosen = values(Settings(iterations=iterations).megatron_flags(came))
    assert chosen.beta3 == 0.995
    assert warmup.warning(args, chosen) is None


def test_sizes_never_end_in_an_error():
    sizes = list(islice(warmup.update_sizes(settings(beta1=0.0, beta2=0.0, beta3=0.0)), 3))
    assert sizes == [math.inf] * 3
