"""Models of which two modules hold the same weights."""

from unittest import mock


def in_place(name):
    """Build GPT models that share what ``name`` says."""
    from megatron.core.models.gpt import GPTModel

    original = GPTModel.__init__

    def sharing(self, *args, **kwargs):
        original(self, *args, **kwargs)
        share(*MODELS[name](self))

    return mock.patch.object(GPTModel, "__init__", sharing)


def share(one, other):
    for name, module in one.named_modules():
        for key in list(module._parameters):
            setattr(other.get_submodule(name), key, getattr(module, key))


MODELS = {
    # Two layers, which checkpoints hold in one tensor.
    "shared-layers": lambda model: model.decoder.layers[:2],
    # Tensors with names of their own, tied by hand.
    "shared-words": lambda model: (model.embedding.word_embeddings, model.output_layer),
}
