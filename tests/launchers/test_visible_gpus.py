"""How many GPUs a launcher counts on: those that its shell may use, not those that the machine has."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize(
    "listed, visible, wanted", [(3, None, 3), (3, "2,0", 2), (3, "GPU-5f0c", 1), (3, "", 0), (0, None, 0), (0, "0,1", 0)]
)
def test_gpus_are_counted_within_cuda_visible_devices(listed: int, visible: str | None, wanted: int, tmp_path: Path) -> None:
    (tmp_path / "nvidia-smi").write_text("#!/bin/sh\n" + "".join(f"echo 'GPU {n}: H200'\n" for n in range(listed)))
    (tmp_path / "nvidia-smi").chmod(0o755)
    env = {key: value for key, value in os.environ.items() if key != "CUDA_VISIBLE_DEVICES"}
    env |= {"PATH": f"{tmp_path}:{env['PATH']}"} | ({} if visible is None else {"CUDA_VISIBLE_DEVICES": visible})
    script = f'source "{ROOT}/scripts/lib/launch.sh" --rehearse; visible_gpus'
    done = subprocess.run(["bash", "-c", script], env=env, capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.strip() == str(wanted)
