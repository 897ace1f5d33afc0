"""The flags, read as far as they make sense: every mistake becomes a finding, and what is sound goes on to the other checks."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from math import prod
from typing import Literal

from slime.config.command_line import CommandLine, parse_words
from slime.config.config import Config
from slime.config.errors import ConfigError
from slime.config.facts import Facts, facts_of
from slime.config.hf_config import HfConfig
from slime.config.hf_fields import FAMILIES
from slime.config.loader import apply_yaml, build, starting_values
from slime.config.resolve import values_of
from slime.config.rules import STAGES, Values, collect
from slime.config.rules.layout import chunks_of
from slime.config.stages import Chunk
from slime.model.names import NameTable
from slime.model.placement import Grid
from slime.rehearse.findings import Findings
from slime.rehearse.known_models import described_config, known_config, known_names
from slime.rehearse.model.kinds import kinds

Basis = Literal["file", "release", "flags", "nothing"]
"""config.json of the checkpoint; the stored one of the release that the folder is named after; one that MODEL_ARGS describe."""

SUBJECTS = {
    "engine_model": "engines",
    "engine_answers": "engines",
    "engine_options": "engines",
    "engine_server": "engines",
    "context": "engines",
    "dispatch": "engines",
    "router": "engines",
    "training": "config",
}
"""File of a rule -> what a report calls its subject, where that is not its name."""


@dataclass(frozen=True)
class Reading:
    """What the flags mean. A part that their mistakes leave undefined is None."""

    config: Config
    hf: HfConfig | None
    basis: Basis
    """Where `hf` comes from."""
    table: NameTable | None
    grid: Grid | None
    chunks: tuple[Chunk, ...] | None

    @property
    def trains_mtp(self) -> bool:
        """The multi-token-prediction layer is built, trained and sent to the engines."""
        return bool(self.config.model.mtp_num_layers)

    @property
    def num_gpus(self) -> int:
        """Of trainer and engines together."""
        cluster = self.config.cluster
        trainer, engines = cluster.actor_num_nodes * cluster.actor_num_gpus_per_node, cluster.rollout_num_gpus or 0
        return max(trainer, engines) if cluster.colocate else trainer + engines

    @property
    def num_nodes(self) -> int:
        return max(1, -(-self.num_gpus // max(self.config.cluster.num_gpus_per_node, 1)))

    @property
    def num_parameters(self) -> int:
        """Of everything that is built, each once."""
        return sum(
            prod(entry.shape) * count
            for entry, count in kinds(self.table)
            if not entry.float32 and (self.trains_mtp or not entry.is_mtp)
        )


def read(argv: Sequence[str], findings: Findings, *, env: Mapping[str, str] | None = None) -> Reading:
    """env: the job's environment variables, where the launcher's are known."""
    words = _words(argv, findings)
    values, notes, basis = _resolved(words, findings, env)
    config = build(values, notes=tuple(notes), door="rehearse")
    hf, table = values.hf, None
    if hf is not None:
        try:
            table = _table(json.dumps(dict(hf), sort_keys=True, default=str)) if hf.get("model_type") in FAMILIES else None
        except (ValueError, TypeError, KeyError, AttributeError, ZeroDivisionError) as error:
            findings.violation("model", f"{hf.source} describes no model that can be built ({error})", "", "repair the file")
            hf = None
    return Reading(config, hf, basis if hf is not None else "nothing", table, _grid(config), chunks_of(values))


@lru_cache(maxsize=4)
def _table(raw: str) -> NameTable:
    """60,000 names of a large model take a third of a second."""
    return NameTable.for_model(HfConfig(json.loads(raw)))


def _words(argv: Sequence[str], findings: Findings) -> CommandLine:
    """All words at once when they are right; otherwise every flag by itself, keeping the right ones."""
    try:
        words = parse_words(argv, door="rehearse")
        findings.ok(
            "flags",
            "every flag is declared, and its value has the right type",
            f"{sum(w.startswith('--') for w in argv)} flags",
        )
        return words
    except ConfigError as error:
        for line in str(error).split("\n"):
            findings.violation("flags", line, fix=_flag_fix(line))
    groups: list[list[str]] = []
    for word in argv:
        if word.startswith("--") and len(word) > 2:
            groups.append([word])
        elif groups:
            groups[-1].append(word)
    kept: list[str] = []
    for group in groups:
        try:
            parse_words(group, door="rehearse")
        except ConfigError:
            continue
        kept += group
    return parse_words(kept, door="rehearse")


def _flag_fix(line: str) -> str:
    if "did you mean" in line:
        return f"write {line.partition('did you mean ')[2].rstrip('?')}"
    return f"correct or remove the flag; `{sys.executable} -m slime.config --help` lists all"


def _resolved(words: CommandLine, findings: Findings, env: Mapping[str, str] | None) -> tuple[Values, list[str], Basis]:
    start = starting_values(words)
    notes: list[str] = []
    try:
        notes = apply_yaml(start, words)
    except ConfigError as error:
        findings.violation("flags", str(error), fix="correct the file of --custom-config-path")
    facts, basis = _facts(start, findings)
    values = values_of(start, given=words.given, door="rehearse", facts=facts, env=env)
    found = collect(STAGES, values)
    for said in found.wrong:
        findings.violation(SUBJECTS.get(said.subject, said.subject), said.what, said.values, said.fix)
    for said in found.held:
        findings.ok(SUBJECTS.get(said.subject, said.subject), said.what, said.values)
    for said in found.open:
        area = SUBJECTS.get(said.subject, said.subject)
        findings.unchecked(area, said.what, said.values, said.fix, decides=said.decides)
    if not found.wrong:
        findings.ok("config", "the flags agree with each other", f"{len(values.notes)} values derived")
    return values, [*notes, *values.notes], basis


def _facts(start: dict, findings: Findings) -> tuple[Facts, Basis]:
    """What the disk says; where it has no config.json, the release of that name, or the model that MODEL_ARGS describe."""
    folder = start["hf_checkpoint"]
    try:
        found = facts_of(start)
    except ConfigError as error:
        findings.violation("files", str(error), fix="repair the file")
        return Facts(), "nothing"
    if found.hf_config is not None:
        findings.ok("files", "config.json of --hf-checkpoint is read", f"{folder}/config.json")
        return found, "file"
    if not folder:
        return found, "nothing"
    if (known := known_config(folder)) is not None:
        findings.unchecked("files", f"{folder}/config.json is not on this machine; {known.source} stands for it")
        return replace(found, hf_config=dict(known), hf_source=known.source), "release"
    described, source = described_config(start)
    absent = f"{folder}/config.json is not on this machine, and no release is stored under that name"
    findings.unchecked(
        "files",
        absent + (f"; {source} stands for it" if described else ""),
        ", ".join(known_names()),
        "run this where the checkpoint is, or copy its config.json into a folder and pass that as --hf-checkpoint",
        decides=True,
    )
    if described is None:
        return found, "nothing"
    return replace(found, hf_config=described, hf_source=source.rstrip(",")), "flags"


def _grid(config: Config) -> Grid | None:
    sizes, cluster = config.parallel, config.cluster
    grid = Grid(
        world=cluster.actor_num_nodes * cluster.actor_num_gpus_per_node,
        tp=sizes.tensor_model_parallel_size,
        pp=sizes.pipeline_model_parallel_size,
        cp=sizes.context_parallel_size,
        ep=sizes.expert_model_parallel_size,
        etp=sizes.expert_tensor_parallel_size or sizes.tensor_model_parallel_size,
    )
    if min(grid.world, grid.tp, grid.pp, grid.cp, grid.ep, grid.etp) < 1:
        return None
    if grid.world % (grid.tp * grid.pp * grid.cp) or grid.world % (grid.etp * grid.ep * grid.pp):
        return None
    return grid
