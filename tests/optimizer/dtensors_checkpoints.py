"""Cases of dtensors_worker: state that is saved under one wrapper and loaded under another."""

import copy

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)

from megatron_came import CAME
from tests.support.dtensor_models import (
    SETTINGS,
    fresh_model,
    model_distance,
    train,
    train_whole,
    wrap,
)


def contents(model, optimizer):
    return {"model": model.state_dict(), "optimizer": get_optimizer_state_dict(model, optimizer)}


def save(model, optimizer, folder):
    dcp.save(contents(model, optimizer), checkpoint_id=folder)


def load(model, optimizer, folder):
    state = contents(model, optimizer)
    dcp.load(state, checkpoint_id=folder)
    model.load_state_dict(state["model"])
    set_optimizer_state_dict(model, optimizer, state["optimizer"])


FP32, BF16, INT8 = torch.float32, torch.bfloat16, torch.int8


def resume(ranks, runs):
    """Train under one wrapper, save, load under another, and train on."""
    whole = train_whole(range(4))
    for first, second, saved, loaded in runs:
        folder = ranks.folder / f"{first}-{second}-{saved}-{loaded}"
        model = wrap(ranks, first)
        optimizer = CAME(model.parameters(), momentum_dtype=saved, **SETTINGS)
        train(model, optimizer, range(2))
        save(model, optimizer, folder)
        other = wrap(ranks, second)
        resumed = CAME(other.parameters(), momentum_dtype=loaded, **SETTINGS)
        load(other, resumed, folder)
        train(other, resumed, range(2, 4))
        assert resumed.param_groups[0]["step"] == 4
        error = model_distance(other, whole)
        limit = 5e-5 if saved == loaded == FP32 else 0.05
        assert error <= limit, (first, second, saved, loaded, error)


def case_checkpoints_between_wrappers(ranks):
    resume(
        ranks,
        [
            ("fsdp", "tp_fsdp", FP32, FP32),
            ("tp_fsdp", "plain", FP32, FP32),
            ("plain", "fsdp", INT8, FP32),  # whose codes are no momentum
            ("plain", "hsdp", INT8, INT8),
            ("fsdp", "plain", INT8, INT8),
        ],
    )


def case_checkpoints_between_all_wrappers(ranks):
    names = [*ranks.kinds, "plain"]
    pairs = [(first, second) for first in names for second in names]
    resume(ranks, [(*pair, FP32, FP32) for pair in pairs])
    dtypes = (FP32, BF16, INT8)
    resume(ranks, [("fsdp", "tp", saved, loaded) for saved in dtypes for loaded in dtypes])


def case_the_same_wrapper_resumes_bit_for_bit(ranks):
    for momentum in (torch.float32, torch.int8):
        model = wrap(ranks, "fsdp")
        optimizer = CAME(model.parameters(), momentum_dtype=momentum, **SETTINGS)
        train(model, optimizer, range(3))
        folder = ranks.folder / f"same-{momentum}"
        save(model, optimizer, folder)
        other = wrap(ranks, "fsdp")
        resumed = CAME(other.parameters(), momentum_dtype=momentum, **SETTINGS)
        load(other, resumed, folder)
        train(model, optimizer, range(3, 5))
        train(other, resumed, range(3, 5))
        for ours, theirs in zip(model.parameters(), other.parameters(), strict=True):
            assert torch.equal(ours.to_local(), theirs.to_local()), momentum


def case_remainders_in_checkpoints(ranks):
    """bf16 weights with their lower halves: fp32 weights come back bit for bit, on any mesh."""

    def resumed_as(kind, folder=None):
        model = wrap(ranks, kind, torch.bfloat16)
        settings = {"remainders": True, "kernels": "plain"}
        optimizer = CAME(model.parameters(), **settings, **SETTINGS)
        if folder is not None:
            load(model, optimizer, folder)
        return model, optimizer

    model, optimizer = resumed_as("fsdp")
    train(model, optimizer, range(3))
    folder = ranks.folder / "remainders"
    save(model, optimizer, folder)
    for kind in ("tp_fsdp", "plain"):
        other, resumed = resumed_as(kind, folder)
        for param, own in zip(model.parameters(), other.parameters(), strict=True):
            lower, theirs = optimizer.state[param], resumed.state[own]
            assert torch.equal(full(param), full(own)), kind
            assert torch.equal(full(lower["remainder"]), full(theirs["remainder"])), kind


def full(tensor):
    """Gloo does not gather int16."""
    tensor = tensor.detach()
    tensor = tensor.int() if tensor.dtype == torch.int16 else tensor
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def case_whole_state(ranks):
    """A state dictionary of whole tensors, as one process saves it, and PyTorch's full ones."""
    whole = fresh_model()
    optimizer = CAME(whole.parameters(), **SETTINGS)
    train(whole, optimizer, range(3))
    saved = copy.deepcopy(optimizer.state_dict())
    weights = copy.deepcopy(whole.state_dict())
    train(whole, optimizer, range(3, 6))
    for kind in ranks.kinds:
        model = wrap(ranks, kind, weights=weights)
        resumed = CAME(model.parameters(), **SETTINGS)
        resumed.load_state_dict(copy.deepcopy(saved))  # it is not copied
        train(model, resumed, range(3, 6))
        assert model_distance(model, whole) <= 5e-5, kind
        options = StateDictOptions(full_state_dict=True)
        everything = get_optimizer_state_dict(model, resumed, options=options)
        for name, state in everything["state"].items():
            for key, value in state.items():
                param = dict(whole.named_parameters())[name]
                theirs = optimizer.state[param][key]
                assert value.shape == theirs.shape, (kind, name, key)
                assert torch.allclose(value, theirs, rtol=1e-3, atol=1e-9), (kind, name, key)


def case_own_counts_of_steps_are_loaded(ranks):
    """Of a block that is unfrozen late. PyTorch loads what a new optimizer's state has alone."""
    whole = StateDictOptions(full_state_dict=True, cpu_offload=True)
    from_first = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)

    def broadcast(model, optimizer, other, resumed):
        saved = get_optimizer_state_dict(model, optimizer, options=whole)
        other.load_state_dict(model.state_dict())
        saved = saved if ranks.rank == 0 else {}
        set_optimizer_state_dict(other, resumed, saved, options=from_first)

    def from_files(model, optimizer, other, resumed):
        folder = ranks.folder / f"counts-{kind}"
        save(model, optimizer, folder)
        load(other, resumed, folder)

    def unfreeze(model, step):
        model.blocks[1].requires_grad_(step >= 1)

    for kind, hand_overs in (("fsdp", (broadcast, from_files)), ("tp", (from_files,))):
        for hand_over in hand_overs:
            model, other = (wrap(ranks, kind) for _ in range(2))
            optimizer, resumed = (
                CAME(each.parameters(), bias_correction=True, **SETTINGS) for each in (model, other)
            )
            model.blocks[1].requires_grad_(False)
            train(model, optimizer, range(4), unfreeze)
            hand_over(model, optimizer, other, resumed)
            counts = {int(state["step"]) for state in resumed.state.values()}
            assert counts == {2, 4}, (kind, hand_over)
            for each in ((model, optimizer), (other, resumed)):
                train(*each, range(4, 6))
            assert model_distance(model, other) <= 1e-6, (kind, hand_over)


def case_hop(ranks, index):
    """Load what another number of ranks has saved, train on, save; compare."""
    index = int(index)
    model = wrap(ranks, ranks.kinds[0])
    optimizer = CAME(model.parameters(), **SETTINGS)
    if index:
        load(model, optimizer, ranks.folder / f"hop-{index - 1}")
    train(model, optimizer, range(2 * index, 2 * index + 2))
    save(model, optimizer, ranks.folder / f"hop-{index}")
    assert model_distance(model, train_whole(range(2 * index + 2))) <= 5e-5
