"""What a launcher would run, learnt by running it where it can do nothing: see watch.sh and confine.py."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from tools.foreign.confine import confine, version

READERS = """awk basename cat cut dirname expr false grep head ls nproc paste printf readlink realpath rev sed seq sort tac tail
tr true uniq wc""".split()
"""Programs that a launcher may really run: they read and print."""
SECONDS = 20
STANDS_FOR = {name: f"/{name}" for name in ("BASE_DIR", "BASE_FOLDER")} | {
    name: f"{name}_OF_YOURS" for name in ("WANDB_KEY", "WANDB_API_KEY", "HF_TOKEN")
}
"""Variables that public launchers want from the caller -> what stands for them: a folder, and secrets that no file may hold."""


@dataclass(frozen=True)
class Call:
    """One command that was not run."""

    words: tuple[str, ...]
    arrays: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """The shell's arrays at that time, of calls that mention training."""
    environment: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class ModelScript:
    name: str
    place: str
    """"here": scripts/models of this project; "theirs": beside the launcher; "nowhere"."""
    rotary_base: str
    """MODEL_ARGS_ROTARY_BASE at that time."""


@dataclass(frozen=True)
class Watched:
    calls: tuple[Call, ...]
    models: tuple[ModelScript, ...]
    files: Mapping[str, str]
    """What it would have written: path -> text."""
    last_words: str
    """What it printed last."""
    ended: str
    """How it ended: "", or "after 20 s", "with status 1"."""


def watch(launcher: Path, *, models: Path, arguments: Sequence[str] = (), settings: Mapping[str, str] | None = None) -> Watched:
    """models: scripts/models of this project. settings: variables that the caller of the launcher would set.

    Raises ValueError where the launcher cannot be confined.
    """
    if not version():
        raise ValueError(
            "a foreign launcher is run only where the kernel can confine it (Landlock, Linux 5.13 or later), and this one "
            "cannot; take the file to such a machine"
        )
    with tempfile.TemporaryDirectory(prefix="slime-watch-") as name:
        folder = Path(name)
        programs = _link_programs(folder / "bin")
        environment = {
            "PATH": str(folder / "bin"), "HOME": os.environ.get("HOME", "/"), "USER": os.environ.get("USER", "user"),
            "LANG": "C.UTF-8", "TMPDIR": name, "WATCH_FOLDER": name, "WATCH_MODELS": str(models),
            **STANDS_FOR, **(settings or {}),
        }  # fmt: skip
        words = [str(programs["bash"]), "--noprofile", "--norc", str(Path(__file__).with_name("watch.sh")), str(launcher)]
        process = subprocess.Popen(
            [*words, *arguments], env=environment, cwd=launcher.parent, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT, start_new_session=True,
            preexec_fn=partial(confine, writable=folder, programs=programs.values()),
        )  # fmt: skip
        try:
            said, _ = process.communicate(timeout=SECONDS)
            ended = f"with status {process.returncode}" if process.returncode else ""
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            said, _ = process.communicate()
            ended = f"after {SECONDS} s, when it was stopped"
        # Lines of a trace begin with a plus.
        lines = [line for line in said.decode(errors="replace").splitlines() if line.strip() and line[0] != "+"]
        return _read(folder, "\n".join(lines[-5:]), ended)


def _link_programs(folder: Path) -> dict[str, Path]:
    folder.mkdir()
    found = {name: shutil.which(name) for name in ("bash", "date", *READERS)}
    if found["bash"] is None:
        raise ValueError("there is no bash on this machine, and a launcher is a bash script")
    for name, path in found.items():
        if path is not None and name != "bash":
            (folder / name).symlink_to(Path(path).resolve())
    return {name: Path(path).resolve() for name, path in found.items() if path is not None}


def _read(folder: Path, last_words: str, ended: str) -> Watched:
    calls: list[Call] = []
    models: list[ModelScript] = []
    files: dict[str, str] = {}
    # The name begins with the time.
    for file in sorted(folder.glob("call.*"), key=lambda one: [int(part) for part in one.name.split(".")[1:]]):
        fields = iter(file.read_bytes().decode(errors="surrogateescape").split("\0"))
        kind, count = next(fields), int(next(fields)) - 1
        words = tuple(next(fields) for _ in range(count))
        if kind == "command":
            calls.append(Call(words, *_surroundings(fields)))
        elif kind == "model":
            models.append(ModelScript(*words))
        elif kind == "file" and (written := Path(words[1])).exists():
            files[words[0]] = written.read_text(errors="replace")
    return Watched(tuple(calls), tuple(models), files, last_words, ended)


def _surroundings(fields: Iterator[str]) -> tuple[dict[str, tuple[str, ...]], dict[str, str]]:
    arrays: dict[str, tuple[str, ...]] = {}
    environment: dict[str, str] = {}
    for kind in fields:
        if kind == "array":
            name, count = next(fields), int(next(fields))
            arrays[name] = tuple(next(fields) for _ in range(count))
        elif kind == "env":
            name = next(fields)
            environment[name] = next(fields)
    return arrays, environment
