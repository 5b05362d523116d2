"""What ranks compare, and how it is said, without ranks."""

import pytest
import torch

from megatron_came import voice
from megatron_came.megatron import agreement
from megatron_came.megatron.agreement import (
    Kernels,
    difference,
    names_of,
    parameters_of,
    settings_of,
)
from megatron_came.megatron.config import CameOptimizerConfig
from megatron_came.megatron.errors import UnsupportedError


@pytest.mark.parametrize(
    ("values", "clause"),
    [
        ([1, 1, 1], None),
        ([1, 2], "rank 1 has --lr 2, rank 0 1"),
        ([2, 1, 1], "rank 0 has --lr 2, ranks 1 and 2 1"),
        ([1, 2, 2, 1, 1], "ranks 1 and 2 have --lr 2, ranks 0, 3 and 4 1"),
        ([1, None], "rank 1 has no --lr, rank 0 has --lr 1"),
        ([1, 2, 3], "rank 2 has --lr 3, rank 1 2, rank 0 1"),
        ([1] * 20 + [2], "rank 20 has --lr 2, ranks 0, 1, 2, 3 and 16 more 1"),
        (range(9), "rank 8 has --lr 8, rank 7 7, rank 6 6, rank 5 5"),
    ],
    ids=str,
)
def test_a_difference_is_a_clause(values, clause):
    found = {
        rank: {} if value is None else {"--lr": str(value)} for rank, value in enumerate(values)
    }
    assert difference(found) == clause


def test_one_of_several_differences_is_said():
    found = {0: {"--a": "1", "--b": "2", "--c": "3"}, 1: {"--a": "1", "--b": "x", "--c": "y"}}
    assert difference(found) == "rank 1 has --b x, rank 0 2 (1 more differ)"


def test_few_ranks_are_all_named():
    assert names_of([3]) == "rank 3"
    assert names_of(list(range(8))) == "ranks 0, 1, 2, 3, 4, 5, 6 and 7"


@pytest.mark.parametrize(
    ("name", "value", "compared"),
    [
        ("lr", 0.1, True),
        ("params_dtype", torch.bfloat16, True),
        ("lr_decay_style", "cosine", True),
        ("adam_betas", [0.9, 0.95], True),
        ("save_interval", 10, True),
        ("load", None, False),
        ("load", "checkpoint", True),  # whether there is one
        ("load_dir", "checkpoint", False),
        ("data_path", ["a", "b"], False),
        ("data_cache", "/scratch/rank0", False),
        ("tokenizer_model", "bpe", False),
        ("local_rank", 1, False),
        ("num_workers", 2, False),
        ("tensorboard_dir", None, False),
        ("timers", object, False),
    ],
    ids=str,
)
def test_what_may_differ_is_not_compared(monkeypatch, name, value, compared):
    monkeypatch.setattr(agreement, "arguments", lambda: {name: value})
    config = CameOptimizerConfig(lr=1e-3)
    flag = "--" + name.replace("_", "-")
    assert (settings_of(config).get(flag) is not None) == compared


@pytest.mark.parametrize("name", ["load", "save", "pretrained_checkpoint"])
def test_where_checkpoints_are_may_differ_but_not_if_there_are_any(monkeypatch, name):
    given = {}
    monkeypatch.setattr(agreement, "arguments", lambda: given)
    seen = []
    for value in ("/node0/checkpoints", "checkpoints", None):
        given[name] = value
        seen.append(settings_of(CameOptimizerConfig(lr=1e-3)))
    assert difference(dict(enumerate(seen[:2]))) is None
    flag = "--" + name.replace("_", "-")
    words = f"rank 2 has no {flag}, rank 0 has {flag} FOLDER"
    assert difference({0: seen[0], 2: seen[2]}) == words


def test_settings_are_those_of_the_command_line_and_what_computes(monkeypatch):
    monkeypatch.setenv("NUMBA_OPT", "0")
    monkeypatch.setenv("NUMBA_NUM_THREADS", "1")  # any number computes the same
    settings = settings_of(CameOptimizerConfig(lr=1e-3, momentum_dtype="int8", seed=7))
    expected = {
        "--optimizer": "came",
        "--lr": "0.001",
        "--came-beta2": "0.999",
        "--came-cautious": "False",
        "--came-kernels": "auto",
        "--came-momentum-dtype": "int8",
        "--came-main-params": "fp32",
        "--seed": "7",
        "NUMBA_OPT": "0",
        "PyTorch": torch.__version__,
    }
    assert expected.items() <= settings.items()
    assert "NUMBA_NUM_THREADS" not in settings


def test_parameters_say_what_ranks_must_share():
    weight, norm = torch.nn.Parameter(torch.zeros(2, 3)), torch.nn.Parameter(torch.zeros(4).half())
    weight.tensor_model_parallel, weight.partition_dim = True, 1
    norm.requires_grad = False
    assert parameters_of({"weight": weight, "norm": norm}) == {
        "weight": "2x3 float32 cut along dimension 1",
        "norm": "frozen 4 float16",
    }


@pytest.mark.parametrize(
    ("found", "sentence"),
    [
        ([None, "plain"], "--came-cuda-graph cannot be used on rank 0: no GPU"),
        (["triton 3.6", "triton 3.7"], "--came-cuda-graph: rank 1 has kernels triton 3.7, rank 0 "),
    ],
)
def test_graphs_are_not_given_up_for_kernels_that_all_ranks_have(found, sentence, monkeypatch):
    """Simulated: what each rank has."""
    kernels = {rank: Kernels(name, "no GPU") for rank, name in enumerate(found)}
    monkeypatch.setattr(agreement, "rank", lambda: 0)
    monkeypatch.setattr(agreement, "_kernels_here", lambda config, model_chunks: kernels[0])
    monkeypatch.setattr(agreement, "_differ", lambda text, everyone: True)
    monkeypatch.setattr(agreement, "by_rank", lambda mine, everyone: kernels)
    with pytest.raises(UnsupportedError, match=sentence):
        agreement._with_common_kernels(CameOptimizerConfig(lr=1e-3, cuda_graph=True), [], [None])


def test_groups_one_after_the_other_connect_all_ranks(monkeypatch):
    """Simulated: what the others of this rank's groups have found by then."""
    others = {"model": {1: None}, "data": {2: "bad", 3: None}}
    monkeypatch.setattr(voice, "of_all_ranks", lambda found, group: [others[group], found])
    monkeypatch.setattr(voice, "world_size", lambda: 4)
    monkeypatch.setattr(
        voice.dist, "all_reduce", lambda has, op, group: has.add_(any(others[group].values()))
    )
    found = voice.by_rank(None, ["model", "data"])
    assert list(found.items()) == [(0, None), (1, None), (2, "bad"), (3, None)]
    assert voice.of_any_rank(None, groups=["model", "data"]) == "bad"
    assert voice.of_any_rank(None, groups=["model"]) is None
