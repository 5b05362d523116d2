"""What ranks hold of a model's buffers, in every kind of layout."""

from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.parallel_state import RankGenerator

from megatron_came import megatron, memory
from megatron_came.memory import stages
from megatron_came.memory.grid import Grid
from megatron_came.memory.optimizers import ADAMW
from tests.support.memory_flags import DO, EXPERTS, SMALL, launch, pp, tp


@pytest.fixture(scope="module", autouse=True)
def replaced():
    megatron.install()
    memory.install()


@pytest.mark.parametrize(
    ("flags", "ranks"),
    [
        (DO, 8),
        (DO + "--overlap-grad-reduce --ddp-bucket-size 5003 ", 8),
        (DO + "--num-distributed-optimizer-instances 2 ", 8),
        (DO + "--context-parallel-size 2 ", 8),
        (DO + EXPERTS + "--expert-model-parallel-size 4 ", 8),
        (DO + EXPERTS + tp(2) + "--sequence-parallel --expert-tensor-parallel-size 1 ", 8),
    ],
)
def test_the_shards_of_a_buffer_hold_every_element_once(flags, ranks):
    (stage,) = launch(SMALL + flags, ranks).stages
    assert len(stage.buffers[0].elements) > 1
    assert sum(int(buffer.elements.sum()) for buffer in stage.buffers) == stage.parameters
    held = sum(int(buffer.elements.sum()) * buffer.weight for buffer in stage.buffers)
    assert held < stage.components(ADAMW).weights < 1.2 * held


def test_blocks_that_share_a_scale_end_with_a_slice():
    key = SimpleNamespace(
        param_dtype=torch.bfloat16, grad_dtype=torch.float32, is_expert_parallel=False
    )
    layout = SimpleNamespace(
        bucket_indices=[(0, 1024), (1024, 2048)],
        param_index_map={"a": (0, 300, 0), "b": (320, 900, 0), "c": (1024, 2048, 1)},
    )
    buffer = stages.cut(key, layout, 2)
    # Of a 300, of b 192 and 388, of c 512 and 512.
    assert buffer.elements.tolist() == [300 + 192 + 512, 388 + 512]
    assert buffer.held[1].tolist() == [2 + 1 + 2, 2 + 2]


@pytest.mark.parametrize("instances", [1, 2])
def test_ranks_hold_the_shards_that_megatron_gives_them(instances):
    grid = Grid(
        world=64,
        tensor=2,
        pipeline=2,
        virtual=None,
        context=2,
        expert=4,
        expert_tensor=1,
        instances=instances,
        sharded=True,
    )
    dense, experts = grid.shards_of_ranks()
    ranks = RankGenerator(
        tp=2, ep=1, dp=8, pp=2, cp=2, order="tp-cp-ep-dp-pp", rank_offset=0
    ).get_ranks("dp-cp")
    expert_ranks = RankGenerator(
        tp=1, ep=4, dp=8, pp=2, cp=1, order="tp-cp-ep-dp-pp", rank_offset=0
    ).get_ranks("dp")
    for places, groups in ((dense, ranks), (experts, expert_ranks)):
        for group in groups:
            for place, rank in enumerate(group):
                assert int(places[rank % 32]) == place % (len(group) // instances)


def test_the_fullest_rank_is_found_among_all():
    run = launch(SMALL + DO + EXPERTS + "--expert-model-parallel-size 2 ", 8)
    (stage,) = run.stages
    totals = [
        sum(int(buffer.elements[(dense, expert)[buffer.of_experts]]) for buffer in stage.buffers)
        for dense, expert in zip(
            *(places.tolist() for places in run.grid.shards_of_ranks()), strict=True
        )
    ]
    held = sum(int(buffer.elements[stage.shards[buffer.of_experts]]) for buffer in stage.buffers)
    assert held == max(totals) > min(totals)


def test_tied_embeddings_are_counted_once():
    one, two = (launch(SMALL + flags, 2) for flags in ("", pp(2)))
    assert one.parameters == two.parameters
    assert sum(stage.parameters for stage in two.stages) == one.parameters + 48 * 256


def test_latent_attention_can_be_laid_out():
    latent = "--multi-latent-attention --qk-layernorm --kv-lora-rank 16 --q-lora-rank 24 "
    latent += "--position-embedding-type rope "
    one, two = (launch(SMALL + latent + flags, 2) for flags in ("", tp(2)))
    assert one.parameters == two.parameters
    assert 0.5 < two.stages[0].parameters / one.parameters < 0.6


@pytest.mark.parametrize("ranks", [1, 2])
def test_the_norm_before_a_query_that_is_not_latent_is_in_its_projection(ranks):
    """As Transformer Engine's layers have it, of DeepSeek-V2-Lite; local ones cannot be built."""
    latent = SMALL + "--multi-latent-attention --kv-lora-rank 16 " + tp(ranks)
    plain, normed = (launch(latent + flags, ranks) for flags in ("", "--qk-layernorm "))
    of_layer = 2 * (48 + 16)  # a LayerNorm of the input and one of the latent key and value
    assert normed.parameters - plain.parameters == 4 * of_layer
    # Every tensor-parallel rank has all of them.
    (own,), (others) = normed.stages, plain.stages
    assert own.parameters - others[0].parameters == 4 * of_layer


def test_nothing_is_left_behind():
    launch(SMALL + pp(2) + EXPERTS, 2).stages  # noqa: B018
    assert not dist.is_initialized()
    assert parallel_state._MPU_PIPELINE_MODEL_PARALLEL_RANK is None
    assert torch.empty(1).device.type == "cpu"
