"""BERT and T5 in Megatron's training loop against the authors' optimizer on one rank; see ``make
test-all``."""

import pytest

from tests.training.harness import Case, losses, run, run_chains, worst_difference
from tests.training.layouts import CAME, DO
from tests.training.other_models import LAYOUTS, MODELS

pytestmark = pytest.mark.matrix

TOLERANCE = 2e-6  # see test_training

NAMES = [f"{model}-{name}" for model, layouts in LAYOUTS.items() for name in layouts]


@pytest.fixture(scope="module")
def seen(tmp_path_factory):
    """What the ranks saw, by name of the case."""
    folder = tmp_path_factory.mktemp("models")
    once = "--optimizer sgd --lr 1e-12 --min-lr 0 --lr-warmup-iters 0 --train-iters 1 "
    saving = "--save-interval 1 --no-save-optim --no-save-rng "
    chains, two = [], []
    for model, flags in MODELS.items():
        place = folder / model
        start = f"{CAME}--load {place} --finetune --no-load-optim --no-load-rng {flags}"
        chains.append(
            [
                Case(f"weights-{model}", f"{once}{saving}--save {place} {flags}", f"came+{model}"),
                Case(f"oracle-{model}", start, f"oracle+{model}"),
            ]
        )
        two += [
            Case(f"{model}-{name}", start + layout, f"came+{model}")
            for name, layout in LAYOUTS[model].items()
        ]
        two.append(Case(f"fault-{model}", start + DO, f"no_dp_sum+{model}"))
    return run_chains(chains, folder / "ranks1") | run(2, two, folder / "ranks2")


@pytest.mark.parametrize("name", NAMES)
def test_losses_equal_the_authors_optimizer(seen, name):
    ours, theirs = losses(seen[name]), losses(seen["oracle-" + name.split("-")[0]])
    assert len(ours) == 20
    assert theirs[-1] < theirs[0] - 0.2  # it trains, or nothing is compared
    assert worst_difference(ours, theirs) <= TOLERANCE


@pytest.mark.parametrize("model", MODELS)
def test_a_missing_reduction_is_seen(seen, model):
    ours, theirs = losses(seen[f"fault-{model}"]), losses(seen[f"oracle-{model}"])
    assert worst_difference(ours, theirs) > 10 * TOLERANCE
