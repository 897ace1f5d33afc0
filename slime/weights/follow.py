"""Differences for an engine that the run does not reach into: a process beside it keeps a copy of the checkpoint at the newest
published version, and says so in the folder where versions are published.

    python3 -m slime.weights.follow --root DIR --local DIR --origin CHECKPOINT --engine http://host:port
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from urllib.parse import urlsplit

from slime.config.errors import ConfigError
from slime.config.external import engine_url
from slime.weights.published import Header, LocalCopy, version_folder, write_whole

logger = logging.getLogger(__name__)
_LOOK_SECONDS = 0.5


def _note(root: str | Path, engine: str) -> Path:
    """Where the copy of an engine is told of."""
    return Path(root) / "followed" / f"{urlsplit(engine).netloc.replace(':', '_')}.json"


def newest(root: str | Path) -> int | None:
    """The newest published version; None before the first."""
    versions = [int(folder.name.removeprefix("weight_v")) for folder in Path(root).glob("weight_v*")]
    return max(versions, default=None)


def follow(root: str | Path, copy: LocalCopy, engine: str, version: int) -> None:
    """Bring the copy to a version and say so. Raises ValueError as `LocalCopy.follow` does, and OSError."""
    run = Header.read(version_folder(root, version)).run
    applied = copy.follow(root, version)
    note = _note(root, engine)
    note.parent.mkdir(exist_ok=True)
    write_whole(note, json.dumps({"run": run, "version": version, "folder": str(copy.folder)}))
    logger.info("v%d is in %s (applied: %s)", version, copy.folder, ", ".join(map(str, applied)) or "nothing")


def wait_for_copy(root: str | Path, engine: str, version: int, seconds: float) -> str:
    """Folder of the copy beside an engine, once it has the version. Raises RuntimeError when it has not in that time."""
    run, started, said = Header.read(version_folder(root, version)).run, time.monotonic(), None
    while time.monotonic() - started < seconds:
        try:
            said = json.loads(_note(root, engine).read_text())
            if (said["run"], said["version"]) == (run, version):
                return str(said["folder"])
        except (OSError, ValueError, KeyError):
            pass  # not there yet
        time.sleep(_LOOK_SECONDS)
    raise RuntimeError(
        f"beside external engine {engine} nobody has brought a copy to weights v{version} in {seconds:.0f} s (last: "
        f"{said}): is "
        f"`python3 -m slime.weights.follow --root {root} --engine {engine} ...` running there?"
    )


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python3 -m slime.weights.follow", description=__doc__.split("\n\n")[0])
    parser.add_argument("--root", required=True, help="the run's --update-weight-disk-dir, as it is seen here")
    parser.add_argument("--local", required=True, help="folder of the copy, as the engine sees it")
    parser.add_argument("--origin", required=True, help="the checkpoint with which the engine was started")
    parser.add_argument("--engine", required=True, help="its address as in --rollout-external-engine-addrs")
    args = parser.parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s [follow] %(message)s", datefmt="%H:%M:%S")
    try:
        engine = engine_url(args.engine)
    except ConfigError as error:
        parser.error(str(error))
    copy, last, told = LocalCopy(args.local, origin=args.origin), None, None
    while True:
        version = newest(args.root)
        try:
            key = None if version is None else (Header.read(version_folder(args.root, version)).run, version)
            if key is not None and key != last:
                follow(args.root, copy, engine, version)
                last = key
        except (OSError, ValueError) as error:  # seen amid a change of runs, or a full disk: it is tried again
            if str(error) != told:
                logger.error("%s; trying again", error)
                told = str(error)
        time.sleep(_LOOK_SECONDS)


if __name__ == "__main__":
    sys.exit(main())
