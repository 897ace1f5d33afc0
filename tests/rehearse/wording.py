"""Every finding has an area of the report, and says it in words that the documents have."""

from __future__ import annotations

from slime.config.rules import RULES
from slime.rehearse.findings import Findings
from slime.rehearse.reading import SUBJECTS
from tests.words import strange_words

AREAS = {SUBJECTS.get(name, name) for name in (rule.__module__.rsplit(".", 1)[-1] for rule in RULES)}
AREAS |= set("batch config files flags layout memory nodes ranks sync weights".split())


def well_said(findings: Findings) -> Findings:
    for finding in findings.items:
        assert finding.area in AREAS and finding.what, finding
        strange = strange_words(finding.what) + strange_words(finding.fix)
        assert not strange, (strange, finding)
    return findings
