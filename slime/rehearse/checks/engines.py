"""The engines that would start, and their options in the SGLang that will run them; the rest is in the rule book."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from slime.engine.plan import lay_out, slots_of
from slime.engine.spec import EngineSpec
from slime.engine.versions import TABLE, capabilities, installed_version, option_table, pinned_version, translate, typed_argv
from slime.rehearse.findings import Findings
from slime.rehearse.reading import Reading


@dataclass(frozen=True)
class EnginePlan:
    specs: tuple[EngineSpec, ...]
    version: str
    renames: tuple[str, ...]
    """One line per option that this SGLang version calls otherwise."""


def check_engines(reading: Reading, findings: Findings, *, version: str | None) -> EnginePlan:
    """All engines; none where the groups have no sizes (the rule book has said why)."""
    config = reading.config
    found = version or pinned_version() or _installed(findings)
    if config.debug.debug_train_only or not config.engine.groups:
        return EnginePlan((), found, ())
    try:
        column = capabilities(found)
        specs = lay_out(
            config.engine.groups,
            slots=slots_of(config),
            flags=config.engine.sglang,
            hf_checkpoint=str(config.checkpoint.hf_checkpoint),
            seed=config.model.seed,
        )
    except ValueError as error:
        if str(error) not in {finding.what for finding in findings.of("violation")}:
            findings.violation("engines", str(error), "", str(error).rpartition(";")[2].strip())
        return EnginePlan((), found, ())
    renames: list[str] = []
    for spec in {(spec.model, spec.role, repr(spec.settings)): spec for spec in specs}.values():
        renames += _check_options(spec, found, column, findings)
    return EnginePlan(tuple(specs), found, tuple(dict.fromkeys(renames)))


def check_fixed_models(specs: Sequence[EngineSpec], findings: Findings, *, gpu_gb: float, mem_fraction: float) -> None:
    """A model that is not trained is not taken apart here: its weights, by their files, have to fit its GPUs. mem_fraction:
    where no option says one."""
    for spec in {spec.model: spec for spec in specs if not spec.update_weights}.values():
        _check_fixed(spec, findings, gpu_gb=gpu_gb, mem_fraction=mem_fraction)


def _check_fixed(spec: EngineSpec, findings: Findings, *, gpu_gb: float, mem_fraction: float) -> None:
    files = list(Path(spec.model_path).glob("*.safetensors"))
    if not files:
        findings.unchecked(
            "memory",
            f"engines of {spec.model}: whether the weights of {spec.model_path} fit {spec.num_gpus} GPUs; the folder is not "
            "at hand",
            "",
            "rehearse where it is",
            decides=True,
        )
        return
    weights = sum(file.stat().st_size for file in files) / 1e9
    fraction = float(str(spec.settings.get("mem_fraction_static", mem_fraction)))
    room = spec.num_gpus * gpu_gb * fraction
    findings.check(
        weights < room,
        "memory",
        f"engines of {spec.model}: {weights:.1f} GB of weights fit {spec.num_gpus} GPUs",
        values=f"{room:.0f} GB at mem_fraction_static {fraction:g}",
        wrong=f"engines of {spec.model}: {weights:.1f} GB of weights, and {spec.num_gpus} GPUs of {gpu_gb:g} GB leave "
        f"{room:.0f} at mem_fraction_static {fraction:g}",
        fix="more GPUs for each engine (num_gpus_per_engine)",
    )


def _installed(findings: Findings) -> str:
    try:
        return installed_version()
    except ValueError:
        findings.unchecked(
            "engines",
            f"sglang is not installed here; options are checked against {TABLE[-1].version}",
            "",
            "name the cluster's with --engine-version",
        )
        return TABLE[-1].version


def _check_options(spec: EngineSpec, version: str, column, findings: Findings) -> list[str]:
    """Each option by itself, so that all wrong ones are named."""
    try:
        translated = translate(spec.settings, column)
    except ValueError as error:
        findings.violation("engines", f"{spec.model} {spec.role}: {error}", "", "keep one of the two spellings")
        return []
    wrong = 0
    for name, value in translated.settings.items():
        try:
            typed_argv({name: value}, option_table(version))
        except ValueError as error:
            wrong += 1
            findings.violation("engines", f"{spec.model} {spec.role}: {error}", "", _option_fix(str(error)))
    if not wrong:
        findings.ok(
            "engines",
            f"{spec.model} {spec.role}: every option exists in sglang {version}",
            f"{len(translated.settings)} options",
        )
    return list(translated.notes)


def _option_fix(error: str) -> str:
    return f"write {error.partition('nearest: ')[2]}" if "nearest: " in error else "correct the value or remove the option"
