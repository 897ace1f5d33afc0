"""Gradient buffers, the distributed optimizer and its schedule, from megatron-core's own parts."""

from __future__ import annotations

import importlib.util
import logging
import math
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from slime.compat.megatron import prepare
from slime.device import get_device
from slime.training.memory import torch_optimizers
from slime.training.optimizer_state import put_state_together_by_parameter

if TYPE_CHECKING:
    from slime.config import Config

prepare()

from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig  # noqa: E402
from megatron.core.optimizer import MegatronOptimizer, OptimizerConfig, get_megatron_optimizer  # noqa: E402
from megatron.core.optimizer.clip_grads import clip_grad_by_total_norm_fp32  # noqa: E402
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler  # noqa: E402

log = logging.getLogger(__name__)

_HISTORY = {"exp_avg", "exp_avg_sq", "momentum_buffer", "step"}


@dataclass(frozen=True)
class Schedule:
    """Lengths in trajectories: the schedule advances by a step's trajectories, so a change of batch size keeps its shape."""

    warmup: int
    decay: int
    wsd_decay: int | None


def schedule_of(config: Config) -> Schedule:
    """Lengths of warm-up and decay. `--lr-decay-iters` and `--lr-warmup-iters` count steps of --global-batch-size."""
    rules, batch_size = config.optimizer, config.batch.global_batch_size
    if batch_size is None:
        raise ValueError("--global-batch-size (or --num-steps-per-rollout) is needed to train")
    if rules.lr_decay_iters:
        decay = rules.lr_decay_iters * batch_size
    elif config.data.num_rollout:
        decay = config.data.num_rollout * config.data.rollout_batch_size * config.data.n_samples_per_prompt
    elif rules.lr_decay_style == "constant":
        decay = max(2 * rules.lr_warmup_iters * batch_size, 1)  # nothing reads it beyond the warm-up
    else:
        raise ValueError(f"--lr-decay-style {rules.lr_decay_style} needs a length: give --lr-decay-iters or --num-rollout")
    warmup = rules.lr_warmup_iters * batch_size
    if rules.lr_warmup_fraction is not None:
        warmup = int(rules.lr_warmup_fraction * decay)
    if warmup >= decay:
        raise ValueError(
            f"the learning rate warms up for {warmup} samples, but the run has {decay}; lower --lr-warmup-iters "
            f"{rules.lr_warmup_iters} / --lr-warmup-fraction {rules.lr_warmup_fraction} or raise --lr-decay-iters"
        )
    wsd = None if rules.lr_wsd_decay_iters is None else rules.lr_wsd_decay_iters * batch_size
    return Schedule(warmup, decay, wsd)


def wrap_gradients(chunks: Sequence[torch.nn.Module], config: Config) -> list[DistributedDataParallel]:
    """Each chunk with fp32 gradient buffers that are *summed* over data and context parallel ranks.

    Megatron sums instead of averaging when its model config says calculate_per_token_loss; what users mean by the flag of that
    name is in StepPlan.loss_weight already.
    """
    rules = config.optimizer
    ddp = DistributedDataParallelConfig(
        grad_reduce_in_fp32=True,
        use_distributed_optimizer=True,
        overlap_grad_reduce=rules.overlap_grad_reduce,
        # Gathering would wait for the next forward pass, but weights leave for the engines right after the step.
        overlap_param_gather=False,
        bucket_size=rules.ddp_bucket_size,
        # training.guard looks at every gradient itself, and can name parameter and samples.
        check_for_nan_in_grad=False,
        **dict(rules.ddp),
    )
    for chunk in chunks:
        assert chunk.config.calculate_per_token_loss, "build the model with calculate_per_token_loss=True: gradients are summed"
    return [
        DistributedDataParallel(config=chunk.config, ddp_config=ddp, module=chunk, disable_bucketing=number > 0)
        for number, chunk in enumerate(chunks)
    ]


@dataclass(frozen=True)
class Modes:
    """Which of megatron-core's optimizers runs; a note for every flag that is not taken as given."""

    offload: bool
    precision_aware: bool
    notes: tuple[str, ...]


def optimizer_modes(config: Config, params_dtype: torch.dtype, *, on_host: bool) -> Modes:
    """From --optimizer-cpu-offload, --use-precision-aware-optimizer and what this machine has.

    Raises ValueError for a combination that megatron-core would run with weights from before the checkpoint was loaded, or
    cannot run.
    """
    rules = config.optimizer
    offload, precise, notes = rules.optimizer_cpu_offload, rules.use_precision_aware_optimizer, []
    if rules.overlap_param_gather:
        notes.append("overlap_param_gather off: weights leave for the engines right after a step, whole")
    if offload and on_host:
        offload = False
        notes.append("optimizer_cpu_offload off: the model is on the host already")
    if offload and params_dtype != torch.bfloat16:
        raise ValueError(
            f"--optimizer-cpu-offload keeps float32 copies of bf16 parameters; this model is {params_dtype}. Leave it out"
        )
    if offload and not precise:
        # The other way round the copies are of main parameters, which nothing refreshes when a checkpoint is loaded.
        precise = True
        notes.append("use_precision_aware_optimizer on: --optimizer-cpu-offload updates parameters through it")
    if precise and not offload and importlib.util.find_spec("transformer_engine") is None:
        narrow = [name for name in ("main_grads_dtype", "exp_avg_dtype", "exp_avg_sq_dtype") if getattr(rules, name) != "fp32"]
        if narrow:
            told = ", ".join(f"--{name.replace('_', '-')} {getattr(rules, name)}" for name in narrow)
            raise ValueError(
                f"{told}: only TransformerEngine's Adam keeps other dtypes than fp32; install it or leave them out"
            )
        precise = False
        notes.append("use_precision_aware_optimizer off: its Adam is TransformerEngine's; torch's keeps everything in fp32 too")
    return Modes(offload, precise, tuple(notes))


def make_optimizer(wrapped: Sequence[DistributedDataParallel], config: Config) -> MegatronOptimizer:
    """Adam (or SGD) with fp32 main parameters, its state sharded over data and context parallel ranks."""
    rules, params_dtype = config.optimizer, wrapped[0].config.params_dtype
    modes = optimizer_modes(config, params_dtype, on_host=next(wrapped[0].parameters()).device.type == "cpu")
    if dist.get_rank() == 0:
        for note in modes.notes:
            log.info("optimizer: %s", note)
    dtypes = {"fp32": torch.float32, "bf16": torch.bfloat16}
    values: dict[str, Any] = {
        "optimizer": rules.optimizer,
        "lr": rules.lr,
        "min_lr": rules.min_lr,
        "weight_decay": rules.weight_decay,
        "adam_beta1": rules.adam_beta1,
        "adam_beta2": rules.adam_beta2,
        "adam_eps": rules.adam_eps,
        "sgd_momentum": rules.sgd_momentum,
        "clip_grad": rules.clip_grad,
        "bf16": params_dtype == torch.bfloat16,
        "params_dtype": params_dtype,
        "use_distributed_optimizer": True,
        "overlap_param_gather": False,
        "optimizer_cpu_offload": modes.offload,
        "optimizer_offload_fraction": rules.optimizer_offload_fraction,
        "overlap_cpu_optimizer_d2h_h2d": modes.offload and rules.overlap_cpu_optimizer_d2h_h2d,
        "use_torch_optimizer_for_cpu_offload": rules.use_torch_optimizer_for_cpu_offload,
        "use_precision_aware_optimizer": modes.precision_aware,
    }
    if modes.precision_aware:
        values |= {
            "main_grads_dtype": dtypes[rules.main_grads_dtype],
            "main_params_dtype": dtypes[rules.main_params_dtype],
            "exp_avg_dtype": dtypes[rules.exp_avg_dtype],
            "exp_avg_sq_dtype": dtypes[rules.exp_avg_sq_dtype],
        }
    optimizer = get_megatron_optimizer(OptimizerConfig(**values, **dict(rules.megatron)), list(wrapped))
    for part in parts_of(optimizer):
        put_state_together_by_parameter(part)
    return optimizer


@contextmanager
def step_threads(optimizer: MegatronOptimizer, config: Config) -> Iterator[int]:
    """How many threads torch's operators have here for a step of `optimizer`; the former number comes back afterwards.

    A trainer rank has one thread (OMP_NUM_THREADS; Ray sets it where nobody did), and its arithmetic is the GPU's. Adam in main
    memory is not: it gets this rank's share of the cores, 63 GB of state having taken one thread 10 s.
    """
    before = count = torch.get_num_threads()
    if optimizer.config.optimizer_cpu_offload:
        ranks_here = min(config.cluster.actor_num_gpus_per_node, dist.get_world_size())
        count = max(before, usable_cores() // ranks_here)
        torch.set_num_threads(count)
    try:
        yield count
    finally:
        torch.set_num_threads(before)


def usable_cores() -> int:
    """Cores that this process may run on, and that its container may use."""
    cores = len(os.sched_getaffinity(0))
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
    except OSError:
        return cores
    return cores if quota == "max" else max(1, min(cores, int(quota) // int(period)))


def make_scheduler(optimizer: MegatronOptimizer, config: Config) -> OptimizerParamScheduler:
    """Learning rate and weight decay by trajectories seen."""
    rules, schedule = config.optimizer, schedule_of(config)
    growing = rules.start_weight_decay is not None
    return OptimizerParamScheduler(
        optimizer,
        init_lr=rules.lr_warmup_init,
        max_lr=rules.lr,
        min_lr=rules.min_lr,
        lr_warmup_steps=schedule.warmup,
        lr_decay_steps=schedule.decay,
        lr_decay_style=rules.lr_decay_style,
        start_wd=rules.start_weight_decay if growing else rules.weight_decay,
        end_wd=rules.end_weight_decay if growing else rules.weight_decay,
        wd_incr_steps=schedule.decay,
        wd_incr_style=rules.weight_decay_incr_style,
        use_checkpoint_opt_param_scheduler=False,
        override_opt_param_scheduler=False,
        wsd_decay_steps=schedule.wsd_decay,
        lr_wsd_decay_style=rules.lr_wsd_decay_style,
    )


def parts_of(optimizer: MegatronOptimizer) -> list[MegatronOptimizer]:
    """The optimizers inside: dense and expert parameters have one each."""
    return list(getattr(optimizer, "chained_optimizers", [optimizer]))


NORM_CHUNK = 1 << 22  # gradients squared at once, in 32 MB


@torch.no_grad()
def gradient_norm(optimizer: MegatronOptimizer) -> float:
    """Of the main gradients of all ranks, each counted once; equal on every rank. Called by all together, after prepare_grads.

    Squares are added in float64. megatron-core adds in float32, which was 2.6e-6 off at 2.5 million gradients on a CPU and
    therefore another number under another layout.
    """
    parts = parts_of(optimizer)
    group = parts[0].get_grad_stats_parallel_group()
    gradients = [
        gradient
        for part in parts
        if not getattr(part, "is_stub_optimizer", False)
        for gradient in part.get_main_grads_for_grad_norm()
    ]
    total = torch.zeros((), dtype=torch.float64, device=get_device().torch_device)
    for gradient in gradients:
        for piece in gradient.reshape(-1).split(NORM_CHUNK):
            total += piece.double().square().sum()
    dist.all_reduce(total, group=group)
    return math.sqrt(total.item())


def clip_gradients(optimizer: MegatronOptimizer, max_norm: float, total_norm: float) -> None:
    """Scale all main gradients by max_norm / total_norm where the norm is larger; 0 does not clip."""
    if max_norm <= 0:
        return
    for part in parts_of(optimizer):
        parameters = [] if getattr(part, "is_stub_optimizer", False) else part.get_parameters()
        if parameters:
            decoupled = part.config.use_precision_aware_optimizer_no_fp8_or_ds_fp8
            clip_grad_by_total_norm_fp32(parameters, max_norm, total_norm, decoupled)


def restore_schedule(scheduler: OptimizerParamScheduler, saved: dict[str, Any], *, take: str) -> None:
    """Continue a saved schedule at its position.

    take: "same" demands that flags and checkpoint agree, "flags" and "checkpoint" say which one wins. The decay length is
    allowed to differ under a constant learning rate, where nothing reads it. Raises ValueError with the differing values.
    """
    own = scheduler.state_dict()
    differing = {key: (own[key], saved[key]) for key in own if key != "num_steps" and key in saved and own[key] != saved[key]}
    if own["lr_decay_style"] == "constant" and own["wd_incr_style"] == "constant":
        differing = {key: pair for key, pair in differing.items() if key not in ("lr_decay_steps", "wd_incr_steps")}
    if differing and take == "same":
        told = ", ".join(f"{key} {mine} (checkpoint: {theirs})" for key, (mine, theirs) in sorted(differing.items()))
        raise ValueError(
            f"the learning-rate schedule of the flags is not the checkpoint's: {told}; use the old values, or say "
            f"--override-opt-param-scheduler (flags win) or --use-checkpoint-opt-param-scheduler (checkpoint wins)"
        )
    if take == "checkpoint":
        for key, (_, theirs) in differing.items():
            setattr(scheduler, key, theirs)
    scheduler.num_steps = 0
    scheduler.step(increment=int(saved["num_steps"]))


def forget_history(optimizer: MegatronOptimizer) -> None:
    """Zero moments and step counts (--reset-optimizer-states); main parameters and the schedule stay as they are."""
    for wrapped in torch_optimizers(optimizer):
        # An offloading optimizer keeps a part of the parameters in each of several.
        for one in getattr(wrapped, "sub_optimizers", [wrapped]):
            for owner in (*one.state.values(), *one.param_groups):
                for name in _HISTORY & owner.keys():
                    owner[name] = owner[name].zero_() if isinstance(owner[name], torch.Tensor) else 0
