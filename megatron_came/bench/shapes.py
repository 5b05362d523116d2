"""Shapes of the parameters of well-known models, and two small ones, as Megatron lays them out."""

from collections.abc import Callable
from functools import partial

Shape = tuple[int, ...]


def _gpt2(layers: int, hidden: int, vocabulary: int = 50304, positions: int = 1024) -> list[Shape]:
    """GPT-2 with tied embeddings; its 50257 words are padded to 50304."""
    # The norm before attention, attention, the norm behind it, and the perceptron.
    layer: list[Shape] = [(hidden,)] * 2 + [(3 * hidden, hidden), (3 * hidden,)]
    layer += [(hidden, hidden), (hidden,)] + [(hidden,)] * 2
    layer += [(4 * hidden, hidden), (4 * hidden,), (hidden, 4 * hidden), (hidden,)]
    return [(vocabulary, hidden), (positions, hidden), *(layer * layers), (hidden,), (hidden,)]


def _llama(layers: int, hidden: int, ffn: int) -> list[Shape]:
    """The layers of a Llama without grouped queries; no embeddings."""
    # RMSNorm: no biases.
    attention: list[Shape] = [(hidden,), (3 * hidden, hidden), (hidden, hidden)]
    mlp: list[Shape] = [(hidden,), (2 * ffn, hidden), (hidden, ffn)]
    return (attention + mlp) * layers


# Layers and hidden size; a head of attention has 64 elements.
GPT2 = {
    "gpt2-small": (12, 768),
    "gpt2-medium": (24, 1024),
    "gpt2-large": (36, 1280),
    "gpt2-xl": (48, 1600),
}
_MODELS: dict[str, tuple[int, Callable[[int], list[Shape]]]] = {
    # nanoGPT's model of single characters, 65 padded to 128
    "nanogpt-char": (6, lambda layers: _gpt2(layers, 384, 128, 256)),
    "gpt2-nano": (2, partial(_gpt2, hidden=192)),
    "gpt2-mini": (4, partial(_gpt2, hidden=256)),
    **{name: (layers, partial(_gpt2, hidden=hidden)) for name, (layers, hidden) in GPT2.items()},
    "llama-7b-layer": (1, lambda layers: _llama(layers, 4096, 11008)),
}
MODELS = tuple(_MODELS)


def shapes_of(model: str, layers: int | None = None) -> list[Shape]:
    """Return the shapes of the parameters of one of ``MODELS``, with so many layers if any."""
    usual, shapes = _MODELS[model]
    return shapes(usual if layers is None else layers)
