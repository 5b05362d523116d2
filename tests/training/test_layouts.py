"""Every layout against the authors' optimizer on one rank: parallelism, precision, communication;
see ``make test-all``."""

import pytest

from tests.training.harness import losses, worst_difference
from tests.training.layouts import FROZEN, MODELS, NAMES, SIXTEEN_BIT, TIED, oracle_of

pytestmark = pytest.mark.matrix

TOLERANCE = 2e-6  # see test_training


@pytest.mark.parametrize("name", [*(f"{model}-dp1-do" for model in MODELS), *NAMES])
def test_losses_equal_the_authors_optimizer(layouts, name):
    theirs = losses(layouts["oracle-" + name.split("-")[0]])
    assert theirs[-1] < theirs[0] - 0.5
    assert worst_difference(losses(layouts[name]), theirs) <= TOLERANCE


@pytest.mark.parametrize("name", FROZEN)
def test_ranks_that_own_nothing(layouts, name):
    ours, theirs = losses(layouts[name]), losses(layouts[f"oracle-{name}"])
    assert theirs[-1] != theirs[0]
    assert worst_difference(ours, theirs) <= TOLERANCE


@pytest.mark.parametrize("name", TIED)
def test_tied_embeddings_stay_bit_identical(layouts, name):
    first, last = (
        {rank["weights"][key] for rank in layouts[name] if key in rank["weights"]}
        for key in ("embedding.word_embeddings.weight", "output_layer.weight")
    )
    assert len(first) == (2 if "tp2" in name else 1)
    assert first == last


@pytest.mark.parametrize(
    ("name", "all_reduces"),
    [
        ("gpt2-dp1-do", 0),
        ("gpt2-dp4", 0),  # whole gradients on every rank
        ("gpt2-dp4-do-overlap", 2),
        ("gpt2-tp4", 2),
        ("gpt2-tp2-dp2-do-overlap", 2 * 2),  # what is cut over both goes over one group of both
        ("gpt2-dp4-two-instances", 2),
        ("moe-ep2-dp4-do", 2 * 2),  # experts have their own data-parallel ranks
        ("tied-pp2", 5),
        ("tied-pp2-dp2", 2 + 5),
        ("tied-pp2-vpp2-dp2", 2 + 5),
    ],
)
def test_collectives_of_a_step(layouts, name, all_reduces):
    for rank in layouts[name]:
        first, second = rank["collectives"][:2]
        step = {key: second[key] - first[key] for key in first}
        assert step == {"all_reduce": all_reduces, "broadcast": 0}


def test_two_runs_are_bit_identical(layouts):
    for first, second in zip(layouts["twice-a"], layouts["twice-b"], strict=True):
        assert first == second


def test_overlapping_the_gather_with_the_step_changes_nothing(layouts):
    """Megatron gives each model chunk an optimizer of its own."""
    for without, overlapped in zip(layouts["step-a"], layouts["step-b"], strict=True):
        assert without["losses"] == overlapped["losses"]
        assert without["weights"] == overlapped["weights"]


@pytest.mark.parametrize("name", SIXTEEN_BIT)
def test_sixteen_bit_training_follows_the_authors_optimizer(layouts, name):
    """Gradients are rounded in another order, so the comparison is coarse."""
    oracle = layouts[oracle_of(SIXTEEN_BIT[name])]
    assert layouts[name][0]["skipped"] == oracle[0]["skipped"]
    assert worst_difference(losses(layouts[name]), losses(oracle)) <= 2e-3


@pytest.mark.parametrize("name", ["fp16", "fp16-do"])
def test_an_overflow_leaves_every_state_bit_identical(layouts, name):
    for rank in layouts[name]:
        assert sum(rank["skipped"]) > 5
        assert not any(rank["changed_though_skipped"])
