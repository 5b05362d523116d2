"""How ``megatron_came.pretrain_gpt`` meets the training loop of each release.

The loop of 0.19 makes a GPT of the flags by itself, and takes its settings as a container; 0.18
takes the container and a function that builds the model; 0.17 and 0.16 read the flags themselves.
The helpers that hand out a batch among ranks have moved and changed their arguments, too.
"""

from argparse import Namespace
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from megatron.core import mpu
from megatron.core.enums import ModelType
from megatron.core.transformer import multi_token_prediction
from megatron.training import get_args, inprocess_restart, pretrain, print_rank_0

from megatron_came.rules import Rule, stop_if_refused
from megatron_came.versions import release

Batch = dict[str, Any]  # tensors, or None for what the rank has no use of

_DEFAULTS = {"tokenizer_type": "GPT2BPETokenizer"}  # those of Megatron's own pretrain_gpt.py


def build_tokenizer(args: Namespace) -> Any:
    """Build the tokenizer that the flags ask for."""
    if release() < (0, 17):
        from megatron.core.tokenizers.text.utils.build_tokenizer import build_tokenizer as build
    else:
        from megatron.core.tokenizers.utils.build_tokenizer import build_tokenizer as build
    return build(args)


def mtp_on_this_rank(config: Any, vp_stage: int | None) -> bool:
    """Whether a model chunk of this rank holds layers of multi-token prediction."""
    here: Callable[..., bool] = multi_token_prediction.mtp_on_this_rank
    if release() < (0, 18):
        return bool(here(config, ignore_virtual=False, vp_stage=vp_stage))
    return bool(
        here(
            layout=config.pipeline_model_parallel_layout,
            mtp_num_layers=config.mtp_num_layers,
            ignore_virtual=False,
            vp_stage=vp_stage,
        )
    )


def share_batch(
    data: Iterator[dict[str, torch.Tensor]] | None, keys: Iterable[str], *, predicts_further: bool
) -> Batch:
    """Take the next micro-batch and hand it out to tensor- and context-parallel ranks.

    Tensor-parallel rank 0 has the data. ``predicts_further`` says whether this rank's chunk needs
    all of a batch for multi-token prediction.
    """
    from megatron.core.utils import get_batch_on_this_cp_rank

    if mpu.get_tensor_model_parallel_rank() == 0 and data is None:
        raise RuntimeError("Megatron gave tensor-parallel rank 0 no data loader.")
    if release() < (0, 18):
        from megatron.training.utils import get_batch_on_this_tp_rank

        whole = get_batch_on_this_tp_rank(data, mtp_on_this_rank=predicts_further)
        part: Batch = get_batch_on_this_cp_rank({key: whole.get(key) for key in keys})
        return part
    part = get_batch_on_this_cp_rank(
        _over_tensor_parallel_ranks(data, keys, predicts_further),
        is_hybrid_cp=False,
        cp_group=mpu.get_context_parallel_group(),
    )
    return {key: part.get(key) for key in keys}


def _over_tensor_parallel_ranks(
    data: Iterator[dict[str, torch.Tensor]] | None, keys: Iterable[str], predicts_further: bool
) -> Batch:
    from megatron.core.utils import get_batch_on_this_tp_rank

    args = get_args()
    tp_rank = mpu.get_tensor_model_parallel_rank()
    batch: Batch = {}
    if data is not None and tp_rank == 0:
        sample = next(data)
        batch = {key: sample[key].cuda(non_blocking=True) for key in keys if key in sample}
    packed = "is_sft" if release() < (0, 19) else "has_cu_seqlens"
    shared: Batch = get_batch_on_this_tp_rank(
        batch,
        **{packed: False},  # pretrain_gpt refuses packed sequences
        is_hybrid_cp=False,
        create_attention_mask_in_dataloader=args.create_attention_mask_in_dataloader,
        broadcast_src_rank=mpu.get_tensor_model_parallel_src_rank(),
        broadcast_group=mpu.get_tensor_model_parallel_group(),
        cp_size=args.context_parallel_size,
        tp_rank=tp_rank,
        micro_batch_size=args.micro_batch_size,
        seq_length=args.seq_length,
        mtp_on_this_rank=predicts_further,
        pipeline_model_parallel_size=args.pipeline_model_parallel_size,
        is_pipeline_first_stage=mpu.is_pipeline_first_stage(),
        is_pipeline_last_stage=mpu.is_pipeline_last_stage(),
    )
    return shared


def train(
    datasets: Callable[..., Any],
    forward_step: Callable[..., Any],
    embedding_ranks: Callable[[list[int]], list[int]],
    rules: Iterable[Rule],
) -> None:
    """Read the flags and train as they say, with what builds data sets and runs the model.

    Raises:
        SystemExit: a rule refuses the flags.
    """
    # For --inprocess-restart, which starts ``pretrain`` again where a rank is lost.
    run, store = inprocess_restart.maybe_wrap_for_inprocess_restart(pretrain)
    more = {"store": store, "get_embedding_ranks": embedding_ranks}
    kind = ModelType.encoder_or_decoder
    if release() < (0, 18):
        from megatron.training.arguments import parse_args

        stop_if_refused(rules, parse_args())
        run(datasets, build_gpt, kind, forward_step, args_defaults=_DEFAULTS, **more)
        return
    from megatron.training.argument_utils import pretrain_cfg_container_from_args
    from megatron.training.arguments import parse_and_validate_args

    args = parse_and_validate_args(args_defaults=_DEFAULTS)
    stop_if_refused(rules, args)
    if release() < (0, 19):
        settings = pretrain_cfg_container_from_args(args)
        run(settings, datasets, build_gpt, kind, forward_step, **more)
        return
    from megatron.training.argument_utils import gpt_config_from_args

    settings = pretrain_cfg_container_from_args(args, gpt_config_from_args(args))
    run(settings, datasets, kind, forward_step, **more)


def build_gpt(
    pre_process: bool = True,
    post_process: bool = True,
    vp_stage: int | None = None,
    config: Any = None,
    pg_collection: Any = None,
) -> Any:
    """Build this rank's chunk of a GPT as the flags say, for a loop that does not do so itself."""
    from megatron.core.models.gpt import GPTModel, gpt_layer_specs
    from megatron.training.arguments import core_transformer_config_from_args

    args = get_args()
    config = config or core_transformer_config_from_args(args)
    engine = args.transformer_impl == "transformer_engine"
    norms = {"normalization": args.normalization, "qk_l2_norm": args.qk_l2_norm}
    further = None
    if args.mtp_num_layers is not None:
        # Further tokens are predicted by layers like the last, as in Megatron's gpt_builders.py.
        layers = gpt_layer_specs.get_gpt_decoder_layer_specs(config, engine, **norms)
        further = gpt_layer_specs.get_gpt_mtp_block_spec(
            config, layers[-1], engine, vp_stage=vp_stage
        )
    print_rank_0("building GPT model ...")
    return GPTModel(
        config=config,
        transformer_layer_spec=gpt_layer_specs.get_gpt_decoder_block_spec(
            config, engine, vp_stage=vp_stage, **norms
        ),
        mtp_block_spec=further,
        vocab_size=args.padded_vocab_size,
        max_sequence_length=args.max_position_embeddings,
        pre_process=pre_process,
        post_process=post_process,
        fp16_lm_cross_entropy=args.fp16_lm_cross_entropy,
        share_embeddings_and_output_weights=not args.untie_embeddings_and_output_weights,
        position_embedding_type=args.position_embedding_type,
        rotary_percent=args.rotary_percent,
        rotary_base=args.rotary_base,
        rope_scaling=args.use_rope_scaling,
        vp_stage=vp_stage,
        pg_collection=pg_collection,
    )
