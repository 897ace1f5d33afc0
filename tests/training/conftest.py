from __future__ import annotations

import pathlib
import sys

import pytest

sys.path.insert(0, str(pathlib.Path(__file__).parent))

import tiny  # noqa: E402  (imports megatron-core once; ranks are forked from here)


@pytest.fixture(scope="session")
def qwen3(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    return tiny.qwen3(tmp_path_factory.mktemp("qwen3"))


@pytest.fixture(scope="session")
def qwen3_tied(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """Its output layer is its embedding."""
    return tiny.qwen3(tmp_path_factory.mktemp("qwen3-tied"), tied=True)


@pytest.fixture(scope="session")
def glm_tiny(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """The tiny GLM-5.2 of the launchers: of eight layers three are dense, 1, 2, 3 and 7 compute indices; well conditioned."""
    from tools.make_tiny_checkpoint import main

    folder = tmp_path_factory.mktemp("glm-tiny")
    main(["--preset", "cpu", "--seed", "0", "--output-bf16", str(folder / "bf16")])
    return folder / "bf16"


@pytest.fixture(scope="session")
def glm(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    return tiny.glm(tmp_path_factory.mktemp("glm"))


@pytest.fixture(scope="session")
def glm_mtp(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    return tiny.glm_mtp(tmp_path_factory.mktemp("glm-mtp"))
