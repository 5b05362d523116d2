"""Ranks that were not given the same: one sentence on all of them, and no training."""

import pytest

from tests.training.harness import Case, losses, run

SHORT = "--train-iters 2 --lr-warmup-iters 1 --optimizer came "
DO = "--use-distributed-optimizer "
TP, PP = "--tensor-model-parallel-size 2 ", "--pipeline-model-parallel-size 2 "
# Flags of both ranks, those of rank 1 alone, and what the sentence says.
FLAGS = {
    "beta": ("", "--came-beta2 0.9", "rank 1 has --came-beta2 0.9, rank 0 0.999"),
    "clip": (TP, "--came-clip-threshold 2", "rank 1 has --came-clip-threshold 2.0, rank 0 1.0"),
    "eps": (DO, "--came-eps1 1e-20", "rank 1 has --came-eps1 1e-20, rank 0 1e-30"),
    "rate": (PP, "--lr 1e-3", "rank 1 has --lr 0.001, rank 0 0.0003"),
    "style": ("", "--lr-decay-style linear", "rank 1 has --lr-decay-style linear, rank 0 cosine"),
    "warm-up": ("", "--lr-warmup-iters 0", "rank 1 has --lr-warmup-iters 0, rank 0 1"),
    "decay": (TP, "--weight-decay 0", "rank 1 has --weight-decay 0.0, rank 0 0.1"),
    "clip-grad": ("", "--clip-grad 2", "rank 1 has --clip-grad 2.0, rank 0 1.0"),
    "seed": ("", "--seed 6", "rank 1 has --seed 6, rank 0 5"),
    "momentum": (
        DO,
        "--came-momentum-dtype bf16",
        "rank 1 has --came-momentum-dtype bf16, rank 0 fp32",
    ),
    "main-params": (
        DO + "--bf16 ",
        "--came-main-params remainder",
        "rank 1 has --came-main-params remainder, rank 0 fp32",
    ),
    "precision": ("", "--bf16", "rank 1 has --bf16 True, rank 0 False"),
    "kernels": ("", "--came-kernels plain", "rank 1 has --came-kernels plain, rank 0 auto"),
    "wrapper": ("", DO, "rank 1 has --use-distributed-optimizer True, rank 0 False"),
    "hidden-size": ("", "--hidden-size 64", "rank 1 has --hidden-size 64, rank 0 48"),
    "load": ("", "--load elsewhere", "rank 1 has --load FOLDER, rank 0 has no --load"),
    "save": (
        DO + "--save-interval 5 ",
        "--save elsewhere",
        "rank 1 has --save FOLDER, rank 0 has no --save",
    ),
    "optimizer": ("", "--optimizer adam", "rank 1 has --optimizer adam, rank 0 came"),
}
# What else rank 1 may have alone.
VARIANTS = {
    "frozen": (
        "frozen-on-last",
        "",
        "rank 1 has decoder.layers.1.mlp.linear_fc1.weight frozen 192x48 float32 ",
    ),
    "frozen-tp": (
        "frozen-on-last",
        TP,
        "cut along dimension 0, rank 0 96x48 float32 cut along dimension 0",
    ),
    "frozen-tied": ("tied-frozen-on-last", PP, "rank 1 has tied embeddings frozen 256x48 float32 "),
    "numba-asked-for": (
        "no-numba-on-last",
        "--came-kernels numba ",
        "--came-kernels numba cannot be used on rank 1: kernels 'numba' need numba",
    ),
    "fp8": (
        "fp8-on-last",
        PP + "--bf16 ",
        "weights are in fp8, which is supported with --fp8-param-gather",
    ),
    "uncut": (
        "uncut-on-last",
        PP + DO,
        "does not say along which dimension it is cut",
    ),
}


@pytest.fixture(scope="module")
def seen(tmp_path_factory):
    folder = tmp_path_factory.mktemp("agreement")
    cases = [
        Case(name, SHORT + flags, fails=True, last=last) for name, (flags, last, _) in FLAGS.items()
    ]
    cases += [
        Case(name, SHORT + flags, variant, fails=True)
        for name, (variant, flags, _) in VARIANTS.items()
    ]
    cases += [
        Case("no-numba", SHORT, "no-numba-on-last"),
        Case("plain", SHORT + "--came-kernels plain "),
        Case("own-business", SHORT, last="--num-workers 1 --tensorboard-queue-size 7"),
    ]
    return run(2, cases, folder) | {"log": (folder / "log").read_text()}


@pytest.mark.parametrize("name", [*FLAGS, *VARIANTS])
def test_what_only_one_rank_has_is_refused_on_all(seen, name):
    sentence = (FLAGS | VARIANTS)[name][2]
    for rank in seen[name]:
        assert rank["error"].startswith("SystemExit: megatron_came: ")
        assert sentence in rank["error"]
        assert "\n" not in rank["error"]
        assert not rank["losses"]


def test_ranks_may_report_otherwise(seen):
    assert len(losses(seen["own-business"])) == 2


def test_all_ranks_take_the_kernels_that_all_have(seen):
    first, second = seen["no-numba"]
    assert first["weights"] == second["weights"]
    assert first["weights"] == seen["plain"][0]["weights"]
    line = "round otherwise and rank 1 has kernels plain, rank 0 numba "
    assert seen["log"].count(line) == 1
