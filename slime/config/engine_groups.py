"""The --sglang-config YAML: models, each with groups of equal engines. Every key is checked."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal

from slime.config.errors import ConfigError, load_yaml, nearest, refuse_unknown_keys
from slime.config.flags import FrozenMap

WorkerType = Literal["regular", "prefill", "decode", "placeholder", "encoder"]
WORKER_TYPES: tuple[str, ...] = ("regular", "prefill", "decode", "placeholder", "encoder")
MODEL_KEYS = ("name", "model_path", "num_gpus_per_engine", "update_weights", "server_groups", "engine_groups")
GROUP_KEYS = ("worker_type", "num_gpus", "num_gpus_per_engine", "overrides")


@dataclass(frozen=True)
class EngineGroup:
    """Engines of one kind: num_gpus / num_gpus_per_engine of them."""

    worker_type: WorkerType
    num_gpus: int
    num_gpus_per_engine: int
    overrides: Mapping[str, object]
    """SGLang server argument -> value; wins over the --sglang-* flags."""

    @property
    def num_engines(self) -> int:
        return 0 if self.worker_type == "placeholder" else self.num_gpus // self.num_gpus_per_engine


@dataclass(frozen=True)
class SglangModel:
    """One served model behind one router."""

    name: str
    model_path: str | None
    update_weights: bool
    """The trainer's weights go to these engines."""
    server_groups: tuple[EngineGroup, ...]


def read_models(
    file: str, *, hf_checkpoint: str | None, default_gpus_per_engine: int
) -> tuple[tuple[SglangModel, ...], list[str]]:
    """Models of an --sglang-config file, with one note per value that was filled in or looks odd.

    Raises ConfigError naming the file, the path inside it, the value, and what is legal.
    """
    content = load_yaml(file, flag="--sglang-config")
    if not isinstance(content, dict):
        raise ConfigError(f"{file}: the top must be a mapping with the key 'sglang', found {type(content).__name__}")
    refuse_unknown_keys(content, ("sglang",), file=file, path="")
    if not isinstance(content.get("sglang"), list) or not content["sglang"]:
        raise ConfigError(f"{file}: 'sglang' must be a list of models, each with a name and server_groups")
    notes: list[str] = []
    models: list[SglangModel] = []
    for index, entry in enumerate(content["sglang"]):
        path = f"sglang[{index}]"
        if not isinstance(entry, dict):
            raise ConfigError(f"{file}: {path} must be a mapping, found {entry!r}")
        model = _read_model(entry, file=file, path=path, hf=hf_checkpoint, gpus=default_gpus_per_engine, notes=notes)
        if any(model.name == other.name for other in models):
            raise ConfigError(f"{file}: {path}.name {model.name!r} is taken by an earlier model; names are the routers' keys")
        models.append(model)
    if sum(model.update_weights for model in models) > 1:
        names = [model.name for model in models if model.update_weights]
        raise ConfigError(
            f"{file}: models {names} would all receive the trainer's weights; set update_weights: false on all but one"
        )
    return tuple(models), notes


def _read_model(entry: dict, *, file: str, path: str, hf: str | None, gpus: int, notes: list[str]) -> SglangModel:
    refuse_unknown_keys(entry, MODEL_KEYS, file=file, path=path)
    name = _text(entry, "name", file=file, path=path)
    if name is None:
        raise ConfigError(f"{file}: {path} has no name")
    if "server_groups" in entry and "engine_groups" in entry:
        raise ConfigError(f"{file}: {path} has server_groups and engine_groups, two names of one thing; keep server_groups")
    key = "engine_groups" if "engine_groups" in entry else "server_groups"
    listed = entry.get(key) or []
    if not isinstance(listed, list):
        raise ConfigError(f"{file}: {path}.{key} must be a list of groups, found {listed!r}")
    per_engine = _whole(entry, "num_gpus_per_engine", file=file, path=path) or gpus
    groups = tuple(
        _read_group(group, file=file, path=f"{path}.{key}[{i}]", gpus=per_engine, notes=notes) for i, group in enumerate(listed)
    )
    paths = {str(group.overrides["model_path"]) for group in groups if "model_path" in group.overrides}
    own = _text(entry, "model_path", file=file, path=path)
    if len(paths | ({own} if own else set())) > 1:
        raise ConfigError(
            f"{file}: the groups of {path} serve different models {sorted(paths | ({own} if own else set()))}; "
            "give each its own entry under 'sglang'"
        )
    model_path = own or (paths.pop() if paths else hf)
    update = entry.get("update_weights")
    if update is not None and not isinstance(update, bool):
        raise ConfigError(f"{file}: {path}.update_weights must be true or false, found {update!r}")
    if update is None:
        update = model_path == hf
        if not update:
            notes.append(
                f"sglang model {name!r}: update_weights = False, because its model_path {model_path!r} is not --hf-checkpoint"
            )
    kinds = {group.worker_type for group in groups}
    if ("prefill" in kinds) != ("decode" in kinds):
        raise ConfigError(
            f"{file}: {path} has {'prefill' if 'prefill' in kinds else 'decode'} groups alone; "
            "prefill and decode engines need each other"
        )
    return SglangModel(name=name, model_path=model_path, update_weights=update, server_groups=groups)


def _read_group(group: object, *, file: str, path: str, gpus: int, notes: list[str]) -> EngineGroup:
    if not isinstance(group, dict):
        raise ConfigError(f"{file}: {path} must be a mapping, found {group!r}")
    refuse_unknown_keys(group, GROUP_KEYS, file=file, path=path)
    kind = group.get("worker_type", "regular")
    if kind not in WORKER_TYPES:
        raise ConfigError(
            f"{file}: {path}.worker_type is {kind!r}{nearest(str(kind), WORKER_TYPES)} (legal: {', '.join(WORKER_TYPES)})"
        )
    count = _whole(group, "num_gpus", file=file, path=path)
    if count is None:
        raise ConfigError(f"{file}: {path} has no num_gpus")
    per_engine = _whole(group, "num_gpus_per_engine", file=file, path=path) or gpus
    if kind != "placeholder" and count % per_engine:
        raise ConfigError(f"{file}: {path} has num_gpus {count}, which is no multiple of num_gpus_per_engine {per_engine}")
    overrides = group.get("overrides") or {}
    if not isinstance(overrides, dict):
        raise ConfigError(f"{file}: {path}.overrides must be a mapping of SGLang server arguments, found {overrides!r}")
    clean: dict[str, object] = {}
    for key, value in overrides.items():
        name = str(key).replace("-", "_")
        if name != key:
            notes.append(f"{file}: {path}.overrides.{key} is read as {name}")
        if name in clean:
            raise ConfigError(f"{file}: {path}.overrides has {name} twice (once with dashes)")
        clean[name] = value
    return EngineGroup(kind, count, per_engine, FrozenMap(clean))


def _text(entry: dict, key: str, *, file: str, path: str) -> str | None:
    value = entry.get(key)
    if value is not None and not isinstance(value, str):
        raise ConfigError(f"{file}: {path}.{key} must be text, found {value!r}")
    return value


def _whole(entry: dict, key: str, *, file: str, path: str) -> int | None:
    value = entry.get(key)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int) or value <= 0:
        raise ConfigError(f"{file}: {path}.{key} must be a whole number above 0, found {value!r}")
    return value


def groups_without_yaml(
    *, rollout_num_gpus: int, gpus_per_engine: int, prefill_num_servers: int | None, model_path: str | None
) -> tuple[SglangModel, ...]:
    """One model "default": no groups (router only), regular engines, or prefill plus decode."""
    model = SglangModel("default", model_path, True, ())
    if rollout_num_gpus == 0:
        return (model,)
    if prefill_num_servers is None:
        if rollout_num_gpus % gpus_per_engine:
            raise ConfigError(
                f"--rollout-num-gpus {rollout_num_gpus} is no multiple of --rollout-num-gpus-per-engine {gpus_per_engine}"
            )
        return (replace(model, server_groups=(EngineGroup("regular", rollout_num_gpus, gpus_per_engine, FrozenMap()),)),)
    prefill = prefill_num_servers * gpus_per_engine
    decode = rollout_num_gpus - prefill
    if prefill <= 0 or decode <= 0 or decode % gpus_per_engine:
        raise ConfigError(
            f"--prefill-num-servers {prefill_num_servers} times --rollout-num-gpus-per-engine {gpus_per_engine} leaves "
            f"{decode} of {rollout_num_gpus} GPUs for decode; it must leave a positive multiple of {gpus_per_engine}"
        )
    groups = (
        EngineGroup("prefill", prefill, gpus_per_engine, FrozenMap()),
        EngineGroup("decode", decode, gpus_per_engine, FrozenMap()),
    )
    return (replace(model, server_groups=groups),)
