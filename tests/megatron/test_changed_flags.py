"""What is said of flags that a resumed run has unlike its checkpoint."""

import argparse
import functools
from types import SimpleNamespace

import pytest

from megatron_came.megatron.checkpoints import flags, loading
from megatron_came.megatron.checkpoints.flags import said_changes, schedule_refusal

NAMES = [*flags._OF_SCHEDULE, *flags._OTHERS]
SCHEDULERS = {"override_opt_param_scheduler": False, "use_checkpoint_opt_param_scheduler": False}
FILLED = {"num_attention_heads": 4, "hidden_size": 32, "group_query_attention": True}


def run(**flags):
    return SimpleNamespace(**{**SCHEDULERS, **FILLED, **flags})


@functools.cache
def options():
    """Option strings of Megatron's parser, by argument."""
    from megatron.training.arguments import add_megatron_arguments

    parser = add_megatron_arguments(argparse.ArgumentParser(allow_abbrev=False))
    found = {}
    for action in parser._actions:
        found.setdefault(action.dest, []).extend(action.option_strings)
    return found


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("values", [(0.5, 0.25), (True, None), (["a", 1], None), ("cosine", "x")])
def test_every_flag_is_said(name, values):
    if flags._FLAGS.get(name, "").startswith("no "):
        values = True, False  # a switch that says the opposite
    saved, now = (run(**{name: value}) for value in values)
    (sentence,) = said_changes(saved, now)
    flag = flags._FLAGS.get(name, "--" + name.replace("_", "-")).removeprefix("no ")
    assert sentence.startswith(f"training goes on with {flag} ")
    assert "the checkpoint's run had" in sentence
    assert said_changes(saved, saved) == []


@pytest.mark.parametrize("name", NAMES)
def test_every_flag_is_one_of_megatrons(name):
    flag = flags._FLAGS.get(name, "--" + name.replace("_", "-")).removeprefix("no ")
    if name not in options():
        pytest.skip("another release's")
    assert flag in options()[name]


def test_switches_that_were_never_given_are_off():
    assert said_changes(run(swiglu=None, bf16=False), run(swiglu=False, bf16=None)) == []
    assert said_changes(run(), run(clip_grad=1.0)) == []  # of an older release


def test_arguments_that_megatron_fills_in_are_not_said_twice():
    before = run(train_iters=8, lr_decay_iters=8, weight_decay=0.1, start_weight_decay=0.1)
    now = run(train_iters=12, lr_decay_iters=12, weight_decay=0.2, start_weight_decay=0.2)
    (sentence,) = said_changes(before, now)
    assert "--train-iters 12 (the checkpoint's run had 8)" in sentence
    assert "--weight-decay 0.2" in sentence
    assert "--lr-decay-iters" not in sentence
    assert "--start-weight-decay" not in sentence


def test_a_gated_layer_has_another_width_of_its_own():
    before, now = run(ffn_hidden_size=128, swiglu=False), run(ffn_hidden_size=64, swiglu=False)
    (sentence,) = said_changes(before, now)
    assert "--ffn-hidden-size 64 (the checkpoint's run had 128)" in sentence
    (sentence,) = said_changes(before, run(ffn_hidden_size=64, swiglu=True))
    assert "--ffn-hidden-size" not in sentence


@pytest.mark.parametrize(
    "flag",
    [
        *(
            "dataloader_type",
            "data_sharding",
            "data_args_path",
            "rope_type",
            "rotary_scaling_factor",
        ),
        *("moe_apply_probs_on_input", "moe_mlp_glu_interleave_size", "hybrid_layer_pattern", "sft"),
    ],
)
def test_what_decides_the_order_of_data_and_how_weights_are_read_is_among_them(flag):
    assert flag in NAMES


def test_opposites():
    (sentence,) = said_changes(run(add_bias_linear=True), run(add_bias_linear=False))
    assert "--disable-bias-linear on (the checkpoint's run had it off)" in sentence


OWN = {"max_lr": 2e-3, "min_lr": 0.0, "lr_decay_steps": 80}
GROUPS = [{"wd_mult": 1.0, "max_lr": 2e-3}, {"wd_mult": 0.0, "max_lr": 2e-3}]


def test_a_schedule_is_refused_unless_a_flag_says_whose_counts():
    saved, now = run(lr=1e-3), run(lr=2e-3)
    theirs = {**OWN, "max_lr": 1e-3}
    problem = schedule_refusal(saved, now, (theirs, OWN), [])
    assert "--lr 0.002 (the checkpoint's run had 0.001)" in problem
    assert flags.OVERRIDE in problem
    assert flags.KEEP in problem
    assert schedule_refusal(saved, now, (OWN, OWN), [(GROUPS, GROUPS)]) is None
    for flag in SCHEDULERS:
        both = run(lr=2e-3, **{flag: True})
        assert schedule_refusal(saved, both, (theirs, OWN), [(GROUPS, GROUPS)]) is None


def test_a_schedule_that_no_flag_explains_is_refused_by_its_own_names():
    problem = schedule_refusal(run(), run(), ({**OWN, "lr_decay_steps": 40}, OWN), [])
    assert "lr_decay_steps 80 (the checkpoint's run had 40)" in problem


def test_rates_of_groups_count_as_well():
    faster = [{**group, "max_lr": 5e-3} for group in GROUPS]
    problem = schedule_refusal(run(), run(), (OWN, OWN), [(faster, GROUPS)])
    assert "max_lr 0.005 (the checkpoint's run had 0.002)" in problem
    keeping = run(use_checkpoint_opt_param_scheduler=True)
    more = [*GROUPS, {"wd_mult": 0.5, "max_lr": 1e-3}]
    assert "no rates for some groups" in schedule_refusal(
        run(), keeping, (OWN, OWN), [(more, GROUPS)]
    )


@pytest.mark.parametrize(
    ("message", "run_flags", "words"),
    [
        (
            "Detected load from a distributed checkpoint, but neither --use-dist-ckpt nor ...",
            {"ckpt_format": "torch"},
            "is of --ckpt-format torch_dist, this run has --ckpt-format torch: give",
        ),
        (
            "Some keys found in the checkpoint are missing in the provided sharded state dict.",
            {"dist_ckpt_strictness": "raise_all"},
            "--dist-ckpt-strictness raise_all refuses the checkpoint in place",
        ),
        (
            "Some keys found in the checkpoint are missing",
            {"dist_ckpt_strictness": "log_all"},
            None,
        ),
        ("EOF", {"dist_ckpt_strictness": "raise_all"}, None),
        (
            "Integrity manifest not found at place/integrity.json.",
            {},
            "--verify-integrity: the checkpoint in place was saved without that: leave it out",
        ),
    ],
)
def test_a_flag_is_blamed_and_not_the_checkpoint(message, run_flags, words):
    said = loading._of_flags("place", RuntimeError(message), run(**run_flags))
    assert (words in said) if words else said is None
