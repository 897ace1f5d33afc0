"""What is done at the same time: generation and training."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from slime.config.flags import derived, flag


@dataclass(frozen=True)
class LoopConfig:
    """The schedule of rollouts, training steps and weight syncs."""

    schedule: Literal["sync", "one-step-ahead", "fully-async"] = "sync"
    """Generate and train in turn; the next rollout while one is trained; or all the time (both need devices of their own)."""
    max_weight_staleness: int | None = flag(None, low=0)
    """fully-async: most versions that a trained sample may be behind the weights of the engines; None: any."""
    on_stale_group: Literal["regenerate", "drop"] = "regenerate"
    """What becomes of a prompt whose samples are older: it is generated again, or given up and counted."""
    pause_generation_mode: Literal["retract", "in_place", "abort"] = "retract"
    """Requests in an engine whose weights change: their cache is built anew, or kept, or they end and go on as new ones."""
    runs_ahead: bool = derived(False)
    """Something is generated while the trainer trains."""
