"""A tiny GLM-5.2 for tests that send it."""

from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def tiny_pair(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its folder: bf16/ and fp8/, which nobody writes to."""
    from tools.make_tiny_checkpoint import main

    folder = tmp_path_factory.mktemp("tiny-pair")
    main(["--preset", "cpu", "--seed", "5", "--output", str(folder)])
    return folder
