"""Rules for every test: one thread per process, torch seeded, `gpu` tests only where a CUDA device is, floors importable."""

from __future__ import annotations

import os
import pathlib
import sys

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# Ray's default is 15, which trainers and engines inherit: beside tests in a second process it leaves them little of a core.
os.environ.setdefault("RAY_worker_niceness", "0")

_TESTS = pathlib.Path(__file__).parent
for folder in (_TESTS, _TESTS.parent):
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))

import pytest  # noqa: E402

SERVERS = (
    "tests/e2e/",
    "tests/engine/",
    "tests/launchers/",
    "tests/ray/",
    "tests/preflight/",
)
"""Tests that start engines, routers and Ray: they pick ports one after the other and wait for each other's answers."""


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: object) -> object:
    """Whole files to each process (`--dist loadfile`), and all that start servers to the same one, as if nobody ran beside
    it."""
    from xdist.scheduler import LoadFileScheduling

    class ServersTogether(LoadFileScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return "servers" if nodeid.startswith(SERVERS) else super()._split_scope(nodeid)

    return ServersTogether(config, log) if config.getvalue("dist") == "loadfile" else None


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    """torch's generator starts anew: what a test draws does not depend on the tests that this process ran before."""
    if torch := sys.modules.get("torch"):
        torch.manual_seed(0)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    wanting = [item for item in items if item.get_closest_marker("gpu")]
    if not wanting:
        return
    import torch

    if torch.cuda.is_available():
        return
    for item in wanting:
        item.add_marker(pytest.mark.skip(reason="needs one CUDA device; none here"))
