"""What a rule is given, and the two ways to run the book."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from slime.config.errors import ConfigError
from slime.config.facts import Facts
from slime.config.hf_config import HfConfig


@dataclass(frozen=True)
class Said:
    """One statement of a rule."""

    subject: str
    """The rule's file: model, layout, engines, ..."""
    what: str
    values: str = ""
    fix: str = ""
    decides: bool = False
    """Of something open: nothing is proven until it is known."""


class Values(dict):
    """Attribute -> value while rules run. A rule reads and derives values, and says what holds, what is wrong, what is open."""

    def __init__(
        self,
        start: Mapping[str, object],
        *,
        given: Iterable[str],
        door: str,
        facts: Facts,
        env: Mapping[str, str] | None = None,
    ) -> None:
        """env: the job's environment variables; None where nobody knows them."""
        super().__init__(start)
        self.given = frozenset(given)
        self.door = door
        self.facts = facts
        self.env = env
        self.notes: list[str] = []
        self.mistakes: list[str] = []
        self.held: list[tuple[str, str]] = []
        self.open: list[tuple[str, str, str, bool]] = []

    def derive(self, name: str, value: object, why: str) -> None:
        """Set a value that was not said, and write down why. Says nothing when the value is already that."""
        if self[name] != value:
            self[name] = value
            self.notes.append(f"{name} = {value!r}, because {why}")

    def require(self, condition: object, mistake: str, *, holds: str = "", values: str = "") -> bool:
        """`mistake`, one line with its values and after the last semicolon the way out, unless the condition holds."""
        if not condition:
            self.mistakes.append(mistake)
        elif holds:
            self.held.append((holds, values))
        return bool(condition)

    def holds(self, what: str, values: str = "") -> None:
        """Something proven that a reader of a report wants to see."""
        self.held.append((what, values))

    def undecided(self, what: str, values: str = "", fix: str = "", *, decides: bool = True) -> None:
        """Something that is not known here. decides: whether the run works depends on it, so that nothing is proven without;
        else only the machines can answer it."""
        self.open.append((what, values, fix, decides))

    @property
    def hf(self) -> HfConfig | None:
        """config.json of the trained model, where it is known."""
        raw = self.facts.hf_config
        return None if raw is None else HfConfig(raw, self.facts.hf_source or f"{self['hf_checkpoint']}/config.json")

    def stop_if_wrong(self) -> None:
        """Raise all mistakes so far as one error; what follows may rely on what came before."""
        if self.mistakes:
            raise ConfigError("\n".join(self.mistakes))


Rule = Callable[[Values], None]


@dataclass(frozen=True)
class Stage:
    """Rules that rely on the stages before them; their mistakes are told together."""

    rules: tuple[Rule, ...]
    converts: bool = False
    """They hold for a conversion too, which knows only flags of model, layout and checkpoint."""


def stop_at_first(stages: Sequence[Stage], v: Values) -> None:
    """Every rule of the door. Raises ConfigError with all mistakes of the first stage that has any."""
    for stage in stages:
        if v.door == "convert" and not stage.converts:
            continue
        for rule in stage.rules:
            try:
                rule(v)
            except ValueError as error:  # of a config.json that lacks what the rule asks for
                raise ConfigError("\n".join([*v.mistakes, *(() if v.mistakes else [str(error)])])) from None
        v.stop_if_wrong()


@dataclass(frozen=True)
class Collected:
    """What every rule said, whatever the others found."""

    wrong: tuple[Said, ...]
    held: tuple[Said, ...]
    open: tuple[Said, ...]


def collect(stages: Sequence[Stage], v: Values) -> Collected:
    """Every rule by itself, all mistakes; for a report."""
    wrong: list[Said] = []
    held: list[Said] = []
    undecided: list[Said] = []
    for rule in (rule for stage in stages for rule in stage.rules):
        v.mistakes, v.held, v.open = [], [], []
        subject, raised = rule.__module__.rpartition(".")[2], []
        try:
            rule(v)
        except ConfigError as error:
            raised = str(error).split("\n") if not v.mistakes else []
        except ValueError as error:
            raised = [] if wrong or v.mistakes else [str(error)]
        except (TypeError, KeyError, IndexError, ZeroDivisionError, AttributeError, OverflowError) as consequence:
            # A rule that relies on a value which an earlier mistake left open; alone it would be our own mistake.
            assert wrong, f"{subject}.{rule.__name__}: {consequence!r}"
        wrong += [Said(subject, line, fix=way_out(line)) for line in v.mistakes or raised]
        held += [Said(subject, *words) for words in v.held]
        undecided += [Said(subject, what, values, fix, decides) for what, values, fix, decides in v.open]
    v.mistakes, v.held, v.open = [], [], []
    return Collected(tuple(wrong), tuple(held), tuple(undecided))


def way_out(mistake: str) -> str:
    """What a mistake says after its last semicolon."""
    if ";" in mistake:
        return mistake.rpartition(";")[2].strip()
    return "change one of the values that it names"
