"""``--use-megatron-fsdp`` trains as Megatron's own data parallelism does."""

import pytest

from tests.training.harness import SMALL, Case, losses, run, worst_difference
from tests.training.layouts import CP, DO, SP, TP

TOLERANCE = 2e-6  # relative, of the loss; see test_training
# Of bf16 weights: one that is rounded otherwise, as the last bits of sums differ between cuts, is
# off by 2^-9. With and without Megatron's distributed optimizer losses differ by 4.4e-5 on 4 ranks.
BF16_TOLERANCE = 1e-4
FSDP = "--use-megatron-fsdp --ckpt-format fsdp_dtensor --data-parallel-sharding-strategy "
STRATEGIES = ("no_shard", "optim", "optim_grads", "optim_grads_params")
ZERO3 = FSDP + "optim_grads_params "
MODEL = SMALL + "--log-num-zeros-in-grad "
OVERLAP = "--overlap-grad-reduce --overlap-param-gather "
BF16 = "--bf16 --megatron-fsdp-main-grads-dtype fp32 "
# By number of ranks: what is compared with the first of its row, which has no FSDP.
LAYOUTS = {
    2: (
        (DO, *(f"{FSDP}{strategy} " for strategy in STRATEGIES), ZERO3 + OVERLAP),
        (DO + BF16, ZERO3 + BF16),
    ),
    4: (
        (TP + DO, *(f"{FSDP}{strategy} {TP}" for strategy in STRATEGIES)),
        (TP + SP + DO, ZERO3 + TP + SP),
        (TP + DO + BF16, ZERO3 + TP + BF16, TP + BF16),
        (DO, ZERO3),
        (CP + DO, ZERO3 + CP),
    ),
}


def named(ranks, flags):
    return f"{ranks}-" + "".join(flags.split())


def compared(ranks):
    return [(ranks, first, flags) for first, *rest in LAYOUTS[ranks] for flags in rest]


def train(ranks, folder, more=()):
    cases = [
        Case(named(ranks, flags), flags, model=MODEL) for row in LAYOUTS[ranks] for flags in row
    ]
    return run(ranks, [*cases, *more], folder)


def check(seen, ranks, first, flags):
    theirs, ours = (losses(seen[named(ranks, each)]) for each in (first, flags))
    assert theirs[-1] < theirs[0] - 0.2  # it trains, or nothing is compared
    tolerance = BF16_TOLERANCE if "--bf16" in flags else TOLERANCE
    assert worst_difference(ours, theirs) <= tolerance
    assert worst_difference(ours[:2], theirs[:2]) <= TOLERANCE  # before one can be seen


@pytest.fixture(scope="session")
def on_two(tmp_path_factory):
    """What two ranks saw."""
    faults = [
        Case("no-sums", ZERO3, "no_dp_sum", model=MODEL),
        Case("nan-loss", ZERO3, "nan-loss", fails=True, model=MODEL),
        Case("nan-gradient", ZERO3, "nan-gradient", fails=True, model=MODEL),
        Case("silent", ZERO3 + TP, "came+silent", fails=True, model=MODEL),
    ]
    return train(2, tmp_path_factory.mktemp("ranks2"), faults)


@pytest.fixture(scope="session")
def on_four(tmp_path_factory):
    """What four ranks saw."""
    return train(4, tmp_path_factory.mktemp("ranks4"))


@pytest.mark.parametrize(("ranks", "first", "flags"), compared(2))
def test_losses_equal_those_without_fsdp(on_two, ranks, first, flags):
    check(on_two, ranks, first, flags)


@pytest.mark.matrix
@pytest.mark.parametrize(("ranks", "first", "flags"), compared(4))
def test_losses_equal_those_without_fsdp_in_larger_layouts(on_four, ranks, first, flags):
    check(on_four, ranks, first, flags)


def test_norms_and_zeros_are_those_without_fsdp(on_two):
    """Before the first update they depend on the model alone."""
    ours, theirs = (on_two[named(2, flags)][0] for flags in (ZERO3, DO))
    for key in ("grad_norms", "zeros"):
        assert ours[key][0] == pytest.approx(theirs[key][0], rel=1e-6)


def test_a_missing_reduction_is_seen(on_two):
    theirs = losses(on_two[named(2, DO)])
    assert worst_difference(losses(on_two["no-sums"]), theirs) > 50 * TOLERANCE


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("nan-loss", "iteration 3, rank 1: the loss is NaN, though all weights of this rank are"),
        ("nan-gradient", "the norm of the gradients is nan; nothing of this iteration was taken"),
    ],
)
def test_a_bad_number_ends_all_ranks_before_the_step(on_two, name, sentence):
    for rank in on_two[name]:
        assert sentence in rank["error"]
        assert len(rank["losses"]) == 2
        assert not rank["changed_though_failed"]


def test_a_weight_that_is_cut_without_saying_so_is_refused_before_training(on_two):
    for rank in on_two["silent"]:
        assert "which the weight does not say (tensor_model_parallel" in rank["error"]
        assert not rank["losses"]
