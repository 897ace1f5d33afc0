"""Every flag that the documentation names exists."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
OF_OTHER_PROGRAMS = {
    "--help", "--logdir", "--address", "--working-dir", "--head", "--extra-index-url",
    "--nnodes", "--node-rank", "--nproc-per-node", "--master-addr", "--master-port",  # torchrun
    "--cubin",  # nvcc
}  # fmt: skip
MEANT_WRONG = {"--rolout-batch-size", "--x", "--y", "--prompt"}
"""The answer to a typo, shown; and `--x`, `--y` for any flags."""
FLAG = re.compile(r"(?<![\w-])--[a-z][a-z0-9]*(?:-[a-z0-9]+)*")


@pytest.fixture(scope="module")
def known() -> set[str]:
    command = [sys.executable, "-m", "slime.config", "--help"]
    answer = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    flags = set(FLAG.findall(answer.stdout))
    assert {"--prompt-data", "--num-layers"} <= flags
    sources = [*(ROOT / "tools").rglob("*.py"), *(ROOT / "scripts").rglob("*.sh"), *(ROOT / "slime").rglob("__main__.py")]
    sources += [*(ROOT / "slime" / "rehearse").glob("*.py")]
    for source in sources:
        flags |= set(FLAG.findall(source.read_text()))
    return flags | OF_OTHER_PROGRAMS | MEANT_WRONG


@pytest.mark.parametrize("page", sorted(ROOT.glob("docs/en/**/*.md")), ids=lambda page: page.name)
def test_every_flag_of_a_page_exists(page, known):
    named = {flag for flag in FLAG.findall(page.read_text()) if not flag.startswith(("--sglang", "--router"))}
    assert sorted(named - known) == []
