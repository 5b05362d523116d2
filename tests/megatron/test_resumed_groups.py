"""Which saved parameter group is whose, and what a resumed run takes of it."""

import itertools

import pytest

from megatron_came.megatron.checkpoints.groups import matching, same_order, settings_to_load
from megatron_came.megatron.checkpoints.under_way import Load, current


def group(name, **settings):
    default = {
        "wd_mult": 1.0,
        "lr_mult": 1.0,
        "is_expert_parallel": False,
        "is_decoupled_lr": False,
        "default_config": True,
        "max_lr": 1e-3,
        "min_lr": 1e-4,
        "lr": 5e-4,
        "weight_decay": 0.1,
        "betas": (0.9, 0.99, 0.999),
        "step": 8,
    }
    return {"name": name, **default, **settings}


PLAIN = [group("matrices"), group("vectors", wd_mult=0.0)]
EXPERTS = [*PLAIN, group("experts", is_expert_parallel=True)]
DECOUPLED = [*PLAIN, group("embedding", max_lr=5e-3, default_config=False)]
# Two widths of rates, which 0.18 does not tell apart.
MUP = [
    *PLAIN,
    group("hidden", max_lr=2e-4, default_config=False),
    group("output", max_lr=3e-3, default_config=False),
]
OWN = {"plain": PLAIN, "experts": EXPERTS, "decoupled": DECOUPLED, "mup": MUP}


def faster(groups, factor=2.0):
    """The same groups of a run with other rates, before its first step."""
    return [
        {**each, "max_lr": each["max_lr"] * factor, "lr": 0.0, "step": 0, "betas": (0.8, 0.9, 0.9)}
        for each in groups
    ]


@pytest.mark.parametrize("kind", OWN)
def test_other_rates_find_their_groups(kind):
    saved = OWN[kind]
    own = faster(saved)
    assert [match["name"] for match in matching(own, saved)] == [each["name"] for each in own]
    assert same_order(own, saved)


@pytest.mark.parametrize("kind", ["plain", "experts", "decoupled", "mup"])
def test_the_same_groups_in_another_order_find_theirs(kind):
    own = OWN[kind]
    for saved in itertools.permutations(own):
        assert [match["name"] for match in matching(own, saved)] == [each["name"] for each in own]
        assert same_order(own, saved) == (list(saved) == own)


def test_groups_that_the_checkpoint_lacks_find_none():
    assert [bool(match) for match in matching(DECOUPLED, PLAIN)] == [True, True, False]
    assert [match["name"] for match in matching(PLAIN, DECOUPLED)] == ["matrices", "vectors"]
    assert not same_order(DECOUPLED, PLAIN)


def test_hyperparameters_are_the_own_and_steps_the_saved():
    for settings in settings_to_load(faster(PLAIN), PLAIN):
        assert settings["betas"] == (0.8, 0.9, 0.9)
        assert settings["step"] == 8
        assert settings["max_lr"] == 1e-3
        assert settings["lr"] == 5e-4


def test_rates_are_the_own_where_that_is_asked_for():
    token = current.set(Load([], None, None, own_rates=True))
    try:
        loaded = settings_to_load(faster(DECOUPLED), DECOUPLED)
    finally:
        current.reset(token)
    assert [settings["max_lr"] for settings in loaded] == [2e-3, 2e-3, 1e-2]
    assert {settings["step"] for settings in loaded} == {8}


def test_groups_of_other_sizes_are_not_in_the_same_order():
    own = [{**each, "params": [1, 2]} for each in PLAIN]
    saved = [{**PLAIN[0], "params": [1]}, {**PLAIN[1], "params": [2, 3, 4]}]
    assert not same_order(own, saved)
    assert same_order(own, PLAIN)  # without parameters, as in common.pt
