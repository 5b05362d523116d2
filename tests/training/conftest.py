"""What several modules' tests look at, made once."""

import pytest

from tests.training import layouts as matrix
from tests.training.harness import Case, run


@pytest.fixture(scope="session")
def start_from(tmp_path_factory):
    """Flags that load the weights which every case of a comparison starts from."""
    folder = tmp_path_factory.mktemp("weights")
    save = f"--save {folder / 'checkpoint'} --save-interval 1 --no-save-optim --no-save-rng "
    run(
        1,
        [
            Case(
                "weights",
                f"--optimizer sgd --lr 1e-12 --min-lr 0 --lr-warmup-iters 0 --train-iters 1 {save}",
            )
        ],
        folder,
    )
    return f"--load {folder / 'checkpoint'} --finetune --no-load-optim --no-load-rng "


@pytest.fixture(scope="session")
def layouts_folder(tmp_path_factory):
    """Where ``layouts`` keeps logs and checkpoints."""
    return tmp_path_factory.mktemp("layouts")


@pytest.fixture(scope="session")
def layouts(layouts_folder):
    """What the ranks of every layout saw."""
    return matrix.train(layouts_folder)
