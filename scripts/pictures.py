"""Draw the pictures of README and docs: bytes per parameter, and the quick start's losses.

Needs neither a GPU nor a training: bytes come from the model of ``megatron-came memory``, losses
from the run that is kept in ``benchmarks/results``.
"""

import json
from pathlib import Path

from megatron_came import megatron, memory
from megatron_came.memory.megatron_flags import parse
from megatron_came.memory.optimizers import ADAMW, LABELS, Optimizer, came, precision_aware
from megatron_came.memory.prediction import Launch
from megatron_came.quickstart.settings import OPTIMIZERS
from megatron_came.terminal.pictures import draw_bars, draw_losses
from megatron_came.terminal.quiet import quiet

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
LOSSES = ROOT / "benchmarks" / "results" / "2026-11-29-cpu-gpt2.json"
GPT2_MEDIUM = """
    --num-layers 24 --hidden-size 1024 --num-attention-heads 16 --seq-length 1024
    --max-position-embeddings 1024 --tokenizer-type NullTokenizer --vocab-size 50257 --mock-data
    --micro-batch-size 1 --train-iters 10 --lr 1e-4 --bf16 --use-distributed-optimizer
"""


def bytes_per_parameter() -> dict[str, dict[str, float]]:
    """What one rank keeps of a parameter of GPT-2 Medium from step to step, by component."""
    usual = Launch(parse(GPT2_MEDIUM.split(), 1))
    smaller = Launch(parse([*GPT2_MEDIUM.split(), "--grad-reduce-in-bf16"], 1))
    args = usual.args
    smallest = came(args, "int8", "remainder")
    adam = precision_aware("fp8", "fp8", "remainder")
    bars: list[tuple[str, Launch, Optimizer]] = [
        ("AdamW", usual, ADAMW),
        ("CAME\nfp32", usual, came(args)),
        ("CAME\nbf16", usual, came(args, "bf16")),
        ("CAME\nint8", usual, came(args, "int8")),
        ("Adam,\nprecision-\naware", usual, adam),
        ("CAME\nint8 +\nremainders", usual, smallest),
        ("Adam,\nprecision-\naware,\nbf16 grads", smaller, adam),
        ("CAME\nint8 +\nremainders,\nbf16 grads", smaller, smallest),
    ]
    found = {}
    for name, launch, optimizer in bars:
        (stage,) = launch.stages
        components = stage.components(optimizer)
        found[name] = {
            label: getattr(components, key) / stage.parameters
            for key, label in LABELS.items()
            if key != "buffers"
        }
    return found


def main() -> None:
    """Draw both."""
    with quiet():
        megatron.install()
        memory.install()
        bars = bytes_per_parameter()
    draw_bars(bars, "bytes a parameter, bf16 weights", DOCS / "bytes_per_parameter.png")
    names = {optimizer.key: optimizer.name for optimizer in OPTIMIZERS}
    runs = json.loads(LOSSES.read_text())["runs"]
    draw_losses({names[run["optimizer"]]: run["losses"] for run in runs}, DOCS / "gpt2.png")


if __name__ == "__main__":
    main()
