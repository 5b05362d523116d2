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
