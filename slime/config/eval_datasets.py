"""Evaluation data sets: NAME FILE pairs or a YAML, with every setting filled in.

A data set's own entry wins over the file's `defaults`, which win over the flags.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass

from slime.config.errors import ConfigError, load_yaml, refuse_unknown_keys
from slime.config.flags import FrozenMap, flag
from slime.config.ranges import ANY

LATER_KEYS = {
    "multimodal_keys", "app_service", "eval_task_timeout", "min_eval_samples", "eval_early_stop_remaining",
    "eval_early_stop_idle_timeout", "message_processor", "reward_model", "remote_environment",
}  # fmt: skip
"""Keys of slime's schema that this version does not act on; giving one is refused."""


@dataclass(frozen=True)
class EvalDataset:
    """One data set of an evaluation."""

    name: str
    path: str
    input_key: str = "input"
    label_key: str | None = None
    tool_key: str | None = None
    metadata_key: str = "metadata"
    apply_chat_template: bool = False
    apply_chat_template_kwargs: Mapping[str, object] = dataclasses.field(default_factory=FrozenMap)
    n_samples_per_eval_prompt: int = flag(1, low=1)
    temperature: float = flag(1.0, low=0)
    top_p: float = flag(1.0, above=0, high=1)
    top_k: int = flag(-1, low=1, also=(-1,))
    max_response_len: int | None = flag(None, low=1)
    max_prompt_len: int | None = flag(None, low=1)
    max_context_len: int | None = flag(None, low=2)
    min_new_tokens: int | None = flag(None, low=0)
    stop: tuple[str, ...] | None = None
    stop_token_ids: tuple[int, ...] | None = flag(None, low=0)
    repetition_penalty: float | None = flag(None, above=0)
    skip_special_tokens: bool | None = None
    no_stop_trim: bool | None = None
    rm_type: str | None = None
    custom_rm_path: str | None = None
    custom_generate_function_path: str | None = None
    metadata_overrides: Mapping[str, object] = dataclasses.field(default_factory=FrozenMap)
    """Merged into each sample's metadata, as rm_type is."""


FROM_FLAGS: dict[str, tuple[str, ...]] = {
    "input_key": ("eval_input_key", "input_key"),
    "label_key": ("eval_label_key", "label_key"),
    "tool_key": ("eval_tool_key", "tool_key"),
    "metadata_key": ("metadata_key",),
    "apply_chat_template": ("apply_chat_template",),
    "apply_chat_template_kwargs": ("apply_chat_template_kwargs",),
    "n_samples_per_eval_prompt": ("n_samples_per_eval_prompt",),
    "temperature": ("eval_temperature", "rollout_temperature"),
    "top_p": ("eval_top_p", "rollout_top_p"),
    "top_k": ("eval_top_k", "rollout_top_k"),
    "max_response_len": ("eval_max_response_len", "rollout_max_response_len"),
    "max_prompt_len": ("eval_max_prompt_len", "rollout_max_prompt_len"),
    "max_context_len": ("eval_max_context_len", "rollout_max_context_len"),
    "min_new_tokens": ("eval_min_new_tokens",),
    "stop": ("rollout_stop",),
    "stop_token_ids": ("rollout_stop_token_ids",),
    "skip_special_tokens": ("rollout_skip_special_tokens",),
    "custom_rm_path": ("custom_rm_path",),
}
"""Setting of a data set -> attributes to ask, in order; the first that is not None is taken."""

_FIELDS = tuple(item.name for item in dataclasses.fields(EvalDataset))
_SHOWN = {
    "int": "whole number", "float": "number", "str": "text", "bool": "truth value", "tuple[str, ...]": "list of texts",
    "tuple[int, ...]": "list of whole numbers", "Mapping[str, object]": "mapping",
}  # fmt: skip
"""Types as a message names them."""
_SETTINGS = tuple(name for name in _FIELDS if name not in ("name", "path"))


def read_eval_datasets(values: Mapping[str, object]) -> tuple[tuple[EvalDataset, ...], list[str]]:
    """Data sets of --eval-config or --eval-prompt-data, and notes. `values` maps every attribute to its value."""
    if values["eval_config"] is not None:
        notes = []
        if values["eval_prompt_data"]:
            notes.append("--eval-prompt-data is not used, because --eval-config is given")
        return _from_yaml(str(values["eval_config"]), values), notes
    pairs = list(values["eval_prompt_data"] or ())
    if len(pairs) == 1:
        return (_make({"name": "aime", "path": pairs[0]}, {}, values, "--eval-prompt-data"),), [
            f"eval data set {pairs[0]!r} is called 'aime', because --eval-prompt-data has one value; give NAME FILE to name it"
        ]
    if len(pairs) % 2:
        raise ConfigError(f"--eval-prompt-data wants NAME FILE pairs, got {len(pairs)} values: {' '.join(map(str, pairs))}")
    made = [
        _make({"name": name, "path": path}, {}, values, "--eval-prompt-data")
        for name, path in zip(pairs[::2], pairs[1::2], strict=True)
    ]
    return _refuse_twins(made, "--eval-prompt-data"), []


def _refuse_twins(datasets: list[EvalDataset], source: str) -> tuple[EvalDataset, ...]:
    names = [dataset.name for dataset in datasets]
    twins = sorted({name for name in names if names.count(name) > 1})
    if twins:
        raise ConfigError(f"{source}: data set names must differ (they name metrics), found twice: {', '.join(twins)}")
    return tuple(datasets)


def _from_yaml(file: str, values: Mapping[str, object]) -> tuple[EvalDataset, ...]:
    content = load_yaml(file, flag="--eval-config")
    root = content.get("eval", content) if isinstance(content, dict) else None
    if not isinstance(root, dict):
        raise ConfigError(f"{file}: the top must be a mapping with 'datasets' (and 'defaults'), possibly under 'eval'")
    prefix = "eval." if root is not content else ""
    if prefix:
        refuse_unknown_keys(content, ("eval",), file=file, path="")
    refuse_unknown_keys(root, ("defaults", "datasets"), file=file, path=prefix.rstrip("."))
    defaults = root.get("defaults") or {}
    if not isinstance(defaults, dict):
        raise ConfigError(f"{file}: {prefix}defaults must be a mapping, found {defaults!r}")
    _check_keys(defaults, _SETTINGS, file, f"{prefix}defaults")
    listed = root.get("datasets") or []
    if isinstance(listed, dict):
        listed = [_named(name, entry, file, f"{prefix}datasets") for name, entry in listed.items()]
    if not isinstance(listed, list) or not listed:
        raise ConfigError(
            f"{file}: {prefix}datasets must be a list of entries (name, path, ...) or a mapping from name to entry"
        )
    made = []
    for index, entry in enumerate(listed):
        path = f"{prefix}datasets[{index}]"
        if not isinstance(entry, dict):
            raise ConfigError(f"{file}: {path} must be a mapping, found {entry!r}")
        _check_keys(entry, _FIELDS, file, path)
        missing = [key for key in ("name", "path") if not (isinstance(entry.get(key), str) and entry[key].strip())]
        if missing:
            raise ConfigError(f"{file}: {path} needs {' and '.join(missing)} as text")
        made.append(_make(entry, defaults, values, f"{file}: {path}"))
    return _refuse_twins(made, file)


def _named(name: object, entry: object, file: str, path: str) -> dict:
    """An entry of the mapping from name to entry."""
    if not isinstance(name, str) or not isinstance(entry, dict):
        raise ConfigError(f"{file}: {path}.{name} must be a mapping under a name that is text, found {entry!r}")
    return {"name": name, **entry}


def _check_keys(mapping: dict, legal: tuple[str, ...], file: str, path: str) -> None:
    later = sorted(LATER_KEYS & set(mapping))
    if later:
        raise ConfigError(f"{file}: {path}: this version does not act on {', '.join(later)}; remove it")
    refuse_unknown_keys(mapping, legal, file=file, path=path)


def _make(entry: dict, defaults: dict, values: Mapping[str, object], where: str) -> EvalDataset:
    made: dict[str, object] = {}
    for item in dataclasses.fields(EvalDataset):
        if entry.get(item.name) is not None:
            made[item.name] = _typed(item, entry[item.name], where)
        elif defaults.get(item.name) is not None:
            made[item.name] = _typed(item, defaults[item.name], where)
        else:
            answers = (values[name] for name in FROM_FLAGS.get(item.name, ()))
            found = next((answer for answer in answers if answer is not None), None)
            if found is not None:
                made[item.name] = found
    return EvalDataset(**made)  # type: ignore[arg-type]


def _typed(item: dataclasses.Field, value: object, where: str) -> object:
    """`value` of a YAML file as the field's type; YAML reads 1e-5 as text and one stop word as text."""
    kind = str(item.type).removesuffix(" | None")
    try:
        bounds = item.metadata.get("flag", {}).get("range", ANY)
        if kind.startswith("tuple"):
            inner = int if "int" in kind else str
            listed = tuple(inner(one) for one in (value if isinstance(value, list) else [value]))
            for one in listed:
                bounds.refuse(one)
            return listed
        if kind.startswith("Mapping"):
            if not isinstance(value, Mapping):
                raise ValueError("wants a mapping")
            return FrozenMap(dict(value))  # type: ignore[call-overload]
        if kind == "bool" and not isinstance(value, bool):
            raise ValueError("wants true or false")
        if kind == "float" and isinstance(value, bool):
            raise ValueError("wants a number")
        if kind == "str" and not isinstance(value, str):
            raise ValueError("wants a text; put it into quotes")
        if kind == "int" and (isinstance(value, bool) or int(value) != float(value)):  # type: ignore[call-overload, arg-type]
            raise ValueError("wants a whole number")
        made = {"int": int, "float": float, "str": str, "bool": bool}[kind](value)  # type: ignore[arg-type]
        bounds.refuse(made)
        return made
    except (TypeError, ValueError, OverflowError) as error:
        raise ConfigError(f"{where}.{item.name}: {value!r} is no {_SHOWN.get(kind, kind)} ({error})") from None
