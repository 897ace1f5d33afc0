"""The import path that users' plugins know: `from slime.utils.misc import load_function`."""

from __future__ import annotations

from typing import Any

from slime.config.dotted import find as load_function

__all__ = ["SingletonMeta", "load_function"]


class SingletonMeta(type):
    """A class with this metaclass has one instance per process: the first call's arguments make it, later calls give it."""

    _made: dict[type, Any] = {}

    def __call__(cls, *args: Any, **kwargs: Any) -> Any:
        if cls not in SingletonMeta._made:
            SingletonMeta._made[cls] = super().__call__(*args, **kwargs)
        return SingletonMeta._made[cls]
