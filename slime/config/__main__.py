"""`python -m slime.config --help` lists the flags; with flags, it prints what they mean and why.

python -m slime.config [--door train|convert|rehearse] [--check] FLAGS...

--check prints mistakes alone. Exit status: 0, 2 with a mistake, 3 where the checkpoint has done all that is asked for.
"""

from __future__ import annotations

import dataclasses
import sys

from slime.config import SECTION_NAMES, load

NOTHING_TO_TRAIN = 3


def main(argv: list[str]) -> int:
    door = "train"
    if argv[:1] == ["--door"]:
        door, argv = argv[1], argv[2:]
    check = argv[:1] == ["--check"]
    argv = argv[check:]
    config = load(argv or ["--help"], door=door)  # type: ignore[arg-type]
    if check:
        sys.stderr.write(f"slime: {config.nothing_to_train()}\n" if config.nothing_to_train() else "")
        return NOTHING_TO_TRAIN if config.nothing_to_train() else 0
    for section in SECTION_NAMES:
        sys.stdout.write(f"{section}\n")
        part = getattr(config, section)
        for item in dataclasses.fields(part):
            sys.stdout.write(f"  {item.name} = {getattr(part, item.name)!r}\n")
    sys.stdout.write("notes\n" + "".join(f"  {line}\n" for line in config.notes))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
