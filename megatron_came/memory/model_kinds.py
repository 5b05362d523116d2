"""Models of Megatron's training scripts other than GPT's, built as those scripts build them."""

import argparse
import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

GPT, BERT, T5 = "gpt", "bert", "t5"


def kind_of(script: str) -> str:
    """The model that a training script trains, by its name."""
    stem = Path(script).stem
    return next((kind for kind in (BERT, T5) if stem == f"pretrain_{kind}"), GPT)


def build_function(args: argparse.Namespace) -> tuple[Any, Callable[..., Any]]:
    """Return the transformer's settings, and what builds a pipeline stage or a chunk of it.

    Args:
        args: Megatron's arguments, for local layers, with ``model_kind`` unless it is a GPT.
    """
    from megatron.training.argument_utils import gpt_config_from_args
    from megatron.training.arguments import core_transformer_config_from_args

    kind = getattr(args, "model_kind", GPT)
    if kind == GPT:
        gpt = gpt_config_from_args(args)
        return gpt.transformer, gpt.get_builder_cls()(gpt).build_model
    config = core_transformer_config_from_args(args)
    build = {BERT: _bert, T5: _t5}[kind]

    def build_model(pg_collection: Any, **stage: Any) -> Any:
        return build(args, config, pg_collection, stage)

    return config, build_model


def _shared(args: argparse.Namespace) -> dict[str, Any]:
    return {
        "vocab_size": args.padded_vocab_size,
        "max_sequence_length": args.max_position_embeddings,
        "share_embeddings_and_output_weights": not args.untie_embeddings_and_output_weights,
        "parallel_output": True,
    }


def _bert(args: argparse.Namespace, config: Any, groups: Any, stage: dict[str, Any]) -> Any:
    from megatron.core.models.bert.bert_layer_specs import bert_layer_local_spec
    from megatron.core.models.bert.bert_model import BertModel

    return BertModel(
        config,
        num_tokentypes=2 if args.bert_binary_head else 0,  # of two sentences
        add_binary_head=args.bert_binary_head,
        transformer_layer_spec=bert_layer_local_spec,
        pg_collection=groups,
        **_shared(args),
        **stage,
    )


def _t5(args: argparse.Namespace, config: Any, groups: Any, stage: dict[str, Any]) -> Any:
    from megatron.core.models.T5 import T5Model
    from megatron.core.models.T5.t5_spec import (
        LNImpl,
        get_t5_decoder_with_local_block_spec,
        get_t5_encoder_with_local_block_spec,
    )

    stage.pop("vp_stage", None)  # T5 has one stage
    encoder_config = copy.deepcopy(config)
    encoder_config.num_layers = args.encoder_num_layers
    encoder = get_t5_encoder_with_local_block_spec(args.encoder_num_layers)
    decoder = get_t5_decoder_with_local_block_spec(config.num_layers)
    for layers in (encoder, decoder):
        # The last norm is Transformer Engine's, without which Megatron leaves it out.
        layers.layer_norm = layers.layer_norm or LNImpl
    return T5Model(
        config,
        encoder_config=encoder_config,
        transformer_encoder_layer_spec=encoder,
        transformer_decoder_layer_spec=decoder,
        position_embedding_type=args.position_embedding_type,
        relative_attention_num_buckets=args.relative_attention_num_buckets,
        relative_attention_max_distance=args.relative_attention_max_distance,
        **_shared(args),
        **stage,
    )
