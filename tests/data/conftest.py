"""Tokenizers of every kind, made once."""

import json
from pathlib import Path

import pytest
import sentencepiece

from megatron_came.data.tokenizer import GPT2_END, Gpt2Bpe, HuggingFace, train_tokenizer
from tests.support.datasets import TEXTS


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("sentencepiece") / "tokenizer.model"
    train_tokenizer(TEXTS, path, vocab_size=700)
    return path


@pytest.fixture(scope="session")
def usual_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with SentencePiece's own defaults: text normalised, white space run together."""
    prefix = tmp_path_factory.mktemp("usual") / "tokenizer"
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=(line for text in TEXTS for line in text.splitlines()),
        model_prefix=str(prefix),
        vocab_size=700,
        minloglevel=2,
    )
    return prefix.with_suffix(".model")


@pytest.fixture(scope="session")
def gpt2(tmp_path_factory: pytest.TempPathFactory) -> Gpt2Bpe:
    """A small vocabulary of GPT-2's kind."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    folder = tmp_path_factory.mktemp("gpt2")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=500, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(TEXTS, trainer)
    tokenizer.model.save(str(folder))
    files = Gpt2Bpe(folder / "vocab.json", folder / "merges.txt")
    vocabulary = json.loads(files.vocab_file.read_text())
    files.vocab_file.write_text(json.dumps({**vocabulary, GPT2_END: len(vocabulary)}))
    return files


@pytest.fixture(scope="session")
def hugging_face(gpt2: Gpt2Bpe, tmp_path_factory: pytest.TempPathFactory) -> HuggingFace:
    """The same as a folder, with a token before each document, as Llama's tokenizer has."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    tokenizer = Tokenizer(models.BPE.from_file(str(gpt2.vocab_file), str(gpt2.merge_file)))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.add_special_tokens([GPT2_END, "<s>"])
    start = ("<s>", tokenizer.token_to_id("<s>"))
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[start]
    )
    folder = tmp_path_factory.mktemp("hugging_face")
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<s>",
        "eos_token": GPT2_END,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return HuggingFace(folder)
