"""What a rehearsal found: one line per statement, with its values and, when it is wrong, the fix."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

Verdict = Literal["launchable", "not launchable", "not proven"]
EXIT_STATUS: dict[Verdict, int] = {"launchable": 0, "not launchable": 1, "not proven": 3}

Severity = Literal["ok", "violation", "unchecked"]


@dataclass(frozen=True)
class Finding:
    """`unchecked` is said of everything that this machine cannot see; it is never counted as passed."""

    severity: Severity
    area: str
    what: str
    values: str = ""
    fix: str = ""
    decides: bool = False
    """Of what is unchecked: the run may or may not work, so that without it nothing is proven."""

    def __post_init__(self) -> None:
        assert self.severity != "violation" or self.fix or self.values, f"a violation needs values or a fix: {self.what}"

    def line(self) -> str:
        mark = {"ok": "ok       ", "violation": "VIOLATION", "unchecked": "UNPROVEN " if self.decides else "unchecked"}[
            self.severity
        ]
        text = f"{mark} {self.area}: {self.what}"
        if self.values:
            text += f" [{self.values}]"
        return text + (f"\n          fix: {self.fix}" if self.fix else "")


@dataclass
class Findings:
    """Collects findings; nothing stops at the first violation."""

    items: list[Finding] = field(default_factory=list)

    def ok(self, area: str, what: str, values: str = "") -> None:
        self._add(Finding("ok", area, what, values))

    def violation(self, area: str, what: str, values: str = "", fix: str = "") -> None:
        self._add(Finding("violation", area, what, values, fix))

    def unchecked(self, area: str, what: str, values: str = "", fix: str = "", *, decides: bool = False) -> None:
        self._add(Finding("unchecked", area, what, values, fix, decides))

    def check(self, good: bool, area: str, what: str, *, values: str = "", wrong: str, fix: str) -> bool:
        """`what` when it holds, `wrong` with the fix when it does not."""
        if good:
            self.ok(area, what, values)
        else:
            self.violation(area, wrong, values, fix)
        return good

    def _add(self, finding: Finding) -> None:
        if finding not in self.items:
            self.items.append(finding)

    def of(self, severity: Severity) -> list[Finding]:
        return [finding for finding in self.items if finding.severity == severity]

    @property
    def verdict(self) -> Verdict:
        if self.of("violation"):
            return "not launchable"
        return "not proven" if any(finding.decides for finding in self.of("unchecked")) else "launchable"

    @property
    def launchable(self) -> bool:
        """All is proven that a machine without the cluster can prove."""
        return self.verdict == "launchable"
