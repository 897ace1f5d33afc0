"""Options of the kit, and what its contracts are called with."""

from __future__ import annotations

import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "rollout"))

import pytest  # noqa: E402
from plugin_contracts.contract import Stage, attribute  # noqa: E402
from plugin_contracts.registry import CONTRACTS  # noqa: E402
from rollout.conftest import prompt_file, rollout_config, router, runtime_args, tokenizer_folder  # noqa: E402, F401


def pytest_addoption(parser: pytest.Parser) -> None:
    kit = parser.getgroup("plugin contracts")
    for flag in CONTRACTS:
        kit.addoption(flag, action="append", default=[], metavar="PATH", help="a function of yours, package.module.name")
    kit.addoption("--group-rm", action="store_true", help="graders get lists")
    kit.addoption("--random-rewards", action="store_true", help="two gradings of one answer may differ")
    kit.addoption("--contract-args", metavar="FILE", help="a YAML as for --custom-config-path")


def given_paths(config: pytest.Config) -> dict[str, list[str]]:
    """flag -> the user's paths, of the command line and of SLIME_CONTRACT_* variables."""
    found: dict[str, list[str]] = {}
    for flag in CONTRACTS:
        paths = list(config.getoption(flag, default=None) or [])
        paths += filter(None, [os.environ.get(f"SLIME_CONTRACT_{attribute(flag).upper()}")])
        if paths:
            found[flag] = paths
    return found


def pytest_configure(config: pytest.Config) -> None:
    sys.path.insert(0, str(config.invocation_params.dir))


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """One test for each path and each promise of its flag."""
    if "promise" not in metafunc.fixturenames:
        return
    paths = given_paths(metafunc.config) or {flag: [f"plugin_contracts.examples.{attribute(flag)}"] for flag in CONTRACTS}
    rows = [(flag, path, promise) for flag, each in paths.items() for path in each for promise in CONTRACTS[flag]]
    metafunc.parametrize(
        ("flag", "path", "promise"), rows, ids=[f"{flag} {path}: {promise.__name__}" for flag, path, promise in rows]
    )


@pytest.fixture
def stage(rollout_config, runtime_args, router, pytestconfig) -> Stage:  # noqa: F811
    return Stage(
        rollout_config,
        runtime_args,
        router,
        group_rm=bool(pytestconfig.getoption("--group-rm", default=False)),
        random_rewards=bool(pytestconfig.getoption("--random-rewards", default=False)),
        yaml=pytestconfig.getoption("--contract-args", default=None),
    )
