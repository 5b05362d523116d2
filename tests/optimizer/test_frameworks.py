"""The examples and lines for other frameworks, where these are installed (extra "hosts")."""

import copy
import json
import re
from pathlib import Path

import pytest
import torch

from tests.support.running import run_python

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples" / "huggingface"


def need(*packages):
    for package in packages:
        pytest.importorskip(package, reason=f"{package} is not installed: pip install .[hosts]")


def test_the_trainer_trains_and_resumes(tmp_path):
    need("transformers", "accelerate")
    command = (str(EXAMPLES / "trainer.py"), "--output", str(tmp_path), "--steps")
    for steps, more in ((20, ()), (30, ("--resume",))):
        done = run_python(*command, str(steps), *more)
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    saved = json.loads((tmp_path / "checkpoint-30" / "trainer_state.json").read_text())
    losses = {entry["step"]: entry["loss"] for entry in saved["log_history"] if "loss" in entry}
    assert losses[10] > losses[20] > losses[30]


def test_a_llama_is_fine_tuned_on_its_answers(tmp_path):
    need("transformers", "accelerate", "tokenizers")
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    words = ["[UNK]", "[EOS]", "###", "Instruction", ":", "Input", "Response"]
    words += ["count", "to", "up", "down", "one", "two", "three"]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, "[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    model, data = tmp_path / "llama", tmp_path / "data.json"
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2}
    config = LlamaConfig(vocab_size=len(words), num_hidden_layers=1, eos_token_id=1, **sizes)
    LlamaForCausalLM(config).save_pretrained(model)
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="[UNK]", eos_token="[EOS]"
    ).save_pretrained(model)
    up = {"instruction": "count up", "input": "to three", "output": "one two three"}
    data.write_text(json.dumps([up, {"instruction": "count down", "output": "three two one"}] * 8))
    done = run_python(
        *(str(EXAMPLES / "finetune.py"), "--model", str(model), "--data", str(data)),
        *("--output", str(tmp_path / "run"), "--batch", "8", "--lr", "1e-2", "--epochs", "20"),
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    found = [float(loss) for loss in re.findall(r"'loss': '?([\d.]+)", done.stdout)]
    assert len(found) == 40  # two steps an epoch: micro-batches of four are accumulated
    assert found[-1] < found[0] / 2
    assert (tmp_path / "run" / "model.safetensors").exists()


def run_fsdp2(*more):
    done = run_python(
        *("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"),
        *(str(EXAMPLES / "fsdp2.py"), *more),
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    return dict(re.findall(r"step (\d+) loss ([\d.]+)", done.stdout))


def test_fsdp2_of_accelerate_trains_and_resumes(tmp_path):
    need("transformers", "accelerate")
    whole = run_fsdp2("--steps", "6")
    folder = ("--checkpoint", str(tmp_path / "saved"))
    halves = run_fsdp2("--steps", "3", *folder) | run_fsdp2("--steps", "6", *folder)
    assert float(whole["5"]) < float(whole["0"])
    assert halves == whole


def test_the_container_of_the_docs_trains_in_torchtitan():
    need("torchtitan")
    (code,) = re.findall(
        r"```python\n(from dataclasses.*?)```",
        (ROOT / "docs" / "pytorch.md").read_text(),
        re.DOTALL,
    )
    found = {}
    exec(code, found)
    model = torch.nn.Sequential(torch.nn.Linear(4, 6), torch.nn.Linear(6, 4))

    def step(model, container):
        model(torch.ones(2, 4)).sum().backward()
        container.step()
        container.zero_grad()

    container = found["optimizer"].build(model_parts=[model])
    step(model, container)
    saved, copied = copy.deepcopy((container.state_dict(), model))
    resumed = found["optimizer"].build(model_parts=[copied])
    resumed.load_state_dict(saved)
    for each in ((model, container), (copied, resumed)):
        step(*each)
    assert resumed.optimizers[0].param_groups[0]["step"] == 2
    for ours, theirs in zip(model.parameters(), copied.parameters(), strict=True):
        assert torch.equal(ours, theirs)
