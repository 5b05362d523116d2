"""The matrix of layouts: models, parallelism, precision, communication; see ``make test-all``."""

import pytest

from tests.training.harness import Case, losses, run, worst_difference

pytestmark = pytest.mark.matrix

TOLERANCE = 2e-6  # see test_training

CAME = "--optimizer came "
DO = "--use-distributed-optimizer "
OVERLAP = DO + "--overlap-grad-reduce --overlap-param-gather --ddp-bucket-size 5003 "
TWO_INSTANCES = DO + "--num-distributed-optimizer-instances 2 "


def tp(size):
    return f"--tensor-model-parallel-size {size} "


def pp(size, virtual=None):
    chunks = f"--num-layers-per-virtual-pipeline-stage {virtual} " if virtual else ""
    return f"--pipeline-model-parallel-size {size} " + chunks


SP = "--sequence-parallel "
CP = "--context-parallel-size 2 "
EP = "--expert-model-parallel-size 2 "
ETP1, ETP2 = "--expert-tensor-parallel-size 1 ", "--expert-tensor-parallel-size 2 "

MODELS = {
    "gpt2": "",
    "llama": "--swiglu --group-query-attention --num-query-groups 2 --normalization RMSNorm "
    "--disable-bias-linear --untie-embeddings-and-output-weights --position-embedding-type rope ",
    "moe": "--num-experts 4 --moe-router-topk 2 --moe-ffn-hidden-size 32 "
    "--moe-shared-expert-intermediate-size 32 --moe-token-dispatcher-type alltoall "
    "--moe-router-load-balancing-type none --disable-bias-linear --swiglu ",
}
LAYOUTS = {
    "gpt2": {
        2: {
            "pp2-vpp2": pp(2, 1),
            "pp2-vpp2-do-overlap": pp(2, 1) + OVERLAP,
            "tp2-sp-do": tp(2) + SP + DO,
            "cp2": CP,
            "cp2-do": CP + DO,
        },
        4: {
            "tp4": tp(4),
            "pp4": pp(4),
            "dp4": "",
            "dp4-do": DO,
            "dp4-do-overlap": OVERLAP,
            "dp4-two-instances": TWO_INSTANCES,
            "tp2-dp2-do-overlap": tp(2) + OVERLAP,
            "pp2-vpp2-tp2-do": pp(2, 1) + tp(2) + DO,
            "tp2-sp-cp2-do": tp(2) + SP + CP + DO,
            "cp2-dp2-do": CP + DO,
            "tp4-sp": tp(4) + SP,
        },
    },
    "llama": {
        2: {"tp2-do": tp(2) + DO, "pp2-do": pp(2) + DO, "dp2-do": DO, "tp2-sp": tp(2) + SP},
        4: {"tp4": tp(4), "tp2-pp2": tp(2) + pp(2), "tp2-dp2-do": tp(2) + DO},
    },
    "moe": {
        2: {
            "ep2": EP,
            "ep2-do": EP + DO,
            "dp2-do": DO,
            "tp2-sp-etp2-do": tp(2) + SP + ETP2 + DO,
            "tp2-sp-ep2-do": tp(2) + SP + EP + ETP1 + DO,
        },
        4: {
            "ep2-dp4-do": EP + DO,
            "ep2-pp2": EP + pp(2),
            "ep2-dp4-do-overlap": EP + OVERLAP,
            "tp2-sp-ep2-etp2": tp(2) + SP + EP + ETP2,
            "tp2-sp-dp2-etp2-do": tp(2) + SP + ETP2 + DO,
            "tp2-sp-dp2-ep2-etp1-do": tp(2) + SP + EP + ETP1 + DO,
        },
    },
}
NAMES = [
    f"{model}-{name}"
    for model, sizes in LAYOUTS.items()
    for layouts in sizes.values()
    for name in layouts
]

UNTIED = "--untie-embeddings-and-output-weights "
# (variant, ranks, flags of the model, flags of the layout)
FROZEN = {
    "stage-without-parameters": ("frozen-stage", 2, UNTIED, pp(2)),
    "stage-without-parameters-do": ("frozen-stage", 2, UNTIED, pp(2) + DO),
    "rank-without-elements-do": ("frozen-but-one", 4, "", DO),
}

# Megatron rounds the norm of the gradients of several optimizers otherwise than of one, so that
# clipping would scale them otherwise.
VPP = pp(2, 1) + OVERLAP + "--ckpt-format torch --clip-grad 0 "
STEP = "--overlap-param-gather-with-optimizer-step "
FIFTY = "--train-iters 50 "
EXACT = {  # compared bit for bit, by number of ranks
    2: {
        "tied-pp2": FIFTY + pp(2) + DO,
        "twice-a": DO,
        "twice-b": DO,
        "step-a": VPP,
        "step-b": VPP + STEP,
    },
    4: {
        "tied-pp2-tp2": FIFTY + pp(2) + tp(2) + DO,
        "tied-pp2-dp2": FIFTY + pp(2) + DO,
        "tied-pp2-vpp2-dp2": FIFTY + pp(2, 1) + OVERLAP,
    },
}
TIED = [name for here in EXACT.values() for name in here if name.startswith("tied")]
SIXTEEN_BIT = {
    "bf16": "--bf16 ",
    "bf16-do": "--bf16 " + DO,
    "bf16-do-bf16-reduce": "--bf16 --grad-reduce-in-bf16 " + DO,
    "fp16-do": "--fp16 --initial-loss-scale 4294967296 --loss-scale-window 4 " + DO,
    "fp16": "--fp16 --initial-loss-scale 4294967296 --loss-scale-window 4 ",
}


def _oracle_of(flags):
    """Name of the case in which the authors' class trains with the flags."""
    return "oracle" + "".join(flags.replace(DO, "").split())


@pytest.fixture(scope="session")
def seen(tmp_path_factory):
    folder = tmp_path_factory.mktemp("matrix")
    once = "--train-iters 1 --lr 1e-12 --min-lr 0 --lr-warmup-iters 0 --optimizer sgd "
    saving = "--save-interval 1 --no-save-optim --no-save-rng "
    start = {
        model: f"--load {folder / model} --finetune --no-load-optim --no-load-rng {flags}"
        for model, flags in MODELS.items()
    }
    cases = {1: [], 2: [], 4: []}
    for model, flags in MODELS.items():
        cases[1] += [
            Case(f"weights-{model}", f"{once}{saving}--save {folder / model} {flags}"),
            Case(f"oracle-{model}", start[model] + CAME, "oracle"),
            Case(f"{model}-dp1-do", start[model] + CAME + DO),
        ]
        for ranks, layouts in LAYOUTS[model].items():
            cases[ranks] += [
                Case(f"{model}-{name}", start[model] + CAME + layout)
                for name, layout in layouts.items()
            ]
    for name, (variant, ranks, model, layout) in FROZEN.items():
        here = folder / f"start-{name}"
        begin = f"--load {here} --finetune --no-load-optim --no-load-rng {model}"
        cases[1] += [
            Case(f"start-{name}", f"{once}{saving}--save {here} {model}"),
            Case(f"oracle-{name}", begin + CAME, f"oracle+{variant}"),
        ]
        cases[ranks].append(Case(name, begin + CAME + layout, f"came+{variant}"))
    for ranks, exact in EXACT.items():
        cases[ranks] += [Case(name, CAME + flags) for name, flags in exact.items()]
    # The authors' class on whole tensors, with plain data parallelism: overflows come alike.
    theirs = {flags.replace(DO, "") for flags in SIXTEEN_BIT.values()}
    cases[2] += [Case(_oracle_of(flags), CAME + flags, "oracle") for flags in sorted(theirs)]
    cases[2] += [Case(name, CAME + flags) for name, flags in SIXTEEN_BIT.items()]
    results = {}
    for ranks, here in cases.items():
        results.update(run(ranks, here, tmp_path_factory.mktemp(f"matrix{ranks}")))
    return results


@pytest.mark.parametrize("name", [*(f"{model}-dp1-do" for model in MODELS), *NAMES])
def test_losses_equal_the_authors_optimizer(seen, name):
    theirs = losses(seen["oracle-" + name.split("-")[0]])
    assert theirs[-1] < theirs[0] - 0.5
    assert worst_difference(losses(seen[name]), theirs) <= TOLERANCE


@pytest.mark.parametrize("name", FROZEN)
def test_ranks_that_own_nothing(seen, name):
    ours, theirs = losses(seen[name]), losses(seen[f"oracle-{name}"])
    assert theirs[-1] != theirs[0]
    assert worst_difference(ours, theirs) <= TOLERANCE


@pytest.mark.parametrize("name", TIED)
def test_tied_embeddings_stay_bit_identical(seen, name):
    first, last = (
        {rank["weights"][key] for rank in seen[name] if key in rank["weights"]}
        for key in ("embedding.word_embeddings.weight", "output_layer.weight")
    )
    assert len(first) == (2 if "tp2" in name else 1)
    assert first == last


def test_two_runs_are_bit_identical(seen):
    for first, second in zip(seen["twice-a"], seen["twice-b"], strict=True):
        assert first == second


def test_overlapping_the_gather_with_the_step_changes_nothing(seen):
    """Megatron gives each model chunk an optimizer of its own."""
    for without, overlapped in zip(seen["step-a"], seen["step-b"], strict=True):
        assert without["losses"] == overlapped["losses"]
        assert without["weights"] == overlapped["weights"]


@pytest.mark.parametrize("name", SIXTEEN_BIT)
def test_sixteen_bit_training_follows_the_authors_optimizer(seen, name):
    """Gradients are rounded in another order, so the comparison is coarse."""
    oracle = seen[_oracle_of(SIXTEEN_BIT[name])]
    assert seen[name][0]["skipped"] == oracle[0]["skipped"]
    assert worst_difference(losses(seen[name]), losses(oracle)) <= 2e-3


@pytest.mark.parametrize("name", ["fp16", "fp16-do"])
def test_an_overflow_leaves_every_state_bit_identical(seen, name):
    for rank in seen[name]:
        assert sum(rank["skipped"]) > 5
        assert not any(rank["changed_though_skipped"])
