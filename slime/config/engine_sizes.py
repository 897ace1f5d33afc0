"""What one engine of a group is made of: its ranks along each axis, and the options that are left for SGLang. Pure "
"arithmetic."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from slime.config.engine_groups import EngineGroup, SglangModel
from slime.config.errors import ConfigError

SIZE_NAMES = {
    "tp": ("tp_size", "tensor_parallel_size"),
    "pp": ("pp_size", "pipeline_parallel_size"),
    "dp": ("dp_size", "data_parallel_size"),
    "ep": ("ep_size", "expert_parallel_size", "ep"),
}
OURS = (
    "host",
    "port",
    "nccl_port",
    "dist_init_addr",
    "nnodes",
    "node_rank",
    "api_key",
    "admin_api_key",
    "disaggregation_bootstrap_port",
    "disaggregation_mode",
    "base_gpu_id",
    "gpu_id_step",
)
"""Set per process by the engine room; a flag or override of them would break addressing, give a process another's GPUs or
role, or open the server to others."""

DEFAULT_TRANSFER = "mooncake"
"""How SGLang moves KV between a prefill and a decode engine when nothing is said."""

SUCCESSORS: Mapping[str, str] = {
    "nsa_prefill_backend": "dsa_prefill_backend",
    "nsa_decode_backend": "dsa_decode_backend",
    "cuda_graph_max_bs": "cuda_graph_max_bs_decode",
    "cuda_graph_bs": "cuda_graph_bs_decode",
    "piecewise_cuda_graph_tokens": "cuda_graph_bs_prefill",
    "piecewise_cuda_graph_max_tokens": "cuda_graph_max_bs_prefill",
}
"""An option's name in the oldest supported SGLang -> its name since."""

RETIRED: Mapping[str, Mapping[str, str]] = {"enable_ep_moe": {}, "enable_deepep_moe": {"moe_a2a_backend": "deepep"}}
"""Switches that spread an engine's experts over all of its ranks in SGLang before 0.5 (public launchers still have them) ->
what they say beside that."""


def merged(flags: Mapping[str, object], overrides: Mapping[str, object]) -> dict[str, object]:
    """Flags with a group's overrides on top; an override replaces a flag also when they use old and new names of one option."""
    overridden = {SUCCESSORS.get(name, name) for name in overrides}
    kept = {name: value for name, value in flags.items() if SUCCESSORS.get(name, name) not in overridden}
    return {**kept, **overrides}


@dataclass(frozen=True)
class EngineSizes:
    """One engine, before it has a place."""

    model: str
    role: str
    num_gpus: int
    num_nodes: int
    tp: int
    pp: int
    dp: int
    ep: int
    model_path: str
    settings: Mapping[str, object]
    """SGLang's options as they were written, without the sizes."""

    @property
    def where(self) -> str:
        return f"{self.model} {self.role}"

    @property
    def attention_tp(self) -> int:
        """Ranks that share one attention."""
        return self.tp // self.dp

    def text(self, name: str) -> str | None:
        """An option's value under its old or new name; None when it is not given (or null)."""
        names = {name, SUCCESSORS.get(name, name), *(old for old, new in SUCCESSORS.items() if new == name)}
        found = next((self.settings[one] for one in names if one in self.settings), None)
        return None if found is None else str(found)

    def whole(self, name: str) -> int | None:
        """The same as a number; None also for what is no whole number (the option's own type is checked elsewhere)."""
        try:
            return int(self.text(name) or "")
        except ValueError:
            return None

    def number(self, name: str) -> float | None:
        """The same, whole or not."""
        try:
            return float(self.text(name) or "")
        except ValueError:
            return None

    def on(self, name: str) -> bool:
        return (self.text(name) or "").lower() in ("true", "1")


def engine_sizes(
    model: SglangModel, group: EngineGroup, flags: Mapping[str, object], *, gpus_per_node: int, hf_checkpoint: str | None
) -> EngineSizes:
    """Sizes of each engine of a group. Raises ConfigError for sizes that do not divide, and options that only slime may set."""
    settings, where = merged(flags, group.overrides), f"{model.name} {group.worker_type}"
    if group.worker_type == "encoder":
        raise ConfigError(f"{where}: encoder groups serve image models, which this version does not train; remove the group")
    if refused := sorted(name for name in settings if name in OURS):
        raise ConfigError(
            f"{where}: {', '.join(refused)} are set per process by slime; remove them from the flags and overrides"
        )
    model_path = settings.pop("model_path", None) or model.model_path or hf_checkpoint
    sizes = {size: _pop_size(settings, names, where) for size, names in SIZE_NAMES.items()}
    gpus, pp = group.num_gpus_per_engine, sizes["pp"] or 1
    tp = sizes["tp"] or max(gpus // pp, 1)
    if tp * pp != gpus:
        raise ConfigError(
            f"{where}: {gpus} GPUs are not tensor parallel {tp} x pipeline parallel {pp}; choose a pp_size that divides {gpus}"
        )
    dp, ep = sizes["dp"] or 1, sizes["ep"] or (tp if _spreads_experts(settings, where) else 1)
    attention_dp = str(settings.get("enable_dp_attention", "")).lower() in ("true", "1")
    if dp > 1 and not attention_dp:
        raise ConfigError(f"{where}: dp_size {dp} means attention data parallelism here; add --sglang-enable-dp-attention")
    if tp % dp:
        raise ConfigError(f"{where}: dp_size {dp} must divide the tensor parallel size {tp}; choose among {divisors(tp)}")
    if tp % ep:
        raise ConfigError(f"{where}: ep_size {ep} must divide the tensor parallel size {tp}; choose among {divisors(tp)}")
    nodes = max(1, gpus // gpus_per_node)
    if gpus % nodes or gpus // nodes > gpus_per_node:
        raise ConfigError(
            f"{where}: {gpus} GPUs do not fill {-(-gpus // gpus_per_node)} nodes of {gpus_per_node}; choose a multiple of "
            f"{gpus_per_node}"
        )
    if attention_dp:
        settings["dp_size"] = dp
    return EngineSizes(model.name, group.worker_type, gpus, nodes, tp, pp, dp, ep, str(model_path), settings)


def divisors(number: int, *, of: int | None = None) -> list[int]:
    """Of `number`, and of the second number too where there is one."""
    return [size for size in range(1, number + 1) if number % size == 0 and (of is None or of % size == 0)]


def _pop_size(settings: dict[str, object], names: tuple[str, ...], where: str) -> int | None:
    given = {name: settings.pop(name) for name in names if name in settings}
    values = set()
    for name, value in given.items():
        try:
            values.add(int(str(value)))
        except ValueError:
            raise ConfigError(f"{where}: {name} is {value!r}, not a whole number; give one") from None
    if len(values) > 1:
        raise ConfigError(f"{where}: {given} say different things; keep one")
    size = values.pop() if values else None
    if size is not None and size < 1:
        raise ConfigError(f"{where}: {next(iter(given))} is {size}; sizes start at 1")
    return size


def _spreads_experts(settings: dict[str, object], where: str) -> bool:
    """Whether a retired switch asks for it; takes such switches out, and puts in what else they say."""
    found = False
    for switch, meant in RETIRED.items():
        if str(settings.pop(switch, "")).lower() not in ("true", "1"):
            continue
        found = True
        for name, value in meant.items():
            if settings.setdefault(name, value) != value:
                raise ConfigError(f"{where}: {switch} means {name} {value}, and {name} is {settings[name]}; keep one")
    return found


def sizes_of_groups(
    models: Sequence[SglangModel], flags: Mapping[str, object], *, gpus_per_node: int, hf_checkpoint: str | None
) -> Iterator[EngineSizes | ConfigError]:
    """One answer for each group that has engines, in order: its sizes, or why it has none."""
    for model in models:
        for group in model.server_groups:
            if group.worker_type == "placeholder":
                continue
            try:
                yield engine_sizes(model, group, flags, gpus_per_node=gpus_per_node, hf_checkpoint=hf_checkpoint)
            except ConfigError as error:
                yield error
