"""Whole runs note what their processes read of the config; test_what_is_read.py looks at all of them together."""

from __future__ import annotations

import os
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def reads(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of the records, one below it for each file whose run was recorded."""
    return tmp_path_factory.mktemp("reads")


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """BASE_DIR of the tiny GLM-5.2 on one node, whose first run makes checkpoints and data that later ones find."""
    return tmp_path_factory.mktemp("tiny")


@pytest.fixture
def recorded_run(reads: Path, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every process of this test's runs has the recorder (recorder/sitecustomize.py)."""
    folder = reads / request.path.stem
    folder.mkdir()
    monkeypatch.setenv("RECORD_READS", str(folder))
    paths = (str(Path(__file__).with_name("recorder")), os.environ.get("PYTHONPATH"))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, paths)))
