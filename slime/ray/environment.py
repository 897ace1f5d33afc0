"""Variables that Ray reads when it is imported, so they are set before that, by the program and not by a module."""

from __future__ import annotations

import os
import secrets

# Every failed call is answered where it is waited for (slime.ray.calls). Ray would print the same exception again, with a
# traceback and as "Unhandled error", for each result of it that nobody took.
QUIET = {"RAY_IGNORE_UNHANDLED_ERRORS": "1"}

# The cluster that a run starts for itself is for this process alone. Whoever else reaches its ports needs a secret, and what
# asks for none is not opened: the agent's metrics, and by a port that does not exist the two of autoscaler and dashboard.
_ALONE = {"RAY_enable_metrics_collection": "0", "AUTOSCALER_METRIC_PORT": "-1", "DASHBOARD_METRIC_PORT": "-1"}


def prepare() -> None:
    os.environ.update(QUIET)
    if not os.environ.get("RAY_ADDRESS"):
        os.environ.update(_ALONE, RAY_AUTH_MODE="token", RAY_AUTH_TOKEN=secrets.token_hex(32))
