"""Argument lists to rehearse: the flagship as its launcher really passes it, and edits of it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]

RECORDER = """#!{python}
import json, os, sys
if sys.argv[1:3] == ["-m", "slime.rehearse"]:
    open({out!r}, "w").write(json.dumps(sys.argv[3:]))
else:
    os.execv({python!r}, [{python!r}, *sys.argv[1:]])
"""


@dataclass(frozen=True)
class Recipe:
    argv: tuple[str, ...]
    env: dict[str, str]
    yaml: str = ""

    def with_flag(self, name: str, *values: str) -> Recipe:
        """The flag with other values; added when it is not there."""
        begin, end = self._span(name)
        return replace(self, argv=(*self.argv[:begin], name, *values, *self.argv[end:]))

    def without(self, name: str) -> Recipe:
        begin, end = self._span(name)
        assert end > begin, f"{name} is not in the recipe"
        return replace(self, argv=(*self.argv[:begin], *self.argv[end:]))

    def with_yaml(self, old: str, new: str) -> Recipe:
        assert old in self.yaml, f"{old!r} is not in the YAML"
        return replace(self, yaml=self.yaml.replace(old, new))

    def with_env(self, **values: str) -> Recipe:
        return replace(self, env={**self.env, **values})

    def value(self, name: str) -> str:
        begin, _ = self._span(name)
        return self.argv[begin + 1]

    def _span(self, name: str) -> tuple[int, int]:
        if name not in self.argv:
            return len(self.argv), len(self.argv)
        begin = max(place for place, word in enumerate(self.argv) if word == name)
        end = begin + 1
        while end < len(self.argv) and not self.argv[end].startswith("--"):
            end += 1
        return begin, end

    def written(self, folder: Path) -> list[str]:
        """The argument list, with the YAML written to `folder`."""
        if not self.yaml:
            return list(self.argv)
        file = folder / "sglang.yaml"
        file.write_text(self.yaml)
        return list(self.with_flag("--sglang-config", str(file)).argv)


def recorded(launcher: str, folder: Path, **variables: str) -> Recipe:
    """What `bash scripts/LAUNCHER --rehearse` passes to the rehearsal."""
    out, python = folder / "argv.json", folder / "python"
    python.write_text(RECORDER.format(python=sys.executable, out=str(out)))
    python.chmod(0o755)
    kept = {key: value for key, value in os.environ.items() if key not in ("HOSTFILE", "BASE_DIR", "MASTER_ADDR")}
    env = {**kept, "PYTHON": str(python), "RUN_DIR": str(folder / "run"), **variables}
    subprocess.run(
        ["bash", str(ROOT / "scripts" / launcher), "--rehearse"], env=env, check=True, capture_output=True, timeout=120
    )
    argv = [word for word in json.loads(out.read_text()) if word != "--rehearse"]
    at = argv.index("--runtime-env")
    variables = json.loads(argv[at + 1])["env_vars"]
    del argv[at : at + 2]
    recipe = Recipe(tuple(argv), variables)
    if "--sglang-config" in argv:
        recipe = replace(recipe, yaml=Path(recipe.value("--sglang-config")).read_text())
    return recipe


def model_args(name: str) -> list[str]:
    """MODEL_ARGS of scripts/models/NAME.sh."""
    command = f'source "{ROOT}/scripts/models/{name}.sh"; printf "%s\\n" "${{MODEL_ARGS[@]}}"'
    return subprocess.run(["bash", "-c", command], check=True, capture_output=True, text=True).stdout.splitlines()


def one_node(name: str, folder: str, *, tp: str, ep: str) -> list[str]:
    """A GRPO run of a smaller model on 8 GPUs."""
    flags = f"""
        --actor-num-nodes 1 --actor-num-gpus-per-node 8 --colocate --num-rollout 10 --bf16
        --hf-checkpoint /models/{folder} --ref-load /models/ref
        --prompt-data /data/p.jsonl --label-key label --rm-type deepscaler
        --rollout-batch-size 32 --n-samples-per-prompt 8 --rollout-max-response-len 8192 --global-batch-size 256
        --tensor-model-parallel-size {tp} --sequence-parallel
        --expert-model-parallel-size {ep} --expert-tensor-parallel-size 1
        --recompute-granularity full --recompute-method uniform --recompute-num-layers 1
        --use-dynamic-batch-size --max-tokens-per-gpu 9216
        --optimizer-cpu-offload --use-precision-aware-optimizer
        --rollout-num-gpus-per-engine 2 --sglang-mem-fraction-static 0.7
    """
    return [*model_args(name), *flags.split()]
