"""User functions named by dotted paths in flags."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any


def load_hook(flag: str, path: str | None) -> Callable[..., Any] | None:
    """The function at `path` (package.module.name), or None for no path. Raises ValueError naming flag, path and what is
    missing."""
    if path is None:
        return None
    module_name, _, name = path.rpartition(".")
    if not module_name:
        raise ValueError(f"{flag} {path}: expected package.module.function")
    try:
        module = importlib.import_module(module_name)
    except ImportError as error:
        raise ValueError(f"{flag} {path}: cannot import {module_name}: {error}") from error
    hook = getattr(module, name, None)
    if not callable(hook):
        raise ValueError(f"{flag} {path}: {module_name} has no function {name}")
    return hook
