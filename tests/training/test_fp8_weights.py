"""Weights in fp8 (``--fp8-param-gather``), with a stand-in for Transformer Engine's tensors.

Megatron's own distributed optimizer, buffers and quantising copy, over several buckets: main
weights, momentum and factors are bit for bit those of a model in bf16 with the same gradients, the
model's weights are the main weights as Megatron quantises them, and CAME writes none of them.
"""

from dataclasses import asdict, dataclass

import pytest

from megatron_came.tools import inspect, repair
from tests.training import damaged_files as damage
from tests.training.harness import SMALL, Case, losses, run, worst_difference

IN_FP8 = (([24, 20], "fp8"), ([18, 33], "fp8"), ([32, 14], "swiglu"), ([40, 40], "fp8"))
MIXED = (
    ([24, 20], "fp8"),
    ([20], "plain"),
    ([32, 14], "swiglu"),
    ([30, 28], "plain"),
    ([7, 64], "fp8"),
)
EXPERTS = (*IN_FP8, ([26, 20], "expert"), ([44, 16], "expert"))
DISTRIBUTED = ("full", "full-efficient", "dp")


@dataclass
class Stepped:
    """Parameters and settings of a model that is stepped; see ``fp8_worker``."""

    name: str
    recipe: str
    parameters: tuple = IN_FP8
    momentum: str = "fp32"
    overlaps: bool = False
    fp32_gradients: bool = True
    bucket_size: int = 700
    spike_guard: float | None = None
    formats: tuple[str, ...] = ()
    # Whether data-parallel ranks cut both models alike, so that sums are added up alike.
    same_cut: bool = True
    folder: str = ""

    def as_json(self, ranks: int) -> dict:
        return {**asdict(self), "exact": self.same_cut or ranks == 1}


CASES = [
    Stepped("delayed", "delayed", formats=(*DISTRIBUTED, "legacy")),
    Stepped("tensorwise", "tensorwise", momentum="int8", formats=(*DISTRIBUTED, "legacy")),
    Stepped("blockwise", "blockwise", momentum="bf16", formats=DISTRIBUTED),
    Stepped("mxfp8", "mxfp8", formats=DISTRIBUTED),
    Stepped("mxfp8-bf16-gradients", "mxfp8", fp32_gradients=False, momentum="bf16"),
    Stepped("overlap", "tensorwise", overlaps=True),
    Stepped("overlap-mxfp8", "mxfp8", overlaps=True, formats=("full",)),
    Stepped("guarded-mxfp8", "mxfp8", spike_guard=50.0),
    Stepped("experts", "blockwise", EXPERTS, formats=("full",)),
    Stepped("experts-mxfp8", "mxfp8", EXPERTS, momentum="int8"),
    Stepped("experts-overlap-mxfp8", "mxfp8", EXPERTS, overlaps=True),
    Stepped("mixed", "tensorwise", MIXED, same_cut=False, formats=(*DISTRIBUTED, "legacy")),
    Stepped("mixed-blockwise", "blockwise", MIXED, same_cut=False, momentum="int8"),
    Stepped("mixed-mxfp8", "mxfp8", MIXED, same_cut=False, overlaps=True),
]


@pytest.fixture(scope="module")
def seen(request, tmp_path_factory):
    """What the ranks saw, by their number and the name of the case; of those that are asked for."""
    folder, found = tmp_path_factory.mktemp("fp8"), {}
    items = [item for item in request.session.items if item.path == request.path]
    asked = [item.callspec.params for item in items if hasattr(item, "callspec")]
    for ranks in (1, 2):
        cases = [case for case in CASES if {"ranks": ranks, "name": case.name} in asked]
        for case in cases:
            case.folder = str(folder / f"checkpoints{ranks}")
        if cases:
            seen = run(ranks, cases, folder / f"dp{ranks}", worker="tests.training.fp8_worker")
            found |= {(ranks, name): each for name, each in seen.items()}
    return found


@pytest.mark.parametrize(
    ("ranks", "name"),
    [
        # One rank alone compares all of a mixture bit for bit.
        pytest.param(
            ranks, case.name, marks=pytest.mark.matrix if ranks == 1 and case.same_cut else ()
        )
        for ranks in (1, 2)
        for case in CASES
    ],
)
def test_main_weights_are_those_of_bf16_and_weights_are_quantised(seen, ranks, name):
    assert [rank["problems"] for rank in seen[ranks, name]] == [[]] * ranks
    assert max(seen[ranks, name][0]["buckets"]) > 1


TRAINED = (
    f"{SMALL}--micro-batch-size 2 --bf16 --use-distributed-optimizer --overlap-grad-reduce "
    "--ddp-bucket-size 5003 --swiglu "
)
FULL = "--dist-ckpt-optim-fully-reshardable "
TP2 = "--tensor-model-parallel-size 2 "
FC1 = "decoder.layers.mlp.linear_fc1.weight"
# Recipe and flags.
RUNS = {
    "delayed": ("delayed", FULL),
    "tensor-parallel": ("delayed", FULL + TP2),
    "blockwise": ("blockwise", "--overlap-param-gather --came-momentum-dtype int8 "),
    "tensorwise": ("tensorwise", FULL + "--came-momentum-dtype bf16 "),
    "mxfp8": ("mxfp8", FULL + "--overlap-param-gather --reuse-grad-buf-for-mxfp8-param-ag "),
}
ELSEWHERE = [name for name, (_, flags) in RUNS.items() if FULL in flags]
# Of the loss, where weights are rounded otherwise: in fp8 or bf16, or once more when they are read.
ROUNDED = 1e-3


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Runs in Megatron's training loop: saved after three iterations of six, and resumed."""
    folder = tmp_path_factory.mktemp("trained")
    cases = [Case("bf16", TRAINED)]
    for name, (recipe, flags) in RUNS.items():
        both = f"{TRAINED}{flags}--fp8-recipe {recipe} "
        saves = f"--save {folder / name} --save-interval 3 "
        loads = f"--load {folder / name} --ckpt-step 3 "
        cases.append(Case(name, both + saves, variant="fp8"))
        cases.append(Case(f"{name}-resumed", both + loads, variant="fp8"))
        if name in ELSEWHERE:
            cases.append(Case(f"{name}-in-bf16", f"{TRAINED}{FULL}{loads}"))
    seen = run(2, cases, folder / "runs")
    damage.distributed(damage.copy(folder / "delayed", folder / "damaged"), FC1.__eq__)
    loads = f"{TRAINED}{FULL}--fp8-recipe delayed --load {folder / 'damaged'} "
    seen |= run(2, [Case("damaged", loads, variant="fp8", fails=True)], folder / "refused")
    return seen, folder


@pytest.mark.parametrize("name", RUNS)
def test_training_resumes(trained, name):
    seen, _ = trained
    straight, resumed = seen[name], seen[f"{name}-resumed"]
    if name != "tensor-parallel":  # which begins with other weights
        assert worst_difference(losses(straight), losses(seen["bf16"])) < ROUNDED
    if name == "tensorwise":  # its scales follow the largest weight, which a file has in bf16
        assert worst_difference(losses(resumed), losses(straight)[3:]) < ROUNDED
    else:
        assert losses(resumed) == losses(straight)[3:]
        for key in ("state", "weights"):
            assert [rank[key] for rank in resumed] == [rank[key] for rank in straight]


@pytest.mark.parametrize("name", RUNS)
def test_its_checkpoint_is_verified_and_not_repaired(trained, name, capsys):
    _, folder = trained
    assert inspect.main([str(folder / name), "--verify"]) == 0
    said = capsys.readouterr().out
    assert "tensors that it has digests of are what was saved." in said
    assert "not compared with the model's, which are in fp8." in said
    assert repair.main([str(folder / name), str(folder / f"{name}-anew")]) == 1
    assert "has weights in fp8, of which main weights cannot" in capsys.readouterr().err


@pytest.mark.parametrize("name", ELSEWHERE)
def test_its_checkpoint_goes_into_a_run_in_bf16(trained, name):
    seen, _ = trained
    resumed, straight = (losses(seen[each]) for each in (f"{name}-in-bf16", name))
    assert worst_difference(resumed, straight[3:]) < ROUNDED


def test_weights_in_fp8_are_verified_as_they_are_read(trained):
    seen, folder = trained
    assert "not verified" not in (folder / "runs" / "log").read_text()
    for rank in seen["damaged"]:
        assert f"damaged: weights of {FC1}[0] in __" in rank["error"]
