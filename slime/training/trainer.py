"""One rank of the trainer."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import Module

from slime.batch.pack import pack
from slime.compat.megatron import prepare
from slime.config.passes import passes_of
from slime.device import Device, Peaks
from slime.model.hf_config import read_hf_config
from slime.model.local import local_tensors
from slime.parallel import Ranks
from slime.training import state
from slime.training.columns import (
    Columns,
    call_with_rollout_data,
    fill_advantages,
    mean_importance_weight,
    rollout_metrics,
    save_train_data,
    split_column,
)
from slime.training.forward import Output, Pipeline
from slime.training.guard import Guard
from slime.training.hooks import load_hook
from slime.training.index_replay import check_selections
from slime.training.loss import Objective
from slime.training.old_actor import OldActor
from slime.training.optimizer import (
    clip_gradients,
    forget_history,
    gradient_norm,
    make_optimizer,
    make_scheduler,
    step_threads,
    wrap_gradients,
)
from slime.training.routing_replay import RoutingReplay
from slime.training.snapshots import Snapshots
from slime.training.spikes import Spikes
from slime.training.state import LoadedState
from slime.types import RolloutBatch, StepPlan
from slime.types.micro_batch import MicroBatch

if TYPE_CHECKING:
    from slime.config import Config
    from slime.training.checkpoint import PendingSave
    from slime.training.critic import Critic, ValueObjective

prepare()

from megatron.core.distributed import finalize_model_grads  # noqa: E402

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class TrainReport:
    """What one rollout's training did; equal on every rank."""

    metrics: dict[str, float]
    """rollout/* values and perf/*_time seconds of the whole rollout."""
    per_step: list[dict[str, float]]
    """train/* of every step; train/step counts the steps of the run from 1, and on over a resume."""


class Trainer:
    """DDP, optimizer and schedule around model chunks; every public method is called by all ranks together."""

    def __init__(
        self,
        config: Config,
        device: Device,
        ranks: Ranks,
        model: Sequence[Module],
        *,
        ref: bool = False,
        objective: Objective | ValueObjective | None = None,
    ) -> None:
        """model: this rank's chunks as built (no DDP yet). ref: keep the weights of --ref-load beside them. objective: in the
        place of the one that the flags describe."""
        self.config, self.device, self.ranks = config, device, ranks
        self.model = list(model)
        self.peaks = Peaks(device)
        self.largest_micro_batch = 0
        """Rows of a rank's longest micro-batch so far, padding included."""
        self.most_micro_batches = 0
        """Of one step on one rank."""
        self.steps_done = 0
        """Of the run, skipped ones and those before a resume included."""
        self.keeps_reference = ref or config.algorithm.use_kl_loss or config.algorithm.kl_coef != 0
        self.objective = Objective.from_config(config, ranks) if objective is None else objective
        self.trains_values = objective is not None
        """It is a critic's: what it saves is no policy."""
        self.critic: Critic | None = None
        """Set where the estimator needs one; it is loaded, trained and saved along."""
        self._hooks = {
            "log_prob": load_hook(
                "--custom-megatron-before-log-prob-hook-path", config.algorithm.custom_megatron_before_log_prob_hook_path
            ),
            "step": load_hook(
                "--custom-megatron-before-train-step-hook-path", config.algorithm.custom_megatron_before_train_step_hook_path
            ),
            "advantage": load_hook("--custom-advantage-function-path", config.algorithm.custom_advantage_function_path),
            "data": load_hook("--rollout-data-postprocess-path", config.algorithm.rollout_data_postprocess_path),
        }
        if config.model.megatron.get("deterministic_mode"):
            # Kernels of our own ask torch as well. Some operations of torch have no other way than theirs: they warn.
            torch.use_deterministic_algorithms(True, warn_only=True)
        _refuse_auxiliary_losses(self.model)
        _prepare_schedules(self.model, ranks)
        self.replay = RoutingReplay(self.model) if config.algorithm.use_routing_replay and objective is None else None
        self.replays_selections = config.algorithm.use_rollout_indexer_replay and objective is None
        self.snapshots = Snapshots(self.model)
        self.old_actor = OldActor(self.snapshots) if config.algorithm.keep_old_actor and objective is None else None
        self.pending_save: PendingSave | None = None
        rules = config.optimizer
        self.guard = Guard(
            ranks.rank,
            limit=0 if rules.check_for_nan_in_loss_and_grad else rules.max_skipped_steps,
            spikes=Spikes(rules.skip_spike),
            spike_limit=rules.max_skipped_steps,
        )
        self.optimizer = self.scheduler = None
        chunks: Sequence[Module] = self.model
        # An evaluation-only run has no steps, so it pays for no optimizer state.
        if config.data.num_rollout != 0:
            chunks = wrap_gradients(self.model, config)
            self.optimizer = make_optimizer(chunks, config)
            self.scheduler = make_scheduler(self.optimizer, config)
        self.pipeline = Pipeline(chunks, ranks, device)
        self.pipeline.config.finalize_model_grads_func = self._finalize_gradients
        if self.optimizer is not None and rules.overlap_grad_reduce:
            # Otherwise megatron-core expects as many micro-batches in every step as in the first, and sums early where there
            # are more.
            no_sync = [chunk.no_sync for chunk in chunks]
            self.pipeline.config.no_sync_func = no_sync if len(no_sync) > 1 else no_sync[0]
        self.pipeline.config.grad_scale_func = None

    def _finalize_gradients(self, chunks, num_tokens=None, **rest) -> None:
        self.guard.scan(chunks, self.ranks)
        finalize_model_grads(chunks, None, **rest)

    def train(self, batch: RolloutBatch, steps: Sequence[StepPlan]) -> TrainReport:
        """Old and reference log-probs, advantages, then every step of the rollout."""
        if self.optimizer is None:
            raise ValueError("this trainer was built without an optimizer (--num-rollout 0)")
        state.finish_save(self, wait=False)
        clock = _Clock()
        if self.config.optimizer.reset_optimizer_states:
            forget_history(self.optimizer)
        columns = self._columns(batch, steps, clock)
        metrics: dict[str, float] = {}
        if self.ranks.is_last_stage:
            metrics = rollout_metrics(columns, batch, self.ranks)
            if self.config.debug.save_debug_train_data:
                save_train_data(self.config.debug.save_debug_train_data, columns, batch, self.ranks)
        per_step: list[dict[str, float]] = [{} for _ in steps]
        if self.critic is not None:
            with clock("critic_train"), self.peaks("train"):
                per_step = self.critic.learn(batch, steps, columns)
        if self.critic is None or batch.rollout_id >= self.config.algorithm.num_critic_only_steps:
            with clock("actor_train"), self.peaks("train"):
                done = 0
                for told, plan in zip(per_step, steps, strict=True):
                    with self.replay.replaying(done) if self.replay else nullcontext():
                        told |= self._act(batch, plan, columns)
                    done += plan.num_micro_batches
        else:
            for told in per_step:  # a step of the run all the same: its metrics have a place on the axis
                self.steps_done += 1
                told["train/step"] = float(self.steps_done)
        if self.replay is not None:
            metrics["perf/routing_replay_bytes"] = float(self.replay.nbytes)
        metrics = self._from_last_stage(metrics)
        interval = self.config.checkpoint.ref_update_interval
        if interval and self.keeps_reference and (batch.rollout_id + 1) % interval == 0:
            self.snapshots.take("ref")
        return TrainReport({**metrics, **clock.metrics()}, per_step)

    def log_probs(self, batch: RolloutBatch, steps: Sequence[StepPlan]) -> dict[int, Tensor]:
        """Per-token log-probs of this data-parallel rank's samples under the current weights; {} before the last stage."""
        return self._log_probs(batch, steps, "")[0]

    # --- before the steps ---

    def _columns(self, batch: RolloutBatch, steps: Sequence[StepPlan], clock: _Clock) -> Columns:
        passes = passes_of(self.config, len(steps))
        mine = tuple(p for plan in steps for micro in plan.micro_batches[self.ranks.dp_rank] for p in micro)
        columns = Columns(positions=mine)
        if self.config.algorithm.use_rollout_routing_replay:
            self._fill_replay(batch, steps)
        if self.replays_selections:
            check_selections(batch, read_hf_config(self.config.checkpoint.hf_checkpoint))
        if passes.ref:
            if "ref" not in self.snapshots:
                raise ValueError("--kl-coef / --use-kl-loss compare with a reference model; give --ref-load")
            with clock("ref_log_probs"), self.peaks("log-probs"), self.snapshots.playing("ref"):
                reference, _ = self._log_probs(batch, steps, "ref_")
            columns.ref_log_probs = reference
        if passes.teacher:
            with clock("teacher_log_probs"), self.peaks("log-probs"), self.snapshots.playing("teacher"):
                columns.teacher_log_probs, _ = self._log_probs(batch, steps, "teacher_")
        if passes.values:
            assert self.critic is not None, "--advantage-estimator ppo is built with a critic"
            with clock("values"), self.peaks("log-probs"):
                columns.values = self.critic.values(batch, steps)
        if passes.old:
            with clock("log_probs"), self.peaks("log-probs"), self._experts_of_old():
                columns.old_log_probs, columns.entropy = self._old_log_probs(batch, steps)
        rules = self.config.algorithm
        if not self.ranks.is_last_stage:
            return Columns(positions=mine)
        if rules.loss_type == "policy_loss" and rules.compute_advantages_and_returns:
            fill_advantages(columns, batch, self.config, self.ranks, custom=self._hooks["advantage"])
        if self._hooks["data"] is not None:
            arguments = (self.config.args, batch.rollout_id)
            call_with_rollout_data(self._hooks["data"], columns, batch, *arguments, flag="--rollout-data-postprocess-path")
        return columns

    def _old_log_probs(self, batch: RolloutBatch, steps: Sequence[StepPlan]) -> tuple[dict, dict]:
        """By the weights as they are, or with --keep-old-actor each sample by those that wrote it: a pass for each of them."""
        if self.old_actor is None:
            return self._log_probs(batch, steps, "", replay=True)
        found: tuple[dict[int, Tensor], dict[int, Tensor]] = ({}, {})
        for tag, rows in self.old_actor.writers(batch.weight_versions).items():
            with self.snapshots.playing(tag):
                told = self._log_probs(batch, steps, "", replay=True)
            for column, values in zip(found, told, strict=True):
                column.update((row, values[row]) for row in rows if row in values)
        return found

    def note_sent(self, version: int) -> None:
        """The weights as they are now go to the engines as `version`."""
        if self.old_actor is not None:
            self.old_actor.remember(version, self.steps_done)

    def _fill_replay(self, batch: RolloutBatch, steps: Sequence[StepPlan]) -> None:
        if batch.routed_experts is None:
            raise ValueError("--use-rollout-routing-replay: this rollout has no routed experts; was it made without the flag?")
        micro_batches = [micro for plan in steps for micro in self.pack(batch, plan, {})]
        experts = [[batch.routed_experts[position] for position in micro.positions] for micro in micro_batches]
        self.replay.fill(experts, [micro.layout for micro in micro_batches], self.ranks)

    def _experts_of_old(self) -> AbstractContextManager[None]:
        """During the pass of the old log-probs: the engines' experts, or the recording of the routers' own."""
        if self.replay is None:
            return nullcontext()
        return self.replay.replaying(0) if self.config.algorithm.use_rollout_routing_replay else self.replay.recording()

    def _log_probs(
        self, batch: RolloutBatch, steps: Sequence[StepPlan], prefix: str, *, replay: bool = False
    ) -> tuple[dict, dict]:
        """The micro-batches of the steps themselves, so that numerics of packing cancel in the ratio."""
        if self._hooks["log_prob"] is not None:
            self._hooks["log_prob"](self.config.args, self.pipeline.chunks, prefix)
        log_probs: dict[int, Tensor] = {}
        entropy: dict[int, Tensor] = {}

        def read(micro: MicroBatch, output: Output) -> tuple[dict, dict]:
            values, uncertainty = self.objective.log_probs(micro, output)
            return split_column(micro, values), split_column(micro, uncertainty)

        for values, uncertainty in self.evaluate(batch, steps, read, replay=replay):
            log_probs |= values
            entropy |= uncertainty
        return log_probs, entropy

    def evaluate(
        self,
        batch: RolloutBatch,
        steps: Sequence[StepPlan],
        read: Callable[[MicroBatch, Output], Any],
        *,
        replay: bool = False,
    ) -> list[Any]:
        """read(micro-batch, output) of every micro-batch of the steps, without gradient; [] before the last stage."""
        return self.pipeline.evaluate([micro for plan in steps for micro in self.pack(batch, plan, {}, replay=replay)], read)

    def pack(self, batch: RolloutBatch, plan: StepPlan, columns: dict, *, replay: bool = False) -> list[MicroBatch]:
        """replay: with what the engines' sparse attention read, where the run takes that."""
        make = partial(
            pack,
            batch,
            loss_weight=plan.loss_weight,
            denominator=plan.denominator,
            contiguous=self.config.parallel.allgather_cp,
            cp_rank=self.ranks.cp_rank,
            cp_size=self.ranks.cp_size,
            multiple=self.ranks.tp_size * self.config.batch.data_pad_size_multiplier,
            columns=columns,
        )
        micro_batches = [make(positions) for positions in plan.micro_batches[self.ranks.dp_rank]]
        if replay and self.replays_selections:
            micro_batches = [
                replace(micro, selections=tuple(batch.indexer_topk[position] for position in micro.positions))
                for micro in micro_batches
            ]
        self.most_micro_batches = max(self.most_micro_batches, len(micro_batches))
        self.largest_micro_batch = max(self.largest_micro_batch, *(micro.tokens.numel() for micro in micro_batches))
        return micro_batches

    # --- a step ---

    def _act(self, batch: RolloutBatch, plan: StepPlan, columns: Columns) -> dict[str, float]:
        carried = columns.for_packing() if self.ranks.is_last_stage else {}
        micro_batches = self.pack(batch, plan, carried, replay=True)
        if carried and self.config.algorithm.tis_batch_normalize:
            mine = [position for micro in micro_batches for position in micro.positions]
            mean = mean_importance_weight(columns, mine, batch, self.config, self.ranks)
            micro_batches = [replace(micro, mean_importance_weight=mean) for micro in micro_batches]
        return {f"train/{name}": value for name, value in self.step(batch, plan, micro_batches).items()}

    def step(self, batch: RolloutBatch, plan: StepPlan, micro_batches: Sequence[MicroBatch]) -> dict[str, float]:
        """One optimizer step on the plan's micro-batches of this rank: what it reports, equal on every rank."""
        where = f"rollout {batch.rollout_id + 1} step {plan.step_id + 1}"
        for chunk in self.pipeline.chunks:
            chunk.zero_grad_buffer()
        self.optimizer.zero_grad()
        if self._hooks["step"] is not None:
            self._hooks["step"](
                self.config.args, batch.rollout_id, plan.step_id, self.pipeline.chunks, self.optimizer, self.scheduler
            )
        bias = [buffer.clone() for buffer in self._expert_biases()]
        values = self.pipeline.train(micro_batches, self.objective)
        if values:
            ids = [tuple(int(batch.sample_ids[p]) for p in micro.positions) for micro in micro_batches]
            self.guard.note_loss([value["loss"] + value.get("mtp_loss", 0.0) for value in values], ids)
        self.optimizer.prepare_grads()
        grad_norm = gradient_norm(self.optimizer)
        samples = [int(batch.sample_ids[p]) for p in plan.positions]
        metrics = self._reduce(values)
        if self.guard.allows(where, self._judged(grad_norm, metrics), samples, self.device.torch_device):
            clip_gradients(self.optimizer, self.config.optimizer.clip_grad, grad_norm)
            with step_threads(self.optimizer, self.config) as threads:
                begin = time.monotonic()
                self.optimizer.step_with_ready_grads()
                log.debug("%s: optimizer %.2f s, %d threads", where, time.monotonic() - begin, threads)
            self.scheduler.step(increment=plan.num_trajectories)
        else:
            for live, before in zip(self._expert_biases(), bias, strict=True):
                live.copy_(before)
        metrics |= {"grad_norm": grad_norm, "global_batch_size": float(plan.num_trajectories)}
        metrics["skipped_steps"] = float(self.guard.skipped)
        metrics |= {f"lr-pg_{n}": float(group["lr"]) for n, group in enumerate(self.optimizer.param_groups)}
        self.steps_done += 1
        metrics["step"] = float(self.steps_done)
        return metrics

    def _judged(self, grad_norm: float, metrics: Mapping[str, float]) -> dict[str, float]:
        """What of a step may spike. A policy's loss is near 0 in a first step, and may be below."""
        is_supervised = self.config.algorithm.loss_type == "sft_loss"
        return {"gradient norm": grad_norm} | ({"loss": metrics["loss"]} if is_supervised else {})

    def _expert_biases(self) -> list[Tensor]:
        return [
            b for chunk in self.model for name, b in chunk.named_buffers() if name.endswith("expert_bias") and b is not None
        ]

    def _reduce(self, values: list[dict[str, Tensor]]) -> dict[str, float]:
        """Add up over micro-batches and data-parallel ranks, then tell every stage. Context-parallel values are equal."""
        metrics: dict[str, float] = {}
        if values:
            names = sorted(values[0])
            sums = torch.stack([torch.stack([value[name] for value in values]).sum() for name in names])
            dist.all_reduce(sums, group=self.ranks.dp_group)
            metrics = dict(zip(names, sums.tolist(), strict=True))
        return self._from_last_stage(metrics)

    def _from_last_stage(self, metrics: dict[str, float]) -> dict[str, float]:
        if self.ranks.pp_size == 1:
            return metrics
        box = [metrics]
        last = dist.get_global_rank(self.ranks.pp_group, self.ranks.pp_size - 1)
        dist.broadcast_object_list(box, src=last, group=self.ranks.pp_group, device=self.device.torch_device)
        return box[0]

    # --- state ---

    def load(self) -> LoadedState:
        """Weights, and where --load continues a run everything else, by the rules of checkpoint.resolve."""
        loaded = state.load(self)
        self._restore_reference(loaded.start_rollout_id)
        if self.critic is not None:
            self.critic.load(self, loaded.continued)
        return loaded

    def _restore_reference(self, num_trained: int) -> None:
        """The reference after `num_trained` rollouts, which no checkpoint holds: --ref-load, or the weights just loaded."""
        paths = self.config.checkpoint
        interval = paths.ref_update_interval
        if not (interval and self.keeps_reference) or num_trained < interval:
            return
        if num_trained % interval:
            raise ValueError(
                f"--ref-update-interval {interval}: the reference of rollout {num_trained - num_trained % interval} is in no "
                f"checkpoint of rollout {num_trained}; continue from one of a multiple of {interval} rollouts (--ckpt-step)"
            )
        self.snapshots.take("ref")

    def save(self, rollout_id: int, *, data_state: Mapping[str, Any] | None) -> Path:
        """The whole state under --save as iteration `rollout_id`. Raises one ValueError on all ranks; the old one stays.

        With --async-save the files are written while training goes on; the checkpoint is in force after a later `train`,
        `save` or `finish_save`, which also raises what went wrong.
        """
        if self.critic is not None:
            # First: a checkpoint of the actor's without its critic could not be continued.
            self.critic.save(rollout_id)
            self.critic.finish_save()
        return state.save(self, rollout_id, data_state)

    def finish_save(self) -> None:
        """Wait for a save that is being written; nothing to do without one."""
        state.finish_save(self)

    def named_weights(self) -> Iterator[tuple[str, Tensor]]:
        """(global megatron-core name, this rank's tensor) of every parameter and of the routers' expert bias."""
        for local in local_tensors(self.model, self.ranks):
            yield local.name, local.tensor


def _refuse_auxiliary_losses(chunks: Sequence[Module]) -> None:
    # They are divided by token counts inside the router, so their share would depend on packing and padding.
    for chunk in chunks:
        given = [chunk.config.moe_aux_loss_coeff, chunk.config.moe_z_loss_coeff]
        if chunk.config.num_moe_experts and any(np.any(np.asarray(value or 0)) for value in given):
            raise ValueError(
                f"--moe-aux-loss-coeff {given[0]} / --moe-z-loss-coeff {given[1]}: a step is the weighted sum of token losses "
                f"and has no router loss; pass 0 (--moe-router-bias-update-rate balances experts)"
            )


def _prepare_schedules(chunks: Sequence[Module], ranks: Ranks) -> None:
    """What the pipeline schedules read and Megatron's own front end would set."""
    for chunk in chunks:
        config = chunk.config
        config.variable_seq_lengths = True
        config.pipeline_dtype = config.params_dtype
        config.deallocate_pipeline_outputs = True
        if ranks.vpp_size:
            # Batched P2P gives wrong losses under interleaving over gloo, silently (megatron-core 0.16.1).
            config.overlap_p2p_comm, config.batch_p2p_comm = True, False


class _Clock:
    """Seconds per named phase of one rollout."""

    def __init__(self) -> None:
        self._seconds: dict[str, float] = {}
        self._name, self._begin = "", 0.0

    def __call__(self, name: str) -> _Clock:
        self._name = name
        return self

    def __enter__(self) -> None:
        self._begin = time.monotonic()

    def __exit__(self, *exc: object) -> None:
        self._seconds[self._name] = time.monotonic() - self._begin

    def metrics(self) -> dict[str, float]:
        return {f"perf/{name}_time": seconds for name, seconds in self._seconds.items()}
