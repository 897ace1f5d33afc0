"""What a run was doing when it lost a machine, in a reader's words. Imports nothing: also for who speaks when Ray is gone."""

from __future__ import annotations

import re

# What the driver calls its waits (slime.ray.calls) that a reader would not understand: the engines' calls by their names.
_PHASES = (
    (r"fleet release_memory|waking the trainer", "handing the devices to the trainer"),
    (r"fleet resume_memory|putting the trainer's", "handing the devices to the engines"),
    (r"fleet (pause|flush|begin|load|end|versions|checksums|proceed)", "sending weights to the engines"),
    (r"fleet recover", "starting engines again"),
    (r"(state|restore|num_rollout|destinations)\b", "between two phases"),
)

RESUMES = "it resumes from the last checkpoint"


def phase_of(doing: str) -> str:
    """What the driver calls a wait, in a reader's words."""
    return next((words for pattern, words in _PHASES if re.match(pattern, doing)), doing or "starting")
