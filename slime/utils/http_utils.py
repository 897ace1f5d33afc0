"""The import path that users' plugins know: `from slime.utils.http_utils import post`."""

from __future__ import annotations

from slime.rollout.generation import num_engines as get_rollout_num_engines
from slime.rollout.http import get, init_http_client, post

__all__ = ["get", "get_rollout_num_engines", "init_http_client", "post"]
