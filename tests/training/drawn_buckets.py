"""Known numbers in buffers of random shapes, buckets and paddings, saved and loaded elsewhere."""

import os
import random
from dataclasses import asdict, dataclass, replace

from tests.training.harness import run

FORMATS = ("full", "full-efficient", "dp", "legacy")
# How many are drawn for each pair of numbers of ranks, which save and load; for long searches there
# are variables.
DRAWS = int(os.environ.get("CAME_BUCKET_DRAWS", "4"))
SEED = os.environ.get("CAME_BUCKET_SEED", "")


@dataclass
class Draw:
    """Parameters and settings of one save or load; see ``buckets_worker``."""

    name: str
    folder: str
    saves: bool
    parameters: list[tuple[list[int], str]]
    formats: tuple[str, ...]
    bucket_size: int | None
    busbw: bool
    precision: str
    grad_reduce_in_fp32: bool
    momentum: str
    main_params: str
    instances: int = 1

    def as_json(self, ranks: int) -> dict:
        return asdict(self)


def _shape(rng):
    most = {1: 400, 2: 60, 3: 12}
    dims = rng.choice((1, 1, 2, 2, 2, 3))
    return [rng.randint(1, most[dims]) for _ in range(dims)]


def _bucket_size(rng):
    return rng.choice((None, 1, 97, 640, 1009, 5003))


def draw(name, folder, rng):
    """Draw what is saved."""
    precision = rng.choice(("fp32", "bf16", "bf16", "fp16"))
    kinds = ["plain"] * 6 + ["frozen"] + ["fp32"] * (precision == "bf16")
    parameters = [(_shape(rng), rng.choice(kinds)) for _ in range(rng.randint(2, 12))]
    if rng.random() < 0.5:
        parameters[rng.randrange(len(parameters))] = (_shape(rng), "shared")
    parameters.append((_shape(rng), "plain"))  # not all are frozen
    remainder = precision == "bf16" and rng.random() < 0.5
    return Draw(
        name,
        str(folder),
        True,
        parameters,
        FORMATS,
        _bucket_size(rng),
        rng.random() < 0.3,
        precision,
        precision != "bf16" or rng.random() < 0.5,
        rng.choice(("fp32", "bf16", "int8")),
        "remainder" if remainder else "fp32",
    )


def elsewhere(case, rng):
    """Draw how it is loaded: dp_reshardable allows no other buckets."""
    for formats, buckets in (
        (("dp",), case.bucket_size),
        (("full", "full-efficient", "legacy"), _bucket_size(rng)),
    ):
        yield replace(
            case,
            name=f"{case.name}-{formats[0]}",
            saves=False,
            formats=formats,
            bucket_size=buckets,
            busbw=rng.random() < 0.3,
        )


def come_back(folder, pair, search_path=()):
    """Save on some ranks, load on others, and make sure that all numbers are what they were."""
    rng = random.Random(f"{pair} {SEED}")
    saves = [draw(f"draw{number}", folder / f"{number}", rng) for number in range(DRAWS)]
    loads = [load for case in saves for load in elsewhere(case, rng)]
    worker = {"worker": "tests.training.buckets_worker", "search_path": search_path}
    saved = run(pair[0], saves, folder / "save", **worker)
    loaded = run(pair[1], loads, folder / "load", **worker)
    wrong = {
        f"{name} on rank {rank}": seen["problems"]
        for name, ranks in (saved | loaded).items()
        for rank, seen in enumerate(ranks)
        if seen["problems"]
    }
    assert not wrong
    padded = [
        any(size != unpadded for buckets in seen[0]["buckets"] for size, unpadded in buckets[:-1])
        for seen in saved.values()
    ]
    assert any(padded)  # the draws reach what they are for
