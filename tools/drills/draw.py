"""Which drill has which number: a function of the seed, so that one drill can be made again."""

from __future__ import annotations

import random
from dataclasses import dataclass
from itertools import product

PROCESSES = (
    "launcher", "head", "raylet", "driver", "rollout", "engine-actor", "scheduler", "router", "trainer", "writer",
    "nursery", "grader",
)  # fmt: skip
"""head: Ray's control process. scheduler: the engine's process that computes. A run has no worker that loads data: it reads
prompts in the rollout actor. Its helpers are drilled instead: the writer, which a trainer rank forks for a
checkpoint's file, and the nursery, which forks the graders."""
FAULTS = ("kill", "stop", "term", "memory")
"""SIGKILL; SIGSTOP and after some time SIGCONT; SIGTERM; no more address space than it has."""
PICKED_ALONE = ("oom",)
"""Picked and never drawn, so that drills keep their numbers: killed by the kernel when it takes any more memory (cgroups)."""
PHASES = ("start", "generate", "hand-over", "train", "save", "sync", "evaluate")


@dataclass(frozen=True)
class Drill:
    seed: int
    number: int
    process: str
    fault: str
    phase: str
    tolerant: bool
    """--use-fault-tolerance."""
    delay: float
    """Seconds from the beginning of the phase to the fault."""
    which: int
    """Of several processes of the kind."""
    beside: tuple[str, str] | None = None
    """A second process, and what befalls it at the same moment; a picked drill may have one."""

    def __str__(self) -> str:
        second = "" if self.beside is None else f" with {self.second}"
        return f"{self.seed}/{self.number}: {self.fault} of {self.process}{second} in {self.phase}"

    @property
    def second(self) -> str:
        """ "stop of router"; "" where there is none."""
        return "" if self.beside is None else f"{self.beside[1]} of {self.beside[0]}"


_WITHOUT_ENGINES = (("launcher", "head", "raylet", "driver", "rollout", "trainer", "writer"), ("start", "train", "save"))
"""Processes and phases of a run on recorded rollouts that starts no engines: a launch of it takes a third of the time."""
PICKED = 0
"""Seed of drills that somebody picked; their number is the place in the list of all."""


def pick(process: str, fault: str, phase: str, *, tolerant: bool, beside: tuple[str, str] | None = None) -> Drill:
    """That drill. Raises ValueError for a process, fault or phase that there is not. beside: (process, fault) of a second."""
    every = [one for faults in (FAULTS, PICKED_ALONE) for one in product(PROCESSES, faults, PHASES) if exists(one[0], one[2])]
    for one in ((process, fault, phase), *([] if beside is None else [(*beside, phase)])):
        if one not in every:
            raise ValueError(
                f"no drill {' '.join(one)}: choose of {PROCESSES}, {(*FAULTS, *PICKED_ALONE)}, {PHASES}; writers live in save "
                "alone"
            )
    return Drill(PICKED, every.index((process, fault, phase)), process, fault, phase, tolerant, 0.0, 0, beside)


def exists(process: str, phase: str) -> bool:
    """Whether the run has such a process in that phase. Graders come with the first answers, writers with a save."""
    if process == "writer":
        return phase == "save"
    return not (phase == "start" and process in ("grader", "nursery", "router"))


def draw(seed: int, number: int, *, engines: bool = True) -> Drill:
    """Drill `number` (from 0) of a seed. The first twelve have every process, fault and phase; the others are random.

    engines: whether the run has any; without them all drills of a seed are random.
    """
    assert number >= 0, f"drills are numbered from 0, not {number}"
    chance = random.Random(f"{seed} {number}")
    processes, phases = (PROCESSES, PHASES) if engines else _WITHOUT_ENGINES
    if engines and number < len(PROCESSES):
        process, fault, phase = _first(seed)[number]
    else:
        process, fault = chance.choice(processes), chance.choice(FAULTS)
        phase = chance.choice([one for one in phases if exists(process, one)])
    tolerant = engines and chance.random() < 0.75
    delay = chance.uniform(0.0, {"start": 6.0, "train": 0.2}.get(phase, 0.05))
    return Drill(seed, number, process, fault, phase, tolerant, round(delay, 3), chance.randrange(2))


def _first(seed: int) -> list[tuple[str, str, str]]:
    """Each process once, faults and phases dealt out as from shuffled decks."""
    chance = random.Random(f"first {seed}")
    while True:
        processes = chance.sample(PROCESSES, len(PROCESSES))
        faults, phases = (_dealt(chance, deck, len(processes)) for deck in (FAULTS, PHASES))
        if all(exists(process, phase) for process, phase in zip(processes, phases, strict=True)):
            return list(zip(processes, faults, phases, strict=True))


def _dealt(chance: random.Random, deck: tuple[str, ...], count: int) -> list[str]:
    cards: list[str] = []
    while len(cards) < count:
        cards += chance.sample(deck, len(deck))
    return cards[:count]
