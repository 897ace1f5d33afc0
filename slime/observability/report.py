"""The line that a user watches: one per rollout."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class RolloutLine:
    """The figures of one rollout, one training pass and one weight update."""

    rollout_id: int
    num_rollout: int
    reward: float | None
    """Mean of the graded samples; None where nothing is graded (supervised training)."""
    response_length: float
    """Mean tokens of a response."""
    log_prob_gap: float | None
    """Mean |log-prob of the trainer - log-prob of the engine| per response token; None when the engine's were not recorded."""
    entropy: float | None
    loss: float | None
    generate_seconds: float
    train_seconds: float
    sync_seconds: float
    step_seconds: float

    def text(self) -> str:
        width = len(str(self.num_rollout))
        gap = f" | gap {self.log_prob_gap:.4f}" if self.log_prob_gap is not None else ""
        entropy = f" | entropy {self.entropy:.3f}" if self.entropy is not None else ""
        loss = f" | loss {self.loss:7.4f}" if self.loss is not None else ""
        reward = f" | reward {self.reward:6.3f} {bar(self.reward)}" if self.reward is not None else ""
        return (
            f"rollout {self.rollout_id + 1:>{width}}/{self.num_rollout}{reward} | "
            f"response {self.response_length:6.1f} tok{gap}{entropy}{loss} | step {self.step_seconds:5.1f} s "
            f"(generate {self.generate_seconds:.1f}, train {self.train_seconds:.1f}, sync {self.sync_seconds:.1f})"
        )


def bar(share: float, *, cells: int = 10) -> str:
    """A reward between 0 and 1 as a short bar; values outside are cut to the ends."""
    full = round(max(0.0, min(1.0, share)) * cells)
    return "█" * full + "·" * (cells - full)


def evaluation_line(rollout_id: int, scores: Mapping[str, float], *, when: str) -> str:
    """Mean rewards by data set; a NaN is a data set of which no sample was graded."""
    listed = ", ".join(f"{name} {'has no result' if math.isnan(score) else f'{score:.3f}'}" for name, score in scores.items())
    return f"evaluation {when} (rollout {rollout_id}): {listed}"
