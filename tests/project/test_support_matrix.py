"""The table of layouts in docs/support.md says what the tests compare with the authors."""

import re
from pathlib import Path

import pytest

from tests.training import layouts, other_models
from tests.training.harness import data_parallel_size, parallel_size

PAGE = (Path(__file__).parents[2] / "docs" / "support.md").read_text()
MODELS = ("gpt2", "llama", "moe", "bert", "t5")


def _cases(model):
    """Flags and number of ranks of each case of a model."""
    if model in other_models.LAYOUTS:
        return [(flags, 2) for flags in other_models.LAYOUTS[model].values()]
    cases = [
        (flags, ranks)
        for ranks, found in layouts.LAYOUTS[model].items()
        for flags in found.values()
    ]
    cases.append((layouts.DO, 1))
    if model == "gpt2":
        cases += [
            (flags, ranks) for ranks, found in layouts.PLAIN.items() for flags in found.values()
        ]
    return cases


def _flag(name):
    return lambda flags, ranks: {"yes"} if name in flags else set()


# What a case says about a row: the values that it covers.
ROWS = {
    "tensor parallel": lambda flags, ranks: {parallel_size(flags, "tensor-model")},
    "sequence parallel, at tensor parallel": lambda flags, ranks: (
        {parallel_size(flags, "tensor-model")} if "--sequence-parallel" in flags else set()
    ),
    "pipeline parallel": lambda flags, ranks: {parallel_size(flags, "pipeline-model")},
    "virtual pipeline stages": _flag("--num-layers-per-virtual-pipeline-stage"),
    "context parallel": lambda flags, ranks: {parallel_size(flags, "context")},
    "expert parallel": lambda flags, ranks: {parallel_size(flags, "expert-model")},
    "expert tensor parallel": lambda flags, ranks: (
        {parallel_size(flags, "expert-tensor")} if "--expert-tensor" in flags else set()
    ),
    "data parallel": lambda flags, ranks: {data_parallel_size(flags, ranks)},
    "distributed optimizer": _flag("--use-distributed-optimizer"),
    "... with overlapped communication, odd buckets": _flag("--overlap-param-gather"),
    "... two instances": _flag("--num-distributed-optimizer-instances 2"),
}


def _table():
    lines = PAGE.split("| layout |", 1)[1].split("\n\n", 1)[0].splitlines()[2:]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return {re.sub(r" \[\d\]", "", row[0]): row[1:] for row in cells}


@pytest.mark.parametrize("row", ROWS)
@pytest.mark.parametrize(("column", "model"), list(enumerate(MODELS)))
def test_the_table_says_what_is_tested(row, column, model):
    cell = _table()[row][column]
    claimed = (
        {"yes"} if cell.startswith("yes") else {int(size) for size in re.findall(r"\d+", cell)}
    )
    covered = set().union(*(ROWS[row](flags, ranks) for flags, ranks in _cases(model)))
    if row != "expert tensor parallel":
        covered -= {1}
    assert claimed == covered


def test_every_row_is_checked():
    assert _table().keys() == ROWS.keys() | {"frozen parameters, stages and ranks that own nothing"}
    assert layouts.FROZEN
