"""slime's import path for a generate function that reads the engine's answer while it is written.

There a stream keeps what an aborted request had; here the engine's answer to an abort brings that whole, with log-probs, so
that the stock function keeps it as well.
"""

from slime.rollout.sglang_rollout import generate as generate_streaming

__all__ = ["generate_streaming"]
