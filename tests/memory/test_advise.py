"""The cheapest change after which a launch fits."""

import json

import pytest
import torch

from megatron_came import megatron, memory
from megatron_came.memory import advise, command
from megatron_came.memory.changes import changes
from megatron_came.memory.launch_command import LaunchCommand
from megatron_came.memory.megatron_flags import objection
from megatron_came.memory.optimizers import ADAMW, came, of_launch, precision_aware
from tests.support.memory_flags import BF16, DO, EXPERTS, SMALL, launch, pp, tp

# So wide that the optimizer's state counts, so long that activations are more than the fp32 copies
# of fp8 moments.
WIDE = SMALL.replace("--hidden-size 48", "--hidden-size 512") + BF16
WIDE = WIDE.replace("--seq-length 32", "--seq-length 512").replace(
    "embeddings 32", "embeddings 512"
)
CAME = ("--optimizer", "came")
FULL = "--recompute-granularity full --recompute-method uniform --recompute-num-layers 1 "
FP8 = precision_aware("fp8", "fp8", "remainder")


@pytest.fixture(scope="module", autouse=True)
def replaced():
    megatron.install()
    memory.install()


def advice(flags, budget, ranks=4):
    """What is advised, and in words."""
    run = launch(flags, ranks)
    words, trained = LaunchCommand(flags.split(), ranks), of_launch(run.args)
    found = advise.advise(words, run, trained, int(budget(run)))
    return found, " ".join(" ".join(advise.text(found, words, trained)).split())


def test_a_launch_that_fits_needs_no_change():
    found, said = advice(WIDE + DO, lambda run: run.peak(ADAMW))
    assert found.singles == []
    assert found.together is None
    assert said.startswith("This launch fits: with AdamW it needs ")


@pytest.mark.parametrize(
    ("fits", "said"),
    [
        (ADAMW, "AdamW is enough: it would need"),
        (FP8, "Adam with fp8 moments is enough: it would need"),
        (None, "With Adam it would not fit, in no form that Megatron has."),
    ],
)
def test_a_launch_with_came_that_fits_is_told_whether_adam_would(fits, said):
    flags = WIDE + DO + "--optimizer came --came-momentum-dtype int8 --came-main-params remainder "
    _, words = advice(flags, lambda run: run.peak(fits or came(run.args, "int8", "remainder")))
    assert words.startswith("This launch fits: with CAME int8 + rem. it needs ")
    assert said in words


def test_adam_with_fp8_moments_is_enough_where_it_is():
    found, said = advice(WIDE + DO, lambda run: run.peak(FP8))
    first = found.singles[0].changes[0]
    assert first.name == "Adam with fp8 moments"
    assert first.flags[-4:] == ("--exp-avg-dtype", "fp8", "--exp-avg-sq-dtype", "fp8")
    assert "Adam with fp8 moments is enough: CAME is not needed" in said


def test_what_is_free_comes_first():
    found, said = advice(WIDE, lambda run: run.peak(ADAMW) - 1)
    first = found.singles[0].changes[0]
    assert (first.kind, first.cost) == ("sharding", "nothing: the same numbers and traffic")
    assert "1. --use-distributed-optimizer costs: nothing" in said
    kinds = [option.changes[0].kind for option in found.singles]
    assert len(kinds) == len(set(kinds))
    wanted = ["sharding", "Adam", "gradients", "CAME", "recomputation", "tensor", "pipeline"]
    assert [kind for kind in wanted if kind in kinds] == kinds


def test_came_is_advised_where_no_adam_fits():
    found, said = advice(WIDE + DO, lambda run: run.peak(FP8) - 1)
    names = [option.changes[0].name for option in found.singles]
    assert names[0] == "CAME with int8 momentum"
    assert "Adam is not enough in any form that Megatron has; CAME is." in said


@pytest.mark.parametrize("flags", ["", DO + "--optimizer came ", pp(2) + "--micro-batch-size 4 "])
def test_every_advice_is_a_launch_that_needs_what_is_said(flags):
    flags = WIDE + flags
    found, _ = advice(flags, lambda run: 0.99 * run.peak(of_launch(run.args)))
    assert found.singles
    for option in found.singles:
        (change,) = option.changes
        changed = launch(" ".join(change.applied(flags.split())), change.ranks or 4)
        assert changed.peak(of_launch(changed.args)) == option.needs <= found.budget
        assert change.cost


def test_changes_that_are_enough_together_are_all_needed():
    flags = WIDE + DO + "--micro-batch-size 4 "
    found, said = advice(flags, lambda run: 0.2 * run.peak(ADAMW))
    assert found.singles == []
    together = found.together
    assert together.needs <= found.budget
    assert len(together.changes) > 1
    assert "No change is enough alone." in said

    def needs(changes):
        words = flags.split()
        for change in changes:
            words = change.applied(words)
        changed = launch(" ".join(words), 4)
        return changed.peak(of_launch(changed.args))

    assert needs(together.changes) == together.needs
    for change in together.changes:
        fewer = [other for other in together.changes if other is not change]
        assert needs(fewer) > found.budget


def test_more_gpus_are_not_the_only_advice_where_changes_together_are_enough():
    flags = SMALL.replace("--hidden-size 48", "--hidden-size 512") + BF16 + DO
    flags += "--num-layers 1 --num-attention-heads 1 "  # so that no other layout is left
    found, said = advice(flags, lambda run: 6.6 * run.stages[0].parameters, 2)
    assert [option.changes[0].kind for option in found.singles] == ["ranks"]
    assert {change.kind for change in found.together.changes} == {"CAME", "gradients"}
    assert found.together.needs <= found.budget
    assert "On the GPUs that there are these are, together, the cheapest first:" in said


# Whatever the budget: one that nothing reaches, so that all changes that help are named.


def offered(flags, ranks=4):
    found, _ = advice(flags, lambda run: 1000, ranks)
    return {change.kind: change for change in found.together.changes}


@pytest.mark.parametrize(
    ("flags", "kind", "without"),
    [
        (WIDE + "--optimizer sgd --micro-batch-size 4 ", "sharding", ()),
        (WIDE + DO + "--cuda-graph-impl local --micro-batch-size 4 ", "recomputation", ()),
        (
            WIDE + DO + EXPERTS + "--moe-layer-recompute ",
            "recomputation",
            ("--recompute-activations", "--recompute-modules", "--moe-layer-recompute"),
        ),
    ],
    ids=["sgd", "CUDA graphs", "recomputed experts"],
)
def test_nothing_is_advised_that_megatron_refuses(flags, kind, without):
    change = offered(flags).get(kind)
    assert (change is None) == (without == ())
    assert change is None or change.without == without


def test_sequence_parallelism_takes_the_place_of_what_it_refuses():
    flags = WIDE + DO + FULL + "--distribute-saved-activations " + tp(2)
    (change,) = [each for each in changes(launch(flags, 4), None, None) if each.kind == "sequence"]
    refused = objection(launch(flags + "--sequence-parallel ", 4).args)
    assert "must be false when sequence parallel is enabled" in refused
    assert objection(launch(" ".join(change.applied(flags.split())), 4).args) == ""


def test_flags_of_the_precision_aware_optimizer_go_with_it():
    flags = WIDE + DO + "--use-precision-aware-optimizer --main-grads-dtype bf16 "
    change = offered(flags)["CAME"]
    assert "--main-grads-dtype" in change.without
    assert "--grad-reduce-in-bf16" in change.flags
    changed = launch(" ".join(change.applied(flags.split())), 4)
    assert changed.args.main_grads_dtype == torch.float32
    assert not changed.args.accumulate_allreduce_grads_in_fp32


def test_smaller_momentum_is_advised_with_fsdp2():
    flags = WIDE + "--use-torch-fsdp2 --untie-embeddings-and-output-weights --optimizer came "
    flags += "--no-gradient-accumulation-fusion --ckpt-format torch_dist "
    assert offered(flags)["CAME"].flags == (*CAME, "--came-momentum-dtype", "int8")


# With these Adam in 12 bytes is enough, and before the last of them CAME in 9 is not.
TOGETHER = "--micro-batch-size 1 --grad-reduce-in-bf16 " + FULL
ADAM = "--use-precision-aware-optimizer --exp-avg-dtype bf16 --exp-avg-sq-dtype bf16 "


@pytest.mark.parametrize(("own", "bytes_more"), [("adam", 0), ("came", 0), ("came", -1)])
def test_adam_is_enough_among_changes_where_it_is(own, bytes_more):
    flags = WIDE + DO + "--micro-batch-size 4 "
    small = launch(flags + TOGETHER + ADAM, 4)
    budget = small.peak(of_launch(small.args)) + bytes_more
    mine = f"--optimizer {own} "
    found, said = advice(flags + mine, lambda run: budget)
    kinds = [change.kind for change in found.together.changes]
    if own == "adam":
        assert "CAME" not in kinds
        assert said.endswith("Adam with bf16 moments is enough with these: CAME is not needed.")
    elif bytes_more == 0:
        assert "Adam with bf16 moments is enough: it would need" in said
    else:
        assert said.endswith("With Adam it would not fit, in no form that Megatron has.")


def test_where_nothing_helps_it_is_said():
    found, said = advice(WIDE, lambda run: 1000)
    assert found.together.needs > 1000
    assert "Nothing that is tried here makes it fit. With all of these it still needs" in said
    assert said.endswith("Take more GPUs, GPUs with more memory, or a smaller model.")


def test_the_command(capsys):
    words = [*(WIDE + DO).split(), "--gpus", "4", "--advise"]
    assert command.main([*words, "1GiB"]) == 0
    assert "This launch fits: with AdamW" in capsys.readouterr().out
    assert command.main([*words, "10MiB", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)["advice"]
    assert result["needs"] > result["budget"] == 10 * 2**20
    assert command.main([*words, "80"]) == 2
    assert "--advise 80 is no size" in capsys.readouterr().err


def test_offload_is_advised_where_it_is_enough():
    flags = WIDE + DO + "--optimizer came --came-momentum-dtype int8 --came-main-params remainder "
    away = launch(flags + "--optimizer-cpu-offload ", 4)
    found, said = advice(flags, lambda run: away.peak(of_launch(away.args)))
    (change,) = [each.changes[0] for each in found.singles if each.changes[0].kind == "offload"]
    assert change.flags == ("--use-distributed-optimizer", "--optimizer-cpu-offload")
    assert "--optimizer-cpu-offload costs: gradients and weights cross to the CPU" in said
