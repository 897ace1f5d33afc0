"""docs/en/advanced/flags.md, made from the declarations.

python3 -m slime.config.flags_page            # print it
python3 -m slime.config.flags_page --write    # write the page (a test fails while it is not current)
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Iterator
from pathlib import Path

from slime.config.command_line import SECTIONS, SET_BY_SLIME, flag_table
from slime.config.flags import Flag, field_default, field_docs, to_bool, to_float, to_int, to_json_object
from slime.config.hf_check import NEUTRAL
from slime.config.megatron_words import MEANING
from slime.config.rules.effects import ONE_ANSWER, UNREAD, UNREAD_OPTIMIZER

PAGE = Path(__file__).resolve().parents[2] / "docs" / "en" / "advanced" / "flags.md"

ACTS_IN = {
    "cluster": "the driver and the placement of processes (`slime/ray`)",
    "parallel": "the trainer's process groups and model chunks (`slime/parallel`, `slime/model`)",
    "model": "the trainer's model and the comparison with `config.json` (`slime/model`, `slime/config/hf_check.py`)",
    "optimizer": "`slime/training/optimizer.py`",
    "checkpoint": "`slime/training/checkpoint.py`, the converter, the engines' first weights",
    "data": "the rollout actor's data source (`slime/rollout`)",
    "batch": "the driver's plan of steps (`slime/batch`) and the trainer's packed streams",
    "rollout": "`slime/rollout`: requests, rewards, filters",
    "evaluation": "`slime/rollout/evaluation.py`",
    "algorithm": "`slime/algorithms`, called by the trainer's objective",
    "engine": "engines, router and weight updates (`slime/engine`, `slime/weights`, `slime/ray`)",
    "loop": "the driver (`slime/train.py`, `slime/ray/run.py`, `slime/ray/in_flight.py`)",
    "tracking": "`slime/observability`",
    "debug": "the driver, dumps and checks of a run",
    "upkeep": "the driver (`slime/ray/leaving.py`, `slime/ray/lasting.py`, `slime/ray/standstill.py`)",
    "front_end": "nothing: a note at start says why",
}
"""Section -> where its flags act."""

KINDS = {to_int: "whole number", to_float: "number", str: "text", to_json_object: "JSON object", to_bool: "true or false"}
"""Converter -> what the flag takes, where neither choices nor a range say it."""
OWN_PREFIX = "dsa_"
OWN = frozenset(
    """kernel_cache max_skipped_steps keep_checkpoints on_broken_prompt_line max_drops_in_a_row rm_workers rm_timeout rehearsed
    check_weight_update_equal pg_loss_length overlong_buffer_len overlong_penalty_factor
    tis_mode tis_level tis_upper_bound tis_lower_bound tis_batch_normalize
    save_on_signal save_on_signal_seconds snapshot_interval snapshot_peer snapshot_versions max_trainer_restarts
    hang_report_minutes hang_exit_minutes skip_spike
    use_rs rs_level rs_upper_bound rs_lower_bound rs_veto_threshold
    custom_metrics_sink_path
    critic_lr critic_lr_warmup_iters critic_load critic_save""".split()
)
"""Attributes that slime and Megatron-LM do not have."""

HEAD = """# Flags

Made from the declarations by `python3 -m slime.config.flags_page --write`; `--help` at any door prints the same. Names and
defaults are those of slime and Megatron-LM, except where a flag is marked *own*: that one is this project's.

* Every flag is checked when it is read: an unknown name is refused with the nearest known one, a number has a range, a name its
  choices. What flags mean together is checked by the rule book (`slime/config/rules`), before anything is started.
* `NAME none` takes back what stood before it, where a flag may be absent: a launcher's `--decoder-first-pipeline-num-layers 14`
  followed by `--decoder-first-pipeline-num-layers none` is as if neither were there; so is a switch, `--colocate none`.
* `--custom-config-path FILE` is YAML of attributes (flags with underscores) that win over flags, under the same checks.
* `--sglang-ARGUMENT` goes to the SGLang server under the option's own name, of any supported version; `--router-ARGUMENT` to
  the router. What this project sets itself is refused there: {ours}.
* *Refused* flags are known, but this version does not have what they ask for; giving one ends the start with a sentence.
* *No effect*: recipes carry the flag, and a note at start says why it changes nothing.
"""


def page() -> str:
    ours = ", ".join(f"`{name}`" for name in sorted(SET_BY_SLIME["sglang"]))
    lines = [HEAD.format(ours=ours)]
    for section, cls in SECTIONS.items():
        lines += [f"## {section}", "", f"{(cls.__doc__ or '').splitlines()[0]} They act in {ACTS_IN[section]}.", ""]
        lines += ["| flag | takes | default | meaning |", "|---|---|---|---|", *_rows_of(section, cls), ""]
    for title, section in (
        ("megatron-core's TransformerConfig", "model.megatron"),
        ("megatron-core's OptimizerConfig", "optimizer.megatron"),
        ("megatron-core's DistributedDataParallelConfig", "optimizer.ddp"),
    ):
        lines += [f"## {title}", "", "Passed on under these field names; flags and fields are those of Megatron-LM.", ""]
        lines += ["| flag | takes | field | meaning |", "|---|---|---|---|", *_fields(section), ""]
    return "\n".join(lines)


def _rows_of(section: str, cls: type) -> Iterator[str]:
    docs = field_docs(cls)
    defaults = {item.name: field_default(item) for item in dataclasses.fields(cls)}
    for row in flag_table().values():
        if row.section != section:
            continue
        own = " *Own.*" if row.dest.startswith(OWN_PREFIX) or row.dest in OWN else ""
        effect = f" *No effect*: {ONE_ANSWER[row.dest]}." if row.dest in ONE_ANSWER else ""
        later = f" *Refused*: {row.later}." if row.later else ""
        values = f" *Refused*: {', '.join(map(str, row.later_values))}." if row.later_values else ""
        default = defaults.get(row.dest)
        turned = "Turned off: " if row.num_values == 0 and row.switch_value is False and default is None else ""
        shown = "" if row.num_values == 0 or default in (None, (), {}) else f"`{default}`"
        yield _line(row, _takes(row), shown, turned + docs.get(row.dest, "") + own + effect + later + values)


def _fields(section: str) -> Iterator[str]:
    for row in flag_table().values():
        if row.section != section or (row.num_values == 0 and row.name.startswith("--no-") and row.dest in row.name):
            continue
        why = UNREAD.get(row.dest, UNREAD_OPTIMIZER.get(row.dest))
        what = f"*Refused*: {row.later}." if row.later else f"*No effect*: {why}." if why else ""
        if row.dest in NEUTRAL and not what:
            what = f"Must leave the model as `config.json` describes it: {' or '.join(map(repr, NEUTRAL[row.dest]))}."
        turned = "Turned off: " if row.num_values == 0 and row.switch_value is False else ""
        what = what or turned + MEANING.get(row.dest, "")
        yield _line(row, _takes(row), f"`{row.dest}`", what)


def _takes(row: Flag) -> str:
    if row.num_values == 0:
        return "switch"
    bounds = str(getattr(row.convert, "bounds", "") or "")
    choices = getattr(row.convert, "choices", None)
    kind = KINDS.get(getattr(row.convert, "inner", row.convert), "text")
    if bounds and kind in ("whole number", "number"):
        bounds = f"{kind}, {bounds}"
    what = ", ".join(f"`{choice}`" for choice in choices) if choices else bounds or kind
    count = {1: "", "one or more": ", one or more"}.get(row.num_values, f", {row.num_values} of them")
    return f"{what}{count}" + (" (or `none`)" if row.optional else "")


def _line(row: Flag, takes: str, default: str, text: str) -> str:
    return f"| `{row.name}` | {takes} | {default} | {text.replace('|', chr(92) + '|')} |"


def main(argv: list[str]) -> int:
    if argv == ["--write"]:
        PAGE.write_text(page())
        return 0
    sys.stdout.write(page())
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
