"""What is trained: small models in plain PyTorch, and their data."""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional

from megatron_came.compare.presets import Preset
from megatron_came.data.corpus import Corpus
from megatron_came.terminal.sentences import CommandError

type Batch = tuple[Tensor, Tensor]
_BLOCK = 4096  # bytes of text; one block of twenty is held out
_IGNORED = -100  # targets that cross entropy leaves out
_MASKED = 0.15


@dataclass(frozen=True)
class Task:
    """A model and its data."""

    build: Callable[[], nn.Module]  # from PyTorch's seed
    draw: Callable[[int, torch.Generator], Batch]  # so many samples, to train on
    held_out: Batch  # never trained on, the same for all runs
    loss: Callable[[Tensor, Tensor], Tensor]  # of the model's outputs and the targets
    data: str  # a digest of the data


class Transformer(nn.Module):
    """A GPT or BERT on bytes, or with ``classes`` a ViT; no dropout.

    Args:
        preset: sizes.
        places: length of a sequence.
        inputs: a byte's values, or numbers of a patch.
        classes: 0 for the logits of each place, else those of the whole.
        causal: whether a place sees those before it alone.
    """

    def __init__(
        self, preset: Preset, places: int, inputs: int, *, classes: int = 0, causal: bool = False
    ) -> None:
        super().__init__()
        width = preset.width
        self.embed = nn.Linear(inputs, width) if classes else nn.Embedding(inputs, width)
        self.places = nn.Embedding(places, width)
        layer = nn.TransformerEncoderLayer(
            width, preset.heads, 4 * width, 0.0, batch_first=True, norm_first=True
        )
        self.layers = nn.TransformerEncoder(layer, preset.layers, nn.LayerNorm(width), False)
        self.head = nn.Linear(width, classes) if classes else None
        mask = nn.Transformer.generate_square_subsequent_mask(places) if causal else None
        self.register_buffer("mask", mask, persistent=False)
        for param in self.parameters():
            if param.dim() > 1:
                nn.init.normal_(param, std=0.02)

    def forward(self, inputs: Tensor) -> Tensor:
        """Return logits: (batch, places, 256) of bytes, or (batch, classes)."""
        mask = self.get_buffer("mask") if self.mask is not None else None
        x = self.layers(self.embed(inputs) + self.places.weight, mask, is_causal=mask is not None)
        if self.head is None:
            return functional.linear(x, self.get_parameter("embed.weight"))
        return self.head(x.mean(1))  # type: ignore[no-any-return]


def _text(preset: Preset, paths: Sequence[Path], *, masked: bool) -> Task:
    corpus = Corpus.from_paths(paths) if paths else Corpus.python_library()
    data = b"\n".join(text.encode() for text in corpus)
    blocks = torch.frombuffer(bytearray(data), dtype=torch.uint8)
    blocks = blocks[: len(blocks) // _BLOCK * _BLOCK].view(-1, _BLOCK)
    if len(blocks) < 20 or preset.length >= _BLOCK:
        raise CommandError(
            f"There are {len(data)} bytes of text, and {20 * _BLOCK} are needed: name more files."
        )
    held = torch.arange(len(blocks)) % 20 == 19
    draw = partial(_masked if masked else _next, preset.length)
    return Task(
        lambda: Transformer(preset, preset.length, 256, causal=not masked),
        partial(draw, blocks[~held].flatten()),
        draw(blocks[held].flatten(), 64, torch.Generator().manual_seed(0)),
        lambda out, targets: functional.cross_entropy(
            out.flatten(0, 1).float(), targets.flatten(), ignore_index=_IGNORED
        ),
        hashlib.sha256(data).hexdigest(),
    )


def _windows(length: int, data: Tensor, size: int, generator: torch.Generator) -> Tensor:
    starts = torch.randint(len(data) - length, (size, 1), generator=generator)
    return data[starts + torch.arange(length)].long()


def _next(length: int, data: Tensor, size: int, generator: torch.Generator) -> Batch:
    windows = _windows(length + 1, data, size, generator)
    return windows[:, :-1], windows[:, 1:]


def _masked(length: int, data: Tensor, size: int, generator: torch.Generator) -> Batch:
    windows = _windows(length, data, size, generator)
    chosen = torch.rand(windows.shape, generator=generator) < _MASKED
    return windows.masked_fill(chosen, 0), windows.masked_fill(~chosen, _IGNORED)


def _regression(preset: Preset, paths: Sequence[Path]) -> Task:
    """A network's outputs, with noise in those that are trained on."""

    def network() -> nn.Module:
        sizes = [preset.width] * (preset.layers + 1)
        hidden = [nn.Sequential(nn.Linear(*pair), nn.ReLU()) for pair in pairwise(sizes)]
        return nn.Sequential(*hidden, nn.Linear(preset.width, 1))

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        teacher = network().requires_grad_(False)
        spread = torch.logspace(0, -2, preset.width)  # some inputs matter more than others

    def draw(noise: float, size: int, generator: torch.Generator) -> Batch:
        inputs = torch.randn(size, preset.width, generator=generator) * spread
        clean = 10 * teacher(inputs)
        return inputs, clean + noise * torch.randn(clean.shape, generator=generator)

    held_out = draw(0.0, 1024, torch.Generator().manual_seed(0))
    return Task(network, partial(draw, 0.1), held_out, functional.mse_loss, "teacher of seed 0")


def _image(preset: Preset, paths: Sequence[Path]) -> Task:
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        raise CommandError(
            "The preset image takes its pictures from scikit-learn, which is not installed:"
            " pip install scikit-learn."
        ) from None
    pictures, labels = map(torch.from_numpy, load_digits(return_X_y=True))
    pictures = (pictures.float() - pictures.float().mean()) / pictures.float().std()
    patches = pictures.view(-1, 4, 2, 4, 2).transpose(2, 3).reshape(-1, 16, 4)
    held = torch.arange(len(labels)) % 5 == 4

    def draw(size: int, generator: torch.Generator) -> Batch:
        chosen = torch.nonzero(~held).flatten()
        chosen = chosen[torch.randint(len(chosen), (size,), generator=generator)]
        return patches[chosen], labels[chosen]

    return Task(
        lambda: Transformer(preset, 16, 4, classes=10),
        draw,
        (patches[held], labels[held]),
        functional.cross_entropy,
        "digits of scikit-learn",
    )


TASKS: dict[str, Callable[[Preset, Sequence[Path]], Task]] = {
    "gpt": partial(_text, masked=False),
    "bert": partial(_text, masked=True),
    "regression": _regression,
    "image": _image,
}
