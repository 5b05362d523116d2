"""Files that one rank alone cannot read or write: all ranks end, in a sentence that says which."""

import re

import pytest

from tests.training.harness import SMALL, Case, losses, run

SMALLER = SMALL + "--micro-batch-size 2 --num-layers 1 "
DO = "--use-distributed-optimizer "
STAGES = SMALL + DO + "--micro-batch-size 2 --pipeline-model-parallel-size 2 "
FORMATS = {
    "dp": DO,
    "exchanged": DO + "--ckpt-fully-parallel-load ",
    "legacy": DO + "--ckpt-format torch ",
}
# By format, which of the files that a rank opens fails: its summary before and in Megatron's
# reading, the common state, and what holds tensors.
READ = {"dp": (1, 4, 6, 7, 11, 15, 17), "exchanged": (3, 4, 10, 11, 12, 16, 17), "legacy": (2, 5)}


@pytest.fixture(scope="module")
def seen(tmp_path_factory):
    folder = tmp_path_factory.mktemp("failing")
    saves = "--save-interval 2 --exit-interval 4 --save "
    file = folder / "file"
    file.touch()
    cases = [
        Case("dp", f"{SMALLER}{DO}{saves}{folder / 'dp'}"),
        Case("legacy", f"{SMALLER}{FORMATS['legacy']}{saves}{folder / 'legacy'}"),
        Case("full", f"{SMALLER}{DO}{saves}{folder / 'full'}", variant="full-disc", fails=True),
        Case("resumed", f"{SMALLER}{DO}--load {folder / 'full'}"),
        Case("stages", f"{STAGES}{saves}{folder / 'stages'}"),
        Case("unlisted", f"{STAGES}--load {folder / 'stages'}", "unlisted-on-last", fails=True),
        Case("no memory", f"{STAGES}--load {folder / 'stages'}", "no-memory", fails=True),
        Case("file", f"{SMALLER}{DO}{saves}{file}", fails=True),
    ]
    for kind, numbers in READ.items():
        loads = f"{SMALLER}{FORMATS[kind]}--load {folder / kind.replace('exchanged', 'dp')}"
        cases += [
            Case(f"{kind}-{nth}", loads, variant=f"unreadable-{nth}", fails=True) for nth in numbers
        ]
    return run(2, cases, folder / "runs")


def error_of(ranks):
    (error,) = {rank["error"] for rank in ranks}
    assert error.startswith("SystemExit: megatron_came: ")
    return error


@pytest.mark.parametrize(
    "name", [f"{kind}-{nth}" for kind, numbers in READ.items() for nth in numbers]
)
def test_a_file_that_one_rank_cannot_read(seen, name):
    error = error_of(seen[name])
    assert re.search(
        r"iter_0000004/(\.metadata|metadata.json|__._0.distcp|mp_rank_00)| file\)", error
    )
    assert not any(rank["losses"] for rank in seen[name])


def test_a_file_that_one_rank_cannot_write(seen):
    error = error_of(seen["full"])
    assert re.search(
        r"iteration 4 cannot be saved in .*/full \(see the lines above; \d+ MiB", error
    )
    assert losses(seen["resumed"])[:2] == losses(seen["dp"])[2:]


def test_a_stage_that_cannot_say_what_it_would_load(seen):
    assert "/stages cannot be read (AssertionError: a list)" in error_of(seen["unlisted"])


def test_memory_that_runs_out_is_not_blamed_on_the_checkpoint(seen):
    for rank, ended in enumerate(seen["no memory"]):
        said = f"rank {rank} ran out of memory while the checkpoint in .*/stages was loaded"
        assert re.search(said, ended["error"])
        assert "damaged" not in ended["error"]


def test_a_file_in_the_place_of_a_folder(seen):
    assert re.search("--save .*/file is no folder: name another", error_of(seen["file"]))
    assert not any(rank["losses"] for rank in seen["file"])
