"""The audit of a run that is going on (tools/audit), and what has to be true of every one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SEEN_AS_ROOT = os.geteuid() == 0
"""Else the audit asks as the run's own user, for whom modes keep nothing closed, and may not read the memory of servers."""


def audited(base: Path, *words: str, passed: dict[str, str]) -> dict:
    """The report on the run that owns `base`. passed: secrets given with PASS_ENV."""
    names = [word for name in passed for word in ("--passed", name)]
    command = [sys.executable, "-m", "tools.audit", str(base), *names, *words, "--json", "/dev/stdout"]
    asked = subprocess.run(command, cwd=ROOT, env=os.environ | passed, capture_output=True, text=True, timeout=300)
    assert asked.returncode in (0, 1), asked.stderr
    return json.JSONDecoder().raw_decode(asked.stdout)[0]


def check(found: dict, *, passed: dict[str, str]) -> None:
    """No secret is where somebody else could read it, and nothing answers without one but what is on the list."""
    assert {"Ray's token", *passed} <= set(found["secrets"])
    opened = {kind: found[kind] for kind in ("leaks", "writable", "shared")}
    assert opened == {"leaks": [], "writable": [], "shared": []}
    if SEEN_AS_ROOT:
        assert "the engines' token" in found["secrets"]
        assert found["unexplained"] == [], found["unexplained"]
    # Beyond this node, what answers without a secret says no more than that it lives.
    beyond = [row for row in found["rows"] if row["kind"] == "tcp" and not row["place"].startswith("127.")]
    assert {gives for row in beyond if row["outside"] != "not reached" for gives in row["gives"]} <= {
        "grpc.health.v1.Health/Check", "/health", "/v1/models"
    }  # fmt: skip
