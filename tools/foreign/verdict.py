"""What becomes of each flag of a foreign launcher, and of the whole: parsed, then rehearsed, by this project's own code."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from slime.config import hf_fields
from slime.config.command_line import flag_table, parse_words
from slime.config.errors import ConfigError
from slime.rehearse.options import Options
from slime.rehearse.result import Rehearsal, rehearse
from tools.foreign.job import Job, split_flags
from tools.foreign.watch import Watched

Kind = Literal["same", "differs", "no effect", "missing"]

DIFFERS = {
    "--get-mismatch-metrics": "it measures and changes nothing; there it also weighs the loss",
    "--custom-loss-function-path": "the function gets a MicroBatch where slime passes a dictionary",
    "--custom-tis-function-path": "called with --use-tis; a token that its masks drop leaves KL and entropy too",
    "--custom-config-path": "keys that no flag has go under `custom:`",
    "--rollout-all-samples-process-path": "data_source is the data source itself; there it is its bound get_samples",
    "--rollout-data-postprocess-path": "called as fn(args, rollout_id, rollout_data), as slime's code does",
    "--custom-convert-samples-to-train-data-path": "columns as in customization.md; a column is there for all rows or for none",
    "--sglang-router-policy": "spelt --router-policy",
    "--sglang-enable-ep-moe": "spelt --sglang-ep-size, of all GPUs of an engine",
    "--sglang-enable-deepep-moe": "spelt --sglang-moe-a2a-backend deepep, with --sglang-ep-size of all GPUs of an engine",
    "--rm-type": "built-in graders have a time limit, and one that breaks is never scored 0 (graders.md)",
    "--save-hf": "the written folder holds every tensor that config.json announces",
    "--n-samples-per-prompt": "a group is a column, whatever its size; nothing is centred over the whole batch",
}  # fmt: skip
"""Flags that mean the same with a difference that a user of the public project would notice."""

OF_OTHER_VERSIONS = {
    "--use-slime-router": "a router that newer versions of slime dropped too; SGLang's is always used, leave it out",
    "--slime-router-middleware-paths": "of the router that newer versions of slime dropped; leave it out",
    "--qkv-format": "batches are always packed (thd), as in newer versions of slime; leave it out",
    "--megatron-to-hf-mode": "there is one way to name weights; leave it out",
    "--train-memory-margin-bytes": "the rehearsal says what fits; leave it out",
    "--rollout-external": "engines that somebody else started are named with --rollout-external-engine-addrs; leave it out",
    "--num-gpus-per-engine": "spelt --rollout-num-gpus-per-engine",
}
"""Flags of other versions of slime -> what they are."""

WITHOUT_COUNTERPART = {
    "slime.rollout.forge_load.generate_rollout": "rollouts of a file are trained without engines (--load-debug-rollout-data), "
    "and nothing plays them beside engines that stay up",
    "slime.rollout.sleep_rollout.sleep": "a rollout that waits for ever to hold engines up; start SGLang itself for that",
}
"""Functions that public launchers name and that are not here -> why."""


@dataclass(frozen=True)
class Said:
    """One flag of the launcher."""

    name: str
    words: tuple[str, ...]
    kind: Kind
    why: str = ""

    def line(self) -> str:
        value = " ".join(self.words)
        shown = f"{self.name} {value[:60]}{'...' if len(value) > 60 else ''}".rstrip()
        return f"  {shown}" + (f": {self.why}" if self.why else "")


@dataclass(frozen=True)
class Verdict:
    flags: tuple[Said, ...]
    obstacles: tuple[str, ...]
    """What stops it before its flags mean anything together: flags that are missing, a model that is not here."""
    rehearsal: Rehearsal | None

    @property
    def runs(self) -> bool:
        """Parsed, and nothing in the rehearsal is wrong."""
        return not self.obstacles and self.rehearsal is not None and self.rehearsal.findings.verdict != "not launchable"

    def last_line(self) -> str:
        if self.obstacles:
            return f"verdict: does not run here: {'; '.join(self.obstacles)}"
        assert self.rehearsal is not None
        findings = self.rehearsal.findings
        if wrong := findings.of("violation"):
            said = "; ".join(finding.what for finding in wrong)
            return f"verdict: parses with its flags unchanged, and the rehearsal refuses it: {said}"
        open_ones = "; what is unproven needs files that are not on this machine" if findings.verdict == "not proven" else ""
        return f"verdict: parses and rehearses with its flags unchanged{open_ones}"


def judge(job: Job, watched: Watched, words: Sequence[str], *, options: Options) -> Verdict:
    """words: the job's flags, with files that the launcher would have written where they lie now."""
    flags = tuple(_said(name, tuple(given)) for name, given in split_flags(job.words) if name)
    obstacles = [lost] if (lost := _missing_model(watched)) else []
    obstacles += [f"{said.name}: {said.why}" for said in flags if said.kind == "missing"]
    if obstacles:
        return Verdict(flags, tuple(dict.fromkeys(obstacles)), None)
    done = rehearse(words, options)
    notes = done.reading.config.notes
    flags = tuple(_with_note(said, notes) for said in flags)
    return Verdict(flags, (), done)


def _missing_model(watched: Watched) -> str:
    """Why the model cannot be trained here; "" where nothing is known against it."""
    for model in watched.models:
        for family, needs in hf_fields.MISSING.items():
            if model.place != "here" and _letters(model.name).startswith(_letters(family)):
                return f"{model.name} is a {family} model, which needs {needs}, and no layer here has that"
        if model.place == "nowhere":
            return f"scripts/models has no {model.name}.sh, and there is none beside the launcher"
    return ""


def _letters(name: str) -> str:
    return re.sub(r"[^a-z0-9]", "", name.lower())


def _said(name: str, words: tuple[str, ...]) -> Said:
    if path := next((word for word in words if word in WITHOUT_COUNTERPART), None):
        return Said(name, words, "missing", f"{path} is not here: {WITHOUT_COUNTERPART[path]}")
    if name in OF_OTHER_VERSIONS:
        return Said(name, words, "missing", OF_OTHER_VERSIONS[name])
    try:
        parse_words([name, *words], door="rehearse")
    except ConfigError as error:
        row = flag_table().get(name)
        why = row.later if row is not None and row.later else str(error).removeprefix(f"{name}: ").split("\n")[0]
        return Said(name, words, "missing", f"this version does not have {row.later}" if row is not None and row.later else why)
    if name in DIFFERS:
        return Said(name, words, "differs", DIFFERS[name])
    return Said(name, words, "same")


def _with_note(said: Said, notes: Sequence[str]) -> Said:
    """What a start would say of the flag."""
    note = next((one for one in notes if one.split(" ")[0] == said.name and "change" in one), None)
    if note is None or said.kind != "same":
        return said
    return Said(said.name, said.words, "no effect", note.partition(": ")[2] or note.removeprefix(f"{said.name} "))
