"""The built-in graders by name, and what each needs of the flags. They themselves are in `slime.rollout.grading`."""

from __future__ import annotations

import difflib
from dataclasses import dataclass

BOXED = "boxed_"
"""A prefix of a name: the grader gets only the content of the last \\boxed{}."""


@dataclass(frozen=True)
class GraderFacts:
    """What is known of a grader without importing it."""

    name: str
    needs_label: bool
    metadata_keys: tuple[str, ...] = ()
    """Keys of a sample's metadata that it reads."""
    reward_keys: tuple[str, ...] = ()
    """Not empty: its reward is a mapping with these keys, and --reward-key names one that is a number."""
    label_in_metadata: bool = False
    """The right answer may be in the metadata instead of the label."""


GRADERS = {
    facts.name: facts
    for facts in (
        GraderFacts("math", needs_label=True),
        GraderFacts("deepscaler", needs_label=True),
        GraderFacts("dapo", needs_label=True, reward_keys=("score", "acc")),
        GraderFacts("f1", needs_label=True),
        GraderFacts(
            "gpqa",
            needs_label=True,
            label_in_metadata=True,
            metadata_keys=("choices", "valid_letters", "correct_letter", "correct_answer", "answer_text"),
        ),
        GraderFacts("ifbench", needs_label=False, metadata_keys=("instruction_id_list", "kwargs", "prompt_text", "record_id")),
        GraderFacts("remote_rm", needs_label=False),
        GraderFacts("random", needs_label=False),
    )
}


def grader_facts(name: str) -> GraderFacts | None:
    """Facts of a value of --rm-type, with or without the prefix; None for a name that no grader has."""
    return GRADERS.get(name.removeprefix(BOXED))


def unknown_grader(name: str) -> str:
    """The sentence about a name that no grader has, with the nearest one."""
    near = difflib.get_close_matches(name.removeprefix(BOXED), GRADERS, n=1, cutoff=0.5)
    hint = f"did you mean {near[0]}? " if near else ""
    return f"--rm-type {name!r} is no grader; {hint}there are {', '.join(sorted(GRADERS))}, each also with {BOXED} before it"


def grader_name(text: str) -> str:
    """The converter of --rm-type: a name with or without the prefix. Raises ValueError with the nearest name."""
    if grader_facts(text) is None:
        raise ValueError(unknown_grader(text).removeprefix("--rm-type "))
    return text
