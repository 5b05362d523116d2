"""What the quick start trains, and the Megatron flags that say so."""

from dataclasses import dataclass
from pathlib import Path

from megatron_came.terminal.sentences import CommandError

_MOST = 10**6  # iterations: samples are counted in memory before the first one


@dataclass(frozen=True)
class Optimizer:
    """One that is compared: its name in the summary, and Megatron's, with its own flags."""

    name: str
    key: str
    flags: tuple[str, ...]


# CAME's authors advise 0.5 to 0.9 times AdamW's learning rate, and a third beta of 0.99 to 0.999
# beside a second of 0.95; so short a run wants averages as short as these.
OPTIMIZERS = (
    Optimizer("AdamW", "adam", ("--lr", "1e-3", "--adam-beta2", "0.95")),
    Optimizer("CAME", "came", ("--lr", "7e-4", "--came-beta2", "0.95", "--came-beta3", "0.995")),
)


@dataclass(frozen=True)
class Settings:
    """One quick start. Lengths are in tokens."""

    folder: Path = Path("quickstart")  # where everything goes
    text: tuple[Path, ...] = ()  # files and folders; none for the Python library's sources
    ranks: int = 2  # processes to train with
    port: int | None = None  # TCP port on which they meet; None for any free one
    bf16: bool = False  # whether weights are bf16 with fp32 main weights, or fp32
    iterations: int = 100
    layers: int = 4
    hidden: int = 256
    heads: int = 4
    sequence: int = 256
    vocabulary: int = 4096
    global_batch: int = 16  # sequences a step, over all ranks
    micro_batch: int = 8  # the most sequences that a rank takes at a time
    smallest_text: int = 200_000  # bytes; of less the tokenizer would learn nothing worth having

    def __post_init__(self) -> None:
        if self.iterations < 1:
            raise CommandError(f"{self.iterations} iterations are none: ask for 1 or more.")
        if self.iterations > _MOST:
            raise CommandError(f"{self.iterations} iterations are too many: {_MOST} at most.")
        if self.ranks < 1 or self.global_batch % self.ranks:
            allowed = [n for n in range(1, self.global_batch + 1) if self.global_batch % n == 0]
            raise CommandError(
                f"The batch of {self.global_batch} cannot be split over {self.ranks} ranks:"
                f" take one of {', '.join(map(str, allowed))}."
            )
        if self.port is not None and not 0 < self.port < 65536:
            raise CommandError(f"{self.port} is no port: name one from 1 to 65535.")

    @property
    def dataset(self) -> Path:
        """The indexed dataset, as ``--data-path`` names it."""
        return self.folder / "dataset" / "text"

    @property
    def steps(self) -> Path:
        """What each step was made from."""
        return self.folder / "steps.json"

    @property
    def tokenizer(self) -> Path:
        """The SentencePiece model."""
        return self.dataset.with_suffix(".model")

    def result(self, optimizer: Optimizer) -> Path:
        """The file of what a run measured."""
        return self.folder / f"{optimizer.key}.json"

    def run_folder(self, optimizer: Optimizer) -> Path:
        """A run's log and its report of memory."""
        return self.folder / optimizer.key

    def megatron_flags(self, optimizer: Optimizer) -> list[str]:
        """Megatron's flags for training this GPT-2 with an optimizer."""
        # What is not said is as in GPT-2: tied embeddings, biases, GELU, layer norm.
        model = f"""
            --num-layers {self.layers} --hidden-size {self.hidden}
            --num-attention-heads {self.heads} --seq-length {self.sequence}
            --max-position-embeddings {self.sequence} --position-embedding-type learned_absolute
            --hidden-dropout 0 --attention-dropout 0 --seed 1234 {"--bf16" if self.bf16 else ""}
        """
        training = f"""
            --split 100,0,0 --tokenizer-type GPTSentencePieceTokenizer --num-workers 0
            --train-iters {self.iterations} --global-batch-size {self.global_batch}
            --micro-batch-size {min(self.micro_batch, self.global_batch // self.ranks)}
            --lr-warmup-iters {self.iterations // 10} --lr-decay-style cosine --min-lr 1e-4
            --weight-decay 0.1 --clip-grad 1.0 --use-distributed-optimizer
            --eval-iters 0 --eval-interval {self.iterations + 1}
            --log-interval 1 --timing-log-level 1 --came-report-memory
        """
        # Plain PyTorch throughout: pip installs neither Transformer Engine nor apex.
        plain = """
            --transformer-impl local --attention-backend unfused --no-gradient-accumulation-fusion
            --no-masked-softmax-fusion --no-persist-layer-norm --no-bias-gelu-fusion
            --no-bias-dropout-fusion
        """
        named = ["--data-path", str(self.dataset), "--tokenizer-model", str(self.tokenizer)]
        words = f"{model} {training} {plain} --optimizer {optimizer.key}".split()
        return [*named, *words, *optimizer.flags]
