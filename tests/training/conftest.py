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
def glm(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    return tiny.glm(tmp_path_factory.mktemp("glm"))
