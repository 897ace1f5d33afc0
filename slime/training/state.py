"""What a checkpoint of a trainer holds, and how a trainer takes it back."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch.distributed as dist

from slime.compat.megatron import prepare
from slime.compat.pickles import foreign_classes
from slime.model.build import padded_vocab_size
from slime.model.dist_ckpt import (
    DESCRIPTION,
    check_description,
    describe,
    fill_chunks,
    load_model,
    load_sharded,
    sharded_model,
    sharding_metadata,
)
from slime.model.hf_config import read_hf_config
from slime.model.hf_io import SafetensorsReader, load_hf
from slime.model.names import NameTable
from slime.training import checkpoint
from slime.training.optimizer import restore_schedule
from slime.training.shared_folder import refuse_unshared

if TYPE_CHECKING:
    from slime.training.trainer import Trainer

prepare()

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class LoadedState:
    """What the driver needs to know after a load."""

    start_rollout_id: int
    data_state: dict[str, Any] | None
    """What the driver gave to the save this run continues from; None where nothing is continued."""
    train_steps: int = 0
    """Optimizer steps that the run has done before, skipped ones included."""
    continued: int | None = None
    """Rollout after which the checkpoint was saved that is continued; None where nothing is."""


def load(trainer: Trainer) -> LoadedState:
    """Weights of reference and teacher into snapshots (where an objective needs them), then the actor's own state; see
    checkpoint.resolve."""
    config = trainer.config
    if config.checkpoint.save and trainer.ranks.world_size > 1:
        refuse_unshared(Path(config.checkpoint.save), "--save")
    load_beside(trainer)
    source = checkpoint.resolve(config)
    start = source.start_rollout_id(config.checkpoint.start_rollout_id)
    data_state = None
    if source.kind == "megatron":
        checkpoint.verify(source.folder, trainer.ranks, source.flags)
    if source.resumes:
        data_state = resume(trainer, source.folder)
    else:
        load_weights(trainer, source.kind, source.folder)
        if trainer.optimizer is not None:
            trainer.optimizer.reload_model_params()
    if trainer.ranks.rank == 0:
        how = "continues" if source.resumes else "weights only, counting from the start"
        log.info("load %s: %s (%s); first rollout %d", source.folder, source.why, how, start + 1)
    return LoadedState(start, data_state, trainer.steps_done, source.iteration if source.resumes else None)


def load_beside(trainer: Trainer) -> None:
    """The weights of reference and teacher into snapshots, where an objective needs them."""
    config = trainer.config
    if trainer.keeps_reference:
        if not config.checkpoint.ref_load:
            raise ValueError("--kl-coef / --use-kl-loss compare with a reference model; give --ref-load")
        _load_one_beside(trainer, "ref", config.checkpoint.ref_load, config.checkpoint.ref_ckpt_step, checkpoint.REFERENCE)
    rules = config.algorithm
    if rules.use_opd and rules.opd_type == "megatron":
        _load_one_beside(trainer, "teacher", rules.opd_teacher_load, rules.opd_teacher_ckpt_step, checkpoint.TEACHER)


def save(trainer: Trainer, rollout_id: int, data_state: Mapping[str, Any] | None) -> Path:
    """Everything under iteration `rollout_id`; every rank calls it with the same data_state.

    With --async-save it returns as soon as the state may change; `finish_save` puts the checkpoint in force, and comes
    before the next save.
    """
    config = trainer.config
    finish_save(trainer)
    if not config.checkpoint.save:
        raise ValueError("saving needs --save FOLDER")
    if foreign := foreign_classes(data_state):
        raise ValueError(
            f"the data position cannot be saved: it holds {', '.join(foreign[:3])}, which no load would take; keep plain "
            "values in the metadata of samples and of the data source"
        )
    state = _sharded_state(trainer, is_loading=False)
    hf = read_hf_config(config.checkpoint.hf_checkpoint)
    state |= {
        DESCRIPTION: describe(hf, value_head=trainer.trains_values),
        "iteration": rollout_id,
        "rollout_id": rollout_id,
        "data_state": dict(data_state) if data_state is not None else None,
        "world_size": trainer.ranks.world_size,
        "train_steps": trainer.steps_done,
        "skipped_steps": trainer.guard.skipped,
        "steps_taken": trainer.guard.spikes.state(),
    }
    trainer.pending_save = checkpoint.begin_save(
        Path(config.checkpoint.save), str(rollout_id), state, trainer.ranks, keep=config.checkpoint.keep_checkpoints
    )
    folder = trainer.pending_save.final
    if not config.checkpoint.async_save:
        finish_save(trainer)
    return folder


def finish_save(trainer: Trainer, *, wait: bool = True) -> None:
    """Put a pending save in force; with wait=False only if its files are written. Raises a failed one's ValueError, once."""
    pending = trainer.pending_save
    if pending is None or not (wait or pending.is_written()):
        return
    trainer.pending_save = None
    pending.finish()


def _sharded_state(trainer: Trainer, *, is_loading: bool, with_random: bool = True) -> dict[str, Any]:
    state: dict[str, Any] = sharded_model(trainer.model, trainer.ranks)
    keeps_optimizer = not (trainer.config.checkpoint.no_load_optim if is_loading else trainer.config.checkpoint.no_save_optim)
    if trainer.optimizer is not None and keeps_optimizer:
        state["optimizer"] = trainer.optimizer.sharded_state_dict(
            dict(state), is_loading=is_loading, metadata=sharding_metadata(trainer.ranks)
        )
        if not is_loading:
            _agree_on_step(state["optimizer"])
        # Not sharded: in a load it stays out of the request and is read from the checkpoint's common values.
        if not is_loading:
            state["opt_param_scheduler"] = trainer.scheduler.state_dict()
    if with_random:
        state |= checkpoint.random_state(trainer.ranks)
    return state


def _agree_on_step(optimizer: dict[Any, Any]) -> None:
    """One Adam step count in all parameter groups on all ranks. A rank without parameters in a group (experts, in a stage of
    dense layers) has not counted, and the values of rank 0 are the ones that are written."""
    parts = [optimizer] if "optimizer" in optimizer else optimizer.values()
    groups = [group for part in parts for group in part.get("optimizer", {}).get("param_groups", ())]
    counted: list[int] = [0] * dist.get_world_size()
    dist.all_gather_object(counted, max((int(group.get("step") or 0) for group in groups), default=0))
    if any(counted):
        for group in groups:
            group["step"] = max(counted)


def resume(trainer: Trainer, folder: Path) -> dict[str, Any] | None:
    """All of a checkpoint of this trainer's kind: weights, optimizer, schedule, random state. Returns the data position."""
    paths, rules = trainer.config.checkpoint, trainer.config.optimizer
    common = check_description(read_hf_config(paths.hf_checkpoint), folder, value_head=trainer.trains_values)
    saved_world = common.get("world_size")
    with_random = not paths.no_load_rng and saved_world == trainer.ranks.world_size
    if not with_random and not paths.no_load_rng and trainer.ranks.rank == 0:
        log.warning("random streams start anew: %s ranks saved, %d load", saved_world, trainer.ranks.world_size)
    if "opt_param_scheduler" not in common and not paths.no_load_optim:
        raise ValueError(
            f"{folder} holds no optimizer (saved with --no-save-optim?); pass --no-load-optim to continue with a fresh one"
        )
    state = load_sharded(_sharded_state(trainer, is_loading=True, with_random=with_random), folder, trainer.ranks)
    fill_chunks(trainer.model, state)
    if trainer.optimizer is not None:
        if paths.no_load_optim:
            trainer.optimizer.reload_model_params()
        else:
            trainer.optimizer.load_state_dict(state["optimizer"])
            take = "flags" if rules.override_opt_param_scheduler else "same"
            take = "checkpoint" if rules.use_checkpoint_opt_param_scheduler else take
            restore_schedule(trainer.scheduler, common["opt_param_scheduler"], take=take)
    if with_random:
        checkpoint.restore_random_state(state["rng_state"])
    trainer.guard.skipped = int(common.get("skipped_steps", 0))
    trainer.guard.spikes.restore(common.get("steps_taken", {}))
    # A checkpoint without a count is of a time when metrics took one step a rollout for granted.
    trainer.steps_done = int(common.get("train_steps", common.get("rollout_id", -1) + 1))
    return common.get("data_state")


def load_weights(trainer: Trainer, kind: str, folder: Path) -> None:
    """Weights alone, of a Megatron checkpoint or an HF folder. A critic takes one of its kind, or all but its head of the
    latter."""
    config = trainer.config
    hf = read_hf_config(config.checkpoint.hf_checkpoint)
    if kind == "megatron":
        load_model(trainer.model, hf, folder, trainer.ranks, value_head=trainer.trains_values)
        return
    table = NameTable.for_model(hf)
    load_hf(trainer.model, table, SafetensorsReader(folder), trainer.ranks, padded_vocab=padded_vocab_size(config, hf))


def _load_one_beside(trainer: Trainer, tag: str, path: str, step: int | None, flags: checkpoint.Flags) -> None:
    """The weights in `path`, of a model of the same shape, as a snapshot; the model itself is loaded afterwards."""
    found = checkpoint.find_weights(Path(path), step, flags)
    if found is None:
        raise ValueError(f"{flags.load} {path} has neither {checkpoint.TRACKER} nor a config.json; convert the model first")
    kind, folder = found
    if kind == "megatron":
        checkpoint.verify(folder, trainer.ranks, flags)
    load_weights(trainer, kind, folder)
    trainer.snapshots.take(tag)
