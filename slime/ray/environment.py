"""Variables that Ray reads when it is imported, so they are set before that, by the program and not by a module."""

from __future__ import annotations

import atexit
import os
import secrets
import tempfile

# Every failed call is answered where it is waited for (slime.ray.calls). Ray would print the same exception again, with a
# traceback and as "Unhandled error", for each result of it that nobody took.
QUIET = {"RAY_IGNORE_UNHANDLED_ERRORS": "1"}

# The cluster that a run starts for itself is for this process alone. Whoever else reaches its ports needs a secret, and what
# asks for none is not opened: the agent's metrics, and by a port that does not exist the two of autoscaler and dashboard.
_ALONE = {"RAY_enable_metrics_collection": "0", "AUTOSCALER_METRIC_PORT": "-1", "DASHBOARD_METRIC_PORT": "-1"}


def prepare() -> None:
    os.environ.update(QUIET)
    if not os.environ.get("RAY_ADDRESS"):
        os.environ.pop("RAY_AUTH_TOKEN", None)
        os.environ.update(_ALONE, RAY_AUTH_MODE="token", RAY_AUTH_TOKEN_PATH=_drawn_token())


def _drawn_token() -> str:
    """The file of a new secret, for this user alone; it goes with this process, whose children inherit its path alone."""
    descriptor, path = tempfile.mkstemp(prefix="slime-ray-token-")
    with os.fdopen(descriptor, "w") as file:
        file.write(secrets.token_hex(32))
    atexit.register(_forget, path, os.getpid())
    return path


def _forget(path: str, owner: int) -> None:
    if os.getpid() == owner and os.path.exists(path):
        os.unlink(path)
