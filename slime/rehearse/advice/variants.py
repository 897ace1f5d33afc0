"""A change of a run's flags: words behind them and a YAML of engines in the place of its own, read and assessed like them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import yaml

from slime.config import Config
from slime.engine.plan import lay_out, slots_of
from slime.rehearse.assess import Assessment, assess
from slime.rehearse.checks.engines import EnginePlan
from slime.rehearse.checks.layout import longest_sample
from slime.rehearse.checks.memory import DEFAULT_LENGTH, assumed_of
from slime.rehearse.findings import Findings
from slime.rehearse.model.rates import Rates
from slime.rehearse.options import Options
from slime.rehearse.reading import Reading, read


@dataclass(frozen=True)
class Variant:
    """flags: to be put behind the run's. yaml: the text of another --sglang-config, None where the run's own stays."""

    flags: tuple[str, ...] = ()
    yaml: str | None = None

    def __add__(self, other: Variant) -> Variant:
        return Variant((*self.flags, *other.flags), other.yaml if other.yaml is not None else self.yaml)


@dataclass(frozen=True)
class Outcome:
    """assessment: None where the flags do not make sense. wrong: every violation."""

    assessment: Assessment | None
    wrong: tuple[str, ...]

    @property
    def fits(self) -> bool:
        return self.assessment is not None and not self.wrong


@dataclass(frozen=True)
class Bench:
    """Where variants of one run are tried. folder: for the YAML files."""

    argv: tuple[str, ...]
    options: Options
    rates: Rates
    version: str
    folder: Path

    def words(self, variant: Variant) -> list[str]:
        words = [*self.argv, *variant.flags]
        if variant.yaml is not None:
            file = self.folder / "engines.yaml"
            file.write_text(variant.yaml)
            words += ["--sglang-config", str(file)]
        return words

    def read(self, variant: Variant) -> tuple[Reading, Findings]:
        findings = Findings()
        return read(self.words(variant), findings, env=self.options.env), findings

    def tried(self, variant: Variant) -> Outcome:
        reading, findings = self.read(variant)
        if findings.of("violation") or None in (reading.table, reading.grid, reading.chunks):
            return Outcome(None, _said(findings))
        config = reading.config
        try:
            specs = specs_of(config)
        except ValueError as error:  # groups that do not fit the slots, which the engines' part of a rehearsal says
            return Outcome(None, (str(error),))
        longest = longest_sample(config, prompt=int(assumed_of(self.options.assume).prompt_tokens))
        found = assess(
            reading,
            EnginePlan(specs, self.version, ()),
            self.options,
            self.rates,
            findings,
            length=self.options.length or longest or DEFAULT_LENGTH,
            longest=longest,
            node_counts=False,
        )
        return Outcome(found, _said(findings))


def _said(findings: Findings) -> tuple[str, ...]:
    return tuple(finding.what for finding in findings.of("violation"))


def specs_of(config: Config) -> tuple:
    """Every engine; none of a run without engines."""
    if config.debug.debug_train_only or not config.engine.groups:
        return ()
    return tuple(
        lay_out(
            config.engine.groups,
            slots=slots_of(config),
            flags=config.engine.sglang,
            hf_checkpoint=str(config.checkpoint.hf_checkpoint),
            seed=config.model.seed,
        )
    )


@dataclass(frozen=True)
class Group:
    """One group of engines as a YAML has it."""

    role: str
    engines: int
    gpus: int
    """Of one engine."""
    overrides: dict[str, object]


def groups_of(config: Config) -> tuple[Group, ...]:
    """Groups of the trained model that have engines."""
    return tuple(
        Group(group.worker_type, group.num_engines, group.num_gpus_per_engine, dict(group.overrides))
        for model in config.engine.groups
        for group in model.server_groups
        if group.num_engines
    )


def yaml_of(config: Config, groups: Sequence[Group]) -> str:
    """A --sglang-config with these groups, under the run's own name of the model."""
    listed = [
        {
            "worker_type": group.role,
            "num_gpus": group.engines * group.gpus,
            "num_gpus_per_engine": group.gpus,
            **({"overrides": group.overrides} if group.overrides else {}),
        }
        for group in groups
    ]
    content = {"sglang": [{"name": config.engine.groups[0].name, "server_groups": listed}]}
    return yaml.safe_dump(content, sort_keys=False)


def with_engines(config: Config, groups: Sequence[Group]) -> Variant:
    """The groups in a YAML where the run has one, in flags where they say as much."""
    if config.engine.sglang_config is not None or any(group.overrides for group in groups):
        return Variant(_unset(config, "--prefill-num-servers"), yaml_of(config, groups))
    sizes = {group.gpus for group in groups}
    if len(sizes) > 1:
        return Variant(_unset(config, "--prefill-num-servers"), yaml_of(config, groups))
    flags = ["--rollout-num-gpus-per-engine", str(sizes.pop())]
    prefill = sum(group.engines for group in groups if group.role == "prefill")
    flags += ["--prefill-num-servers", str(prefill)] if prefill else _unset(config, "--prefill-num-servers")
    return Variant(tuple(flags))


def _unset(config: Config, flag: str) -> tuple[str, ...]:
    return (flag, "none") if config.engine.prefill_num_servers is not None else ()


def with_count(group: Group, engines: int) -> Group:
    return replace(group, engines=engines)
