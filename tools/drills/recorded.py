"""Rollouts of a drilled run: engines generate as ever, trained is what was recorded: every step is known to the bit.

--rollout-function-path tools.drills.recorded.generate_rollout        dumps lie in BASE_DIR/dumps
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from slime.rollout import sglang_rollout
from slime.rollout.base_types import RolloutFnEvalOutput, RolloutFnTrainOutput
from slime.rollout.dumps import Replay


def generate_rollout(
    args: Any, rollout_id: int, data_source: Any, evaluation: bool = False
) -> RolloutFnTrainOutput | RolloutFnEvalOutput:
    made = sglang_rollout.generate_rollout(args, rollout_id, data_source, evaluation)
    if evaluation:
        return made
    return Replay(str(Path(os.environ["BASE_DIR"]) / "dumps" / "{rollout_id}.pt")).rollout(rollout_id)
