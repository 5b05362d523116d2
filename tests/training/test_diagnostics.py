"""``--came-log-diagnostics`` and ``--came-spike-guard`` in Megatron's training loop."""

import functools
from pathlib import Path

import pytest
import torch
from torch.distributed import checkpoint

from megatron_came.tools.plot import scalars
from tests.support.oracle import TOLERANCE
from tests.training.harness import Case, losses, run, worst_difference
from tests.training.layouts import DO, EP, MODELS, PP, TP

# The gradient of the bias of attention's keys is nothing but rounding, which CAME makes an update
# of the usual size: its figures are no two layouts' the same.
PLAIN = "--disable-bias-linear --untie-embeddings-and-output-weights "
START = {"gpt2": PLAIN, "moe": MODELS["moe"]}
MEGATRON_FSDP = "--use-megatron-fsdp --ckpt-format fsdp_dtensor --data-parallel-sharding-strategy "
FSDP2 = "--use-torch-fsdp2 --ckpt-format torch_dist "
# PyTorch 2.6 has no fully_shard on a CPU.
ON_FSDP2 = {} if torch.__version__.startswith("2.6.") else {"fsdp2": FSDP2}
LAYOUTS = {
    1: {"dp1": ""},
    2: {"tp2": TP, "dp2-do": DO, "pp2-do": PP + DO, **ON_FSDP2},
}
MOE = {1: {"moe": ""}, 2: {"moe-ep2-do": EP + DO}}
SHORT = "--train-iters 4 --lr-warmup-iters 1 --log-interval 2 "
# Gradients are as large as they come, and the seventh iteration's a thousand times as large: with
# few steps before it, of which each has a smaller update than the one before, it stands out less.
GUARD = "--train-iters 8 --lr-warmup-iters 1 --log-interval 8 --clip-grad 0 --came-spike-guard 1.4 "
ON_FSDP2_GUARDED = {f"guard-{name}": flags for name, flags in ON_FSDP2.items()}
ONLY_SPIKES = {
    1: {"guard": ""},
    2: {"guard-tp2-do": TP + DO, "guard-dp2": "", **ON_FSDP2_GUARDED},
}
SAVED = ("guard-dp2", "guard-fsdp2")
MOE_SPIKES = {1: {"guard-moe": ""}, 2: {"guard-moe-ep2-do": EP + DO}}
# From the seed, since Megatron-FSDP loads checkpoints of its own format alone.
SEEDED = {
    "do": DO,
    "zero3": f"{MEGATRON_FSDP}optim_grads_params ",
    "no-shard": f"{MEGATRON_FSDP}no_shard ",
}


@pytest.fixture(scope="module")
def seen(tmp_path_factory):
    """What ranks saw and what was logged, by name of the case."""
    folder = tmp_path_factory.mktemp("diagnostics")
    start = {}
    once = "--optimizer sgd --lr 1e-12 --min-lr 0 --lr-warmup-iters 0 --train-iters 1 "
    saving = "--save-interval 1 --no-save-optim --no-save-rng "
    begin = []
    for model in ("gpt2", "moe"):
        begin.append(
            Case(f"start-{model}", f"{once}{saving}--save {folder / model} {START[model]}")
        )
        start[model] = (
            f"--load {folder / model} --finetune --no-load-optim --no-load-rng {START[model]}"
            "--optimizer came "
        )
    found, logs = {}, {}
    start["seeded"] = f"{PLAIN}--optimizer came "
    seeded = {2: SEEDED}
    guarded = {2: {f"guard-{name}": flags for name, flags in SEEDED.items()}}
    for ranks in (1, 2):
        cases = begin if ranks == 1 else []
        for names, model, flags, variant in (
            (LAYOUTS, "gpt2", SHORT, "came"),
            (MOE, "moe", SHORT, "came"),
            (ONLY_SPIKES, "gpt2", GUARD, "came+soon-guarded+spike-late"),
            (MOE_SPIKES, "moe", GUARD, "came+soon-guarded+spike-late"),
            (seeded, "seeded", SHORT, "came"),
            (guarded, "seeded", GUARD, "came+soon-guarded+spike-late"),
        ):
            for name, layout in names.get(ranks, {}).items():
                logs[name] = folder / "logs" / name
                log = f"--tensorboard-dir {logs[name]} --came-log-diagnostics "
                if name in SAVED:
                    log += f"--save {folder / name} --save-interval 8 "
                cases.append(Case(name, start[model] + flags + log + layout, variant))
        found |= run(ranks, cases, folder / f"ranks{ranks}")
    return found, logs, folder


@functools.cache
def figures(folder: Path):
    """Values of CAME's figures, by name and iteration."""
    return {
        (name, step): value
        for name, line in scalars(folder).items()
        if name.startswith("came-")
        for step, value in zip(line.x, line.y, strict=True)
    }


@pytest.mark.parametrize(
    ("name", "whole"),
    [
        *((name, "dp1") for name in LAYOUTS[2]),
        *((name, "moe") for name in MOE[2]),
        ("zero3", "do"),
        ("no-shard", "do"),
    ],
)
def test_figures_are_those_of_one_rank(seen, name, whole):
    _, logs, _ = seen
    ours, theirs = figures(logs[name]), figures(logs[whole])
    assert {step for _, step in ours} == {2, 4}
    kinds = {figure.split("/")[1] for figure, _ in ours}
    assert kinds == {"all", "attention", "embedding", "mlp", "norm"} | (
        {"expert"} if whole == "moe" else set()
    )
    assert ours == pytest.approx(theirs, rel=1e-5)


@pytest.mark.parametrize(
    ("name", "whole"),
    [
        ("guard-tp2-do", "guard"),
        ("guard-moe-ep2-do", "guard-moe"),
        ("guard-zero3", "guard-do"),
        ("guard-no-shard", "guard-do"),
        *((name, whole) for name in ON_FSDP2_GUARDED for whole in ("guard", "guard-dp2")),
    ],
)
def test_a_spike_is_skipped_on_all_ranks_and_nothing_changes(seen, name, whole):
    found, logs, _ = seen
    for rank in (*found[name], *found[whole]):
        assert rank["skipped"] == [0] * 6 + [1, 0]
        assert rank["changed_though_skipped"] == [False]
    assert worst_difference(losses(found[name]), losses(found[whole])) <= 2e-6
    assert figures(logs[name])["came-skipped-steps/all", 8] == 1


def saved_tensors(folder: Path):
    """All tensors of a checkpoint, by name."""
    reader = checkpoint.FileSystemReader(folder)
    known = reader.read_metadata().state_dict_metadata
    state = {
        name: torch.empty(entry.size, dtype=entry.properties.dtype)
        for name, entry in known.items()
        if isinstance(entry, checkpoint.metadata.TensorStorageMetadata)
    }
    checkpoint.load(state, storage_reader=reader, no_dist=True)
    return state


@pytest.mark.skipif(not ON_FSDP2, reason="fully_shard of PyTorch 2.6 does not run on a CPU")
def test_state_after_a_skipped_step_is_that_of_data_parallelism(seen):
    *_, folder = seen
    ours, theirs = (
        saved_tensors(folder / name / "iter_0000008") for name in ("guard-fsdp2", "guard-dp2")
    )
    assert ours.keys() == theirs.keys()
    for kind in ("exp_avg", "exp_avg_sq_row", "exp_avg_res_col"):
        assert any(kind in name.split(".") for name in ours), kind
    for name, other in theirs.items():
        if other.is_floating_point():
            assert (ours[name] - other).norm() <= TOLERANCE[torch.float32] * other.norm(), name
