"""Known numbers in buffers of random shapes, buckets and paddings, saved and loaded elsewhere.

What is saved under a parameter's name, and what each rank has after it was loaded on another number
of ranks, must be those numbers, bit for bit.
"""

import pytest

from tests.training.drawn_buckets import come_back

PAIRS = [(2, 3)]
MORE_PAIRS = [(3, 2), (4, 3), (3, 4), (2, 4), (4, 1), (1, 4), (2, 2)]


@pytest.mark.parametrize(
    "pair",
    [*PAIRS, *(pytest.param(pair, marks=pytest.mark.matrix) for pair in MORE_PAIRS)],
    ids=lambda pair: "to".join(map(str, pair)),
)
def test_every_parameter_comes_back(tmp_path, pair):
    come_back(tmp_path, pair)
