"""The import path that users' plugins know: `from slime.utils.async_utils import run`."""

from __future__ import annotations

from slime.engine.client import sync as run

__all__ = ["run"]
