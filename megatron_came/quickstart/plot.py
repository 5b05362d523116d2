"""The picture of the loss curves."""

from collections.abc import Mapping
from pathlib import Path

from megatron_came.data.files import whole_files
from megatron_came.quickstart.train import Result


def plot_losses(results: Mapping[str, Result], picture: Path) -> None:
    """Draws each optimizer's loss over the iterations into a PNG file."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4.5), layout="constrained")
    for name, result in results.items():
        axes.plot(range(1, len(result.losses) + 1), result.losses, label=name)
    axes.set_xlabel("iteration")
    axes.set_ylabel("training loss")
    axes.grid(alpha=0.3)
    axes.legend()
    with whole_files(picture) as (partial,):
        figure.savefig(partial, format="png", dpi=150)
    pyplot.close(figure)
