"""The launch scripts of BERT and T5 train with the scripts of real checkouts, and resume."""

import importlib.util
import os
from importlib.metadata import version
from pathlib import Path

import pytest

from tests.releases.places import copy_of
from tests.support.examples import ROOT, losses, smoke
from tests.training.layouts import pp, tp

TAGS = ("core_v0.16.1", "core_v0.17.1", "core_v0.18.2", "core_v0.19.0")


@pytest.mark.skipif(
    importlib.util.find_spec("transformers") is None, reason="their tokenizers need transformers"
)
@pytest.mark.parametrize("tag", TAGS)
@pytest.mark.parametrize(("model", "layout"), [("bert", pp(2)), ("t5", tp(2))])
def test_trained_in_two_layouts(tmp_path: Path, tag: str, model: str, layout: str) -> None:
    if model == "t5" and tag < "core_v0.18" and version("transformers") >= "5":
        pytest.skip("Megatron's T5 tokenizer before 0.18 needs transformers 4")
    if (model, tag) == ("t5", "core_v0.16.1"):
        layout = ""  # it counts no tokens that are added, and pads otherwise at another size
    checkout, *packages = copy_of(tag, tmp_path / "checkout")
    variables = {
        "MEGATRON_LM": str(checkout),
        "PYTHONPATH": os.pathsep.join(
            [*map(str, packages), str(ROOT), os.environ.get("PYTHONPATH", "")]
        ),
    }
    script = f"{model}/train_8gpus.sh"
    first = losses(smoke(script, tmp_path / "run", **variables))
    log = smoke(script, tmp_path / "run", *layout.split(), **variables)
    assert "SMOKE=1: resuming from" in log
    assert (sorted(first), sorted(losses(log))) == ([1, 2, 3, 4], [5, 6, 7, 8])
    assert all(8 < loss < 13 for loss in (*first.values(), *losses(log).values()))
