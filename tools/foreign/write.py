"""The launcher for here: the foreign one's words in its own arrays, our model script, our Ray job."""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path

from tools.foreign.job import Job, last_value, more_environment
from tools.foreign.watch import STANDS_FOR, ModelScript, Watched

OURS = frozenset({"PYTHONPATH", "MASTER_ADDR", "no_proxy", "NO_PROXY", "NCCL_NVLS_ENABLE", "TENSORBOARD_DIR"})
"""Variables of the job that scripts/lib gives."""


def written(job: Job, watched: Watched, *, launcher: Path, project: Path) -> str:
    """The text of the new launcher."""
    nodes, slots = _size(job)
    several = nodes > 1
    parts = [_head(launcher, project, several=several), _settings(job, watched, nodes=nodes, slots=slots, name=launcher.stem)]
    parts += [_model(model) for model in watched.models[-1:]]
    files = _used_files(job, watched)
    parts += [_file(place, watched.files[target]) for target, place in files.items()]
    groups, flags = _groups(job, watched)
    if (save := last_value(job.words, "--save")) is not None:
        files = {**files, save: "${SAVE}"}
    parts += [_array(name, words, files) for name, words in groups.items()]
    parts.append(_array("FLAGS", [*flags, *job.schedule], files, more='   "$@"\n', references=groups))
    parts.append('check_flags "${FLAGS[@]}"\n' + ("own SAVE\n" if last_value(job.words, "--save") else ""))
    parts.append(_environment(job))
    join = "join_workers\n" if several else ""
    submit = 'submit_job "$(runtime_env_json "${ENVIRONMENT[@]}")" "${FLAGS[@]}"\n'
    parts.append(f"start_ray_head\n{join}{submit}" + ("print_resume\n" if last_value(job.words, "--save") else ""))
    return "\n".join(parts)


def _size(job: Job) -> tuple[int, int]:
    """(nodes, GPUs of each): what trainer and engines take, at least."""

    def number(name: str, default: int) -> int:
        value = last_value(job.words, name)
        return int(value) if value and value.isdigit() else default

    per_node = number("--actor-num-gpus-per-node", 8)
    slots = (
        int(job.slots) if job.slots.isdigit() else max(per_node, number("--num-gpus-per-node", 8 if per_node > 4 else per_node))
    )
    trainer = number("--actor-num-nodes", 1) * per_node
    engines = number("--rollout-num-gpus", 0)
    total = max(trainer, engines) if "--colocate" in job.words else trainer + engines
    return max(1, -(-total // max(slots, 1))), slots


def _head(launcher: Path, project: Path, *, several: bool) -> str:
    nodes = (
        "# HOSTFILE    addresses of the other nodes, one a line, first column; MASTER_ADDR is this one's\n" if several else ""
    )
    return f"""#!/usr/bin/env bash
# Made from {launcher.name} by tools/from_slime.py: its flags, with this project's entry point, model script and Ray job.
#
#   bash FILE [FLAGS...]               FLAGS win over the launcher's; --rehearse proves them without starting anything
#
{nodes}# What else may be set: scripts/lib/launch.sh.
set -euo pipefail

SLIME_ROOT="${{SLIME_ROOT:-{project}}}"
source "${{SLIME_ROOT}}/scripts/lib/launch.sh"
"""


def _settings(job: Job, watched: Watched, *, nodes: int, slots: int, name: str) -> str:
    lines = ["export PYTHONUNBUFFERED=1"]
    mentioned = [*job.words, *job.environment.values(), *watched.files.values()]
    for variable, stands in STANDS_FOR.items():
        if any(stands in word for word in mentioned):
            lines.append(f'require_env {variable} "the launcher wants it"')
    if nodes > 1:
        lines.append('require_env MASTER_ADDR "give the address of this node in the cluster network"')
    else:
        lines.append('export MASTER_ADDR="${MASTER_ADDR:-127.0.0.1}"')
    lines.append(f'export NUM_GPUS="${{NUM_GPUS:-{slots}}}" NUM_NODES="${{NUM_NODES:-{nodes}}}"')
    if save := last_value(job.words, "--save"):
        lines.append(f'SAVE="${{SAVE:-{_inside(save)}}}"')
    base = re.sub(r"^run[-_]", "", name)
    lines.append(f'RUN_DIR="${{RUN_DIR:-${{SLIME_ROOT}}/outputs/{base}-$(date +%Y%m%d-%H%M%S)}}"')
    lines.append('mkdir -p "${RUN_DIR}" || die "cannot make the run folder ${RUN_DIR}"')
    return "\n".join(lines) + "\n"


def _model(model: ModelScript) -> str:
    if model.place != "here":
        return f"# The model is that of the launcher's own models/{model.name}.sh, which this project does not have.\n"
    base = f"export MODEL_ARGS_ROTARY_BASE={shlex.quote(model.rotary_base)}\n" if model.rotary_base else ""
    return f'{base}source "${{SLIME_ROOT}}/scripts/models/{model.name}.sh"\n'


def _used_files(job: Job, watched: Watched) -> dict[str, str]:
    """Files that the launcher writes and its flags name -> where they go here."""
    return {target: f"${{RUN_DIR}}/{Path(target).name}" for target in watched.files if target in job.words}


def _file(place: str, text: str) -> str:
    return f"cat >\"{place}\" <<'END_OF_FILE'\n{text.rstrip()}\nEND_OF_FILE\n"


def _groups(job: Job, watched: Watched) -> tuple[dict[str, tuple[str, ...]], list[str]]:
    """(the launcher's arrays to write, the whole command line with "@NAME" for each)."""
    ours = bool(watched.models) and watched.models[-1].place == "here"
    arrays = sorted(((name, words) for name, words in job.arrays.items() if len(words) > 1), key=lambda one: -len(one[1]))
    groups: dict[str, tuple[str, ...]] = {}
    flags: list[str] = []
    position = 0
    while position < len(job.words):
        for name, words in arrays:
            if job.words[position : position + len(words)] == words:
                flags.append(f"@{name}")
                if not (ours and name == "MODEL_ARGS"):
                    groups[name] = words
                position += len(words)
                break
        else:
            flags.append(job.words[position])
            position += 1
    return groups, flags


def _array(
    name: str, words: Sequence[str], files: Mapping[str, str], *, more: str = "", references: Mapping[str, object] | None = None
) -> str:
    lines: list[str] = []
    for word in words:
        if references is not None and word.startswith("@"):
            lines.append(f'"${{{word[1:]}[@]}}"')
        elif word.startswith("--") or not lines or lines[-1].startswith('"${'):
            lines.append(_quoted(word, files))
        else:
            lines[-1] += f" {_quoted(word, files)}"
    return f"{name}=(\n" + "".join(f"   {line}\n" for line in lines) + more + ")\n"


def _quoted(word: str, files: Mapping[str, str]) -> str:
    if word in files:
        return f'"{files[word]}"'
    return f'"{_inside(word)}"' if any(stands in word for stands in STANDS_FOR.values()) else shlex.quote(word)


def _inside(word: str) -> str:
    """Inside double quotes: what stood for a variable is that variable again."""
    text = re.sub(r'([\\"$`])', r"\\\1", word)
    for name, stands in STANDS_FOR.items():
        text = text.replace(stands, f"${{{name}}}")
    return text


def _environment(job: Job) -> str:
    own = [part for part in job.environment.get("PYTHONPATH", "").split(":") if part and "Megatron-LM" not in part]
    path = ":".join(["${SLIME_ROOT}", *map(_inside, own)])
    lines = [f'"PYTHONPATH={path}${{PYTHONPATH:+:${{PYTHONPATH}}}}"', '"PYTHONUNBUFFERED=1"']
    if "NCCL_NVLS_ENABLE" in job.environment:
        lines.append('"NCCL_NVLS_ENABLE=$(($(count_nvlinks) > 0))"')
    given = {**job.environment, **more_environment(job)}
    lines += [f'"{_inside(f"{name}={value}")}"' for name, value in given.items() if name not in OURS]
    return "ENVIRONMENT=(\n" + "".join(f"   {line}\n" for line in dict.fromkeys(lines)) + ")\n"
