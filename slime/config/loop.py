"""What is done at the same time: generation and training."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from slime.config.flags import derived, flag


@dataclass(frozen=True)
class LoopConfig:
    """The schedule of rollouts, training steps and weight syncs."""

    schedule: Literal["sync", "one-step-ahead", "fully-async"] = flag("sync", later_values=("fully-async",))
    """Generate and train in turn, or generate the next rollout while one is trained (needs devices of their own)."""
    runs_ahead: bool = derived(False)
    """Something is generated while the trainer trains."""
