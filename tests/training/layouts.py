"""The layouts that are trained with: flags, and one run of them all for every module's tests."""

from pathlib import Path

from tests.training.harness import Case, run, run_chains

CAME = "--optimizer came "
DO = "--use-distributed-optimizer "
OVERLAP = DO + "--overlap-grad-reduce --overlap-param-gather --ddp-bucket-size 5003 "
TP, PP = "--tensor-model-parallel-size 2 ", "--pipeline-model-parallel-size 2 "
DEEP = "--num-layers 4 "  # for virtual stages, and a layer for each of four stages
# Of GPT-2, by number of ranks and name.
PLAIN = {
    1: {"dp1": "", "dp1-do": DO},
    2: {"dp2": "", "dp2-do": DO, "tp2": TP, "tp2-do": TP + DO, "pp2": PP, "pp2-do": PP + DO},
    4: {"tp2-pp2": TP + PP, "tp2-dp2-do": TP + DO, "pp2-dp2-do-overlap": PP + OVERLAP},
}
TWO_INSTANCES = DO + "--num-distributed-optimizer-instances 2 "


def tp(size):
    return f"--tensor-model-parallel-size {size} "


def pp(size, virtual=None):
    chunks = f"{DEEP}--num-layers-per-virtual-pipeline-stage {virtual} " if virtual else ""
    return f"--pipeline-model-parallel-size {size} " + chunks


SP = "--sequence-parallel "
CP = "--context-parallel-size 2 "
EP = "--expert-model-parallel-size 2 "
ETP1, ETP2 = "--expert-tensor-parallel-size 1 ", "--expert-tensor-parallel-size 2 "

# All of a rank's batch at once, where two micro-batches would only double many small collectives.
WHOLE = {dp: f"--micro-batch-size {8 // dp} " for dp in (1, 2)}

MODELS = {
    "gpt2": DEEP,
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
            "tp2-sp-do": tp(2) + SP + DO + WHOLE[1],
            "cp2": CP,
            "cp2-do": CP + DO,
            "dp2-do-plain": DO + "--came-kernels plain ",  # the others have Numba's
            "dp2-do-triton": DO + "--came-kernels triton ",
        },
        4: {
            "tp4": tp(4) + WHOLE[1],
            "pp4": pp(4),
            "dp4": "",
            "dp4-do": DO,
            "dp4-do-overlap": OVERLAP,
            "dp4-two-instances": TWO_INSTANCES,
            "dp4-two-instances-overlap": TWO_INSTANCES + "--overlap-grad-reduce ",
            "tp2-dp2-do-overlap": tp(2) + OVERLAP,
            "pp2-vpp2-tp2-do": pp(2, 1) + tp(2) + DO,
            "tp2-sp-cp2-do": tp(2) + SP + CP + DO + WHOLE[1],
            "cp2-dp2-do": CP + DO,
            "cp2-pp2-vpp2": CP + pp(2, 1),
            "tp4-sp": tp(4) + SP + WHOLE[1],
        },
    },
    "llama": {
        2: {
            "tp2-do": tp(2) + DO,
            "pp2-do": pp(2) + DO,
            "dp2-do": DO,
            "tp2-sp": tp(2) + SP + WHOLE[1],
        },
        4: {"tp4": tp(4) + WHOLE[1], "tp2-pp2": tp(2) + pp(2), "tp2-dp2-do": tp(2) + DO},
    },
    "moe": {
        2: {
            "ep2": EP,
            "ep2-do": EP + DO,
            "dp2-do": DO,
            "tp2-sp-etp2-do": tp(2) + SP + ETP2 + DO + WHOLE[1],
            "tp2-sp-ep2-do": tp(2) + SP + EP + ETP1 + DO + WHOLE[1],
        },
        4: {
            "ep2-dp4-do": EP + DO,
            "ep2-pp2": EP + pp(2),
            "ep2-dp4-do-overlap": EP + OVERLAP,
            "tp2-sp-ep2-etp2": tp(2) + SP + EP + ETP2 + WHOLE[2],
            "tp2-sp-dp2-etp2-do": tp(2) + SP + ETP2 + DO + WHOLE[2],
            "tp2-sp-dp2-ep2-etp1-do": tp(2) + SP + EP + ETP1 + DO + WHOLE[2],
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
    "stage-without-parameters": ("frozen-stage", 2, UNTIED + DEEP, pp(2)),
    "stage-without-parameters-do": ("frozen-stage", 2, UNTIED + DEEP, pp(2) + DO),
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


def oracle_of(flags):
    """Name of the case in which the authors' class trains with the flags."""
    return "oracle" + "".join(flags.replace(DO, "").split())


def train(folder: Path) -> dict[str, list[dict]]:
    """Train every layout, and the authors' optimizer beside it.

    Args:
        folder: for logs and checkpoints; of each layout ``memory/NAME`` gets the measured memory.

    Returns:
        By name of the case, what each rank saw.
    """
    once = "--train-iters 1 --lr 1e-12 --min-lr 0 --lr-warmup-iters 0 --optimizer sgd "
    saving = "--save-interval 1 --no-save-optim --no-save-rng "
    start = {
        model: f"--load {folder / model} --finetune --no-load-optim --no-load-rng {flags}"
        for model, flags in MODELS.items()
    }

    def measured(name: str, flags: str, variant: str = "came") -> Case:
        report = f" --came-report-memory --came-memory-dir {folder / 'memory' / name}"
        return Case(name, flags + report, variant)

    chains: list[list[Case]] = []
    cases: dict[int, list[Case]] = {2: [], 4: []}
    for model, flags in MODELS.items():
        chains.append(
            [
                Case(f"weights-{model}", f"{once}{saving}--save {folder / model} {flags}"),
                Case(f"oracle-{model}", start[model] + CAME, "oracle"),
                Case(f"{model}-dp1-do", start[model] + CAME + DO),
            ]
        )
        for ranks, layouts in LAYOUTS[model].items():
            cases[ranks] += [
                measured(f"{model}-{name}", start[model] + CAME + layout)
                for name, layout in layouts.items()
            ]
    for name, (variant, ranks, model, layout) in FROZEN.items():
        here = folder / f"start-{name}"
        begin = f"--load {here} --finetune --no-load-optim --no-load-rng {model}"
        chains.append(
            [
                Case(f"start-{name}", f"{once}{saving}--save {here} {model}"),
                Case(f"oracle-{name}", begin + CAME, f"oracle+{variant}"),
            ]
        )
        cases[ranks].append(measured(name, begin + CAME + layout, f"came+{variant}"))
    for ranks, exact in EXACT.items():
        cases[ranks] += [Case(name, CAME + flags) for name, flags in exact.items()]
    # The authors' class on whole tensors, with plain data parallelism: overflows come alike.
    theirs = {flags.replace(DO, "") for flags in SIXTEEN_BIT.values()}
    cases[2] += [Case(oracle_of(flags), CAME + flags, "oracle") for flags in sorted(theirs)]
    cases[2] += [measured(name, CAME + flags) for name, flags in SIXTEEN_BIT.items()]
    results = run_chains(chains, folder / "ranks1")
    for ranks, here in cases.items():
        results.update(run(ranks, here, folder / f"ranks{ranks}"))
    return results
