"""The tiny GLM-5.2 checkpoint for this folder's tests."""

from __future__ import annotations

import pathlib

import pytest

from slime.compat.megatron import prepare

prepare()


@pytest.fixture(scope="session")
def glm(tmp_path_factory: pytest.TempPathFactory) -> str:
    from tools.make_tiny_checkpoint import main

    folder: pathlib.Path = tmp_path_factory.mktemp("glm")
    main(["--preset", "cpu", "--seed", "0", "--output-bf16", str(folder / "bf16")])
    return str(folder / "bf16")
