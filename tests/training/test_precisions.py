"""Momentum in 16 and 8 bits and remainders in Megatron: layouts, checkpoints, conversions."""

import re

import pytest

from tests.training.harness import Case, losses, run, worst_difference

pytestmark = pytest.mark.matrix

CAME = "--optimizer came --use-distributed-optimizer "
FULL = "--ckpt-format torch_dist --dist-ckpt-optim-fully-reshardable "
DIST = "--ckpt-format torch_dist "
LEGACY = "--ckpt-format torch "
BF16 = "--came-momentum-dtype bf16 "
SMALLEST = "--bf16 --came-momentum-dtype int8 --came-main-params remainder --grad-reduce-in-bf16 "
LLAMA = "--swiglu --disable-bias-linear --untie-embeddings-and-output-weights "
TP2, PP2 = "--tensor-model-parallel-size 2 ", "--pipeline-model-parallel-size 2 "
# What is trained for 20 iterations, with a checkpoint at 10.
WHOLE = {
    "bf16": CAME + BF16 + FULL,
    "llama": CAME + BF16 + FULL + LLAMA,
    "smallest": CAME + SMALLEST + DIST,
    "smallest-full": CAME + SMALLEST + FULL,
    "int8-plain": "--optimizer came --came-momentum-dtype int8 " + DIST,
    "int8-legacy": CAME + "--came-momentum-dtype int8 " + LEGACY,
}
# What goes on from a checkpoint: which one, on how many ranks, with which flags.
RESUMED = {
    **{f"{name}-again": (name, 2, flags) for name, flags in WHOLE.items()},
    "bf16-on-one": ("bf16", 1, WHOLE["bf16"]),
    "bf16-tp2": ("bf16", 2, WHOLE["bf16"] + TP2),
    "bf16-pp2": ("bf16", 2, WHOLE["bf16"] + PP2),
    "llama-tp2": ("llama", 2, WHOLE["llama"] + TP2),
    "smallest-on-one": ("smallest-full", 1, WHOLE["smallest-full"]),
    "smallest-to-fp32": ("smallest", 2, CAME + "--bf16 --grad-reduce-in-bf16 " + DIST),
    "bf16-to-int8": ("bf16", 2, CAME + "--came-momentum-dtype int8 " + FULL),
    "legacy-to-fp32": ("int8-legacy", 2, CAME + LEGACY),
}


@pytest.fixture(scope="session")
def trained(tmp_path_factory):
    """Losses by case, and what was said."""
    folder = tmp_path_factory.mktemp("precisions")
    # The last checkpoint of a folder is the one that is resumed from.
    first = [
        case
        for name, flags in WHOLE.items()
        for case in (
            Case(name, flags),
            Case(
                f"{name}-half",
                f"{flags} --save {folder / name} --save-interval 10 --exit-interval 10",
            ),
        )
    ]
    first.append(Case("main", CAME + "--bf16 "))
    first.append(Case("remainder", CAME + "--bf16 --came-main-params remainder "))
    seen = run(2, first, folder / "whole")
    said = ""
    for ranks in (1, 2):
        cases = [
            Case(name, f"{flags} --load {folder / source}")
            for name, (source, where, flags) in RESUMED.items()
            if where == ranks
        ]
        seen |= run(ranks, cases, folder / f"resumed{ranks}")
        said += (folder / f"resumed{ranks}" / "log").read_text()
    return {name: losses(ranks) for name, ranks in seen.items()}, said


@pytest.mark.parametrize("name", WHOLE)
def test_resuming_at_the_same_layout_is_bit_identical(name, trained):
    curves, _ = trained
    assert curves[f"{name}-half"] + curves[f"{name}-again"] == curves[name]


@pytest.mark.parametrize("name", ["bf16-on-one", "bf16-tp2", "bf16-pp2", "llama-tp2"])
def test_every_layout_draws_the_same_bits(name, trained):
    """Other bits alone change the losses by 1e-5 and more: see the conversions."""
    curves, _ = trained
    assert worst_difference(curves[name], curves[RESUMED[name][0]][10:]) <= 2e-6


@pytest.mark.parametrize(
    "name", ["smallest-on-one", "smallest-to-fp32", "bf16-to-int8", "legacy-to-fp32"]
)
def test_one_precision_goes_on_in_another(name, trained):
    curves, _ = trained
    difference = worst_difference(curves[name], curves[RESUMED[name][0]][10:])
    assert 1e-6 < difference < 1e-3


def test_remainders_follow_fp32_main_weights(trained):
    curves, _ = trained
    assert worst_difference(curves["remainder"], curves["main"]) < 1e-3


@pytest.mark.parametrize(
    "sentence",
    [
        "--came-momentum-dtype fp32 (the checkpoint's run had int8): momentum is taken over "
        "exactly.",
        "--came-momentum-dtype int8 (the checkpoint's run had bf16): momentum is rounded to "
        "nearest, by at most 1/127 of the largest of its block of 256.",
        "--came-momentum-dtype int8 at another layout than the checkpoint's: blocks differ, so "
        "momentum is rounded to nearest, by at most 1/127 of the largest of its block of 256.",
        "--came-main-params fp32 (the checkpoint's run had remainder): the main weights are taken "
        "over bit for bit.",
    ],
)
def test_conversions_are_said(sentence, trained):
    _, said = trained
    assert re.search(f"^megatron_came: {re.escape(sentence)}$", said, re.MULTILINE)
