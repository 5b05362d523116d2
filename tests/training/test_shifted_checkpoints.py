"""Megatron's own fully reshardable checkpoints of padded buckets: one line says that they shift."""

import re

import pytest

from tests.training.harness import Case, run

SHORT = "--train-iters 2 --lr-warmup-iters 0 --save-interval 2 --ckpt-format torch_dist "
FULL = "--use-distributed-optimizer --dist-ckpt-optim-fully-reshardable "
ODD = "--overlap-grad-reduce --ddp-bucket-size 5003 "
WRITES, READS = "saves main weights and optimizer state of this run shifted", "may be shifted"
# Flags, and what is said. Nothing is where no optimizer state gets shifted.
SAID = {
    "padded": ("--optimizer adam " + FULL + ODD + "--save {folder}", WRITES),
    "resumed": ("--optimizer adam " + FULL + "--load {folder}", READS),
    "resumed-padded": (
        "--optimizer adam " + FULL + ODD + "--load {folder} --save {folder}",
        WRITES,
    ),
    "one-bucket": ("--optimizer adam " + FULL + "--save {folder}-other", None),
    "no-optimizer": ("--optimizer adam " + FULL + ODD + "--save {folder}-x --no-save-optim", None),
    "came": ("--optimizer came " + FULL + ODD + "--save {folder}-came", None),
}


@pytest.fixture(scope="module")
def said(tmp_path_factory):
    """What was printed by each case."""
    folder = tmp_path_factory.mktemp("shifted")
    cases = [
        Case(name, SHORT + flags.format(folder=folder / "saved"))
        for name, (flags, _) in SAID.items()
    ]
    run(2, cases, folder)
    printed = re.split(r"=== case (\S+)\n", (folder / "log").read_text())
    lines = dict.fromkeys(SAID, "")
    for name, text in zip(printed[1::2], printed[2::2], strict=True):
        lines[name] += text  # of both ranks
    return lines


@pytest.mark.parametrize("name", SAID)
def test_the_fault_is_named_once_where_it_strikes(said, name):
    _, expected = SAID[name]
    lines = [line for line in said[name].splitlines() if "Megatron-LM#5077" in line]
    assert len(lines) == (expected is not None)
    for line in lines:
        assert line.startswith("megatron_came: WARNING: ")
        assert expected in line
        assert "--no-load-optim" in line
