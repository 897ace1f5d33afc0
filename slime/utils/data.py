"""The import path that users' data sources know: `from slime.utils.data import Dataset`."""

from __future__ import annotations

from slime.rollout.prompt_list import Dataset

__all__ = ["Dataset"]
