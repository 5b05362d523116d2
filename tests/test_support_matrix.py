"""The README's table of layouts says what the tests compare with the authors' optimizer."""

import re
from pathlib import Path

import pytest

from tests.training import test_layouts, test_training

README = (Path(__file__).parents[1] / "README.md").read_text()
MODELS = ("gpt2", "llama", "moe")


def _cases(model):
    """Flags and number of ranks of each case of a model."""
    cases = [
        (flags, ranks)
        for ranks, layouts in test_layouts.LAYOUTS[model].items()
        for flags in layouts.values()
    ]
    cases.append((test_layouts.DO, 1))
    if model == "gpt2":
        cases += [
            (flags, ranks)
            for ranks, layouts in test_training.LAYOUTS.items()
            for flags in layouts.values()
        ]
    return cases


def _size(flags, name):
    found = re.search(rf"--{name} (\d+)", flags)
    return int(found[1]) if found else 1


def _data_parallel(flags, ranks):
    kinds = ("tensor-model-parallel-size", "pipeline-model-parallel-size", "context-parallel-size")
    for kind in kinds:
        ranks //= _size(flags, kind)
    return ranks


def _flag(name):
    return lambda flags, ranks: {"yes"} if name in flags else set()


# What a case says about a row: the values that it covers.
ROWS = {
    "tensor parallel": lambda flags, ranks: {_size(flags, "tensor-model-parallel-size")},
    "sequence parallel, at tensor parallel": lambda flags, ranks: (
        {_size(flags, "tensor-model-parallel-size")} if "--sequence-parallel" in flags else set()
    ),
    "pipeline parallel": lambda flags, ranks: {_size(flags, "pipeline-model-parallel-size")},
    "virtual pipeline stages": _flag("--num-layers-per-virtual-pipeline-stage"),
    "context parallel": lambda flags, ranks: {_size(flags, "context-parallel-size")},
    "expert parallel": lambda flags, ranks: {_size(flags, "expert-model-parallel-size")},
    "expert tensor parallel": lambda flags, ranks: (
        {_size(flags, "expert-tensor-parallel-size")} if "--expert-tensor" in flags else set()
    ),
    "data parallel": lambda flags, ranks: {_data_parallel(flags, ranks)},
    "distributed optimizer": _flag("--use-distributed-optimizer"),
    "... with overlapped communication, odd buckets": _flag("--overlap-param-gather"),
    "... two instances": _flag("--num-distributed-optimizer-instances 2"),
}


def _table():
    lines = README.split("| layout |", 1)[1].split("\n\n", 1)[0].splitlines()[2:]
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
    assert test_layouts.FROZEN
