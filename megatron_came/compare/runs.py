"""One run after another, each kept as a line of a file."""

import json
import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from megatron_came.compare.optimizers import Contender, state_bytes
from megatron_came.compare.presets import Preset
from megatron_came.compare.tasks import Task
from megatron_came.terminal.paths import write_whole
from megatron_came.terminal.sentences import CommandError

_POINTS = 20  # of a curve


@dataclass(frozen=True)
class Key:
    """What tells a run from the others of a comparison."""

    optimizer: str
    rate: float  # the highest of the schedule
    seed: int  # of weights and batches
    batch: int  # samples a step


@dataclass(frozen=True)
class Run(Key):
    """What a run measured."""

    # Iteration, seconds of training so far, mean training loss since the point before, held-out
    # loss.
    curve: list[tuple[int, float, float, float]]
    seconds: float  # of training, held-out losses left out
    step_seconds: float  # of them, in the optimizer
    state_bytes: int  # what the optimizer keeps, measured from its tensors
    weights: int  # number of the model's parameters
    diverged: bool  # whether a loss was not finite, which ended it

    @property
    def key(self) -> Key:
        """Which run it is."""
        return Key(self.optimizer, self.rate, self.seed, self.batch)

    @property
    def final(self) -> float:
        """The held-out loss at the end; infinite if it diverged."""
        return math.inf if self.diverged else self.curve[-1][3]

    @property
    def best(self) -> float:
        """The smallest held-out loss."""
        return min((point[3] for point in self.curve), default=math.inf)


class Results:
    """The finished runs of a folder, a line each, and the settings that all of them share."""

    def __init__(self, folder: Path, settings: dict[str, object]) -> None:
        self._file, about = folder / "runs.jsonl", folder / "settings.json"
        settings = json.loads(json.dumps(settings))
        text = self._file.read_text() if self._file.exists() else ""
        if not about.exists() and text:
            raise CommandError(
                f"{folder} holds runs of unknown settings, since {about.name} is gone: name another"
                " folder with --output."
            )
        found = settings
        if about.exists():
            with _undamaged(str(about)):
                found = dict(json.loads(about.read_text()))
        if found != settings:
            every = {**settings, **found}
            changed = next(key for key in every if settings.get(key) != found.get(key))
            raise CommandError(
                f"{folder} holds runs with {changed} {found.get(changed)}, not"
                f" {settings.get(changed)}: name another folder with --output."
            )
        write_whole(about, (json.dumps(settings, indent=1) + "\n").encode())
        if not text.endswith("\n"):  # it was being written when the process was killed
            text = text[: text.rfind("\n") + 1]
            write_whole(self._file, text.encode())
        self.runs = {}
        for number, line in enumerate(text.splitlines(), start=1):
            with _undamaged(f"{self._file}, line {number},"):
                run = Run(**json.loads(line))
                _ = run.final + run.best + hash(run.key)
            self.runs[run.key] = run

    def add(self, run: Run) -> None:
        """Keep a run."""
        self.runs[run.key] = run
        with self._file.open("a") as file:
            file.write(json.dumps(asdict(run)) + "\n")


@contextmanager
def _undamaged(place: str) -> Iterator[None]:
    try:
        yield
    except (IndexError, TypeError, ValueError):
        raise CommandError(
            f"{place} is not what a comparison writes: name another folder with --output."
        ) from None


def train(
    task: Task,
    preset: Preset,
    contender: Contender,
    key: Key,
    told: Callable[[float, float], None] = lambda share, loss: None,
) -> Run:
    """Train once; ``told`` gets the share that is done, and the loss, after every iteration."""
    device = torch.device("cuda" if preset.gpu else "cpu")
    torch.manual_seed(key.seed)
    model = task.build().to(device)
    optimizers = contender.build(model, preset.betas)
    generator = torch.Generator().manual_seed(key.seed)
    curve: list[tuple[int, float, float, float]] = []
    since: list[float] = []
    clock, stepping = _Clock(device), _Clock(device)
    every = max(1, preset.iterations // _POINTS)
    for done in range(preset.iterations):
        with clock:
            inputs, targets = (each.to(device) for each in task.draw(key.batch, generator))
            _set_rate(optimizers, key.rate, done, preset.iterations)
            loss = _loss(task, model, inputs, targets)
            model.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            with stepping:
                for optimizer in optimizers:
                    optimizer.step()
            since.append(loss.item())
        told((done + 1) / preset.iterations, since[-1])
        if not math.isfinite(since[-1]):
            break
        if (done + 1) % every == 0 or done + 1 == preset.iterations:
            with torch.no_grad():
                held = _loss(task, model, *(each.to(device) for each in task.held_out)).item()
            mean = sum(since) / len(since)
            curve.append((done + 1, round(clock.seconds, 4), round(mean, 5), round(held, 5)))
            since = []
            if not math.isfinite(held):
                break
    return Run(
        **asdict(key),
        curve=[point for point in curve if math.isfinite(point[3])],
        seconds=round(clock.seconds, 4),
        step_seconds=round(stepping.seconds, 4),
        state_bytes=state_bytes(optimizers),
        weights=sum(param.numel() for param in model.parameters()),
        diverged=bool(since) or not math.isfinite(curve[-1][3]),
    )


def _loss(task: Task, model: nn.Module, inputs: Tensor, targets: Tensor) -> Tensor:
    cuda = inputs.device.type == "cuda"
    with torch.autocast(inputs.device.type, torch.bfloat16, enabled=cuda):
        return task.loss(model(inputs), targets)


def _set_rate(
    optimizers: Sequence[torch.optim.Optimizer], rate: float, done: int, iterations: int
) -> None:
    """Warm up over a tenth of the run, then go down along a cosine to a tenth of the rate."""
    warm = min((done + 1) / max(iterations // 10, 1), 1.0)
    decay = 0.55 + 0.45 * math.cos(math.pi * done / iterations)
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = rate * warm * decay


class _Clock:
    """Adds up the seconds that pass in its ``with`` statements."""

    def __init__(self, device: torch.device) -> None:
        self.seconds, self._started, self._device = 0.0, 0.0, device

    def _now(self) -> float:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        return time.perf_counter()

    def __enter__(self) -> None:
        self._started = self._now()

    def __exit__(self, *error: object) -> None:
        self.seconds += self._now() - self._started
