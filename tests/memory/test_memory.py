"""Predicted memory: known sizes, activations, and what fits."""

from dataclasses import replace

import pytest
from megatron.training import theoretical_memory_usage

from megatron_came import megatron, memory
from megatron_came.core.saved import MOST_BYTES
from megatron_came.memory import fit
from megatron_came.memory.activations import activation_bytes, micro_batches_in_flight
from megatron_came.memory.optimizers import ADAMW, came, compared, of_launch
from megatron_came.terminal.sentences import CommandError
from tests.support.memory_flags import BF16, DATA, DO, EXPERTS, MEDIUM, SMALL, launch, pp, tp


@pytest.fixture(scope="module", autouse=True)
def replaced():
    megatron.install()
    memory.install()


# Known sizes.


def test_gpt2_medium_has_its_known_sizes():
    run = launch(MEDIUM + BF16)
    (stage,) = run.stages
    assert stage.parameters == 354_871_296
    parts = stage.components(came(run.args))
    assert parts.momentum / 2**30 == pytest.approx(1.3220, abs=5e-5)
    assert parts.second_moment / 2**20 == pytest.approx(4.6, abs=0.05)


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (
            BF16 + DO,
            {
                "AdamW": 18,
                "CAME fp32": 14.01,
                "CAME bf16": 12.01,
                "CAME int8": 11.03,
                "CAME int8 + rem.": 9.03,
                "SGD": 14,
                "Adafactor": 10.01,
            },
        ),
        (BF16 + DO + "--grad-reduce-in-bf16 ", {"AdamW": 16, "CAME int8 + rem.": 7.03}),
        (BF16, {"AdamW": 18, "CAME int8": 11.03}),
        ("", {"AdamW": 16, "CAME fp32": 12.01}),
        (BF16 + "--sgd-momentum 0 ", {"SGD": 10}),
    ],
)
def test_static_bytes_per_parameter(flags, expected):
    run = launch(MEDIUM + flags)
    (stage,) = run.stages
    found = {
        optimizer.name: stage.components(optimizer).static / stage.parameters
        for optimizer in compared(run.args)
    }
    for name, size in expected.items():
        assert found[name] == pytest.approx(size, abs=0.005)
    # Remainders are refused without the distributed optimizer.
    assert ("CAME int8 + rem." in found) == (DO in flags)


def test_16_bit_gradients_have_fp32_copies_until_the_next_iteration():
    (stage,) = launch(MEDIUM + BF16 + "--grad-reduce-in-bf16 ").stages
    assert stage.components(ADAMW).buffers == 4 * stage.parameters


@pytest.mark.parametrize(
    ("flags", "gpu", "cpu"),
    [  # fp32 gradients: weights and gradients stay; weights and gradients travel in copies
        ("", 4 + 4, 4 + 4 + 4),
        (BF16, 2 + 4, 4 + 4 + 2 + 4),
        (BF16 + "--came-momentum-dtype int8 --came-main-params remainder ", 6, 1 + 2 + 2 + 4),
        (BF16 + "--grad-reduce-in-bf16 --came-momentum-dtype bf16 ", 4, 4 + 2 + 2 + 2),
    ],
)
def test_what_is_offloaded_is_counted_for_the_cpu_alone(flags, gpu, cpu):
    flags = MEDIUM + DO + flags + "--optimizer came --optimizer-cpu-offload "
    whole, half = (launch(flags + more) for more in ("", "--optimizer-offload-fraction 0.5 "))
    for run, share in ((whole, 1.0), (half, 0.5)):
        (stage,), trained = run.stages, of_launch(run.args)
        kept = stage.components(trained)
        plain = stage.components(replace(trained, offloads=False))
        assert plain.host == 0
        assert kept.total < plain.total
        state = plain.state - kept.state
        assert state == pytest.approx(share * plain.state, rel=0.01)
        assert kept.host / stage.parameters == pytest.approx(share * cpu, rel=0.03)
        if share == 1:
            assert kept.static / stage.parameters == pytest.approx(gpu, rel=1e-3)


def test_every_rank_has_some_of_what_is_offloaded():
    flags = MEDIUM + DO + BF16 + "--optimizer came --optimizer-cpu-offload "
    (stage,) = launch(flags + "--optimizer-offload-fraction 0.5 ", 8).stages
    (buffer,) = stage.buffers
    shares = buffer.away[0] / buffer.elements
    # The last rank holds words alone, which go as one; the others make up for it.
    assert buffer.away[0].sum() / buffer.elements.sum() == pytest.approx(0.5, abs=0.01)
    assert shares.min() > 0.1
    assert shares[:5] == pytest.approx(0.5, abs=0.03)


def test_offload_of_another_optimizer_is_refused():
    with pytest.raises(CommandError, match="with --optimizer came alone, not with adam"):
        launch(MEDIUM + DO + BF16 + "--use-precision-aware-optimizer --optimizer-cpu-offload ")


@pytest.mark.parametrize("ranks", [1, 4])
def test_a_checkpoint_takes_what_is_said(ranks):
    """What CAME converts is measured in test_checkpoint_peaks; gathering a bucket is Megatron's."""
    launches = [
        launch(MEDIUM + BF16 + DO + "--save folder --save-interval 9 " + flags, ranks)
        for flags in (
            "",
            "--dist-ckpt-optim-fully-reshardable ",
            "--dist-ckpt-optim-fully-reshardable --distrib-optim-fully-reshardable-mem-efficient ",
        )
    ]
    plain, gathered, on_cpu = (each.stages[0].checkpoint(ADAMW) for each in launches)
    assert plain == on_cpu == 0
    # Without --overlap-grad-reduce there is one bucket.
    (stage,) = launches[1].stages
    (buffer,) = stage.buffers
    padded = buffer.weights // buffer.weight
    assert gathered == 4 * (padded + padded // ranks)
    int8 = came(launches[0].args, "int8")
    assert stage.checkpoint(int8) == MOST_BYTES + gathered
    assert stage.peak(int8) == stage.components(int8).total + stage.checkpoint(int8)
    assert stage.peak(int8) > stage.total(int8)


def test_the_vocabulary_is_padded_as_in_training():
    whole, half = (launch(MEDIUM + flags, 2).args.padded_vocab_size for flags in ("", tp(2)))
    assert (whole, half) == (50304, 50432)


def test_a_trillion_parameters_on_ten_thousand_gpus():
    run = launch(
        DATA
        + BF16
        + DO
        + "--num-layers 64 --hidden-size 8192 --num-attention-heads 64 --seq-length 4096 "
        "--max-position-embeddings 4096 --global-batch-size 5120 --vocab-size 128000 "
        "--untie-embeddings-and-output-weights --normalization RMSNorm --group-query-attention "
        "--num-query-groups 8 --position-embedding-type rope --sequence-parallel "
        "--num-layers-per-virtual-pipeline-stage 2 --expert-model-parallel-size 32 "
        "--expert-tensor-parallel-size 1 "
        + EXPERTS.replace("--num-experts 8", "--num-experts 256").replace("-size 32", "-size 2560")
        + tp(4)
        + pp(16),
        10240,
    )
    assert run.parameters == pytest.approx(1.04e12, rel=0.01)
    assert [stage.layers for stage in run.stages] == [4] * 16
    # What all ranks hold of the weights: dense ones on every tensor-parallel rank alone.
    assert run.stages[1].parameters * 16 < run.parameters / 16


# What Megatron logs.


@pytest.mark.parametrize(
    "flags",
    [
        BF16,
        BF16 + "--grad-reduce-in-bf16 ",
        BF16 + DO + "--came-main-params remainder ",
        BF16 + DO + "--grad-reduce-in-bf16 --came-main-params remainder ",
        "--fp16 " + DO,
        "",
    ],
)
@pytest.mark.parametrize("momentum", ["fp32", "bf16", "int8"])
@pytest.mark.parametrize("ranks", [1, 4])
def test_the_logged_footprint_is_what_is_predicted(flags, momentum, ranks):
    run = launch(MEDIUM + f"--optimizer came --came-momentum-dtype {momentum} " + flags, ranks)
    logged = theoretical_memory_usage.compute_weight_and_optimizer_memory(run.args)
    (stage,) = run.stages
    predicted = stage.components(of_launch(run.args)).static - stage.factors - stage.confidence
    # Megatron leaves out the embeddings of positions, and predictions have padding.
    assert logged == pytest.approx(predicted, rel=0.005)


def test_the_logged_footprint_of_other_optimizers_is_megatrons():
    args = launch(MEDIUM + BF16).args
    logged = theoretical_memory_usage.compute_weight_and_optimizer_memory(args)
    args.optimizer = "came"
    came_logged = theoretical_memory_usage.compute_weight_and_optimizer_memory(args)
    assert came_logged / logged == pytest.approx(14 / 18)


# Activations.


def _megatron(run):
    args = run.args
    args.encoder_seq_length = args.seq_length
    formula = theoretical_memory_usage.compute_activation_memory_without_sp
    if args.sequence_parallel and args.recompute_granularity == "selective":
        formula = theoretical_memory_usage.compute_activation_memory
    return formula(args, args.global_batch_size // run.grid.data)


@pytest.mark.parametrize(
    "flags",
    [
        "",
        tp(2),
        tp(2) + "--sequence-parallel --recompute-activations ",
        pp(2),
        pp(2) + "--global-batch-size 2 ",
        pp(2) + "--num-layers-per-virtual-pipeline-stage 1 ",
    ],
)
def test_the_first_stage_has_what_megatron_says(flags):
    run = launch(SMALL + BF16 + flags, 2)
    assert run.stages[0].activations == pytest.approx(_megatron(run), rel=1e-3)


def test_later_stages_hold_fewer_micro_batches():
    run = launch(SMALL + BF16 + pp(4), 4)
    assert [micro_batches_in_flight(run.args, run.grid, stage) for stage in range(4)] == [
        4,
        3,
        2,
        1,
    ]
    middle = [stage.activations for stage in run.stages[1:3]]
    assert middle[0] / middle[1] == pytest.approx(3 / 2, rel=1e-3)


def test_recomputation_context_parallelism_and_precision_change_activations():
    full = "--recompute-granularity full --recompute-num-layers "
    flags = {
        "bf16": (BF16, 1),
        "fp32": ("", 1),
        "context": (BF16 + "--context-parallel-size 2 ", 2),
        "uniform": (BF16 + full + "1 --recompute-method uniform ", 1),
        "all together": (BF16 + full + "4 --recompute-method uniform ", 1),
        "block": (BF16 + full + "2 --recompute-method block ", 1),
    }
    found = {
        name: launch(SMALL + more, ranks).stages[0].activations
        for name, (more, ranks) in flags.items()
    }
    assert found["fp32"] == pytest.approx(2 * found["bf16"], rel=1e-3)
    assert found["context"] == pytest.approx(found["bf16"] / 2, rel=1e-3)
    assert found["uniform"] < found["block"] < found["bf16"] < found["all together"]
    assert found["uniform"] < found["bf16"] / 2


def test_experts_are_counted_by_what_a_token_goes_through():
    flags = SMALL + BF16 + EXPERTS + tp(2) + "--sequence-parallel --recompute-activations "
    few, many = (
        launch(flags.replace("topk 2", f"topk {count}"), 2).stages[0].activations
        for count in (2, 4)
    )
    tokens, layers = 32, 4
    assert many - few == pytest.approx(4 * 2 * 32 * tokens * layers / 2, rel=1e-3)


def test_an_estimate_needs_no_layers():
    run = launch(SMALL + BF16)
    (chunk,) = run.chunks[0]
    empty = replace(chunk, dense_layers=0, embeds=False, predicts=False)
    assert activation_bytes(run.args, run.grid, 0, [empty]) == 0


# What fits.


@pytest.mark.parametrize("flags", ["", DO])
def test_what_fits_fits_and_the_next_does_not(flags):
    run = launch(SMALL + flags, 4)
    sizes = {}
    for micro_batch in (1, 2, 4, 8, 16):
        sizes[micro_batch] = run.stages_at(4, micro_batch)[0].total(came(run.args))
    assert sorted(sizes.values()) == list(sizes.values())
    found = fit.fit(run, came(run.args), sizes[4])
    assert found.micro_batch == 4
    assert fit.fit(run, came(run.args), sizes[1] - 1).micro_batch is None
    assert fit.fit(run, came(run.args), 2**40).micro_batch == 16


def test_the_fewest_gpus():
    run = launch(SMALL + DO + tp(2), 8)
    sizes = {data: run.stages_at(data, 1)[0].total(came(run.args)) for data in (1, 2, 4, 8)}
    assert sorted(sizes.values(), reverse=True) == list(sizes.values())
    assert fit.fit(run, came(run.args), sizes[4]).gpus == 8
    assert fit.fit(run, came(run.args), sizes[2]).gpus == 4
    assert fit.fit(run, came(run.args), 2**10).gpus is None


def test_what_fits_without_a_global_batch_size():
    run = launch(SMALL.replace("--global-batch-size 64 ", ""), 2)
    found = fit.fit(run, came(run.args), run.stages_at(2, 8)[0].total(came(run.args)))
    assert found.micro_batch == 8


@pytest.mark.parametrize(
    ("said", "size"), [("80GiB", 80 * 2**30), ("1.5 GB", 1_500_000_000), ("7MiB", 7 * 2**20)]
)
def test_sizes(said, size):
    assert fit.parse_size(said) == size


@pytest.mark.parametrize(
    "more",
    [
        "--cuda-graph-impl local ",
        "--cuda-graph-impl transformer_engine --cuda-graph-modules attn ",
        "--moe-token-dispatcher-type flex --moe-enable-deepep ",
        "--moe-token-dispatcher-type flex --moe-flex-dispatcher-backend ncclep ",
        "--fp8-format hybrid --moe-router-padding-for-quantization ",
        "--defer-embedding-wgrad-compute ",
        "--apply-layernorm-1p ",
        "--symmetric-ar-type two_shot ",
        "--overlap-moe-expert-parallel-comm --ep-overlap-early-attn-memory-release ",
    ],
)
def test_what_decides_about_kernels_alone_leaves_bytes_as_they_are(more):
    flags = SMALL + BF16 + DO + EXPERTS + pp(2) + "--expert-model-parallel-size 2 "
    usual, run = (launch(flags + own, 4) for own in ("", more))
    assert [s.components(ADAMW) for s in run.stages] == [s.components(ADAMW) for s in usual.stages]
