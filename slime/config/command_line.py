"""Words of a command line -> attribute values. Strict: what nobody declares is refused, all mistakes at once."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from slime.config.cluster import ClusterConfig, EngineConfig
from slime.config.errors import ConfigError, nearest, one_edit_apart
from slime.config.flags import Flag, flags_of
from slime.config.front_end import FrontEndConfig
from slime.config.loop import LoopConfig
from slime.config.megatron_flags import megatron_flags
from slime.config.model import ModelConfig, ParallelConfig
from slime.config.rollout import DataConfig, EvalConfig, RolloutConfig
from slime.config.run import DebugConfig, TrackingConfig
from slime.config.training import AlgorithmConfig, BatchConfig, CheckpointConfig, OptimizerConfig
from slime.config.upkeep import UpkeepConfig

SECTIONS: Mapping[str, type] = {
    "cluster": ClusterConfig,
    "parallel": ParallelConfig,
    "model": ModelConfig,
    "optimizer": OptimizerConfig,
    "checkpoint": CheckpointConfig,
    "data": DataConfig,
    "batch": BatchConfig,
    "rollout": RolloutConfig,
    "evaluation": EvalConfig,
    "algorithm": AlgorithmConfig,
    "engine": EngineConfig,
    "loop": LoopConfig,
    "tracking": TrackingConfig,
    "debug": DebugConfig,
    "upkeep": UpkeepConfig,
    "front_end": FrontEndConfig,
}
CONVERT_SECTIONS = ("model", "parallel", "checkpoint")

SET_BY_SLIME = {
    "sglang": {
        "model_path": "--hf-checkpoint", "tp_size": "--rollout-num-gpus-per-engine",
        "tensor_parallel_size": "--rollout-num-gpus-per-engine",
        "random_seed": "--seed", "port": "", "host": "", "nnodes": "", "node_rank": "", "dist_init_addr": "", "nccl_port": "",
        "base_gpu_id": "", "gpu_id_step": "", "trust_remote_code": "", "config": "", "skip_server_warmup": "",
        "enable_memory_saver": "--offload-rollout", "enable_return_routed_experts": "--use-rollout-routing-replay",
        "enable_return_indexer_topk": "--use-rollout-indexer-replay",
        "disaggregation_mode": "worker_type in --sglang-config", "disaggregation_bootstrap_port": "", "api_key": "",
        "admin_api_key": "",
    },
    "router": {
        "host": "", "port": "--sglang-router-port", "api_key": "", "worker_urls": "", "prefill": "", "decode": "",
        "pd_disaggregation": "worker_type in --sglang-config", "prometheus_host": "", "prometheus_port": "",
    },
}  # fmt: skip
"""Engine and router settings that this project sets itself -> the flag to use instead, if there is one."""


@dataclass(frozen=True)
class CommandLine:
    """What the words said, before any derivation."""

    given: Mapping[str, object]
    """Attribute -> value, for attributes of the sections."""
    megatron: Mapping[str, Mapping[str, object]]
    """"model.megatron", "optimizer.megatron" or "optimizer.ddp" -> field -> value."""
    sglang: Mapping[str, str | bool]
    router: Mapping[str, str | bool]


@functools.lru_cache(maxsize=1)
def flag_table() -> Mapping[str, Flag]:
    """Every declared flag by its name with dashes."""
    table: dict[str, Flag] = {}
    for section, cls in SECTIONS.items():
        for row in flags_of(section, cls):
            assert row.name not in table, f"{row.name} is declared in {section} and in {table[row.name].section}"
            table[row.name] = row
    table.update((row.name, row) for row in megatron_flags(set(table)))
    return table


def parse_words(argv: Sequence[str], *, door: str) -> CommandLine:
    """Values of `argv`. Raises ConfigError with one line per mistake."""
    given: dict[str, object] = {}
    megatron: dict[str, dict[str, object]] = {"model.megatron": {}, "optimizer.megatron": {}, "optimizer.ddp": {}}
    carried: dict[str, dict[str, str | bool]] = {"sglang": {}, "router": {}}
    mistakes: list[str] = []
    for name, words in _split(argv, mistakes):
        row = flag_table().get(name)
        kind = next((prefix for prefix in carried if name.startswith(f"--{prefix}-")), None)
        if row is None and kind is not None:
            _carry(kind, name, words, carried[kind], mistakes)
        elif row is None:
            mistakes.append(f"unknown flag {name}{nearest(name, flag_table())}")
        elif door == "convert" and row.section.split(".")[0] not in CONVERT_SECTIONS:
            mistakes.append(f"{name} has no meaning for a conversion; it takes model, parallel and checkpoint flags")
        else:
            _store(row, words, megatron.get(row.section, given), mistakes)
    if mistakes:
        raise ConfigError("\n".join(mistakes))
    return CommandLine(given=given, megatron=megatron, sglang=carried["sglang"], router=carried["router"])


def _split(argv: Sequence[str], mistakes: list[str]) -> Iterable[tuple[str, list[str]]]:
    """(flag, its words) in order. `--flag=value` is one word; a word that begins with one dash is a value."""
    found: list[tuple[str, list[str]]] = []
    for word in argv:
        if word.startswith("--") and len(word) > 2:
            name, equals, value = word.partition("=")
            found.append((name, [value] if equals else []))
        elif not found:
            mistakes.append(f"{word!r} stands alone; every value follows its flag")
        else:
            found[-1][1].append(word)
    return found


def _carry(kind: str, name: str, words: list[str], into: dict[str, str | bool], mistakes: list[str]) -> None:
    """An engine or router flag as text: no word is a switch, several words are joined by spaces."""
    key = name[len(kind) + 3 :].replace("-", "_")
    if key in SET_BY_SLIME[kind]:
        instead = SET_BY_SLIME[kind][key]
        mistakes.append(f"{name} is set by slime itself" + (f"; use {instead}" if instead else "; remove it"))
        return
    own = [known for known in flag_table() if known.startswith(f"--{kind}-")]
    close = nearest(name, [known for known in own if abs(len(known) - len(name)) <= 2])
    if close and one_edit_apart(name, close.removeprefix("; did you mean ").removesuffix("?")):
        mistakes.append(f"unknown flag {name}{close}")
        return
    into[key] = " ".join(words) if words else True


def _store(row: Flag, words: list[str], into: dict[str, object], mistakes: list[str]) -> None:
    if row.later:
        mistakes.append(f"{row.name}: this version does not have {row.later}; remove the flag")
        return
    if words == ["none"] and (row.optional or row.num_values == 0):
        into.pop(row.dest, None)  # a word of the launcher's that a later one takes back
        return
    if row.num_values == 0:
        if words:
            mistakes.append(f"{row.name} is a switch and takes no value, got {' '.join(words)!r}")
            return
        into[row.dest] = row.switch_value
        return
    wanted = row.num_values
    if not words or (wanted != "one or more" and len(words) != wanted):
        said = f", got {' '.join(words)!r}" if words else ""
        mistakes.append(f"{row.name} wants {'at least one value' if wanted == 'one or more' else f'exactly {wanted}'}{said}")
        return
    try:
        values = tuple(convert_word(row, word) for word in words)
    except ValueError as error:
        mistakes.append(str(error))
        return
    if row.append:
        into[row.dest] = (*into.get(row.dest, ()), *values)  # type: ignore[misc]
    elif row.num_values == 1:
        into[row.dest] = values[0]
    elif "." in row.section:  # a list of megatron-core; one value stays a scalar, which its unions expect
        into[row.dest] = (
            values[0] if len(values) == 1 and row.dest not in ("recompute_modules", "mrope_section") else list(values)
        )
    else:
        into[row.dest] = values


def convert_word(row: Flag, word: str) -> object:
    """The value that `word` means for the flag. Raises ValueError naming the flag."""
    try:
        value = row.convert(word)
    except ValueError as error:
        raise ValueError(f"{row.name} {error}") from None
    if value in row.later_values:
        raise ValueError(f"{row.name} {word}: this version does not have it yet")
    return value
