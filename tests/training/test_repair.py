"""A run goes on from a repaired checkpoint, near the one that was never damaged."""

import pytest
import torch

from megatron_came.checkpoint_files.folder import find, opened
from megatron_came.tools import inspect, repair
from megatron_came.tools.checkpoints.repairing import overwrite
from tests.training.harness import Case, losses, run, worst_difference

FLAGS = (
    "--optimizer came --use-distributed-optimizer --dist-ckpt-optim-fully-reshardable "
    "--ckpt-format torch_dist --train-iters 12 "
)
# Of the loss, after eight iterations without some of the momentum.
NEAR = 0.03


def shift(folder):
    """Shift main weights and momentum of the first layers, as Megatron-LM#5077 does."""
    with opened(find(folder)) as checkpoint:
        for tensor in checkpoint.tensors:
            if tensor.kind in ("main weights", "momentum") and "decoder.layers" in tensor.name:
                chunk = tensor.chunks[0]
                values = tensor.box(chunk.offsets, chunk.sizes)
                overwrite(tensor, chunk, values.flatten().roll(7).view(values.shape))


@pytest.mark.matrix
@pytest.mark.parametrize("precision", ["", "--bf16 "], ids=["fp32", "bf16"])
def test_a_run_goes_on_from_a_repaired_checkpoint(tmp_path, precision, capsys):
    flags = FLAGS + precision
    save, new = tmp_path / "save", tmp_path / "new"
    first = run(
        2, [Case("straight", f"{flags} --save {save} --save-interval 4 ")], tmp_path / "first"
    )
    (save / "latest_checkpointed_iteration.txt").write_text("4")
    shift(save)
    assert inspect.main([str(save), "--verify"]) == 1
    assert repair.main([str(save), str(new)]) == 0
    assert inspect.main([str(new), "--verify"]) == 0
    assert "begins at zero" in capsys.readouterr().out
    second = run(2, [Case("resumed", f"{flags} --load {new} ")], tmp_path / "second")
    straight, resumed = losses(first["straight"])[4:], losses(second["resumed"])
    assert len(resumed) == 8
    tolerance = torch.finfo(torch.bfloat16).eps if precision else 1e-6
    assert abs(resumed[0] / straight[0] - 1) < tolerance  # the model's weights are the same
    assert worst_difference(resumed, straight) < NEAR
