"""Megatron's BERT and T5 in place of the GPT of a worker's training loop, on bytes of real text.

megatron-core's wheel has the models; the scripts that train them are in checkouts alone.
"""

import contextlib
from copy import deepcopy
from functools import partial
from pathlib import Path
from unittest import mock

import numpy as np
import torch

from tests.training.layouts import DO, pp, tp

# BERT takes no other attention, and Megatron does not change it within a process. The loss is of
# all tokens of a batch, however it is cut: sequences have unlike numbers of masked ones.
_FLAGS = "--attention-backend auto --calculate-per-token-loss "
# At the usual rate its gradients grow twentyfold in 20 iterations, and so does rounding.
MODELS = {"bert": _FLAGS, "t5": _FLAGS + "--lr 3e-5 --min-lr 1e-5 "}
# Both on two ranks. Megatron's T5 has no pipeline.
LAYOUTS = {
    "bert": {"tp2-do": tp(2) + DO, "pp2": pp(2), "pp2-do": pp(2) + DO, "dp2-do": DO},
    "t5": {"tp2": tp(2), "tp2-do": tp(2) + DO, "dp2-do": DO},
}
MASK = 255  # the row that the vocabulary is padded with, and no byte of text in UTF-8
TEXT = Path(__file__).parents[2] / "LICENSE"  # which does not change, as the losses would with it


def _common(args):
    return {
        "vocab_size": args.padded_vocab_size,
        "max_sequence_length": args.max_position_embeddings,
        "share_embeddings_and_output_weights": True,
    }


def _build_bert(config, args, **stage):
    from megatron.core.models.bert.bert_layer_specs import bert_layer_local_spec
    from megatron.core.models.bert.bert_model import BertModel

    return BertModel(config, 2, bert_layer_local_spec, **_common(args), **stage)


def _build_t5(config, args, **stage):
    from megatron.core.models.T5 import T5Model, t5_spec

    return T5Model(
        config=config,
        encoder_config=deepcopy(config),
        transformer_encoder_layer_spec=t5_spec.get_t5_encoder_with_local_block_spec(
            config.num_layers
        ),
        transformer_decoder_layer_spec=t5_spec.get_t5_decoder_with_local_block_spec(
            config.num_layers
        ),
        **_common(args),
        **stage,
    )


def _masked(tokens):
    """Mask a sixth of the tokens, which ones depends on the sequence; returns them and where."""
    places = (torch.arange(tokens.shape[1]) * 7 + tokens[:, :1]) % 6 == 0
    return tokens.masked_fill(places, MASK), places


def _bert_loss(mask, order, output):
    from megatron_came.pretrain_gpt import loss_func

    losses, order_logits = output
    loss, *rest = loss_func(mask, losses)
    return loss + torch.nn.functional.cross_entropy(order_logits, order, reduction="sum"), *rest


def _run_bert(model, tokens):
    """Predict masked tokens, and of each sequence one bit; the ends of some are padding."""
    length = tokens.shape[1]
    inputs, places = _masked(tokens)
    kept = (torch.arange(length) < length - tokens[:, 1:2] % 5).long()
    halves = (torch.arange(length) >= length // 2).long().expand_as(tokens)
    output = model(inputs, kept, tokentype_ids=halves, lm_labels=tokens)
    return output, partial(_bert_loss, places * kept, tokens[:, 2] % 2)


def _run_t5(model, tokens):
    """Read all tokens with some of them masked, and write the second half."""
    from megatron.core.datasets.t5_dataset import T5MaskedWordPieceDataset

    from megatron_came.pretrain_gpt import loss_func

    half = tokens.shape[1] // 2
    inputs, labels, before = _masked(tokens)[0], tokens[:, half:], tokens[:, half - 1 : -1]
    masks = T5MaskedWordPieceDataset.config_attention_mask(inputs, before, None, None, True)
    output = model(inputs, before, *masks, lm_labels=labels)
    return output, partial(loss_func, torch.ones_like(labels))


def _train(build, run, datasets, forward_step, embedding_ranks, rules):
    """Stand in for what trains the GPT."""
    from megatron.core.enums import ModelType
    from megatron.core.tensor_parallel import broadcast_data
    from megatron.training import get_args, pretrain
    from megatron.training.argument_utils import pretrain_cfg_container_from_args
    from megatron.training.arguments import (
        core_transformer_config_from_args,
        parse_and_validate_args,
    )

    def provider(pre_process, post_process, config=None, pg_collection=None):
        args = get_args()
        config = core_transformer_config_from_args(args)
        return build(config, args, pre_process=pre_process, post_process=post_process)

    def forward(data, model):
        sample = None if data is None else next(data)
        return run(model, broadcast_data(["tokens"], sample, torch.int64)["tokens"])

    settings = pretrain_cfg_container_from_args(parse_and_validate_args())
    kind = ModelType.encoder_or_decoder
    pretrain(settings, datasets, kind, forward, provider, get_embedding_ranks=embedding_ranks)


def _documents(_tokenizer):
    """Stand in for Megatron's mock documents, whose numbers only count up."""
    texts = TEXT.read_bytes().split(b"\n\n")
    tokens = [np.frombuffer(text, np.uint8).astype(np.int64) for text in texts]
    documents = mock.MagicMock(sequence_lengths=np.array([*map(len, tokens)], np.int32))
    documents.__len__.return_value = len(tokens)
    documents.get = lambda index, offset=0, length=None: tokens[index][offset:][:length]
    return documents


@contextlib.contextmanager
def in_place(name):
    """Let ``megatron_came.pretrain_gpt`` train one of them."""
    from megatron.core.datasets import gpt_dataset

    from megatron_came import pretrain_gpt

    build, run = {"bert": (_build_bert, _run_bert), "t5": (_build_t5, _run_t5)}[name]
    with (
        mock.patch.object(pretrain_gpt, "train", partial(_train, build, run)),
        mock.patch.object(gpt_dataset, "MockGPTLowLevelDataset", _documents),
    ):
        yield
