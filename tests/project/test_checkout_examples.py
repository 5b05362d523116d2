"""The launch scripts of BERT and T5, which run what only a checkout of Megatron-LM has."""

from pathlib import Path

import pytest

from tests.support.examples import dry_run, run, write_checkout


def test_a_shorter_run_of_bert_has_the_long_warmup_of_its_recipe(tmp_path: Path) -> None:
    lm = str(write_checkout(tmp_path))
    words = dry_run("bert/train_8gpus.sh", TRAIN_ITERS="1000", MEGATRON_LM=lm)
    assert words[words.index("--lr-warmup-iters") + 1] == "200"


@pytest.mark.parametrize(
    ("variables", "flags"),
    [
        ({}, "HuggingFaceTokenizer --tokenizer-model o/made-up/tokenizer"),
        (
            {"DATA_PATH": "my/text", "TOKENIZER_MODEL": "my/tokenizer"},
            "HuggingFaceTokenizer --tokenizer-model my/tokenizer",
        ),
        ({"DATA_PATH": "my/text", "VOCAB_FILE": "v.txt"}, "{} --vocab-file v.txt"),
    ],
    ids=["made-up", "huggingface", "vocabulary"],
)
def test_tokenizers_of_checkouts(tmp_path: Path, variables: dict[str, str], flags: str) -> None:
    lm = str(write_checkout(tmp_path))
    cases = {"bert": ("LowerCase", False), "t5": ("Case", "VOCAB_FILE" not in variables)}
    for model, (case, marked) in cases.items():
        script = f"{model}/train_8gpus.sh"
        words = " ".join(dry_run(script, MEGATRON_LM=lm, OUTPUT="o", **variables))
        assert f" --data-path {variables.get('DATA_PATH', 'o/made-up/sentences')} " in words
        assert "--tokenizer-type " + flags.format(f"BertWordPiece{case}") in words
        assert ("--tokenizer-special-tokens <extra_id_0> " in words) == marked


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({}, "No package has pretrain_t5.py: name a checkout of Megatron-LM with MEGATRON_LM."),
        ({"MEGATRON_LM": "/none"}, "MEGATRON_LM=/none has no pretrain_t5.py: name a checkout"),
        (
            {"MEGATRON_LM": "{}", "DATA_PATH": "my/text"},
            "DATA_PATH=my/text needs the tokenizer that it was made with: name its folder",
        ),
    ],
    ids=["no checkout", "another folder", "no tokenizer"],
)
def test_mistakes_with_checkouts(tmp_path: Path, variables: dict[str, str], message: str) -> None:
    lm = write_checkout(tmp_path)
    variables = {name: value.format(lm) for name, value in variables.items()}
    done = run("t5/train_8gpus.sh", DRY_RUN="1", **variables)
    assert done.returncode == 1
    assert f"train_8gpus.sh: {message}" in done.stderr
    assert done.stdout == ""
