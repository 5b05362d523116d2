"""The launch scripts in examples/ train: shrunken, on the CPU."""

import shutil
from pathlib import Path

import pytest

from tests.support.examples import Cluster, losses, smoke, write_dataset


@pytest.fixture(scope="module")
def run_of_ours(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, str], Path, str]:
    """A dataset as the scripts' variables name it, a run on it, and its log."""
    folder = tmp_path_factory.mktemp("run")
    write_dataset(folder / "text", 100)
    data = {"DATA_PATH": str(folder / "text")}
    return data, folder, smoke("gpt2_medium/train_8gpus.sh", folder / "run", **data)


def test_on_data(run_of_ours: tuple[dict[str, str], Path, str]) -> None:
    _, _, log = run_of_ours
    assert sorted(losses(log)) == [1, 2, 3, 4]
    assert "padded vocab (size: 50257) with 47 dummy tokens (new size: 50304)" in log
    assert "--num-layers 24 -> 4" in log


def test_tensorboard_gets_a_log(run_of_ours: tuple[dict[str, str], Path, str]) -> None:
    pytest.importorskip("tensorboard")
    _, folder, _ = run_of_ours
    assert list((folder / "run" / "tensorboard-smoke").glob("events*"))


@pytest.mark.parametrize(
    "script",
    [
        "gpt2_medium/train_1gpu.sh",
        pytest.param("gpt2_medium/train_tp2_pp2_dp2.sh", marks=pytest.mark.matrix),
    ],
)
def test_resumed_in_another_layout(
    run_of_ours: tuple[dict[str, str], Path, str], script: str, tmp_path: Path
) -> None:
    data, folder, _ = run_of_ours
    shutil.copytree(folder / "run", tmp_path / "run")
    log = smoke(script, tmp_path / "run", **data)
    assert "SMOKE=1: resuming from" in log
    assert sorted(losses(log)) == [5, 6, 7, 8]


@pytest.mark.matrix
@pytest.mark.parametrize("script", ["llama/train_8gpus.sh", "moe/train_8gpus.sh"])
def test_smoke(tmp_path: Path, script: str) -> None:
    log = smoke(script, tmp_path)
    seen = losses(log)
    assert sorted(seen) == [1, 2, 3, 4]
    assert all(8 < loss < 13 for loss in seen.values())


@pytest.mark.matrix
def test_several_nodes_and_adam(tmp_path: Path) -> None:
    cluster = Cluster(tmp_path, nodes=2)
    log = smoke(
        "gpt2_medium/train_slurm.sh",
        tmp_path / "run",
        path=cluster.path,
        OPTIMIZER="adam",
        **cluster.variables,
    )
    assert "processes 16 -> 2" in log
    assert sorted(losses(log)) == [1, 2, 3, 4]
