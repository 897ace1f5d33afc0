from pathlib import Path

import pytest

from tests.rehearse.recipes import Recipe, recorded


@pytest.fixture(scope="session")
def flagship(tmp_path_factory: pytest.TempPathFactory) -> Recipe:
    """The 256-GPU GLM-5.2 recipe, as its launcher passes it."""
    folder: Path = tmp_path_factory.mktemp("flagship")
    return recorded("run-glm5.2-744B-A40B.sh", folder)
