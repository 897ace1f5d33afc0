"""The examples of docs/en/examples: every launcher rehearses, and has a page in the index."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
LAUNCHERS = sorted((ROOT / "docs" / "en" / "examples").glob("*/run-*.sh"))


@pytest.mark.parametrize("launcher", LAUNCHERS, ids=lambda path: path.parent.name)
def test_the_launcher_rehearses(launcher, tmp_path):
    environment = os.environ | {"BASE_DIR": str(tmp_path / "base"), "PYTHON": sys.executable}
    command = ["bash", str(launcher), "--rehearse", "--quick"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, cwd=tmp_path)
    assert done.returncode in (0, 3) and "none failed" in done.stdout, done.stdout[-3000:] + done.stderr[-2000:]


@pytest.mark.parametrize("launcher", LAUNCHERS, ids=lambda path: path.parent.name)
def test_the_page_names_its_launcher(launcher):
    page = (launcher.parent / "README.md").read_text()
    assert f"bash docs/en/examples/{launcher.parent.name}/{launcher.name}" in page
    assert f"examples/{launcher.parent.name}/README.md" in (ROOT / "docs" / "README.md").read_text()
