"""Builds CAME as programs do that have a training loop of their own; one process for each way.

    python -m tests.support.host_worker WAY... [--packages FOLDER]

Each way is forked from a process that has imported what Megatron imports and nothing of it, and
prints a line: its name and what was seen, as JSON. It trains one model of Megatron's for three
steps on gradients that depend on the step alone.
"""

import ast
import contextlib
import importlib
import io
import json
import os
import sys
import tempfile
import traceback
import types
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import torch
import torch._dynamo
import torch.distributed.checkpoint
import torch.distributed.tensor

from megatron_came import cpu_megatron, waiting
from tests.support import loaded_kernels
from tests.support.host_model import (
    COMMON,
    DECAY,
    GIVEN,
    LR,
    build,
    built,
    connect,
    own_config,
    plain_config,
    seen_of,
    train,
)

loaded_kernels.load()
with contextlib.suppress(ImportError):
    import torch.utils.tensorboard


def installed():
    """By the launchers' way, which the others are compared with."""
    from megatron_came.megatron import install

    waiting.stop()
    install()
    return built(own_config())


def scheduled():
    """By the launchers' way, with Megatron's schedule, which sets weight decay by groups."""
    from megatron.core.optimizer import get_megatron_optimizer
    from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

    connect()
    model = build()
    optimizer = get_megatron_optimizer(own_config(), model)
    OptimizerParamScheduler(
        optimizer, 0.0, LR, 0.0, 0, 10, "constant", DECAY, DECAY, 10, "constant"
    )
    return seen_of(model, optimizer)


def plain():
    """A plain configuration with CAME's settings, on a Megatron that nobody has installed into."""
    return built(plain_config(**GIVEN))


def defaults():
    """The same without settings."""
    return built(plain_config())


def attributes():
    """Settings that are set as attributes, by a host that has read Megatron's arguments before."""
    from megatron.training import global_vars

    config = plain_config()
    config.came_beta2 = GIVEN["came_beta2"]
    args = SimpleNamespace(seed=5, optimizer="came", came_beta2=0.5, came_momentum_dtype="bf16")
    global_vars.set_args(args)
    config.came_seed = None
    return built(config)


def late():
    """This package comes when Megatron is there and has been imported by name."""
    from megatron.core.optimizer import get_megatron_optimizer

    here = sys.modules[__name__]
    vars(here)["get_megatron_optimizer"] = get_megatron_optimizer
    waiting.start()
    connect()
    model = build()
    return seen_of(model, here.get_megatron_optimizer(plain_config(**GIVEN), model))


def own_first():
    """A module of this package's is what imports Megatron."""
    from megatron_came.megatron.config import CameOptimizerConfig  # noqa: F401

    return plain()


def _other_package(calls):
    """A package that wraps Megatron's builder without a word of it, as Primus does."""
    other = types.ModuleType("other_package")
    exec(
        "def wrap(original, calls):\n"
        "    def builder(*args, **kwargs):\n"
        "        calls.append('called')\n"
        "        return original(*args, **kwargs)\n"
        "    return builder\n",
        other.__dict__,
    )
    return other


def another_before(*, only_in_loop=False):
    """Another package has wrapped Megatron's builder before this one comes."""
    from megatron.core import optimizer
    from megatron.training import training

    calls = []
    original = optimizer.get_megatron_optimizer
    if only_in_loop:  # and looks Megatron's up when it is called

        def original(*args, **kwargs):
            return optimizer.get_megatron_optimizer(*args, **kwargs)

    wrapped = _other_package(calls).wrap(original, calls)
    training.get_megatron_optimizer = wrapped
    if not only_in_loop:
        optimizer.get_megatron_optimizer = wrapped
    waiting.start()
    connect()
    model = build()
    built_ = training.get_megatron_optimizer(plain_config(**GIVEN), model)
    return {**seen_of(model, built_), "calls": calls}


another_before_in_the_loop = partial(another_before, only_in_loop=True)


def another_after():
    """Another package wraps what this one has put in place."""
    from megatron.core import optimizer

    calls = []
    optimizer.get_megatron_optimizer = _other_package(calls).wrap(
        optimizer.get_megatron_optimizer, calls
    )
    return {**built(plain_config(**GIVEN)), "calls": calls}


def _saved(model, optimizer, folder, **how):
    """Save, or ask for, the checkpoint of a host that has no arguments of Megatron's."""
    from megatron.core import dist_checkpointing

    how = {"metadata": {"distrib_optim_sharding_type": "fully_reshardable"}, **how}
    state = {"model": model[0].module.sharded_state_dict(metadata=how["metadata"])}
    weights = model[0].module.sharded_state_dict(metadata=how["metadata"])
    state["optimizer"] = optimizer.sharded_state_dict(weights, **how)
    if how.get("is_loading"):
        return dist_checkpointing.load(state, folder)
    dist_checkpointing.save(state, folder)
    return state


def _resumed(folder):
    """Train on from a checkpoint."""
    from megatron.core.optimizer import get_megatron_optimizer

    model = build()
    optimizer = get_megatron_optimizer(plain_config(**GIVEN), model)
    loaded = _saved(model, optimizer, folder, is_loading=True)
    model[0].module.load_state_dict(loaded["model"])
    optimizer.load_state_dict(loaded["optimizer"])
    return train(model, optimizer, first=3)


def checkpoint(**settings):
    """Save after three steps, and train on from there, in the same run and in another."""
    from megatron.core.optimizer import get_megatron_optimizer

    connect()
    model = build()
    optimizer = get_megatron_optimizer(plain_config(**(settings or GIVEN)), model)
    train(model, optimizer)
    with tempfile.TemporaryDirectory() as folder:
        _saved(model, optimizer, folder)
        return {"resumed": _resumed(folder), "weights": train(model, optimizer, first=3)}


# Another optimizer has saved what CAME is to train on from.
adams_checkpoint = partial(checkpoint, optimizer="adam")


def _offloaded(*, bf16, sharded, **given):
    """Train with the state moved away and back in between, and without."""
    from megatron.core.optimizer import get_megatron_optimizer

    moved = []

    def to(tensor, device):
        """A device of its own: another address, and nothing is left at the old one."""
        moved.append(tensor.numel())
        copy = tensor.clone()
        tensor.fill_(77)
        return copy

    seen = []
    for away in (False, True):
        model = build(bf16=bf16, sharded=sharded)
        config = plain_config(bf16=bf16, use_distributed_optimizer=sharded, **given)
        optimizer = get_megatron_optimizer(config, model)
        train(model, optimizer)
        if away:
            weights = [param.clone() for param in model[0].parameters()]
            with mock.patch.object(torch.Tensor, "to", to):
                optimizer.offload_to_cpu()
                assert all(map(torch.equal, weights, model[0].parameters()))
                optimizer.restore_from_cpu()
        seen.append(train(model, optimizer, first=3))
    count = sum(param.numel() for param in model[0].parameters())
    return {"kept": seen[0], "moved": seen[1], "elements": sum(moved) // 2, "parameters": count}


def offload():
    """Main weights and state, in every wrapper, leave for inference and come back."""
    connect()
    small = {"came_momentum_dtype": "int8"}
    return {
        "fp32": _offloaded(bf16=False, sharded=True),
        "bf16": _offloaded(bf16=True, sharded=True, **small),
        "remainders": _offloaded(bf16=True, sharded=True, came_main_params="remainder"),
        "fp32 whole": _offloaded(bf16=False, sharded=False),
        "bf16 whole": _offloaded(bf16=True, sharded=False),
    }


def slime():
    """The calls that slime makes (slime/backends/megatron_utils), which is on no package index."""
    import dataclasses

    from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
    from megatron.training import global_vars

    args = SimpleNamespace(**COMMON, optimizer="adam", use_distributed_optimizer=True, seed=0)
    args.came_beta2, args.came_momentum_dtype = 0.99, "bf16"  # of a file, --custom-config-path
    global_vars.set_args(args)
    module, _, name = "megatron_came.use_came".rpartition(".")  # --custom-megatron-init-path
    getattr(importlib.import_module(module), name)(args)
    connect()
    model = build()
    named = [field.name for field in dataclasses.fields(OptimizerConfig)]
    config = OptimizerConfig(**{name: vars(args)[name] for name in named if hasattr(args, name)})
    config.timers = None
    optimizer = get_megatron_optimizer(
        config=config, model_chunks=model, use_gloo_process_groups=True
    )
    return seen_of(model, optimizer)


def _package(name, folder):
    """A package of somebody else's without what its own ``__init__`` imports, a GPU's packages."""
    package = types.ModuleType(name)
    package.__path__ = [str(Path(folder, *name.split(".")))]
    sys.modules[name] = package


def verl():
    """verl's own builders of the configuration and the optimizer."""
    for name in ("verl", "verl.utils", "verl.workers", "verl.workers.config"):
        _package(name, PACKAGES)
    from verl.utils.import_utils import import_external_libs

    os.environ["VERL_USE_EXTERNAL_MODULES"] = "megatron_came"
    import_external_libs(os.environ["VERL_USE_EXTERNAL_MODULES"].split(","))  # its __init__ does
    from verl.utils.megatron.optimizer import get_megatron_optimizer, init_megatron_optim_config
    from verl.workers.config.optimizer import McoreOptimizerConfig

    settings = McoreOptimizerConfig(**COMMON, optimizer="came", override_optimizer_config=GIVEN)
    config = init_megatron_optim_config(settings, bf16=False)
    connect()
    model = build()
    return seen_of(model, get_megatron_optimizer(model, config))


def _bridge():
    """megatron-bridge's ``setup_optimizer``, with what its configuration has of Megatron alone.

    Of ``training/config.py``, whose imports want a GPU's packages, the classes are taken that
    ``training/optim.py`` asks for.
    """
    for name in ("megatron.bridge", "megatron.bridge.training"):
        _package(name, PACKAGES)
    source = Path(PACKAGES, "megatron/bridge/training/config.py")
    wanted = {"OptimizerConfig", "SchedulerConfig", "OptimizerConfigOverrideProvider"}
    wanted |= {"OptimizerConfigOverrideProviderContext"}
    kept = [
        node
        for node in ast.parse(source.read_text()).body
        if (isinstance(node, ast.ClassDef) and node.name in wanted)
        or isinstance(node, ast.Import)
        or (isinstance(node, ast.ImportFrom) and "bridge" not in str(node.module))
    ]
    config = types.ModuleType("megatron.bridge.training.config")
    sys.modules[config.__name__] = config
    exec(compile(ast.Module(kept, []), str(source), "exec"), config.__dict__)
    return config, importlib.import_module("megatron.bridge.training.optim")


def bridge(own=None):
    """``cfg.optimizer = CameOptimizerConfig(...)`` in Megatron-Bridge."""
    config, optim = _bridge()
    connect()
    model = build()
    optimizer = own_config() if own is None else own(config)
    optimizer.finalize()
    scheduler = config.SchedulerConfig(lr_decay_style="constant")
    scheduler.lr_warmup_steps, scheduler.lr_decay_steps, scheduler.wd_incr_steps = 0, 10, 10
    scheduler.start_weight_decay = scheduler.end_weight_decay = DECAY
    return seen_of(model, optim.setup_optimizer(optimizer, scheduler, model)[0])


def bridge_plain():
    """Megatron-Bridge's own configuration with CAME's name and settings."""

    def own(config):
        made = config.OptimizerConfig(**COMMON, optimizer="came", use_distributed_optimizer=True)
        for name, value in GIVEN.items():
            setattr(made, name, value)
        return made

    return bridge(own)


PACKAGES = ""


def run(way):
    """In a process of its own: what was seen, what was said, or the error."""
    said = io.StringIO()
    try:
        with contextlib.redirect_stdout(said):
            if way.startswith(("late", "another_before")):  # there is nothing of ours yet
                waiting.stop()
            cpu_megatron.enable()
            seen = globals()[way]()
    except BaseException as error:  # a checkpoint's are none of Exception
        traceback.print_exc()
        seen = {"error": f"{type(error).__name__}: {error}"}
    seen["said"] = [line for line in said.getvalue().splitlines() if "megatron_came:" in line]
    return seen


def main():
    global PACKAGES
    ways = sys.argv[1:]
    if "--packages" in ways:
        *ways, _, PACKAGES = ways
        sys.path.append(PACKAGES)
    assert not any(name.startswith("megatron.") for name in sys.modules)
    for way in ways:
        sys.stdout.flush()
        child = os.fork()
        if not child:
            print(json.dumps([way, run(way)]), flush=True)
            os._exit(0)
        os.waitpid(child, 0)


if __name__ == "__main__":
    main()
