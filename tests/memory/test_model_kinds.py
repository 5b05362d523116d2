"""BERT and T5: their parameters counted by hand, and launches that name their scripts."""

import json

import pytest

from megatron_came import megatron, memory
from megatron_came.megatron.errors import UnsupportedError
from megatron_came.memory import command, meta_model
from megatron_came.memory.launch_command import from_words
from megatron_came.memory.megatron_flags import parse
from megatron_came.memory.model_kinds import kind_of
from megatron_came.memory.prediction import Launch
from tests.support.memory_flags import BF16, DATA, DO, SMALL, launch, pp, tp

WORDS = (
    DATA + "--global-batch-size 64 --vocab-size 30522 --max-position-embeddings 512 " + BF16 + DO
)
BERT = WORDS + "--num-layers 24 --hidden-size 1024 --num-attention-heads 16 --seq-length 512 "
T5 = WORDS + (
    "--encoder-num-layers 12 --decoder-num-layers 10 --hidden-size 768 --num-attention-heads 12 "
    "--kv-channels 64 --ffn-hidden-size 3072 --encoder-seq-length 512 --decoder-seq-length 128 "
)
# Of bert-large-uncased with both heads, as published; Megatron pads its 30,522 words.
PUBLISHED_BERT = 336_226_108


@pytest.fixture(scope="module", autouse=True)
def replaced():
    megatron.install()
    memory.install()


@pytest.mark.parametrize(
    ("flags", "ranks", "words"),
    [
        ("", 1, 30592),
        ("--spec local ", 2, 30592),
        ("--attention-backend flash ", 1, 30592),
        (tp(2) + pp(2), 4, 30720),
    ],
)
def test_bert_large_has_its_known_size(flags, ranks, words):
    run = Launch(parse((BERT + flags).split(), ranks, "examples/bert/pretrain_bert.py"))
    assert run.parameters == PUBLISHED_BERT + (words - 30522) * (1024 + 1)
    assert sum(stage.layers for stage in run.stages) == 24


@pytest.mark.parametrize(("flags", "ranks", "words"), [("", 1, 30592), (tp(2), 4, 30720)])
def test_t5_has_the_size_of_its_matrices(flags, ranks, words):
    run = Launch(parse((T5 + flags).split(), ranks, "pretrain_t5.py"))
    hidden, ffn, norm = 768, 3072, 2 * 768
    attention = 4 * (hidden * hidden + hidden)
    mlp = 2 * hidden * ffn + ffn + hidden
    encoder = attention + mlp + 2 * norm
    decoder = 2 * attention + mlp + 3 * norm
    # Megatron takes the number of the encoder's layers for the decoder's as well.
    assert run.args.num_layers == 12
    layers = 12 * encoder + 12 * decoder + 2 * norm
    assert run.parameters == layers + (words + 512) * hidden + words
    (stage,) = run.stages
    assert stage.layers == 24


def test_words_of_bert_are_cut_by_tensor_parallelism():
    one, two = (
        Launch(parse((BERT + flags).split(), 2, "pretrain_bert.py")).stages[0].parameters
        for flags in ("", tp(2))
    )
    assert 0.49 < two / one < 0.52


@pytest.mark.parametrize(
    ("words", "script", "kind"),
    [
        ("torchrun --nproc-per-node 2 a/pretrain_bert.py --x 1", "a/pretrain_bert.py", "bert"),
        (
            "torchrun --nproc-per-node 2 -m megatron_came.launch pretrain_t5.py --x 1",
            "pretrain_t5.py",
            "t5",
        ),
        ("pretrain_bert.py --x 1", "pretrain_bert.py", "bert"),
        ("torchrun --nproc-per-node 2 -m megatron_came.pretrain_gpt --x 1", "", "gpt"),
        ("--x 1", "", "gpt"),
    ],
)
def test_the_script_says_which_model_it_is(words, script, kind):
    found = from_words(words.split())
    assert found.flags == ["--x", "1"]
    assert not script or found.script == script
    assert kind_of(found.script) == kind


def test_a_launch_of_bert_is_predicted_and_advised(capsys):
    words = ["--json", "--gpus", "2", "--advise", "1GiB", "pretrain_bert.py", *BERT.split()]
    assert command.main(words) == 0
    values = json.loads(capsys.readouterr().out)
    assert values["parameters"] == PUBLISHED_BERT + (30592 - 30522) * 1025
    assert values["advice"]["needs"] > 2**30


def test_t5_has_no_pipeline(capsys):
    words = ["--gpus", "2", "pretrain_t5.py", *(T5 + pp(2)).split()]
    assert command.main(words) == 2
    said = capsys.readouterr().err
    assert "--pipeline-model-parallel-size 2 does not go with T5" in said


@pytest.mark.parametrize(
    ("said", "expected"),
    [
        ("RMSNorm needs TENorm", "Megatron does not build this model of its local layers, which"),
        ("heads must be even", r"predicted with: heads must be even\.$"),
        ("no bias, when instantiating SharedMLP when instantiating MoELayer", r"with: no bias\.$"),
    ],
)
def test_messages_name_no_classes(said, expected, monkeypatch):
    def fail(args):
        raise ValueError(said)

    monkeypatch.setattr(meta_model, "build_function", fail)
    with pytest.raises(UnsupportedError, match=expected) as raised:
        launch(SMALL).stages  # noqa: B018
    assert "Norm" not in str(raised.value)
