"""Building CAME where Megatron builds its optimizers."""

import inspect
from collections.abc import Iterable
from types import SimpleNamespace
from typing import Any

import torch.distributed as dist
from megatron.core.optimizer.grad_scaler import ConstantGradScaler, DynamicGradScaler
from megatron.core.optimizer.optimizer import MegatronOptimizer

from megatron_came.core.momentum import MOMENTUM_DTYPES
from megatron_came.megatron import agreement, parameter_rules
from megatron_came.megatron.checkpoints import stacks
from megatron_came.megatron.config import CameOptimizerConfig
from megatron_came.megatron.cpu_offload import OffloadedCAME
from megatron_came.megatron.distributed import CameDistributedOptimizer
from megatron_came.megatron.errors import UnsupportedError
from megatron_came.megatron.megatron_fsdp import CameMegatronFSDP, local_groups
from megatron_came.megatron.parameter_names import (
    FACTORED,
    identities,
    named_parameters,
    original_of,
)
from megatron_came.megatron.rules import refuse
from megatron_came.megatron.run import arguments
from megatron_came.megatron.sharding import ModelGroups, chain_of, check_replicas, shard_of
from megatron_came.megatron.spikes import guard_spikes
from megatron_came.megatron.wrappers import CameFloat16Optimizer, CameFP32Optimizer
from megatron_came.optimizer import CAME
from megatron_came.parameter_checks import check_trainable
from megatron_came.patching import Function
from megatron_came.rules import Settings
from megatron_came.voice import Groups, say_once


def with_came(
    original: Function, config: Any, model_chunks: list[Any], *args: Any, **kwargs: Any
) -> Any:
    """Stand in for ``get_megatron_optimizer``."""
    given = inspect.signature(original).bind(config, model_chunks, *args, **kwargs).arguments
    # Where it is one of the original's ``**kwargs``, it is not among what is bound.
    collection = kwargs.get("pg_collection", given.get("pg_collection"))
    everyone = agreement.connecting(collection)
    is_came = getattr(config, "optimizer", None) == "came"
    # Ranks with other optimizers have this setting in common with those of CAME. Others' wrappers
    # may lead here twice.
    if is_came or (collection is None and arguments() and not hasattr(config, "as_asked")):
        agreement.refuse_other_settings({"--optimizer": str(config.optimizer)}, everyone)
    if is_came:
        config = _agreed(config, model_chunks, collection, everyone)
    optimizer = original(config, model_chunks, *args, **kwargs)
    share_gradient_dtype(chain_of(optimizer))
    if is_came and config.spike_guard is not None:
        guard_spikes(chain_of(optimizer), config.spike_guard)
    return optimizer


def _agreed(
    given: Any, model_chunks: list[Any], collection: Any | None, everyone: Groups
) -> CameOptimizerConfig:
    """Return a configuration for Megatron's builder, if all ranks can train one model alike."""
    groups = ModelGroups.of(collection)
    # What is refused may be of this rank alone, which has another stage of the model than others,
    # and from here on Megatron lets all ranks wait for each other.
    with agreement.refused_on_all(everyone):
        config = given
        if not isinstance(given, CameOptimizerConfig):
            config = CameOptimizerConfig.from_plain(given, arguments())
        refuse(settings_of_model(config, model_chunks))
        params = [
            original_of(param) for _, param in named_parameters(model_chunks) if param.requires_grad
        ]
        check_trainable(params)
        for param in params:
            shard_of(param, groups)
    config = agreement.agree(config, model_chunks, collection, everyone)
    parameter_rules.note(config.rule, model_chunks, everyone)
    if not model_chunks[0].ddp_config.use_megatron_fsdp:
        stacks.mark(model_chunks, settings_of_model(config, model_chunks), everyone)
    # Megatron-FSDP makes what it takes for replicas equal; otherwise weights may hold nothing yet.
    made = Settings(model_chunks[0].config)
    # Their sums would be of what happens to be in memory.
    is_empty = not made.perform_initialization or made.init_model_with_meta_device
    if not is_empty and not model_chunks[0].ddp_config.use_megatron_fsdp:
        with agreement.refused_on_all(everyone):
            check_replicas(params, groups)
    return config.as_standard()


def share_gradient_dtype(chain: Iterable[Any]) -> None:
    """Let optimizers whose gradients go into one norm show them in one dtype."""
    ours = [each for each in chain if isinstance(each, CameDistributedOptimizer)]
    dtypes = {buffer.grad_dtype for each in ours for buffer in getattr(each, "buffers", ())}
    for each in ours:
        each.copies_gradients = len(dtypes) > 1


def settings_of_model(config: CameOptimizerConfig, model_chunks: list[Any]) -> SimpleNamespace:
    """Return what is known where CAME is built, perhaps without a command line."""
    configs = [getattr(model_chunks[0], name, None) for name in ("config", "ddp_config")]
    settings = {key: value for each in configs if each for key, value in vars(each).items()}
    settings = {**arguments(), **settings, **vars(config.settings)}
    return SimpleNamespace(**settings, model_chunks=model_chunks)


def with_came_for_groups(original: Function, config: Any, *args: Any, **kwargs: Any) -> Any:
    """Stand in for the builder of one group of optimizers."""
    if hasattr(config, "as_asked"):
        return build(config.as_asked, *args, **kwargs)
    if getattr(config, "optimizer", None) == "came":
        raise UnsupportedError(
            "--optimizer came is built by get_megatron_optimizer, and another package has "
            "called what that calls: load megatron_came after that package, so that CAME's "
            "comes first."
        )
    return original(config, *args, **kwargs)


def build(
    config: CameOptimizerConfig,
    model_chunks: list[Any],
    param_groups: list[dict[str, Any]],
    model_parallel_group: dist.ProcessGroup | None = None,
    intra_dist_opt_group: dist.ProcessGroup | None = None,
    pg_collection: Any | None = None,
    **of_distributed: Any,
) -> MegatronOptimizer:
    """Build CAME in the wrapper that the precision and ``--use-distributed-optimizer`` ask for.

    Takes the arguments of Megatron's ``_get_megatron_optimizer_based_on_param_groups``; what only
    its ``DistributedOptimizer`` knows is for that.

    Raises:
        UnsupportedError: a weight that does not say how it is cut, or a group with ``factored``.
    """
    model_groups = ModelGroups.of(pg_collection)
    model_params = [list(group["params"]) for group in param_groups]
    has_fsdp = bool(model_chunks[0].ddp_config.use_megatron_fsdp)
    if has_fsdp:
        param_groups = local_groups(param_groups)
    came = _came(config, param_groups)
    # Random bits, and which rows are looked at, go by an element's place in the whole model.
    by_place = config.momentum_dtype != "fp32" or arguments().get("came_log_diagnostics")
    known = identities(model_chunks) if by_place else None

    of_distributed = {
        "distributed_optimizer_instance_id": 0,
        "model_chunks": model_chunks,
        "model_groups": model_groups,
        **of_distributed,
    }
    wrapper: Any
    if has_fsdp:
        wrapper = CameMegatronFSDP(
            came, config, _grad_scaler(config), _init_state, params=model_params, **of_distributed
        )
    elif config.use_distributed_optimizer:
        wrapper = CameDistributedOptimizer(
            came, config, _grad_scaler(config), _init_state, identities=known, **of_distributed
        )
    elif config.fp16 or config.bf16:
        wrapper = CameFloat16Optimizer(came, config, _grad_scaler(config), _init_state)
    else:
        wrapper = CameFP32Optimizer(came, config, _init_state)
    wrapper.grad_stats_parallel_group = intra_dist_opt_group
    if not (has_fsdp or config.use_distributed_optimizer):
        wrapper.adopt(model_params, model_groups, known)
        wrapper.grad_stats_parallel_group = model_parallel_group
    wrapper.tp_group, wrapper.expert_tp_group = model_groups.tp, model_groups.expert_tp
    return wrapper


def _came(config: CameOptimizerConfig, param_groups: list[dict[str, Any]]) -> CAME | None:
    """Megatron has no optimizer on a rank without parameter groups."""
    if not param_groups:
        return None
    if any(FACTORED in group for group in param_groups):
        raise UnsupportedError(
            f"{FACTORED} of a parameter group is for plain PyTorch: give {parameter_rules.FLAG} "
            f"PATTERN {FACTORED}=no, or came_rule=[[PATTERN, '{FACTORED}=no']] in the "
            "configuration."
        )
    came = (OffloadedCAME if config.optimizer_cpu_offload else CAME)(
        param_groups,
        lr=config.lr,
        **config.came.as_group(),
        weight_decay=config.weight_decay,
        kernels=config.kernels,
        cuda_graph=config.cuda_graph,
        momentum_dtype=MOMENTUM_DTYPES[config.momentum_dtype],
        remainders=config.main_params == "remainder",
        seed=config.seed,
    )
    for reason in [config.why_plain] if config.why_plain else came.kernel_choices:
        say_once(reason)
    return came


def _init_state(optimizer: CAME, config: Any = None) -> None:
    """Megatron's ``init_state_fn``."""
    optimizer.init_state()


def _grad_scaler(config: CameOptimizerConfig) -> ConstantGradScaler | DynamicGradScaler | None:
    if config.loss_scale:
        return ConstantGradScaler(config.loss_scale)
    if not config.fp16:
        return None
    return DynamicGradScaler(
        initial_scale=config.initial_loss_scale,
        min_scale=config.min_loss_scale,
        growth_factor=2.0,  # both as Megatron's builder has them
        backoff_factor=0.5,
        growth_interval=config.loss_scale_window,
        hysteresis=config.hysteresis,
    )
