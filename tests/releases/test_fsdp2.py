"""``--use-torch-fsdp2`` in the training loop of every release: losses, and a checkpoint."""

import pytest

from tests.releases.places import copy_of, wheel
from tests.training.harness import Case, losses, run, worst_difference

TOLERANCE = 2e-6
DDP = (
    "--optimizer came --ckpt-format torch_dist --num-layers 2 --train-iters 8 --lr-decay-iters 20 "
    "--untie-embeddings-and-output-weights "
)
FSDP2 = DDP + "--use-torch-fsdp2 "


def check(search_path, folder):
    cases = [
        Case("ddp", DDP),
        Case("straight", FSDP2 + f"--save {folder / 'saved'} --save-interval 4 "),
        Case("resumed", FSDP2 + f"--load {folder / 'saved'} --ckpt-step 4 "),
    ]
    seen = run(2, cases, folder / "seen", search_path=search_path)
    straight = losses(seen["straight"])
    assert len(straight) == 8
    assert worst_difference(straight, losses(seen["ddp"])) <= TOLERANCE
    assert losses(seen["resumed"]) == straight[4:]


@pytest.mark.parametrize("release", ["0.17.1", "0.18.2", "0.19.0"])
def test_losses_and_checkpoints(tmp_path, release):
    check(wheel(release), tmp_path)


@pytest.mark.parametrize("tag", ["core_v0.16.1", "core_v0.20.0"])
def test_losses_and_checkpoints_in_a_checkout(tmp_path, tag):
    check(copy_of(tag, tmp_path / "tree"), tmp_path)
