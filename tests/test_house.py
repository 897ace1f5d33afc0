"""The root of the project: what lies there, under which licence, and that what CI runs begins with the linters."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
AT_THE_ROOT = {
    "CHANGELOG.md", "CONTRIBUTING.md", "LICENSE", "README.md", "pyproject.toml",
    "docs", "scripts", "slime", "slime_plugins", "tests", "tools",
}  # fmt: skip
# sha256 of https://www.apache.org/licenses/LICENSE-2.0.txt
APACHE_2 = "cfc7749b96f63bd31c3c42b5c471bf756814053e847c10f3eb003417bc523d30"


def test_the_licence_is_the_whole_text_that_the_package_names():
    assert tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["license"] == {"text": "Apache-2.0"}
    assert hashlib.sha256((ROOT / "LICENSE").read_bytes()).hexdigest() == APACHE_2


def test_nothing_else_lies_at_the_root():
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("not a git checkout: what is tracked cannot be asked")
    names = {line.split("/")[0] for line in listed.stdout.splitlines()}
    assert {name for name in names if not name.startswith(".")} == AT_THE_ROOT


def lint(project: Path) -> subprocess.CompletedProcess:
    """scripts/lint.sh of a project with the programs of this interpreter's environment."""
    environment = os.environ | {"SLIME_VENV": sys.prefix}
    return subprocess.run(["bash", "scripts/lint.sh"], cwd=project, env=environment, capture_output=True, text=True)


@pytest.mark.parametrize(
    ("file", "text", "told"),
    [
        ("slime/x.py", "VALUE = 1\n", None),
        ("slime/x.py", "import os\n", "F401"),
        ("slime/x.py", "VALUE = [1,2]\n", "slime/x.py"),
        ("scripts/x.sh", "#!/usr/bin/env bash\nrm -r $1/*\n", "SC2086"),
        ("scripts/x.sh", '#!/usr/bin/env bash\nSCRIPT_DIR=$(dirname "$0")\nsource "${SCRIPT_DIR}/y.sh"\ngreet\n', None),
        (".ci/run", "#!/usr/bin/env bash\ncd /tmp\n", "SC2164"),
    ],
)
def test_the_linters_see(tmp_path: Path, file: str, text: str, told: str | None):
    for name in ("scripts/lint.sh", ".shellcheckrc", "pyproject.toml"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)
    (tmp_path / "scripts" / "y.sh").write_text("# shellcheck shell=bash\ngreet() { echo hello; }\n")
    (tmp_path / ".ci").mkdir()
    (tmp_path / file).parent.mkdir(exist_ok=True)
    (tmp_path / file).write_text(text)
    done = lint(tmp_path)
    assert (done.returncode, told is None or told in done.stdout + done.stderr) == (int(told is not None), True), done


def test_ci_and_a_commit_begin_with_the_linters():
    test_script = (ROOT / "scripts" / "test.sh").read_text()
    assert test_script.index("bash scripts/lint.sh; fi") < test_script.index("-m pytest --durations")
    assert "entry: bash scripts/lint.sh" in (ROOT / ".pre-commit-config.yaml").read_text()
    assert (ROOT / ".ci" / "run").read_text().endswith("exec bash scripts/test.sh\n")


def test_the_readme_shows_as_many_packages_as_are_pinned():
    pins = [
        line for line in (ROOT / "scripts" / "constraints" / "cpu.txt").read_text().splitlines() if not line.startswith("#")
    ]
    assert f"2/3 {len(pins)} pinned packages" in (ROOT / "README.md").read_text()


def test_the_readme_has_every_launcher():
    readme = (ROOT / "README.md").read_text()
    assert [file.name for file in sorted((ROOT / "scripts").glob("run-*.sh")) if f"`scripts/{file.name}`" not in readme] == []


def test_files_of_tests_have_different_names():
    """The folders are no packages: pytest takes two files of one name for the same module, and collects nothing."""
    names = sorted(path.name for path in (ROOT / "tests").rglob("test_*.py"))
    assert sorted({name for name in names if names.count(name) > 1}) == []
