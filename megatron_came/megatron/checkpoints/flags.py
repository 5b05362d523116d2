"""Flags of a resumed run beside those of the checkpoint's: what differs is said, or refused."""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from megatron_came.core.hyperparameters import TABLE
from megatron_came.megatron.checkpoints.contents import SCHEDULE, first_of
from megatron_came.megatron.checkpoints.groups import RATES, Groups, matching
from megatron_came.rules import flag_of

_words = str.split

# What decides the schedule of learning rate and weight decay, of which a checkpoint has its own.
_OF_SCHEDULE = _words("""
    train_iters train_samples global_batch_size
    lr min_lr lr_decay_style lr_decay_iters lr_decay_samples lr_warmup_iters lr_warmup_samples
    lr_warmup_fraction weight_decay start_weight_decay end_weight_decay weight_decay_incr_style
    decoupled_lr decoupled_min_lr use_mup mup_base_hidden_size
""")
# What else changes how weights are trained.
_TRAINING = [f"came_{row.name}" for row in TABLE] + _words("""
    came_rule
    lr_warmup_init lr_wsd_decay_style lr_wsd_decay_iters lr_wsd_decay_samples clip_grad
    rampup_batch_size step_batch_size_schedule decrease_batch_size_if_needed seed
    data_parallel_random_init calculate_per_token_loss no_weight_decay_cond_type
    apply_wd_to_qk_layernorm fp16 bf16 loss_scale initial_loss_scale min_loss_scale
    loss_scale_window hysteresis grad_reduce_in_bf16 accumulate_allreduce_grads_in_fp32
    fp32_residual_connection attention_softmax_in_fp32 apply_query_key_layer_scaling fp8 fp8_recipe
    fp8_param_gather fp4 attention_dropout hidden_dropout mup_attn_scale_power mup_embedding_mult
    mup_output_mult freeze_all_layers qk_clip qk_clip_alpha qk_clip_threshold split mock_data
    data_path train_data_path data_args_path per_split_data_args_path per_dataset_sequences_path
    dataloader_type data_sharding dataloader_inter_document_masking sft eod_mask_loss
    reset_position_ids reset_attention_mask fim_data fim_rate fim_spm_rate mask_prob short_seq_prob
    phase_transition_iterations logits_load_kd_loss_alpha fp16_lm_cross_entropy head_lr_mult
    mup_base_head_dim mup_width_mult
""")
# What decides how weights are read.
_MODEL = _words("""
    num_layers hidden_size ffn_hidden_size num_attention_heads group_query_attention
    num_query_groups kv_channels seq_length max_position_embeddings position_embedding_type
    add_position_embedding rotary_base rotary_percent rotary_interleaved
    rotary_seq_len_interpolation_factor use_rope_scaling rope_scaling_factor no_rope_freq
    rope_type rotary_scaling_factor mscale mscale_all_dim mrope_section
    yarn_original_max_position_embeddings yarn_beta_fast yarn_beta_slow
    relative_attention_num_buckets relative_attention_max_distance
    normalization layernorm_epsilon layernorm_zero_centered_gamma
    apply_residual_connection_post_layernorm add_bias_linear add_qkv_bias qk_layernorm qk_l2_norm
    swiglu squared_relu openai_gelu quick_geglu activation_func_clamp_value glu_linear_offset
    untie_embeddings_and_output_weights window_size window_attn_skip_freq softmax_type
    attention_output_gate multi_latent_attention q_lora_rank kv_lora_rank qk_head_dim
    qk_pos_emb_head_dim v_head_dim mtp_num_layers mtp_loss_scaling_factor mtp_use_repeated_layer
    spec hybrid_layer_pattern experimental_attention_variant linear_attention_freq
    mamba_state_dim mamba_head_dim mamba_num_heads mamba_num_groups
    heterogeneous_layers_config_path dsa_indexer_topk dsa_indexer_loss_coeff
    num_experts moe_layer_freq moe_ffn_hidden_size moe_shared_expert_intermediate_size
    moe_router_topk moe_router_num_groups moe_router_group_topk moe_router_topk_scaling_factor
    moe_router_score_function moe_router_pre_softmax moe_router_load_balancing_type
    moe_router_enable_expert_bias moe_router_bias_update_rate moe_router_dtype
    moe_aux_loss_coeff moe_z_loss_coeff moe_input_jitter_eps moe_expert_capacity_factor
    moe_token_drop_policy moe_pad_expert_input_to_capacity moe_expert_rank_capacity_factor
    moe_latent_size moe_shared_expert_gate moe_apply_probs_on_input moe_mlp_glu_interleave_size
    moe_shared_expert_glu_interleave_size moe_router_force_load_balancing moe_router_force_biased
    moe_use_upcycling
    make_vocab_size_divisible_by vocab_size tokenizer_type tokenizer_model vocab_file merge_file
""")
_OTHERS = _TRAINING + _MODEL
# What Megatron itself insists on when it resumes.
_FIXED = ("num_layers", "hidden_size", "num_attention_heads")
# Where the flag is not the argument's name; "no " where it says the opposite.
_FLAGS = {
    "add_bias_linear": "no --disable-bias-linear",
    "add_position_embedding": "no --no-position-embedding",
    "data_sharding": "no --no-data-sharding",
    "layernorm_zero_centered_gamma": "--apply-layernorm-1p",
    "layernorm_epsilon": "--norm-epsilon",
    "fp8": "--fp8-format",
    "fp4": "--fp4-format",
}
# Arguments that Megatron fills with another one's value where they are not given.
_FILLED = {
    "lr_decay_iters": "train_iters",
    "lr_decay_samples": "train_samples",
    "start_weight_decay": "weight_decay",
    "end_weight_decay": "weight_decay",
    "ffn_hidden_size": "hidden_size",
    "kv_channels": "hidden_size",
    "num_query_groups": "num_attention_heads",
    "add_qkv_bias": "add_bias_linear",
    "accumulate_allreduce_grads_in_fp32": "bf16",
}
OVERRIDE = "--override-opt_param-scheduler"
KEEP = "--use-checkpoint-opt_param-scheduler"

# How far an element of the momentum is from what was saved, at most.
_ROUNDED = {
    "bf16": "to nearest, by at most 1/256 of itself",
    "int8": "to nearest, by at most 1/127 of the largest of its block of 256",
}
# What decides which elements of a parameter a rank holds, and so the blocks of int8 momentum.
_LAYOUT = _words("""
    world_size tensor_model_parallel_size pipeline_model_parallel_size
    virtual_pipeline_model_parallel_size context_parallel_size expert_model_parallel_size
    expert_tensor_parallel_size overlap_grad_reduce ddp_bucket_size ddp_num_buckets
    use_distributed_optimizer num_distributed_optimizer_instances
    ddp_pad_buckets_for_high_nccl_busbw make_vocab_size_divisible_by
""")


def said_changes(saved: Any, args: Any, *, has_schedule: bool = True) -> list[str]:
    """Say in sentences what of a saved run's flags a resumed run has otherwise.

    ``has_schedule`` says whether it takes the checkpoint's schedule.
    """
    keeps = has_schedule and bool(args.use_checkpoint_opt_param_scheduler)
    # How long it trains is said by this run, also where it keeps the checkpoint's schedule.
    length, schedule = _OF_SCHEDULE[:3], _OF_SCHEDULE[3:]
    ours = [*length, *(() if keeps else schedule), *_OTHERS]
    sentences = []
    if changes := _changes(saved, args, ours):
        sentences.append(f"training goes on with {', '.join(changes)}.")
    if keeps and (changes := _changes(args, saved, schedule, "this run's flags have", {})):
        sentences.append(
            f"training goes on with the checkpoint's schedule, as {KEEP} asks: "
            f"{', '.join(changes)}."
        )
    return sentences


def said_model_changes(saved: Any, args: Any) -> list[str]:
    """Say which flags that weights were trained with a run has otherwise that takes these alone."""
    changes = _changes(saved, args, _MODEL)
    return [f"the weights are taken into a model with {', '.join(changes)}."] if changes else []


def conversions(saved: Any, args: Any) -> Iterator[str]:
    """Say how a checkpoint's momentum and main weights become those of this run, if they change."""
    before, now = getattr(saved, "came_momentum_dtype", "fp32"), args.came_momentum_dtype
    if before != now:
        exact = now == "fp32" or (before, now) == ("int8", "bf16")  # of int8 bf16 has all values
        how = "taken over exactly" if exact else f"rounded {_ROUNDED[now]}"
        yield f"--came-momentum-dtype {now} (the checkpoint's run had {before}): momentum is {how}."
    elif now == "int8" and any(
        getattr(saved, name, None) != getattr(args, name, None) for name in _LAYOUT
    ):
        yield (
            "--came-momentum-dtype int8 at another layout than the checkpoint's: "
            f"blocks differ, so momentum is rounded {_ROUNDED[now]}."
        )
    before, now = getattr(saved, "came_main_params", "fp32"), args.came_main_params
    if before != now:
        yield (
            f"--came-main-params {now} (the checkpoint's run had {before}): the main weights are "
            "taken over bit for bit."
        )


def afresh(iteration: Any) -> str:
    """Say what begins anew with ``--no-load-optim``: in Megatron the schedule does, too."""
    return (
        f"--no-load-optim: training goes on after iteration {iteration} with an optimizer without "
        "momentum and statistics, and the schedule of the learning rate begins anew, with its "
        "warm-up."
    )


def differences(saved: Any, args: Any) -> str:
    """Name what this run's flags say unlike a checkpoint's of model and training, in brackets."""
    changes = _changes(saved, args, _OTHERS)
    return f" (differing: {', '.join(changes)})" if changes else ""


def model_refusal(saved: Any, args: Any) -> str | None:
    """Say in one sentence that a checkpoint is of another model, as far as its flags tell."""
    changes = _changes(saved, args, _FIXED)
    if not changes:
        return None
    return f"the checkpoint is of another model than this run's, with {', '.join(changes)}."


def schedule_refusal(
    saved: Any,
    args: Any,
    schedules: tuple[Mapping[str, Any], Mapping[str, Any]],
    groups: Iterable[tuple[Groups, Groups]],
) -> str | None:
    """Say in one sentence that nothing says whose schedule counts, or None.

    Schedules are states of the checkpoint's and of this run's scheduler; groups are, of each
    optimizer, the parameter groups of this run and of the checkpoint.
    """
    if args.override_opt_param_scheduler:
        return None
    pairs = [
        (group, match)
        for mine, its in groups
        for group, match in zip(mine, matching(mine, its), strict=True)
    ]
    if args.use_checkpoint_opt_param_scheduler:
        if all(match is not None for _, match in pairs):
            return None
        return (
            f"{KEEP} is given, and the checkpoint has no rates for some groups of this run's "
            f"parameters: give the flags of its run (--decoupled-lr, --use-mup), or {OVERRIDE}."
        )
    theirs, own = schedules
    differing = [
        f"{name} {_shown(own[name])} (the checkpoint's run had {_shown(before)})"
        for name, names in SCHEDULE.items()
        if (before := first_of(theirs, names)) is not None and before != own.get(name, before)
    ]
    differing += [
        f"{name} {_shown(group[name])} (the checkpoint's run had {_shown(match[name])})"
        for group, match in pairs
        for name in RATES
        if match is not None and match.get(name) is not None and group.get(name) != match[name]
    ]
    if not differing:
        return None
    flags = _changes(saved, args, _OF_SCHEDULE) or list(dict.fromkeys(differing))
    return (
        "the schedule of learning rate and weight decay is not the checkpoint's, with "
        f"{', '.join(flags)}: add {OVERRIDE} to go on with this run's flags, or {KEEP} to go on "
        "with the checkpoint's schedule."
    )


def _changes(
    before: Any,
    now: Any,
    names: Iterable[str],
    whose: str = "the checkpoint's run had",
    filled: Mapping[str, str] = _FILLED,
) -> list[str]:
    """Name the flags that two runs have unlike each other."""
    changes = []
    for name in names:
        if not (hasattr(before, name) and hasattr(now, name)):
            continue  # another release's
        was, value = getattr(before, name), getattr(now, name)
        source = filled.get(name)
        if _same(was, value):
            continue
        if source is not None and all(_is_filled(name, source, run) for run in (before, now)):
            continue  # it differs only as the one does that it is filled from
        changes.append(_change(_FLAGS.get(name, flag_of(name)), was, value, whose))
    return changes


def _change(flag: str, was: Any, value: Any, whose: str) -> str:
    if isinstance(value, bool) or isinstance(was, bool):
        opposite = flag.startswith("no ")
        flag = flag.removeprefix("no ")
        return f"{flag} {_switch(value, opposite)} ({whose} it {_switch(was, opposite)})"
    return f"{flag} {_shown(value)} ({whose} {_shown(was)})"


def _switch(value: Any, opposite: bool) -> str:
    return "on" if bool(value) != opposite else "off"


def _same(one: Any, other: Any) -> bool:
    """Whether two values mean the same: a switch that was never given is off."""
    if isinstance(one, tuple | list) and isinstance(other, tuple | list):
        return list(one) == list(other)
    if {type(one), type(other)} <= {bool, type(None)}:
        return bool(one) == bool(other)
    return bool(one == other)


def _is_filled(name: str, source: str, run: Any) -> bool:
    value, origin = getattr(run, name), getattr(run, source, None)
    if origin is None:
        return False
    # As Megatron's validate_args has it.
    if name == "ffn_hidden_size":
        gated = getattr(run, "swiglu", False)
        return bool(value == (int(4 * origin * 2 / 3 / 64) * 64 if gated else 4 * origin))
    if name == "kv_channels":
        return bool(value == origin // run.num_attention_heads)
    if name == "num_query_groups":
        return not run.group_query_attention
    if name == "accumulate_allreduce_grads_in_fp32":
        return bool(value or not origin)
    return bool(value == origin)


def _shown(value: Any) -> str:
    if value is None:
        return "none"
    if isinstance(value, float):
        return repr(value)
    if isinstance(value, tuple | list):
        # Lists of lists are several flags, as of --came-rule.
        return (", " if any(isinstance(item, list) for item in value) else " ").join(
            map(_shown, value)
        )
    return str(value)
