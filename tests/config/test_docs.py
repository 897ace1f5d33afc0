"""Every flag that the documentation names exists."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from slime.engine.versions import TABLE, TABLES

ROOT = Path(__file__).resolve().parents[2]
OF_OTHER_PROGRAMS = {
    "--help", "--logdir", "--address", "--working-dir", "--head", "--extra-index-url",
    "--nnodes", "--node-rank", "--nproc-per-node", "--master-addr", "--master-port",  # torchrun
    "--cubin",  # nvcc
    "--nodes", "--ntasks-per-node", "--gpus-per-node", "--exclusive", "--signal",  # sbatch
    "--pid",  # py-spy
    "--max-children",  # mutmut
    "--security-opt",  # docker
    "--contract-args",  # pytest tests/plugin_contracts
}  # fmt: skip
MEANT_WRONG = {"--rolout-batch-size", "--x", "--y", "--prompt", "--sglang-mem-fraction-statik"}
"""The answer to a typo, shown; and `--x`, `--y` for any flags."""
FLAG = re.compile(r"(?<![\w-])--[a-z][a-z0-9]*(?:-[a-z0-9]+)*")


@pytest.fixture(scope="module")
def known() -> set[str]:
    command = [sys.executable, "-m", "slime.config", "--help"]
    answer = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    flags = set(FLAG.findall(answer.stdout))
    assert {"--prompt-data", "--num-layers"} <= flags
    sources = [*(ROOT / "tools").rglob("*.py"), *(ROOT / "scripts").rglob("*.sh"), *(ROOT / "slime").rglob("__main__.py")]
    sources += [*(ROOT / "slime" / "rehearse").glob("*.py"), ROOT / "slime" / "weights" / "follow.py"]
    for source in sources:
        flags |= set(FLAG.findall(source.read_text()))
    return flags | engine_flags() | OF_OTHER_PROGRAMS | MEANT_WRONG


def engine_flags() -> set[str]:
    """--sglang-* under the names of every supported version, and of those before."""
    tables = [json.loads(file.read_text())["options"] for file in TABLES.glob("sglang-*.json")]
    names = {name for table in tables for option in table for name in option["flags"]}
    older = {f"--{name.replace('_', '-')}" for column in TABLE for name in column.renames}
    return {f"--sglang-{name.removeprefix('--')}" for name in names | older}


# flags.md is made from the declarations, refused flags included (test_flags_page.py).
PAGES = {*ROOT.glob("*.md"), *ROOT.glob("docs/en/**/*.md")} - {ROOT / "docs" / "en" / "advanced" / "flags.md"}


@pytest.mark.parametrize("page", sorted(PAGES), ids=lambda page: page.name)
def test_every_flag_of_a_page_exists(page, known):
    assert sorted(set(FLAG.findall(page.read_text())) - known) == []
