"""``--optimizer-cpu-offload``: the same bits as without, in every layout, precision and checkpoint.

Here both "devices" are the CPU, with tensors of their own on each side; that none goes astray is
shown in ``tests/megatron/test_cpu_offload.py``.
"""

import re

import pytest

from tests.training.harness import SMALL, Case, losses, run

DO = "--use-distributed-optimizer --ckpt-format torch_dist "
FULL = DO + "--dist-ckpt-optim-fully-reshardable "
LEGACY = DO + "--ckpt-format torch "
OVERLAP = DO + "--overlap-grad-reduce --overlap-param-gather --ddp-bucket-size 5003 "
TP, PP = "--tensor-model-parallel-size 2 ", "--pipeline-model-parallel-size 2 "
FP16 = "--fp16 --initial-loss-scale 65536 --loss-scale-window 4 "  # skips one of six steps
SMALLEST = "--bf16 --came-momentum-dtype int8 --came-main-params remainder --grad-reduce-in-bf16 "
MOE = (
    "--num-experts 4 --moe-router-topk 2 --moe-ffn-hidden-size 32 --disable-bias-linear --swiglu "
    "--moe-token-dispatcher-type alltoall --moe-router-load-balancing-type none "
    "--expert-model-parallel-size 2 "
)
HALF = "--optimizer-offload-fraction 0.5 "

# By ranks and name: flags, and the fractions that are offloaded.
LAYOUTS = {
    1: {"one": (DO, (0.5, 1)), "one-bf16": (DO + "--bf16 ", (0.5,))},
    2: {
        "fp32": (DO, (0, 0.5, 1)),
        "bf16": (DO + "--bf16 --came-spike-guard 3 ", (0, 0.5, 1)),
        "bf16-gradients": (OVERLAP + "--bf16 --grad-reduce-in-bf16 ", (0.5,)),
        "fp16": (DO + FP16, (0.5, 1)),
        "smallest": (DO + SMALLEST, (0.5, 1)),
        "tp2": (DO + TP, (0.5,)),
        "pp2": (DO + PP + "--bf16 ", (0.5, 1)),
        "plain": (DO + "--came-kernels plain ", (0.5,)),
        "triton": (DO + "--came-kernels triton ", (0.5,)),
        "moe": (DO + MOE, (0.5,)),
    },
    4: {"tp2-dp2": (DO + TP, (0.5, 1)), "tp2-dp2-bf16": (OVERLAP + TP + "--bf16 ", (0.5,))},
}
MATRIX = (
    *("one-bf16", "triton", "moe", "plain", "bf16-gradients", "tp2-dp2", "tp2-dp2-bf16", "full"),
    "weights-fp32",
)
# Every layout offloads half; other fractions are quick here.
OTHER_FRACTIONS = {("fp32", 0), ("fp32", 1)}
# What is saved at 3 of 6 iterations, and goes on with the other choice.
SAVED = {
    "dp": DO + "--bf16 ",
    "full": FULL + "--bf16 --came-momentum-dtype bf16 ",
    "legacy": LEGACY,
    "remainder": FULL + SMALLEST,
}


def offload(fraction):
    return f"--optimizer-cpu-offload --optimizer-offload-fraction {fraction} "


# Whose weights alone are loaded, after the optimizer is made.
FROM_WEIGHTS = {
    "weights-fp32": DO,
    "weights-bf16": DO + "--bf16 ",
    "weights-smallest": DO + SMALLEST,
}
OFFLOADED = {"": "", "-half": offload(0.5)}


def _is_quick(name, fraction):
    return name not in MATRIX and (fraction == 0.5 or (name, fraction) in OTHER_FRACTIONS)


def _mark(names):
    return [
        pytest.param(name, marks=pytest.mark.matrix if name in MATRIX else ()) for name in names
    ]


def _names(ranks):
    return [
        pytest.param(
            ranks, name, fraction, id=f"{name}-{fraction}",
            marks=() if _is_quick(name, fraction) else pytest.mark.matrix,
        )
        for name, (_, fractions) in LAYOUTS[ranks].items()
        for fraction in fractions
    ]  # fmt: skip


@pytest.fixture(scope="module")
def seen(request, tmp_path_factory):
    wanted = [
        item.callspec.params
        for item in request.session.items
        if item.path == request.path and hasattr(item, "callspec")
    ]
    asked = {(case["name"], case.get("fraction")) for case in wanted}
    names = {name for name, _ in asked}
    folder = tmp_path_factory.mktemp("offload")
    results = {}
    for ranks, layouts in LAYOUTS.items():
        cases = [
            Case(f"{name}{end}", flags + more, model=SMALL)
            for name, (flags, fractions) in layouts.items()
            if name in names
            for end, more in [
                ("", ""),
                *((f"-{each}", offload(each)) for each in fractions if (name, each) in asked),
            ]
        ]
        if ranks == 2:
            for name, flags in SAVED.items():
                if name in names:
                    cases += _saving(name, flags, folder)
            for name, flags in FROM_WEIGHTS.items():
                if name in names:
                    cases += _from_weights(name, flags, folder)
        if cases:
            results |= run(ranks, cases, folder / f"ranks{ranks}")
    results["log"] = "".join(path.read_text() for path in folder.glob("*/log"))
    return results


def _saving(name, flags, folder):
    """Save with one choice, go on to the end, and from the checkpoint with the other choice."""
    cases = []
    for end, first, second in (("to", "", offload(0.5)), ("from", offload(0.5), "")):
        place = folder / f"{name}-{end}"
        keep, step = "--save-interval 3 ", "--ckpt-step 3 "
        if name == "legacy":  # where Megatron takes the latest state whatever --ckpt-step says
            keep, step = keep + "--exit-interval 3 ", ""
        cases += [
            Case(f"{name}-{end}-first", f"{flags}{first}--save {place} {keep}", model=SMALL),
            Case(f"{name}-{end}", f"{flags}{second}--load {place} {step}", model=SMALL),
        ]
    if name == "legacy":
        cases.append(Case("legacy-straight", flags, model=SMALL))
    return cases


def _from_weights(name, flags, folder):
    """Save, and start anew from the weights alone, without and with it."""
    first = f"{flags}--save {folder / name} --save-interval 3 --exit-interval 3 "
    then = f"{flags}--load {folder / name} --finetune "
    return [
        Case(f"{name}-first", first, model=SMALL),
        *(Case(f"{name}{end}", then + more, model=SMALL) for end, more in OFFLOADED.items()),
    ]


@pytest.mark.parametrize("name", _mark(FROM_WEIGHTS))
def test_training_starts_from_loaded_weights(seen, name):
    assert losses(seen[name])[0] < losses(seen[f"{name}-first"])[0] - 0.1
    for plain, ours in zip(seen[name], seen[f"{name}-half"], strict=True):
        for key in ("losses", "weights", "state"):
            assert plain[key] == ours[key]


@pytest.mark.parametrize(
    ("ranks", "name", "fraction"), [each for ranks in LAYOUTS for each in _names(ranks)]
)
def test_what_is_offloaded_is_updated_to_the_same_bits(seen, ranks, name, fraction):
    plain, ours = seen[name], seen[f"{name}-{fraction}"]
    for rank, (one, other) in enumerate(zip(plain, ours, strict=True)):
        for key in ("losses", "grad_norms", "skipped", "weights", "state", "steps", "collectives"):
            assert one[key] == other[key], f"{key} of rank {rank}"
    assert all(one["state"] is not None for one in plain)


@pytest.mark.parametrize("way", ["to", "from"])
@pytest.mark.parametrize("name", _mark(SAVED))
def test_checkpoints_resume_with_and_without_it(seen, name, way):
    straight = seen["legacy-straight" if name == "legacy" else f"{name}-{way}-first"]
    second = seen[f"{name}-{way}"]
    assert losses(second) == losses(straight)[3:]
    for one, other in zip(straight, second, strict=True):
        assert one["state"] == other["state"]
        assert one["weights"] == other["weights"]


def test_how_much_is_offloaded_is_said(seen):
    said = re.findall(
        r"--optimizer-cpu-offload: of ([\d,]+) main weights .* ([\d,]+) lie on the CPU", seen["log"]
    )
    shares = {int(b.replace(",", "")) / int(a.replace(",", "")) for a, b in said}
    assert {0.0, 1.0} <= shares
    assert any(0.3 < share < 0.7 for share in shares)
