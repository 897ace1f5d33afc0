"""Tiny checkpoints of every architecture, written once per session."""

from __future__ import annotations

import pathlib

import pytest

from slime.compat.megatron import prepare

prepare()


@pytest.fixture(scope="session")
def glm_pair(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """Folder with bf16/ and fp8/: the tiny GLM-5.2."""
    from tools.make_tiny_checkpoint import main

    folder = tmp_path_factory.mktemp("glm")
    main(["--preset", "cpu", "--seed", "0", "--output", str(folder)])
    return folder


@pytest.fixture(scope="session")
def glm(glm_pair: pathlib.Path) -> str:
    return str(glm_pair / "bf16")
