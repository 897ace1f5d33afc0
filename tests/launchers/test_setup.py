"""scripts/setup.sh picks the Python that the extra's pins are for. Interpreters of made-up versions; nothing is installed."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

# Says that it is 3.MINOR, and refuses to make an environment: what comes after the choice is not wanted here.
PYTHON = """#!/bin/sh
case "$1" in
--version) echo "Python 3.{minor}.9" ;;
-c) exec {real} -c "import sys; sys.version_info = (3, {minor}, 9, 'final', 0); exec(sys.argv[1])" "$2" ;;
*) exit 9 ;;
esac
"""


def setup(folder: Path, *minors: int, **environment: str) -> str:
    """What setup.sh says where these Pythons are, under their names."""
    binaries = folder / "with a space"
    binaries.mkdir()
    for minor in minors:
        program = binaries / f"python3.{minor}"
        program.write_text(PYTHON.format(minor=minor, real=sys.executable))
        program.chmod(0o755)
    if minors:
        (binaries / "python3").symlink_to(binaries / f"python3.{minors[0]}")
    for name in ("bash", "sh", "dirname", "sha256sum", "cat", "cut", "grep", "env"):
        (binaries / name).symlink_to(next(f for f in (Path("/usr/bin") / name, Path("/bin") / name) if f.exists()))
    environment = {"PATH": str(binaries), "SLIME_VENV": str(folder / "venv"), "HOME": str(folder)} | environment
    if environment.get("SLIME_PYTHON") == "mine":
        environment["SLIME_PYTHON"] = str(binaries / f"python3.{minors[-1]}")
    done = subprocess.run(["bash", str(ROOT / "scripts" / "setup.sh")], env=environment, capture_output=True, text=True)
    assert done.returncode != 0
    return done.stderr


@pytest.mark.parametrize(
    ("extra", "minors", "chosen"),
    [("gpu", (11, 12), 12), ("gpu", (12,), 12), ("cpu", (12, 11), 11), ("cpu", (12,), 12), ("cpu", (10, 12), 12)],
)
def test_each_extra_takes_a_python_that_its_pins_are_for(tmp_path: Path, extra: str, minors: tuple[int, ...], chosen: int):
    assert f"with Python 3.{chosen}.9, extra '{extra}'" in setup(tmp_path, *minors, SLIME_EXTRA=extra)


@pytest.mark.parametrize(("extra", "minors", "wanted"), [("gpu", (11, 13), "3.12"), ("cpu", (10, 13), "3.11 or 3.12")])
def test_where_none_is_right_the_wanted_one_is_named(tmp_path: Path, extra: str, minors: tuple[int, ...], wanted: str):
    assert f"no Python {wanted} found" in setup(tmp_path, *minors, SLIME_EXTRA=extra)


def test_a_named_python_is_taken_or_refused_and_never_passed_over(tmp_path: Path):
    assert "with Python 3.12.9" in setup(tmp_path, 11, 12, SLIME_EXTRA="cpu", SLIME_PYTHON="mine")
    other = tmp_path / "other"
    other.mkdir()
    assert "is not a Python 3.12, for which" in setup(other, 12, 11, SLIME_EXTRA="gpu", SLIME_PYTHON="mine")


def test_an_environment_of_another_python_is_made_anew(tmp_path: Path):
    old = tmp_path / "venv" / "bin"
    old.mkdir(parents=True)
    (old / "python").write_text(PYTHON.format(minor=11, real=sys.executable))
    (old / "python").chmod(0o755)
    assert "has Python 3.11.9, for which these pins are not" in setup(tmp_path, 11, 12, SLIME_EXTRA="gpu")
    assert os.listdir(old) == ["python"], "the made-up interpreter does nothing"
