"""The cheapest changes after which a launch fits into a GPU."""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from megatron_came.megatron.errors import UnsupportedError
from megatron_came.memory import fit, megatron_flags
from megatron_came.memory.changes import ADAM, CAME, OPTIMIZERS, Change, changes
from megatron_came.memory.launch_command import LaunchCommand
from megatron_came.memory.optimizers import Optimizer, of_launch
from megatron_came.memory.pages import human
from megatron_came.memory.prediction import Launch
from megatron_came.terminal.console import wrapped
from megatron_came.terminal.sentences import CommandError


@dataclass(frozen=True, slots=True)
class Option:
    """Changes after which a launch needs so many bytes of its fullest GPU."""

    changes: tuple[Change, ...]
    needs: int


# Bytes of the fullest GPU after changes; None for what is no launch.
Needs = Callable[[tuple[Change, ...]], int | None]


def _needs_of(command: LaunchCommand, objection: str) -> Needs:
    """Return what says what a launch needs; each combination of changes is tried once.

    Args:
        command: its flags and ranks.
        objection: Megatron's, to the launch as it is.
    """

    @functools.cache
    def needs(tried: tuple[Change, ...]) -> int | None:
        flags, ranks = command.flags, command.ranks or 1
        for change in tried:
            flags, ranks = change.applied(flags), change.ranks or ranks
        try:
            launch = Launch(megatron_flags.parse(flags, ranks, command.script))
            # Of what is not installed here Megatron may complain in any case.
            if megatron_flags.objection(launch.args) not in ("", objection):
                return None
            optimizer = of_launch(launch.args)
            assert optimizer is not None  # others are refused
            return launch.peak(optimizer)
        except (CommandError, UnsupportedError, ValueError):  # refused, by Megatron or here
            return None

    return needs


@dataclass(frozen=True, slots=True)
class Advice:
    """What makes a launch fit."""

    budget: int  # bytes of a GPU
    needs: int  # bytes of the fullest GPU of the launch as it is
    singles: list[Option]  # changes of which each is enough, the cheapest first; none where it fits
    # Of changes that are enough only together, few and cheap ones; where nothing is enough, all
    # that help. None where one is enough on as many GPUs.
    together: Option | None = None
    # Needs of Adam, as Megatron has it, in CAME's place, by name: of the launch where it fits, or
    # of changes that are enough together.
    others: dict[str, int] = field(default_factory=dict)


def advise(command: LaunchCommand, launch: Launch, trained: Optimizer, budget: int) -> Advice:
    """Find what makes a launch fit into so many bytes of each GPU.

    Args:
        command: its flags and ranks.
        launch: the same, read.
        trained: its optimizer.
        budget: bytes of a GPU.
    """
    needs_after = _needs_of(command, megatron_flags.objection(launch.args))
    needs = launch.peak(trained)
    if needs <= budget:
        adams = [change for change in changes(launch, None, None) if change.kind == ADAM]
        found = {change.name: needs_after((change,)) for change in adams if trained.is_came}
        return Advice(budget, needs, [], others={k: v for k, v in found.items() if v is not None})
    largest = fit.fit(launch, trained, budget)
    candidates = changes(launch, largest.micro_batch, largest.gpus)
    singles: list[Option] = []
    for change in candidates:
        # Of a kind the cheapest one is enough.
        if all(option.changes[0].kind != change.kind for option in singles):
            size = needs_after((change,))
            if size is not None and size <= budget:
                singles.append(Option((change,), size))
    if any(option.changes[0].ranks is None for option in singles):
        return Advice(budget, needs, singles)
    if singles:  # more GPUs alone
        candidates = [change for change in candidates if change.ranks is None]
    together = _together(needs_after, candidates, needs, budget)
    if singles and together.needs > budget:
        return Advice(budget, needs, singles)
    kinds = [change.kind for change in together.changes if change.kind in OPTIMIZERS]
    forms: dict[str, Option] = {}
    # Where it would be CAME that is trained with, Adam may be enough in its place.
    if together.needs <= budget and CAME in (kinds or [CAME if trained.is_came else ADAM]):
        forms = _with_adam(needs_after, candidates, together)
    enough = next((each for each in forms.values() if each.needs <= budget), None)
    if enough is not None and not trained.is_came:
        return Advice(budget, needs, singles, enough)
    others = {name: each.needs for name, each in forms.items()}
    return Advice(budget, needs, singles, together, others)


def _together(needs_after: Needs, candidates: Sequence[Change], needs: int, budget: int) -> Option:
    """Add changes that help, the cheapest first, until it fits; then leave out what it can."""
    kept: dict[str, Change] = {}
    for change in candidates:
        # One optimizer at a time.
        kind = "optimizer" if change.kind in OPTIMIZERS else change.kind
        tried = {**kept, kind: change}
        size = needs_after(tuple(tried.values()))
        if size is not None and size < needs:
            kept, needs = tried, size
        if needs <= budget:
            break
    for kind in reversed([*kept]):  # the dearest first
        fewer = tuple(change for other, change in kept.items() if other != kind)
        size = needs_after(fewer)
        # It must still fit or, where nothing fits, be no larger.
        if size is not None and size <= max(budget, needs):
            del kept[kind]
            needs = size
    return Option(tuple(kept.values()), needs)


def _with_adam(
    needs_after: Needs, candidates: Sequence[Change], together: Option
) -> dict[str, Option]:
    """Put Adam into the place of an optimizer, in each form that there is, by name."""
    rest = [change for change in together.changes if change.kind not in OPTIMIZERS]
    found = {}
    for adam in candidates:
        tried = tuple(sorted([*rest, adam], key=candidates.index))
        size = needs_after(tried) if adam.kind == ADAM else None
        if size is not None:
            found[adam.name] = Option(tried, size)
    return found


def text(advice: Advice, command: LaunchCommand, trained: Optimizer) -> list[str]:
    """Say what would make a launch fit."""
    budget, needs = advice.budget, advice.needs
    said = f"{human(needs)} of each GPU, which has {human(budget)}"
    if needs <= budget:
        lines = wrapped(f"This launch fits: with {trained.name} it needs {said}.")
        return lines + _others(advice, command)
    lines = [*wrapped(f"This launch does not fit: it needs {said}.")]
    if advice.singles:
        lines += ["Each of these is enough, the cheapest first:", ""]
        for number, option in enumerate(advice.singles, 1):
            lines += _described(f"{number}. ", option.changes[0], command)
            lines.append(f"   needs {human(option.needs)}, {human(budget - option.needs)} are left")
        if advice.together is None:
            return [*lines, "", *_verdict(advice.singles, _forms(command))]
        lines.append("")
    assert advice.together is not None
    least = advice.together.needs
    if advice.singles:
        lines += ["On the GPUs that there are these are, together, the cheapest first:", ""]
    elif least <= budget:
        lines += ["No change is enough alone. These are, together, the cheapest first:", ""]
    else:
        said = f"With all of these it still needs {human(least)}:"
        lines += [*wrapped(f"Nothing that is tried here makes it fit. {said}"), ""]
    for change in advice.together.changes:
        lines += _described("-  ", change, command)
    if least <= budget:
        lines += ["", f"Then it needs {human(least)}, {human(budget - least)} are left."]
        adam = next((each for each in advice.together.changes if each.kind == ADAM), None)
        if adam is not None:
            lines += wrapped(f"{adam.name} is enough with these: CAME is not needed.")
        lines += _others(advice, command)
    else:
        lines += ["", "Take more GPUs, GPUs with more memory, or a smaller model."]
    return lines


def _others(advice: Advice, command: LaunchCommand) -> list[str]:
    """Say whether Adam would fit in CAME's place, where that was tried."""
    fits = next((k for k, size in advice.others.items() if size <= advice.budget), None)
    if fits is not None:
        return wrapped(f"{fits} is enough: it would need {human(advice.others[fits])}.")
    if advice.others:
        return wrapped(f"With Adam it would not fit, in no form that {_forms(command)}.")
    return []


def _described(mark: str, change: Change, command: LaunchCommand) -> list[str]:
    first, *more = wrapped(f"   {change.said(command.flags)}")
    return [mark + first.strip(), *more, *wrapped(f"   costs: {change.cost}")]


def _forms(command: LaunchCommand) -> str:
    has_fsdp = "--use-megatron-fsdp" in command.flags
    return "is predicted with Megatron-FSDP" if has_fsdp else "Megatron has"


def _verdict(singles: Sequence[Option], forms: str) -> list[str]:
    """Say which optimizer is enough, where an optimizer alone makes it fit."""
    kinds = [option.changes[0].kind for option in singles]
    if ADAM in kinds:
        name = singles[kinds.index(ADAM)].changes[0].name
        return wrapped(f"{name} is enough: CAME is not needed for this launch to fit.")
    if CAME in kinds:
        return wrapped(f"Adam is not enough in any form that {forms}; CAME is.")
    return ["No optimizer alone is enough."]
