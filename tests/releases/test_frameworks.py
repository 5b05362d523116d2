"""CAME in verl's and Megatron-Bridge's own builders of configurations and optimizers."""

import pytest

from tests.releases.places import frameworks
from tests.support.running import seen_by_host_worker

# Which of the launchers' ways a host's is the same as: the schedule sets weight decay by groups.
SAME = {"verl": "installed", "bridge": "scheduled", "bridge_plain": "scheduled"}


@pytest.fixture(scope="module")
def seen():
    folder = frameworks()
    return seen_by_host_worker(*{*SAME, *SAME.values()}, "--packages", str(folder))


@pytest.mark.parametrize("way", SAME)
def test_it_is_the_came_of_the_launchers(seen, way):
    expected = {key: value for key, value in seen[SAME[way]].items() if key != "said"}
    assert expected["optimizer"] == "CAME"
    assert {key: seen[way].get(key) for key in expected} == expected
