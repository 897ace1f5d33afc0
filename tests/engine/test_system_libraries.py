"""Engines find the libraries that scripts/setup.sh unpacked, whoever starts Python, and whatever its shell says."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from slime.compat.sglang import with_system_libraries


def test_an_engines_loader_looks_into_the_environments_own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(sys, "prefix", str(tmp_path))
    assert with_system_libraries({"A": "1"}) == {"A": "1"}, "nothing was unpacked here"
    folder = tmp_path / "syslib"
    folder.mkdir()
    assert with_system_libraries({}) == {"LD_LIBRARY_PATH": str(folder)}
    assert with_system_libraries({"LD_LIBRARY_PATH": "/cuda"}) == {"LD_LIBRARY_PATH": f"{folder}:/cuda"}
    known = {"LD_LIBRARY_PATH": f"/cuda:{folder}"}
    assert with_system_libraries(known) == known
