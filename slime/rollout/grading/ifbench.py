"""Whether a response follows all instructions of its row (`ifbench`): 1.0 or 0.0, IFBench's strict rule."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from slime.rollout.grading.instructions import CHECKS, NOT_CHECKED
from slime.rollout.grading.response import answer_part, without_end_tokens


def grade_ifbench(response: str, metadata: Mapping[str, Any]) -> float:
    """metadata: `instruction_id_list`, `kwargs` (one mapping for each, or one for all), `prompt_text`.

    An empty response follows nothing. Raises ValueError for a row without instructions, an instruction that is not checked
    here, or arguments that do not fit it.
    """
    ids = [str(name).strip() for name in metadata.get("instruction_id_list") or [] if str(name or "").strip()]
    if not ids:
        raise ValueError("the sample's metadata has no instruction_id_list; name its column with --metadata-key")
    arguments = _arguments(metadata.get("kwargs"), len(ids))
    calls = [(_check(name), _fitting(name, given, metadata)) for name, given in zip(ids, arguments, strict=True)]
    text = answer_part(without_end_tokens(response)).strip()
    return float(bool(text) and all(check(text, **given) for check, given in calls))


def _check(name: str) -> Any:
    if name in NOT_CHECKED:
        raise ValueError(f"ifbench: instruction {name} is not checked here: {NOT_CHECKED[name]}")
    if name not in CHECKS:
        raise ValueError(f"ifbench: there is no instruction {name!r}; known are the {len(CHECKS)} of IFEval and IFBench")
    return CHECKS[name]


def _arguments(given: Any, count: int) -> list[dict[str, Any]]:
    """One mapping per instruction: a list of them (a short one goes on with its last), or one for all; None is absent."""
    rows = given if isinstance(given, list) else [given] * count
    rows = [row if isinstance(row, Mapping) else {} for row in rows][:count]
    rows += [rows[-1] if rows else {}] * (count - len(rows))
    return [{key: value for key, value in row.items() if value is not None} for row in rows]


def _fitting(name: str, given: Mapping[str, Any], metadata: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments that the check takes; rows carry those of all instructions. Whole numbers may be written as 3.0."""
    wanted = list(inspect.signature(CHECKS[name]).parameters)[1:]
    offered = {"prompt_to_repeat": metadata.get("prompt_text")} | dict(given)
    missing = [key for key in wanted if offered.get(key) is None]
    if missing:
        raise ValueError(f"ifbench: instruction {name} needs {', '.join(missing)}; the row's kwargs have {sorted(given)}")
    values = {key: offered[key] for key in wanted}
    return {key: int(value) if isinstance(value, float) and value.is_integer() else value for key, value in values.items()}
