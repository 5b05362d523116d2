"""Buckets with padding between them, saved and loaded, on the core of every release."""

import pytest

from tests.releases.places import copy_of, wheel
from tests.training.drawn_buckets import come_back

RELEASES = ("0.16.1", "0.17.1", "0.18.2", "0.19.0")


@pytest.mark.parametrize("release", RELEASES)
def test_every_parameter_comes_back(tmp_path, release):
    come_back(tmp_path, (2, 3), search_path=wheel(release))


def test_every_parameter_comes_back_in_development(tmp_path):
    tree = copy_of("core_v0.20.0", tmp_path / "tree")
    come_back(tmp_path, (2, 3), search_path=tree)
