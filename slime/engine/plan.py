"""From the config to engines: who sits on which slots, with which sizes and options. Pure; nothing is started."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from slime.config.engine_groups import EngineGroup, SglangModel
from slime.engine.spec import EngineSpec
from slime.engine.versions import TABLE, Translation, capabilities, installed_version, option_table, translate, typed_argv

if TYPE_CHECKING:
    from slime.config import Config

SIZE_NAMES = {
    "tp": ("tp_size", "tensor_parallel_size"),
    "pp": ("pp_size", "pipeline_parallel_size"),
    "dp": ("dp_size", "data_parallel_size"),
    "ep": ("ep_size", "expert_parallel_size", "ep"),
}
# Set per process by the engine room; a flag or override of them would break addressing or open the server to others.
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
)


@dataclass(frozen=True)
class Slots:
    """The rollout side of the cluster, as far as engines care."""

    rollout_num_gpus: int
    gpus_per_node: int
    trainer_gpus: int
    """GPUs of the trainer; the rollout slots begin at `first_rollout_gpu` of the same numbering"""
    first_rollout_gpu: int
    """0 when engines share the trainer's GPUs, else behind them"""
    offload_rollout: bool

    def shared(self, gpu_offset: int) -> bool:
        """Does the engine that starts at this rollout slot sit on a GPU of the trainer?"""
        return self.first_rollout_gpu + gpu_offset < self.trainer_gpus


def plan_engines(config: Config) -> list[EngineSpec]:
    """All engines of a run, in slot order. Raises ValueError for sizes that do not divide, options that do not exist."""
    cluster, debug = config.cluster, config.debug
    trainer_gpus = cluster.actor_num_nodes * cluster.actor_num_gpus_per_node
    alone = cluster.colocate or debug.debug_rollout_only
    slots = Slots(
        rollout_num_gpus=cluster.rollout_num_gpus or 0,
        gpus_per_node=cluster.num_gpus_per_node,
        trainer_gpus=0 if debug.debug_rollout_only else trainer_gpus,
        first_rollout_gpu=0 if alone else trainer_gpus,
        offload_rollout=bool(cluster.offload_rollout),
    )
    specs = lay_out(
        config.engine.groups,
        slots=slots,
        flags=config.engine.sglang,
        hf_checkpoint=config.checkpoint.hf_checkpoint,
        seed=config.model.seed,
    )
    for spec in specs:
        check_options(spec)
    return specs


def lay_out(
    models: Sequence[SglangModel], *, slots: Slots, flags: Mapping[str, object], hf_checkpoint: str, seed: int
) -> list[EngineSpec]:
    """Groups in order, each on the next slots; placeholders keep theirs empty."""
    wanted = sum(group.num_gpus for model in models for group in model.server_groups)
    if wanted != slots.rollout_num_gpus and any(model.server_groups for model in models):
        raise ValueError(
            f"the engine groups take {wanted} GPUs (placeholders included), --rollout-num-gpus is {slots.rollout_num_gpus}; "
            "make them equal"
        )
    specs: list[EngineSpec] = []
    offset = rank = 0
    for model in models:
        for group in model.server_groups:
            if group.worker_type == "placeholder":
                offset += group.num_gpus
                continue
            for _ in range(group.num_engines):
                spec = _engine(
                    model, group, slots, flags, hf_checkpoint, engine_id=len(specs), offset=offset, rank=rank, seed=seed
                )
                specs.append(spec)
                offset += group.num_gpus_per_engine
                rank += spec.num_nodes
    return specs


def _engine(
    model: SglangModel,
    group: EngineGroup,
    slots: Slots,
    flags: Mapping[str, object],
    hf_checkpoint: str,
    *,
    engine_id: int,
    offset: int,
    rank: int,
    seed: int,
) -> EngineSpec:
    settings = merged(flags, group.overrides)
    where = f"engine {engine_id} ({model.name}, {group.worker_type})"
    if group.worker_type == "encoder":
        raise ValueError(f"{where}: encoder groups serve image models, which this version does not train; remove the group")
    refused = sorted(name for name in settings if name in OURS)
    if refused:
        raise ValueError(
            f"{where}: {', '.join(refused)} are set per process by slime; remove them from the flags and overrides"
        )
    model_path = settings.pop("model_path", None) or model.model_path or hf_checkpoint
    sizes = {size: _pop_size(settings, names, where) for size, names in SIZE_NAMES.items()}
    gpus, pp = group.num_gpus_per_engine, sizes["pp"] or 1
    tp = sizes["tp"] or gpus // pp
    if tp * pp != gpus:
        raise ValueError(
            f"{where}: {gpus} GPUs are not tensor parallel {tp} x pipeline parallel {pp}; choose a pp_size that divides {gpus}"
        )
    dp = sizes["dp"] or 1
    attention_dp = str(settings.get("enable_dp_attention", "")).lower() == "true"
    if dp > 1 and not attention_dp:
        raise ValueError(f"{where}: dp_size {dp} means attention data parallelism here; add --sglang-enable-dp-attention")
    if tp % dp:
        raise ValueError(f"{where}: dp_size {dp} must divide the tensor parallel size {tp}")
    ep = sizes["ep"] or 1
    if tp % ep:
        raise ValueError(f"{where}: ep_size {ep} must divide the tensor parallel size {tp}")
    nodes = max(1, gpus // slots.gpus_per_node)
    if gpus % nodes:
        raise ValueError(f"{where}: {gpus} GPUs do not fill {nodes} nodes of {slots.gpus_per_node}")
    shared = slots.shared(offset)
    if attention_dp:
        settings["dp_size"] = dp
    return EngineSpec(
        model=model.name,
        role=group.worker_type,
        engine_id=engine_id,
        gpu_offset=offset,
        num_gpus=gpus,
        num_nodes=nodes,
        tp_size=tp,
        pp_size=pp,
        dp_size=dp,
        ep_size=ep,
        model_path=str(model_path),
        update_weights=model.update_weights,
        needs_offload=slots.offload_rollout and shared,
        random_seed=seed + rank * slots.gpus_per_node,
        settings=settings,
    )


def merged(flags: Mapping[str, object], overrides: Mapping[str, object]) -> dict[str, object]:
    """Flags with a group's overrides on top; an override replaces a flag also when they use old and new names of one option."""
    successors = TABLE[-1].renames
    overridden = {successors.get(name) or name for name in overrides}
    kept = {name: value for name, value in flags.items() if (successors.get(name) or name) not in overridden}
    return {**kept, **overrides}


def _pop_size(settings: dict[str, object], names: tuple[str, ...], where: str) -> int | None:
    given = {name: settings.pop(name) for name in names if name in settings}
    values = set()
    for name, value in given.items():
        try:
            values.add(int(str(value)))
        except ValueError:
            raise ValueError(f"{where}: {name} is {value!r}, not a whole number") from None
    if len(values) > 1:
        raise ValueError(f"{where}: {given} say different things; keep one")
    size = values.pop() if values else None
    if size is not None and size < 1:
        raise ValueError(f"{where}: {next(iter(given))} is {size}; sizes start at 1")
    return size


def check_options(spec: EngineSpec) -> Translation:
    """Type an engine's options against the SGLang that will run (the newest known one where none is installed)."""
    try:
        found = installed_version()
    except ValueError:
        found = TABLE[-1].version
    translated = translate(spec.settings, capabilities(found))
    typed_argv(translated.settings, option_table(found))
    return translated
