"""What an audit found, judged: the closed list of what may be open, and why."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field

from tools.audit.leaks import Leak
from tools.audit.probes import Answer

FINE = {"asks": "asks for the secret", "closed": "the modes of files keep others out", "unreachable": "takes no connection"}
_REACHED = {"unreachable": "not reached", "closed": "not reached"}


@dataclass(frozen=True)
class Known:
    """A listener that answers without a secret, and the reason."""

    who: str
    """Pattern of the process."""
    verdict: str
    protocol: str
    gives: str
    """Pattern of each thing that it gives."""
    why: str
    loopback: bool = False
    """Only where it listens on loopback alone."""

    def covers(self, answer: Answer, outside: str) -> bool:
        if self.loopback and not (answer.listener.is_loopback or outside == "not reached"):
            return False
        fits = re.fullmatch(self.who, answer.listener.who) and (self.verdict, self.protocol) == (
            answer.verdict,
            answer.protocol,
        )
        return bool(fits) and all(re.fullmatch(self.gives, one) for one in answer.gives)


_ONE_NODE = "on loopback, or kept to the run's nodes: their users are trusted (a firewall rule by user closes it)"
KNOWN = (
    Known("sglang::router", "OPEN", "HTTP", "/health|/v1/models", "that it lives, and the model's name"),
    Known(
        "sglang::router", "OPEN", "HTTP", "any path", "its metrics, which ask for no secret: for this node alone", loopback=True
    ),
    Known("slime.engine.serve", "OPEN", "HTTP", "/health", "that it lives"),
    Known(r"dashboard\.py", "OPEN", "HTTP", "/|/api/version", "the page that asks for the token"),
    Known("gcs_server|raylet|ray::.*|slime.train", "OPEN", "gRPC", r"grpc\.health\.v1\.Health/Check", "that it lives"),
    Known(
        "sglang::scheduler.*", "OPEN", "torch store", r"\d+ keys", f"where an engine's ranks meet; {_ONE_NODE}", loopback=True
    ),
    Known("sglang::scheduler.*", "OPEN", "ZeroMQ", ".*", f"addresses for the KV cache; {_ONE_NODE}", loopback=True),
    Known("sglang::scheduler.*", "silent", "", "", f"gloo and the KV cache; {_ONE_NODE}", loopback=True),
    Known("ray::TrainActor", "OPEN", "torch store", r"\d+ keys", f"where trainer ranks meet; {_ONE_NODE}", loopback=True),
    Known("ray::(TrainActor|WeightReceiver)", "silent", "", "", "gloo, which takes whoever knows the group's addresses"),
)


@dataclass(frozen=True)
class Row:
    """One listener."""

    kind: str
    place: str
    who: str
    pids: tuple[int, ...]
    protocol: str
    verdict: str
    gives: tuple[str, ...]
    outside: str
    """"reached" or "not reached" from elsewhere; "" where nobody asked from there."""
    why: str
    """Why it may be so; "" where nothing on the list says it."""

    def line(self) -> str:
        """The same for listeners that are alike: without port, path and process id."""
        at = "a path" if self.kind == "unix" else self.place.rpartition(":")[0]
        said = f"{self.who} at {at}: {' '.join(filter(None, (self.protocol, self.verdict, *self.gives)))}"
        return f"{said}{f', from elsewhere {self.outside}' if self.outside else ''}; {self.why or 'NOT ON THE LIST'}"


@dataclass(frozen=True)
class Report:
    rows: tuple[Row, ...]
    secrets: tuple[str, ...]
    """Names of those that were looked for."""
    leaks: tuple[Leak, ...]
    writable: tuple[str, ...]
    """Files and folders that another user may change."""
    shared: tuple[str, ...]
    """Shared memory that another user may open."""
    not_done: tuple[str, ...] = field(default=())
    """What could not be tried here, and why."""

    @property
    def unexplained(self) -> tuple[Row, ...]:
        return tuple(row for row in self.rows if not row.why)

    @property
    def is_clean(self) -> bool:
        return not (self.unexplained or self.leaks or self.writable or self.shared)

    def to_json(self) -> dict[str, object]:
        return asdict(self) | {"unexplained": [asdict(row) for row in self.unexplained], "clean": self.is_clean}

    def text(self) -> str:
        """Listeners that are alike in a line, then everything else."""
        alike: dict[str, int] = {}
        for row in self.rows:
            alike[row.line()] = alike.get(row.line(), 0) + 1
        lines = [f"{len(self.rows)} listeners", *(f"{count:5} {line}" for line, count in sorted(alike.items()))]
        lines.append(f"looked for: {', '.join(self.secrets) or 'no secret was found'}")
        lines += [f"LEAK: {leak.secret} in {leak.where}" for leak in self.leaks]
        lines += [f"WRITABLE by others: {path}" for path in self.writable]
        lines += [f"SHARED MEMORY open to others: {path}" for path in self.shared]
        lines += [f"not done: {what}" for what in self.not_done]
        return "\n".join([*lines, "clean" if self.is_clean else "NOT CLEAN"])


def judged(answers: Sequence[Answer], outside: Sequence[Answer] | None) -> tuple[Row, ...]:
    """outside: the same listeners, as reached from elsewhere; None where nobody stood there."""
    rows = []
    for at, answer in enumerate(answers):
        there = "" if outside is None else _REACHED.get(outside[at].verdict, "reached")
        why = FINE.get(answer.verdict) or next((known.why for known in KNOWN if known.covers(answer, there)), "")
        one = answer.listener
        rows.append(Row(one.kind, one.place, one.who, one.pids, answer.protocol, answer.verdict, answer.gives, there, why))
    return tuple(rows)
