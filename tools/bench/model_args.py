"""MODEL_ARGS of a model script, for benches and tests that start no launcher."""

from __future__ import annotations

import subprocess
from pathlib import Path

SCRIPTS = Path(__file__).resolve().parents[2] / "scripts" / "models"


def model_args(name: str) -> list[str]:
    """name: of a file in scripts/models, without .sh. Raises CalledProcessError where there is none."""
    script = f"source {SCRIPTS}/{name}.sh && printf '%s\\0' \"${{MODEL_ARGS[@]}}\""
    said = subprocess.run(["bash", "-c", script], capture_output=True, text=True, check=True).stdout
    return said.rstrip("\0").split("\0")
