"""The import path that users' plugins know: `from slime.utils.types import Sample`."""

from __future__ import annotations

from slime.types.sample import Sample

__all__ = ["Sample"]
