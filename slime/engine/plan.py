"""From the config to engines: who sits on which slots, with which sizes and options. Pure; nothing is started."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from slime.config.engine_groups import SglangModel
from slime.config.engine_sizes import EngineSizes, engine_sizes
from slime.engine.spec import EngineSpec
from slime.engine.versions import TABLE, Translation, capabilities, installed_version, option_table, translate, typed_argv

if TYPE_CHECKING:
    from slime.config import Config


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
    specs = lay_out(
        config.engine.groups,
        slots=slots_of(config),
        flags=config.engine.sglang,
        hf_checkpoint=config.checkpoint.hf_checkpoint,
        seed=config.model.seed,
    )
    for spec in specs:
        check_options(spec)
    return specs


def slots_of(config: Config) -> Slots:
    cluster, debug = config.cluster, config.debug
    trainer_gpus = cluster.actor_num_nodes * cluster.actor_num_gpus_per_node
    alone = cluster.colocate or debug.debug_rollout_only
    return Slots(
        rollout_num_gpus=cluster.rollout_num_gpus or 0,
        gpus_per_node=cluster.num_gpus_per_node,
        trainer_gpus=0 if debug.debug_rollout_only else trainer_gpus,
        first_rollout_gpu=0 if alone else trainer_gpus,
        offload_rollout=bool(cluster.offload_rollout),
    )


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
            sizes = engine_sizes(model, group, flags, gpus_per_node=slots.gpus_per_node, hf_checkpoint=hf_checkpoint)
            for _ in range(group.num_engines):
                own_seed = seed + rank * slots.gpus_per_node
                specs.append(_spec(sizes, model, slots, engine_id=len(specs), offset=offset, seed=own_seed))
                offset += group.num_gpus_per_engine
                rank += sizes.num_nodes
    return specs


def _spec(sizes: EngineSizes, model: SglangModel, slots: Slots, *, engine_id: int, offset: int, seed: int) -> EngineSpec:
    return EngineSpec(
        model=sizes.model,
        role=sizes.role,
        engine_id=engine_id,
        gpu_offset=offset,
        num_gpus=sizes.num_gpus,
        num_nodes=sizes.num_nodes,
        tp_size=sizes.tp,
        pp_size=sizes.pp,
        dp_size=sizes.dp,
        ep_size=sizes.ep,
        model_path=sizes.model_path,
        update_weights=model.update_weights,
        needs_offload=slots.offload_rollout and slots.shared(offset),
        random_seed=seed,
        settings=sizes.settings,
    )


def check_options(spec: EngineSpec) -> Translation:
    """Type an engine's options against the SGLang that will run (the newest known one where none is installed)."""
    try:
        found = installed_version()
    except ValueError:
        found = TABLE[-1].version
    translated = translate(spec.settings, capabilities(found))
    typed_argv(translated.settings, option_table(found))
    return translated


def main(argv: Sequence[str]) -> int:
    """`python3 -m slime.engine.plan [--door rehearse] FLAGS`: would the engines start? Status 2 with what is wrong."""
    from slime.config import load

    door = "train"
    if list(argv[:1]) == ["--door"]:
        door, argv = argv[1], argv[2:]
    try:
        plan_engines(load(argv, door=door))  # type: ignore[arg-type]
    except ValueError as error:
        sys.stderr.write(f"slime: {error}\n")
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
