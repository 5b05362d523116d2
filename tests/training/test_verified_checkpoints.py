"""Damaged checkpoints are refused in a sentence that names tensor and file; whole ones are not."""

import re
import shutil
from functools import partial
from pathlib import Path

import pytest
import torch

from tests.training import damaged_files as damage
from tests.training.harness import Case, losses, run
from tests.training.layouts import PP, TP

SMALL = (
    "--num-layers 2 --hidden-size 16 --num-attention-heads 2 --seq-length 8 "
    "--max-position-embeddings 8 --vocab-size 31 --make-vocab-size-divisible-by 8 "
    "--train-iters 5 --lr-warmup-iters 1 --optimizer came "
)
DO = "--use-distributed-optimizer "
BUCKETS = "--overlap-grad-reduce --ddp-bucket-size 501 "
FORMATS = {
    "full": DO + "--dist-ckpt-optim-fully-reshardable ",
    "dp": DO + BUCKETS,
    "whole": "--bf16 ",
    "remainder": DO + "--bf16 --came-main-params remainder --came-momentum-dtype int8 ",
    "async": DO + "--async-save --async-strategy mcore --use-persistent-ckpt-worker ",
    "legacy": DO + "--ckpt-format torch ",
    "legacywhole": "--ckpt-format torch --came-momentum-dtype int8 ",
    # Ranks hold copies, of which each saves its own.
    "pp": DO + BUCKETS + PP,
    "tp": DO + BUCKETS + TP,
    "legacytp": TP + "--ckpt-format torch ",
}
FC1 = "decoder.layers.mlp.linear_fc1.weight"
FACTOR = f"optimizer.state.exp_avg_res_row.{FC1}"
LAST = "iter_0000004"


def _key(name):
    return lambda found: found == name


def _ends(*ends):
    return lambda found: found.startswith(("optimizer.", "chained_")) and found.endswith(ends)


MAIN = _ends(f"param.{FC1}", "bucket_idx_1.param", "bucket_idx_0.param")
MOMENTUM = _ends(f"exp_avg.{FC1}", "bucket_idx_1.exp_avg", "bucket_idx_0.exp_avg")

# What is done to a tensor of a distributed checkpoint, and what the sentence says of it.
IN_TENSORS = {
    "weights-bit": (_key(FC1), damage.flip, rf"weights of {re.escape(FC1)}\[0\]"),
    "weights-sign": (_key(FC1), partial(damage.flip, bit=-1), "weights of "),
    "main-bit": (MAIN, damage.flip, "main weights of "),
    "main-swapped": (MAIN, damage.swap_halves, "main weights of "),
    "momentum-bit": (MOMENTUM, damage.flip, "momentum of "),
    "momentum-shifted": (MOMENTUM, lambda values: values.roll(1), "momentum of "),
    "momentum-nan": (MOMENTUM, damage.with_nan, "momentum of "),
    "factor-bit": (_key(FACTOR), damage.flip, r"exp_avg_res_row of .*fc1.weight\[0\]"),
    "factor-negated": (_key(FACTOR), torch.neg, "exp_avg_res_row of "),
    "factor-zero": (_key(FACTOR), torch.zeros_like, "exp_avg_res_row of "),
    "factor-half": (_key(FACTOR), torch.Tensor.half, f"{FACTOR} is in float16"),
    "factor-integer": (_key(FACTOR), torch.Tensor.long, f"{FACTOR} is in int64"),
}
IN_COMMON = {
    "iteration-gone": (lambda state: state.pop("iteration"), "its iteration is missing"),
    "iteration-other": (lambda state: state.update(iteration=3), "the digests of 4"),
    "iteration-negative": (lambda state: state.update(iteration=-3), "iteration is -3"),
    "iteration-word": (lambda state: state.update(iteration="4"), "iteration is '4'"),
    "record-bit": (
        lambda state: state.update(came_digests=state["came_digests"].replace("4", "5", 1)),
        "record of digests is damaged",
    ),
}


def _legacy_model(state):
    return next(v for k, v in state["model"].items() if k.endswith("linear_fc1.weight"))


def _legacy_norm(state):
    return state["model"]["decoder.final_layernorm.weight"]


def _legacy_buffers(state):
    return state[0][next(iter(state[0]))]


def _legacy_factors(state):
    return next(f for f in state["came"]["parameters"] if "exp_avg_res_row" in f)


def _in_place(get, change):
    def apply(state):
        tensor = get(state)
        tensor.copy_(change(tensor.detach()))

    return apply


OPTIMIZER, MODEL = "distrib_optim.pt", "model_optim_rng.pt"
IN_LEGACY = {
    "weights-bit": (MODEL, _in_place(_legacy_model, damage.flip), "weights of .*fc1.weight"),
    "main-bit": (
        OPTIMIZER,
        _in_place(lambda s: _legacy_buffers(s)["param"], damage.flip),
        "main weights of ",
    ),
    "momentum-nan": (
        OPTIMIZER,
        _in_place(lambda s: _legacy_buffers(s)["exp_avg"], partial(damage.flip, bit=30)),
        "momentum of ",
    ),
    "factor-negated": (
        OPTIMIZER,
        _in_place(lambda s: _legacy_factors(s)["exp_avg_res_row"], torch.neg),
        "exp_avg_res_row of ",
    ),
    "factor-integer": (
        OPTIMIZER,
        lambda s: _legacy_factors(s).update(
            exp_avg_res_row=_legacy_factors(s)["exp_avg_res_row"].long()
        ),
        "distrib_optim.pt has exp_avg_res_row in torch.int64",
    ),
    "iteration-gone": (MODEL, lambda state: state.pop("iteration"), "its iteration is missing"),
}
IN_LEGACY_WHOLE = {
    "momentum-bit": (
        MODEL,
        _in_place(lambda s: s["optimizer"]["state"][2]["exp_avg"], damage.flip),
        "momentum of ",
    ),
    "factor-half": (
        MODEL,
        lambda s: s["optimizer"]["state"][2].update(
            exp_avg_res_row=s["optimizer"]["state"][2]["exp_avg_res_row"].half()
        ),
        "exp_avg_res_row of .* in float16",
    ),
}

UNLAYERED = "optimizer.state.exp_avg_res_col.embedding.position_embeddings.weight"
DISTRIBUTED = ("full", "dp", "whole", "remainder", "async")


def _in_tensors(which, change, said):
    def apply(iteration, saved):
        return damage.distributed(iteration, which, change)

    return apply, said


def _in_common(change, said):
    return lambda iteration, saved: damage.common(iteration, change), said


def _in_file(file, change, said):
    def apply(iteration, saved):
        return damage.legacy(iteration / "mp_rank_00" / file, change)

    return apply, said


def _of_another_iteration(file):
    def apply(iteration, saved):
        shutil.copy(saved / "iter_0000002" / file, iteration / file)
        return file

    return apply, "is not what was saved|cannot be read"


def _of_disk(damage_folder, said):
    return lambda iteration, saved: damage_folder(iteration), said


def _no_metadata(iteration):
    return (iteration / ".metadata").write_bytes(b"\x80\x04].")


def _in_old(which, change, said):
    """Without digests, as an earlier version would have saved it."""

    def apply(iteration, saved):
        damage.common(iteration, damage.forget_digests)
        damage.distributed(iteration, which, change)

    return apply, said


# By name of the case: what is done to the last iteration of a copy, and what is to be said.
DAMAGES = {}
for _kind in DISTRIBUTED:
    for _name, _how in IN_TENSORS.items():
        DAMAGES[f"{_kind}-{_name}"] = _in_tensors(*_how)
    for _name, _how in IN_COMMON.items():
        DAMAGES[f"{_kind}-{_name}"] = _in_common(*_how)
    DAMAGES[f"{_kind}-other-iteration"] = _of_another_iteration("__1_0.distcp")
    DAMAGES[f"{_kind}-common-bit"] = _of_disk(damage.in_common, "beside tensors .* its checksum")
    DAMAGES[f"{_kind}-swapped-files"] = _of_disk(
        damage.swapped, r"__._0.distcp (holds something|has \d+ bytes|cannot be read)"
    )
    DAMAGES[f"{_kind}-no-metadata"] = _of_disk(_no_metadata, ".metadata cannot be read")
    DAMAGES[f"{_kind}-shorter"] = _in_tensors(
        _key(UNLAYERED),
        lambda values: values[:-2].clone(),
        rf"{UNLAYERED} has shape \(14,\), and \(16,\) was saved",
    )
    for _name, _how in {
        "nan": (MOMENTUM, damage.with_nan, "momentum of .* a number that is not finite"),
        "negative": (_key(FACTOR), torch.neg, "exp_avg_res_row of .* a negative number"),
        "shifted": (MAIN, partial(torch.roll, shifts=2), "Megatron-LM#5077.*megatron-came repair"),
    }.items():
        DAMAGES[f"{_kind}-old-{_name}"] = _in_old(*_how)
# Of two chunks the first, which one rank alone reads.
DAMAGES["dp-one-rank"] = _in_tensors(
    MOMENTUM, lambda values: values.unsqueeze(0), "holds something else than"
)
for _name, _how in IN_LEGACY.items():
    DAMAGES[f"legacy-{_name}"] = _in_file(*_how)
DAMAGES["legacy-common-bit"] = _of_disk(
    lambda iteration: damage.in_pickle(iteration / "mp_rank_00" / MODEL),
    "model_optim_rng.pt holds beside tensors does not fit its checksum",
)
DAMAGES["legacy-optimizer-bit"] = _of_disk(
    lambda iteration: damage.in_pickle(iteration / "mp_rank_00" / OPTIMIZER, b"exp_avg_res_row"),
    "distrib_optim.pt holds beside tensors does not fit its checksum",
)
DAMAGES["legacy-other-iteration"] = _of_another_iteration(f"mp_rank_00/{OPTIMIZER}")
for _name, _how in IN_LEGACY_WHOLE.items():
    DAMAGES[f"legacywhole-{_name}"] = _in_file(*_how)
DAMAGES["pp-copy"] = _in_tensors(
    lambda found: "dp_group_idx_1." in found and found.endswith("bucket_idx_0.exp_avg"),
    damage.flip,
    "momentum of embedding.word_embeddings.weight in ",
)
DAMAGES["tp-copy"] = _in_tensors(
    lambda found: "dp_group_idx_1." in found and found.endswith("bucket_idx_0.param"),
    damage.flip,
    "main weights of decoder.final_layernorm",
)
DAMAGES["legacytp-copy"] = (
    lambda iteration, saved: damage.legacy(
        iteration / "mp_rank_01" / MODEL, _in_place(_legacy_norm, damage.flip)
    ),
    "weights of decoder.final_layernorm.weight in .*mp_rank_01/",
)

# Where a format or a damage takes a path of its own.
QUICK_DAMAGES = [
    "full-main-swapped",
    "full-factor-negated",
    "full-iteration-gone",
    "full-other-iteration",
    "full-shorter",
    "full-common-bit",
    "full-swapped-files",
    "full-no-metadata",
    "full-old-negative",
    "dp-weights-bit",
    "dp-record-bit",
    "dp-old-shifted",
    "dp-one-rank",
    "whole-momentum-nan",
    "remainder-weights-bit",
    "remainder-old-shifted",
    "async-momentum-bit",
    "legacy-weights-bit",
    "legacy-factor-integer",
    "legacy-common-bit",
    "legacywhole-factor-half",
    "pp-copy",
    "tp-copy",
    "legacytp-copy",
]


def _forget(iteration):
    ranks = list(iteration.glob("mp_rank_*"))
    for rank in ranks:
        damage.legacy(rank / MODEL, damage.forget_digests)
    if not ranks:
        damage.common(iteration, damage.forget_digests)


# What must not be refused: format, further flags, and what is done to the copy.
KEPT = {
    **{f"{kind}-again": (kind, "", None) for kind in FORMATS},
    **{f"{kind}-old": (kind, "", _forget) for kind in FORMATS},
    "unverified": ("full", "--came-no-verify ", partial(damage.distributed, which=MOMENTUM)),
    "weights-alone": ("full", "--no-load-optim ", partial(damage.distributed, which=MOMENTUM)),
    "finetuned": ("full", "--finetune ", partial(damage.distributed, which=MOMENTUM)),
    "tp2": ("full", "--tensor-model-parallel-size 2 ", None),
    "pp2": ("full", "--pipeline-model-parallel-size 2 ", None),
    # Saved by two data-parallel ranks, which hold copies.
    "whole-tp2": ("whole", "--tensor-model-parallel-size 2 ", None),
}
QUICK_KEPT = {
    "remainder-old",
    "whole-old",
    "legacy-old",
    "unverified",
    "weights-alone",
    "tp2",
    "whole-tp2",
}


def _mark(names, quick):
    return [
        name if name in quick else pytest.param(name, marks=pytest.mark.matrix) for name in names
    ]


@pytest.fixture(scope="session")
def seen(request, tmp_path_factory):
    """What the ranks saw, and the files that were damaged; of those cases that are asked for."""
    items = [item for item in request.session.items if item.path == Path(__file__)]
    asked = {item.callspec.params["name"] for item in items}
    folder = tmp_path_factory.mktemp("verified")
    kinds = {KEPT[name][0] if name in KEPT else name.split("-")[0] for name in asked}
    saving = [
        Case(
            kind,
            f"{SMALL}{FORMATS[kind]}--save {folder / kind} --save-interval 2 --exit-interval 4 ",
        )
        for kind in FORMATS
        if kind in kinds
    ]
    run(2, saving, folder / "saving")
    cases, files = [], {}
    for name in sorted(asked):
        kind, flags, change = KEPT.get(name, (name.split("-")[0], "", None))
        iteration = damage.copy(folder / kind, folder / name)
        if name in DAMAGES:
            files[name] = DAMAGES[name][0](iteration, folder / kind)
        elif change is not None:
            change(iteration)
        load = f"{SMALL}{FORMATS[kind]}--load {folder / name} {flags}"
        cases.append(Case(name, load, fails=name in DAMAGES))
    return {"files": files, **run(2, cases, folder / "loading")}


@pytest.mark.parametrize("name", _mark(DAMAGES, QUICK_DAMAGES))
def test_damage_is_refused_before_training_in_a_sentence_that_names_tensor_and_file(seen, name):
    (error,) = {rank["error"] for rank in seen[name]}
    assert error.startswith("SystemExit: megatron_came: ")
    assert re.search(DAMAGES[name][1], error)
    if "is not what was saved" in error:
        assert seen["files"][name] in error
    assert "\n" not in error
    assert not any(rank["losses"] for rank in seen[name])


@pytest.mark.parametrize("name", _mark(KEPT, QUICK_KEPT))
def test_what_is_whole_is_not_refused(seen, name):
    assert not any(rank["error"] for rank in seen[name])
    assert losses(seen[name])
