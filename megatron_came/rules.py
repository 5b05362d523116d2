"""What is refused: one kind of rule, of which each room that refuses something has a table."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from megatron_came.versions import SUPPORTED, release
from megatron_came.voice import stop


class Settings:
    """Settings by the names of flags, None for those that there are not."""

    def __init__(self, given: Any) -> None:
        self._given = given

    def __getattr__(self, name: str) -> Any:
        return getattr(self._given, name, None)

    def __contains__(self, name: str) -> bool:
        return hasattr(self._given, name)


@dataclass(frozen=True, slots=True)
class Rule:
    """A flag of which some values are refused, or settings that do not go together.

    The sentence says what is wrong and what to do, with ``{given}`` for the flag as it was typed,
    ``{at.NAME}`` for another of the settings and ``{release}`` for Megatron's.
    """

    sentence: str
    flag: str = ""  # whose values are refused; none where ``when`` alone decides
    works: tuple[object, ...] = ()  # that are not, beside "not given" (None, False, 0 or nothing)
    when: Callable[[Settings], object] = lambda settings: True  # a further condition
    argument: str = ""  # the flag's name among the settings, where it is another
    releases: tuple[str, ...] = SUPPORTED  # of Megatron in which the rule holds

    @property
    def destination(self) -> str:
        """The flag's name among the settings."""
        return self.argument or name_of(self.flag)

    def problem(self, settings: Settings) -> str | None:
        """Return the sentence, if the settings are refused."""
        installed = "" if self.releases == SUPPORTED else "{}.{}".format(*release())
        if installed and installed not in self.releases:
            return None
        value = getattr(settings, self.destination) if self.flag else True
        is_set = bool(value) or value == ""  # such as an empty variable of a shell's
        # Megatron makes enumerations of some flags, whose members are named as what was typed.
        if not is_set or getattr(value, "name", value) in self.works or not self.when(settings):
            return None
        typed = value
        if (name := name_of(self.flag)) in settings:  # Megatron may derive one from it
            typed = getattr(settings, name)
        given = self.flag if typed is True else f"{self.flag} {_as_typed(typed)}"
        return self.sentence.format(given=given, at=settings, release=installed)


def refusal(rules: Iterable[Rule], settings: Any) -> str | None:
    """Return the sentence of the first rule that refuses the settings, or None."""
    known = Settings(settings)
    return next(filter(None, (rule.problem(known) for rule in rules)), None)


def stop_if_refused(rules: Iterable[Rule], settings: Any) -> None:
    """End this process with the sentence of the first rule that refuses the settings.

    Raises:
        SystemExit: there is one.
    """
    problem = refusal(rules, settings)
    if problem is not None:
        stop(problem)


def name_of(flag: str) -> str:
    """Return how argparse calls a flag."""
    return flag.removeprefix("--").replace("-", "_")


def flag_of(name: str) -> str:
    """Return the flag that argparse calls so."""
    return "--" + name.replace("_", "-")


def _as_typed(value: object) -> str:
    if isinstance(value, list | tuple):
        return " ".join(map(_as_typed, value))
    return str(getattr(value, "name", value))
