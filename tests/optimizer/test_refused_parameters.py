"""Parameters that CAME would train wrongly, frozen ones, and settings that are no numbers."""

import logging
import math

import numpy as np
import pytest
import torch

from megatron_came import CAME, Shard
from megatron_came import voice as warnings
from megatron_came.parameter_checks import LONG_VECTOR


@pytest.fixture
def lines(caplog):
    warnings.warn_once.cache_clear()
    caplog.set_level(logging.WARNING)
    return lambda: [record.message for record in caplog.records]


def parameter(*shape):
    return torch.nn.Parameter(torch.ones(shape))


def step(optimizer):
    for group in optimizer.param_groups:
        for param in group["params"]:
            param.grad = torch.ones_like(param) if param.requires_grad else None
    optimizer.step()


def flattened(param):
    param._fsdp_flattened = True
    return param


def test_what_fsdp_has_flattened_is_refused():
    flat = [flattened(parameter(60)), flattened(parameter(0))]
    with pytest.raises(ValueError, match=r"use_orig_params=True with ShardingStrategy\.NO_SHARD"):
        CAME(flat, lr=1e-2)
    optimizer = CAME([parameter(6, 10)], lr=1e-2)
    optimizer.param_groups[0]["params"] = flat
    with pytest.raises(ValueError, match="FullyShardedDataParallel"):
        step(optimizer)


def test_what_fsdp_leaves_in_its_shape_is_trained():
    params = [flattened(parameter(6, 10)), flattened(parameter(6))]
    step(CAME(params, lr=1e-2))
    assert all((param < 1).all() for param in params)


def test_a_parameter_that_fsdp_flattens_later_is_refused():
    param = parameter(6, 10)
    optimizer = CAME([param], lr=1e-2)
    step(optimizer)
    flattened(param).data = torch.ones(30)
    with pytest.raises(ValueError, match="FullyShardedDataParallel"):
        step(optimizer)


@pytest.mark.parametrize("steps_before", [0, 1])
def test_flat_vectors_in_the_place_of_matrices_are_refused(steps_before):
    optimizer = CAME([{"params": [parameter(6, 10), parameter(6)]}, {"params": [parameter(3)]}], 1)
    for _ in range(steps_before):
        step(optimizer)
    before = optimizer.param_groups[0]["params"]
    flat = parameter(66)
    optimizer.param_groups[0]["params"] = [flat]
    with pytest.raises(ValueError, match=r"group 0 was built with matrices .* one of 66 elements"):
        step(optimizer)
    assert (flat == 1).all()
    optimizer.param_groups[0]["params"] = before
    step(optimizer)


def test_flat_vectors_with_shards_are_trained():
    optimizer = CAME([parameter(6, 10)], lr=1e-2)
    flat = parameter(60)
    optimizer.param_groups[0]["params"] = [flat]
    optimizer.set_shards({flat: Shard((6, 10), 0, 60)})
    step(optimizer)
    assert optimizer.state[flat]["exp_avg_sq_row"].shape == (6,)


def test_vectors_that_were_there_may_be_all_that_is_left():
    matrix, vector = parameter(6, 10), parameter(6)
    optimizer = CAME([matrix, vector], lr=1e-2)
    optimizer.param_groups[0]["params"] = [vector]
    step(optimizer)
    step(CAME([vector], lr=1e-2))
    optimizer.param_groups[0]["params"] = [parameter(6, 10), vector]  # another object
    step(optimizer)


def test_groups_that_come_and_go():
    first, second = {"params": [parameter(6, 10)]}, {"params": [parameter(6)]}
    optimizer = CAME([first, second], lr=1e-2)
    del optimizer.param_groups[0]
    step(optimizer)
    optimizer.add_param_group({"params": [parameter(7)]})
    step(optimizer)


def test_long_vectors_are_said_once(lines):
    for _ in range(2):
        step(CAME([parameter(LONG_VECTOR + 1)], lr=1e-2))
    assert [line for line in lines() if f"vector of {LONG_VECTOR + 1} elements" in line] == lines()
    assert len(lines()) == 1


def test_usual_vectors_and_shards_are_not(lines):
    shared = parameter(LONG_VECTOR + 1)
    optimizer = CAME([parameter(4, 3), shared], lr=1e-2, kernels="plain")
    warnings.warn_once.cache_clear()
    del lines()[:]
    optimizer.set_shards({shared: Shard((1, LONG_VECTOR + 1), 0, LONG_VECTOR + 1)})
    step(CAME([parameter(LONG_VECTOR)], lr=1e-2, kernels="plain"))
    assert not any(f"{LONG_VECTOR} elements" in line for line in lines())


def test_dtensors_whose_placement_is_not_known_are_refused():
    tensor = pytest.importorskip("torch.distributed.tensor")
    import torch.distributed as dist

    made = not dist.is_initialized()
    if made:
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        mesh = dist.device_mesh.init_device_mesh("cpu", (1,))
        sharded = torch.nn.Parameter(tensor.distribute_tensor(torch.ones(6, 4, 4), mesh))
        with pytest.raises(ValueError, match=r"\(6, 4, 4\) with placements .* leave it out"):
            CAME([sharded], lr=1e-2, flat_convolutions=True)
        optimizer = CAME([sharded], lr=1e-2)
        step(optimizer)
        with pytest.raises(ValueError, match="has a shard that says otherwise"):
            CAME([sharded], lr=1e-2, shards={sharded: Shard.whole((6, 4, 2))})
        step(CAME([sharded], lr=1e-2, shards={sharded: Shard.whole((6, 4, 4))}))
        sharded.decoupled_grad = torch.ones(6, 4, 4)
        with pytest.raises(ValueError, match="must be a DTensor on"):
            optimizer.step()
        (plain,) = params = [torch.nn.Parameter(torch.ones(6, 4, 4))]
        plain.grad = tensor.distribute_tensor(torch.ones(6, 4, 4), mesh)
        with pytest.raises(ValueError, match=r"plain tensor of shape .* is a DTensor"):
            CAME(params, lr=1e-2).step()
    finally:
        if made:
            dist.destroy_process_group()


def test_maximize_goes_up():
    down, up = (torch.nn.Parameter(torch.eye(6, 4)) for _ in range(2))
    steps = CAME([down], lr=1e-2), CAME([up], lr=1e-2, maximize=True)
    for seed in range(3):
        gradient = torch.randn(6, 4, generator=torch.Generator().manual_seed(seed))
        down.grad, up.grad = -gradient, gradient
        for optimizer in steps:
            optimizer.step()
        assert torch.equal(up.grad, gradient)
    assert torch.equal(down, up)
    assert not torch.equal(down, torch.eye(6, 4))


def test_maximize_is_a_key_of_groups():
    down, up = parameter(6, 4), parameter(6, 4)
    step(CAME([{"params": [up], "maximize": True}, {"params": [down]}]))
    assert (up > 1).all()
    assert (down < 1).all()


@pytest.mark.parametrize("name", ["foreach", "fused"])
@pytest.mark.parametrize("value", [None, False, True])
def test_switches_that_mean_nothing_are_taken(name, value):
    step(CAME([{"params": [parameter(3, 2)], name: value}], **{name: value}))


@pytest.mark.parametrize("name", ["differentiable", "capturable"])
def test_switches_that_cannot_be_had_are_refused(name):
    with pytest.raises(ValueError, match=f"{name}=True is not supported.*leave it out"):
        CAME([parameter(3, 2)], **{name: True})
    optimizer = CAME([parameter(3, 2)], **{name: False})
    optimizer.param_groups[0][name] = True
    with pytest.raises(ValueError, match=f"{name}=True is not supported"):
        step(optimizer)
    with pytest.raises(ValueError, match="foreach = 1 is not allowed"):
        CAME([parameter(3, 2)], foreach=1)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int32, torch.bool, torch.cfloat])
def test_frozen_weights_of_other_kinds_are_left_alone(dtype):
    packed = torch.nn.Parameter(torch.zeros(8, 2).to(dtype), requires_grad=False)
    weight = parameter(4, 4)
    optimizer = CAME([packed, weight], lr=1e-2, momentum_dtype=torch.int8)
    optimizer.init_state()
    step_of = torch.ones(4, 4)
    weight.grad = step_of
    optimizer.step()
    assert packed not in optimizer.state
    assert (packed == 0).all()
    assert (weight < 1).all()
    twin = CAME([packed, weight], lr=1e-2, momentum_dtype=torch.int8)
    twin.load_state_dict(optimizer.state_dict())
    twin.step()


def test_a_group_that_is_refused_is_not_added():
    optimizer = CAME([parameter(4, 4)], lr=1e-2)
    for group in (
        {"params": [torch.nn.Parameter(torch.ones(3, dtype=torch.cfloat))]},
        {"params": [parameter(3)], "lr": "1e-3"},
        {"params": [parameter(3)], "betas": (0.9, 0.99)},
        {"params": optimizer.param_groups[0]["params"]},
    ):
        with pytest.raises(ValueError, match=r"\S"):
            optimizer.add_param_group(group)
    assert len(optimizer.param_groups) == 1
    step(optimizer)


BAD = ["1e-4", b"1", True, np.bool_(True), torch.tensor(True), torch.ones(2), None, math.nan, 1j]


@pytest.mark.parametrize("value", BAD, ids=repr)
@pytest.mark.parametrize("name", ["lr", "weight_decay", "clip_threshold"])
def test_what_is_no_number_is_refused(name, value):
    with pytest.raises(ValueError, match=rf"CAME: {name} = .* must be a finite number"):
        CAME([parameter(3, 2)], **{"lr": 1e-3, name: value})
    with pytest.raises(ValueError, match=f"CAME: {name} = "):
        CAME([{"params": [parameter(3, 2)], name: value}], lr=1e-3)


@pytest.mark.parametrize("value", ["x", 0.9, ("0.9", 0.99, 0.999), (True, 0.9, 0.9)], ids=repr)
def test_betas_that_are_no_numbers_are_refused(value):
    with pytest.raises(ValueError, match=r"CAME: beta.* = .* is not allowed"):
        CAME([parameter(3, 2)], lr=1e-3, betas=value)


WRONG = [math.nan, -1.0, "1e-3", None, torch.ones(2), torch.tensor(math.nan), torch.tensor(True)]


@pytest.mark.parametrize("name", ["lr", "weight_decay", "step"])
@pytest.mark.parametrize("value", [*WRONG, torch.tensor(-1.0)], ids=repr)
def test_a_schedule_that_sets_what_is_no_number_is_refused(name, value):
    optimizer = CAME([{"params": [parameter(4, 3)]}, {"params": [parameter(3, 2)]}], lr=1e-3)
    optimizer.param_groups[1][name] = value
    with pytest.raises(ValueError, match=f"CAME: {name} = "):
        step(optimizer)
    for group in optimizer.param_groups:
        assert (group["params"][0] == 1).all()


@pytest.mark.parametrize("step_of", [2.5, True, torch.tensor(2.5)], ids=repr)
def test_half_a_step_is_refused(step_of):
    optimizer = CAME([parameter(3, 2)], lr=1e-3)
    optimizer.param_groups[0]["step"] = step_of
    with pytest.raises(ValueError, match=r"CAME: step = .* a whole number at least 0"):
        step(optimizer)


@pytest.mark.parametrize("kernels", ["plain", "numba"])
def test_tensors_of_one_number_are_taken_for_it(kernels):
    numbers = {"clip_threshold": 0.5, "betas": (0.8, 0.9, 0.95), "eps": (1e-20, 1e-10)}
    given = {
        key: tuple(map(torch.tensor, value)) if isinstance(value, tuple) else torch.tensor(value)
        for key, value in numbers.items()
    }
    tensors = CAME([parameter(3, 2)], lr=1e-2, kernels=kernels, **given)
    later = CAME([parameter(3, 2)], lr=1e-2, kernels=kernels)
    later.param_groups[0].update(given)
    plain = CAME([parameter(3, 2)], lr=1e-2, kernels=kernels, **numbers)
    for optimizer in (tensors, later, plain):
        step(optimizer)
        step(optimizer)
    wanted = plain.param_groups[0]["params"][0]
    for optimizer in (tensors, later):
        # Decays that were tensors were fp32.
        torch.testing.assert_close(optimizer.param_groups[0]["params"][0], wanted)


SETTINGS = [
    ("remainders", "x", "True or False"),
    ("flat_convolutions", 1, "True or False"),
    ("seed", None, "a whole number"),
    ("seed", "1", "a whole number"),
    ("names", ["a"], "not this list"),
    ("names", {"weight": parameter(2)}, "with parameters for keys and str for values"),
    ("shards", [1], "with parameters for keys and Shard for values"),
    ("shards", {1: 2}, "not this dict"),
]


@pytest.mark.parametrize(("name", "value", "message"), SETTINGS, ids=repr)
def test_settings_of_other_kinds_are_refused(name, value, message):
    with pytest.raises(ValueError, match=f"^CAME: {name} .*{message}"):
        CAME([parameter(3, 2)], lr=1e-2, **{name: value})


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2, torch.cfloat])
def test_weights_without_arithmetic_are_refused(dtype):
    weight = torch.nn.Parameter(torch.ones(3, 2).to(dtype))
    with pytest.raises(ValueError, match=rf"not of {dtype}: freeze it \(requires_grad=False\)"):
        CAME([weight], lr=1e-2)
    weight.requires_grad = False
    step(CAME([parameter(3, 2)], lr=1e-2))
    later = parameter(3, 2)
    optimizer = CAME([later, parameter(4, 4)], lr=1e-2)
    step(optimizer)
    later.grad, later.data = None, later.data.to(dtype)
    with pytest.raises(ValueError, match=f"not of {dtype}"):
        optimizer.step()


GRADIENTS = {
    "turned": torch.ones(2, 3),
    "another size": torch.ones(7),
    "integers": torch.ones(3, 2, dtype=torch.int32),
    "complex": torch.ones(3, 2, dtype=torch.cfloat),
    "text": "x",
}


@pytest.mark.parametrize("name", GRADIENTS)
def test_a_decoupled_gradient_that_does_not_fit_is_refused(name):
    param = parameter(3, 2)
    optimizer = CAME([param], lr=1e-2)
    param.decoupled_grad = GRADIENTS[name]
    with pytest.raises(ValueError, match=r"CAME: .*decoupled_grad"):
        optimizer.step()
    assert (param == 1).all()


@pytest.mark.parametrize("shape", [(3, 2), (6,), (1, 3, 2)])
def test_a_decoupled_gradient_may_be_flat(shape):
    param = parameter(3, 2)
    param.decoupled_grad = torch.ones(shape, dtype=torch.bfloat16)
    CAME([param], lr=1e-2).step()
    assert (param < 1).all()


@pytest.mark.parametrize("value", [np.float64(1e-2), np.float32(1e-2), np.int64(1), 1], ids=repr)
def test_numbers_of_other_kinds_are_taken(value, tmp_path):
    optimizer = CAME([parameter(3, 2)], lr=value, weight_decay=value, betas=(np.float64(0), 0, 0))
    step(optimizer)
    torch.save(optimizer.state_dict(), tmp_path / "state")
    optimizer.load_state_dict(torch.load(tmp_path / "state", weights_only=True))


def test_positional_arguments_are_in_the_order_of_the_authors():
    eps, betas = (1e-20, 1e-10), (0.8, 0.9, 0.95)
    group = CAME([parameter(3)], 1e-3, eps, 0.5, betas, 0.1).param_groups[0]
    assert group["eps"] == eps
    assert group["betas"] == betas
    assert (group["clip_threshold"], group["weight_decay"]) == (0.5, 0.1)
    with pytest.raises(ValueError, match=r"eps = .* a tuple of 2 numbers"):
        CAME([parameter(3)], 1e-3, betas)


def test_betas_in_the_place_of_eps_are_said(lines):
    """In AdamW's order of arguments betas come third."""
    CAME([parameter(3)], 1e-3, (1e-3, 0.1), 1.0, (0.9, 0.99, 0.999))
    assert lines() == []
    CAME([parameter(3)], 1e-3, (0.9, 0.999))
    (line,) = lines()
    assert "eps = (0.9, 0.999) look like betas" in line


def test_parameters_left_to_plain_pytorch_are_counted_by_reason(lines):
    many = torch.nn.Parameter(torch.ones(70, 3, 3))
    turned = torch.nn.Parameter(torch.ones(5, 8).t())
    half = [torch.nn.Parameter(torch.ones(4, 4, dtype=torch.bfloat16)) for _ in range(3)]
    step(CAME([parameter(4, 4), many, turned, *half], lr=1e-2, kernels="numba"))
    (line,) = lines()
    assert "for 5 of 6 parameters: 3 with bfloat16 weights, 1 " in line
    assert "not contiguous" in line
    assert "batches of many small matrices" in line


def test_frozen_parameters_are_not_said_to_be_left(lines):
    """As the base of an adapter, in bf16, or what is on the meta device."""
    base = torch.nn.Parameter(torch.ones(4, 4, dtype=torch.bfloat16), requires_grad=False)
    empty = torch.nn.Parameter(torch.empty(3, 3, device="meta"), requires_grad=False)
    step(CAME([base, empty, parameter(4, 4)], lr=1e-2))
    assert lines() == []
    half = torch.nn.Parameter(torch.ones(4, 4, dtype=torch.bfloat16))
    step(CAME([base, half, parameter(4, 4)], lr=1e-2, kernels="numba"))
    (line,) = lines()
    assert "for 1 of 2 parameters: 1 with bfloat16 weights" in line


def test_parameters_left_on_the_meta_device_are_said_once(lines):
    with torch.device("meta"):
        model = torch.nn.Linear(3, 2)
    optimizer = CAME(model.parameters(), lr=1e-2)
    assert not lines()
    model.to_empty(device="cpu")
    model(torch.ones(1, 3)).sum().backward()
    for _ in range(2):
        optimizer.step()
    (line,) = lines()
    assert "2 of 2 parameters are on the meta device" in line
    assert "make the optimizer after them" in line
    made_after = CAME(model.parameters(), lr=1e-2)
    made_after.step()
    assert len(lines()) == 1
