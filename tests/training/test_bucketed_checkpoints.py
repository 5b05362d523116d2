"""Resumes from checkpoints of several odd buckets with padding between them.

``test_buckets`` proves every element; this shows the same in Megatron's training loop, for its
models and layouts: a run that saves after four of eight iterations, and what resumes from it.
"""

from pathlib import Path

import pytest

from tests.training.harness import Case, losses, run, worst_difference
from tests.training.layouts import MODELS

TOLERANCE = 2e-6  # of the loss, where another layout sums in another order

SHORT = "--train-iters 8 --lr-warmup-iters 2 --global-batch-size 12 "
DO = "--use-distributed-optimizer "
ODD = "--overlap-grad-reduce --ddp-bucket-size 5003 "
WIDE = ODD + "--ddp-pad-buckets-for-high-nccl-busbw "
FORMATS = {
    "full": DO + "--dist-ckpt-optim-fully-reshardable ",
    "efficient": DO + "--dist-ckpt-optim-fully-reshardable "
    "--distrib-optim-fully-reshardable-mem-efficient ",
    "dp": DO,
    "legacy": DO + "--ckpt-format torch ",
}
PRECISIONS = {
    "fp32": "",
    "int8": "--bf16 --came-momentum-dtype int8 --came-main-params remainder ",
    "bf16": "--bf16 --grad-reduce-in-bf16 --came-momentum-dtype bf16 ",
    "fp16": "--fp16 --initial-loss-scale 4096 ",
}
TP, PP = "--tensor-model-parallel-size 2 ", "--pipeline-model-parallel-size 2 "
EP, TWO = "--expert-model-parallel-size 2 ", "--num-distributed-optimizer-instances 2 "
# What examples/common.sh and its scripts for eight GPUs set, with buckets for a small model.
EXAMPLES = FORMATS["full"] + ODD + "--overlap-param-gather --bf16 "


def _grid():
    """Every format with every model and number of data-parallel ranks, the rest in turns."""
    precisions, saved = list(PRECISIONS), {}
    for dp in (2, 3, 4):
        for model_number, model in enumerate(MODELS):
            for number, (name, style) in enumerate(FORMATS.items()):
                precision = precisions[(number + model_number + dp) % 4]
                buckets = (ODD, WIDE)[(number + dp) % 2]
                flags = MODELS[model] + style + buckets + PRECISIONS[precision]
                saved[f"{name}-{model}-dp{dp}-{precision}"] = (dp, flags)
    return saved


# Number of ranks and flags of a run that saves, and by what name.
SAVED = {
    **_grid(),
    "examples": (2, EXAMPLES),
    "odd": (2, FORMATS["full"] + ODD),
    "wide": (2, FORMATS["full"] + WIDE),
    "llama3": (3, FORMATS["full"] + ODD + MODELS["llama"]),
    "dp3": (3, FORMATS["dp"] + ODD),
    "dp-pp": (4, FORMATS["dp"] + WIDE + PP),
    "legacy3": (3, FORMATS["legacy"] + ODD),
    "tp-dp": (4, FORMATS["full"] + ODD + TP),
    "pp-dp": (4, FORMATS["full"] + WIDE + PP),
    "moe-ep": (4, FORMATS["full"] + ODD + EP + MODELS["moe"]),
    "dp-moe-ep": (4, FORMATS["dp"] + WIDE + EP + MODELS["moe"]),
    "two": (4, FORMATS["full"] + WIDE + TWO),
    "dp-two": (4, FORMATS["dp"] + WIDE + TWO),
}
# (ranks, name of the checkpoint, flags)
ELSEWHERE = {
    "odd-at-tp2": (2, "odd", FORMATS["full"] + TP),
    "odd-at-dp3": (3, "odd", FORMATS["full"] + WIDE),
    "wide-at-tp2": (2, "wide", FORMATS["full"] + TP + ODD),
    "wide-at-pp2": (2, "wide", FORMATS["full"] + PP),
    "llama3-at-dp2": (2, "llama3", FORMATS["full"] + WIDE + MODELS["llama"]),
    "llama3-at-tp2": (2, "llama3", FORMATS["full"] + TP + MODELS["llama"]),
    "dp3-at-dp2": (2, "dp3", FORMATS["dp"] + ODD),
    "dp3-at-dp4": (4, "dp3", FORMATS["dp"] + WIDE),
    "dp-pp-at-dp1": (2, "dp-pp", FORMATS["dp"] + ODD + PP),
    "legacy3-at-dp2": (2, "legacy3", FORMATS["legacy"] + ODD),
    "legacy3-at-one-bucket": (2, "legacy3", FORMATS["legacy"]),
    "tp-dp-at-dp3": (3, "tp-dp", FORMATS["full"] + ODD),
    "pp-dp-at-tp2": (2, "pp-dp", FORMATS["full"] + TP),
    "moe-ep-at-dp2": (2, "moe-ep", FORMATS["full"] + WIDE + EP + MODELS["moe"]),
    "dp-moe-ep-at-dp2": (2, "dp-moe-ep", FORMATS["dp"] + ODD + EP + MODELS["moe"]),
    "two-at-dp3": (3, "two", FORMATS["full"] + ODD),
}
QUICK = ("examples", "odd", "odd-at-tp2")


def _mark(names):
    return [
        name if name in QUICK else pytest.param(name, marks=pytest.mark.matrix) for name in names
    ]


def _case(name, flags, dp):
    # A batch of twelve for any number of data-parallel ranks from one to four.
    size = "--micro-batch-size 1 " if dp == 4 else "--micro-batch-size 2 "
    return Case(name, f"--optimizer came --ckpt-format torch_dist {SHORT}{size}{flags}")


@pytest.fixture(scope="session")
def seen(request, tmp_path_factory):
    """What the ranks saw, by name of the case; of those cases alone that are asked for."""
    items = [item for item in request.session.items if item.path == Path(__file__)]
    asked = {item.callspec.params.get("name") for item in items if hasattr(item, "callspec")}
    asked |= {ELSEWHERE[name][1] for name in asked & ELSEWHERE.keys()}
    folder = tmp_path_factory.mktemp("bucketed")
    results = {}
    for ranks in (2, 3, 4):
        cases = []
        for name, (where, flags) in SAVED.items():
            if name not in asked or where != ranks:
                continue
            saving = f"--save {folder / name} --save-interval 4 "
            loading = f"--load {folder / name} "
            if "legacy" in name:  # where Megatron takes the latest state of the optimizer
                cases.append(_case(f"{name}-first", f"{flags}{saving}--exit-interval 4 ", ranks))
                cases.append(_case(f"{name}-straight", flags, ranks))
            else:
                cases.append(_case(f"{name}-straight", flags + saving, ranks))
                loading += "--ckpt-step 4 "
            cases.append(_case(f"{name}-second", flags + loading, ranks))
        if cases:
            results |= run(ranks, cases, folder / f"saved{ranks}")
    for ranks in (2, 3, 4):
        cases = [
            _case(
                name,
                f"{flags}--load {folder / saved} "
                + ("" if "legacy" in saved else "--ckpt-step 4 "),
                ranks,
            )
            for name, (where, saved, flags) in ELSEWHERE.items()
            if where == ranks and name in asked
        ]
        if ranks == 2:
            save = f"--save {folder / 'other'} --save-interval 2 "
            flags = f"{FORMATS['dp']}--train-iters 2 --lr-warmup-iters 0 "
            other = f"--load {folder / 'other'} --overlap-grad-reduce --ddp-bucket-size 20011 "
            cases.append(_case("dp-saved-with-buckets", flags + ODD + save, ranks))
            cases.append(_case("dp-at-other-buckets", flags + other, ranks))
            cases[-1].fails = True
        if cases:
            results |= run(ranks, cases, folder / f"elsewhere{ranks}")
    return results


@pytest.mark.parametrize("name", _mark(SAVED))
def test_resuming_at_the_same_layout_is_bit_identical(seen, name):
    straight, second = seen[f"{name}-straight"], seen[f"{name}-second"]
    assert losses(second) == losses(straight)[4:]
    for rank, (one, other) in enumerate(zip(straight, second, strict=True)):
        assert one["state"] == other["state"], f"rank {rank}"
        assert one["weights"] == other["weights"], f"rank {rank}"


@pytest.mark.parametrize("name", _mark(ELSEWHERE))
def test_resuming_at_another_layout_differs_by_rounding(seen, name):
    straight = losses(seen[f"{ELSEWHERE[name][1]}-straight"])
    assert worst_difference(losses(seen[name]), straight[4:]) <= TOLERANCE


def test_other_buckets_are_refused_where_the_format_does_not_allow_them(seen):
    error = seen["dp-at-other-buckets"][0]["error"]
    assert error.startswith("SystemExit: megatron_came: the checkpoint in ")
    assert "other buckets (with --ddp-bucket-size 5003), which its format" in error
    assert "resume with those" in error
    assert not seen["dp-at-other-buckets"][0]["losses"]
