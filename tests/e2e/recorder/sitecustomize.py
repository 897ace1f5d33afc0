"""Imported by every Python whose PYTHONPATH has this folder: with RECORD_READS=FOLDER it notes there who reads the config.

A process appends to a file of its own, at once, because actors are ended without notice: {"read": [section, field, module]} for
the first reader of a field, and {"values": section, ...} with all of a section when a field of it is read for the first time.
Readers are this project's modules; what slime.config passes on (a property, the view for plugins) is read by whoever asked it.
"""

from __future__ import annotations

import json
import os
import sys
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import FrameType, ModuleType

FOLDER = os.environ.get("RECORD_READS", "")
WATCHED = "slime.config.config"
OURS = ("slime.", "slime_plugins.")
NO_READERS = ("slime.config.loader", "slime.config.resolve", "slime.config.rules")
"""They touch everything, as rehearsal and preflight do, whose processes are not recorded."""
TAKE_ALL = ("__dict__", "__iter__", "__repr__", "__eq__", "__hash__")


class Hook(MetaPathFinder):
    """Watches the config's classes as soon as a process imports them; until then a process pays nothing."""

    def find_spec(self, name: str, path: object = None, target: object = None) -> ModuleSpec | None:
        if name != WATCHED:
            return None
        sys.meta_path.remove(self)
        spec = PathFinder.find_spec(name, path)
        plain = spec.loader.exec_module

        def execute(module: ModuleType) -> None:
            plain(module)
            for section in module.SECTION_NAMES:
                watch(module.Config.__dataclass_fields__[section].default_factory, section)

        spec.loader.exec_module = execute
        return spec


def watch(cls: type, section: str) -> None:
    fields, seen = frozenset(cls.__dataclass_fields__), set()

    def read(self: object, name: str) -> object:
        if name in fields and name not in seen and (module := reader(sys._getframe(1))):
            if not seen:
                note({"values": section, "fields": {one: object.__getattribute__(self, one) for one in sorted(fields)}})
            seen.add(name)
            note({"read": [section, name, module]})
        return object.__getattribute__(self, name)

    cls.__getattribute__ = read


def reader(frame: FrameType | None) -> str:
    """The module of this project outside slime.config that asked; "" where it was nobody of ours, or somebody who takes all."""
    while frame is not None:
        name = frame.f_globals.get("__name__") or ""
        if name == "__main__":
            name = getattr(frame.f_globals.get("__spec__"), "name", "")
        if name.startswith(NO_READERS):
            return ""
        if not name.startswith("slime.config"):
            return name if name.startswith(OURS) else ""
        if frame.f_code.co_name in TAKE_ALL:
            return ""
        frame = frame.f_back
    return ""


def note(row: dict) -> None:
    with open(os.path.join(FOLDER, f"{os.getpid()}.jsonl"), "a") as file:
        file.write(json.dumps(row, default=repr) + "\n")


if os.path.isdir(FOLDER) and not {"slime.rehearse", "slime.preflight"} & set(sys.orig_argv):
    sys.meta_path.insert(0, Hook())
