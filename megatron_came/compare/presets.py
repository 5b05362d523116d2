"""What can be compared: one table of experiments."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Preset:
    """One experiment. Every optimizer of it starts from the same weights and sees the same data."""

    about: str  # one line for the help
    task: str  # a key of ``tasks.TASKS``
    # As ``optimizers.parse`` takes them; the first one is what others are held to.
    optimizers: tuple[str, ...]
    rates: tuple[float, ...] | None = None  # the same for all; None for those of each one's own
    seeds: int = 3  # how many, from 1 on
    batches: tuple[int, ...] = (16,)  # samples a step
    iterations: int = 300  # steps of a run, a tenth of them warm-up
    length: int = 64  # bytes of a sequence
    width: int = 64
    layers: int = 2
    heads: int = 4
    betas: tuple[float, float, float] = (0.9, 0.95, 0.995)  # CAME's; the first two are AdamW's
    gpu: bool = False  # whether it needs one


_NO_CONFIDENCE = "came+no-confidence"  # Adafactor with momentum
_VARIANTS = (_NO_CONFIDENCE, "came+cautious", "came+bias-correction", "came+int8")
_BETAS = (0.9, 0.99, 0.999, 0.9999)

PRESETS = {
    "nano": Preset(
        "a GPT of 0.12 M weights on bytes, ten optimizers",
        "gpt",
        ("adamw", "came", *_VARIANTS, "adafactor", "lion", "muon", "sgd"),
        iterations=200,
    ),
    "nano-full": Preset(
        "the same, longer, with batches of 4, 16 and 64: hours",
        "gpt",
        ("adamw", "came", "came+bias-correction", _NO_CONFIDENCE, "adafactor"),
        batches=(4, 16, 64),
        iterations=600,
    ),
    "gpt2-medium": Preset(
        "the layers of GPT-2 Medium on bytes, bf16; needs a GPU",
        "gpt",
        ("adamw", "came", "came+int8", "adafactor"),
        rates=(1e-4, 2e-4, 4e-4),
        iterations=2000,
        length=1024,
        width=1024,
        layers=24,
        heads=16,
        gpu=True,
    ),
    "betas": Preset(
        "beta2 by beta3 on a regression with noise",
        "regression",
        ("adamw", *(f"came+beta2={two}+beta3={three}" for two in _BETAS for three in _BETAS)),
        rates=(3e-4, 1e-3, 3e-3, 1e-2, 3e-2),
        batches=(32,),
        iterations=500,
    ),
    "beta3": Preset(
        "beta3 of 0.99 to 0.9999 on the GPT of nano",
        "gpt",
        ("adamw", *(f"came+beta3={three}" for three in (0.99, 0.995, 0.999, 0.9999))),
        iterations=200,
    ),
    "adafactor": Preset(
        "CAME, Adafactor with momentum and without, on a wider GPT",
        "gpt",
        ("came", _NO_CONFIDENCE, "adafactor"),
        iterations=150,
        width=128,
    ),
    "bert": Preset(
        "memory and loss against AdamW, on a BERT of 0.4 M weights",
        "bert",
        ("adamw", "came", "came+int8"),
        rates=(1e-3, 3e-3),
        iterations=200,
        width=128,
    ),
    "image": Preset(
        "a ViT on the 8 x 8 digits of scikit-learn",
        "image",
        ("adamw", "came", "came+bias-correction", _NO_CONFIDENCE, "adafactor", "sgd"),
        batches=(32,),
        iterations=600,
    ),
}
