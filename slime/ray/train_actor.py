"""One rank of the trainer in a process of its own."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import timedelta
from functools import partial
from typing import TYPE_CHECKING

import ray

from slime.compat.peers import peers_of
from slime.config import Config
from slime.ray.destinations import Destinations
from slime.ray.fates import Process, this_process
from slime.types import RolloutBatch, StepPlan
from slime.weights.protocol import StreamReport

if TYPE_CHECKING:
    from torch import Tensor

    from slime.training.start_page import RankShare
    from slime.weights.read_back import ReadBack

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class RankMemory:
    """Measured bytes of one trainer rank; the rehearsal's memory model predicts the same phases."""

    rank: int
    stage: int
    device: str
    micro_batch_tokens: int
    """Rows of the rank's longest micro-batch."""
    micro_batches: int
    """Most of one step."""
    resumes: bool
    """Whether the run began with the optimizer state of a checkpoint."""
    peaks: dict[str, dict[str, int]]
    """Phase -> {"tensors", "reserved"} (slime.device.PhasePeak)."""


def meeting_place(nodes: Sequence[str]) -> tuple[str, list[str]]:
    """(address of this node at which ranks on `nodes` find a server here, addresses that may connect; none where loopback)."""
    if len(set(nodes)) == 1:
        return "127.0.0.1", []
    here = ray.util.get_node_ip_address()
    return here, peers_of([*nodes, here])


@ray.remote
class TrainActor:
    """Holds a `Trainer`. All methods are called on all ranks alike; rank 0 also serves the rendezvous store."""

    def __init__(self, config: Config, rank: int, world_size: int, device_index: int):
        from slime.observability.log import run_folder, setup_logging

        setup_logging(f"trainer {rank}", folder=run_folder(config.checkpoint.save))
        self._config, self._rank, self._world_size = config, rank, world_size
        self._device_index = device_index
        self._store = None
        self._resumes = False
        self._stream = self._files = self._snapshot = None
        if config.cluster.kernel_cache:
            from slime.ops.cuda_build import cache_environment

            os.environ.update(cache_environment(config.cluster.kernel_cache))
        for name, value in config.cluster.train_env_vars.items():
            os.environ[name] = str(value)

    def process(self) -> Process:
        return this_process()

    def device_kind(self) -> str:
        from slime.device import get_device

        return get_device().kind

    def check_hooks(self) -> None:
        """Rank 0 only. Where no flag names a function of the user's, nothing is imported for it."""
        from slime.training.hooks import check_hooks, named_hooks

        if named_hooks(self._config):
            from slime.compat.megatron import prepare

            prepare()  # a hook may import megatron.core
            check_hooks(self._config)

    def open_store(self, nodes: Sequence[str]) -> tuple[str, int]:
        """Rank 0 only: start the rendezvous store, for the ranks on these nodes. Where it is."""
        from slime.compat.store import serve_store

        address, peers = meeting_place(nodes)
        # Without it rank 0 alone would give up on slow ranks after torch's five minutes.
        wait = timedelta(minutes=self._config.parallel.distributed_timeout_minutes)
        self._store = serve_store(address, peers, world_size=self._world_size, timeout=wait)
        return address, self._store.port

    def start(self, store_address: tuple[str, int]) -> RankShare:
        """Join the process group, build the model and the trainer. Returns this rank's share of the model."""
        import torch.distributed as dist

        from slime.compat.megatron import prepare
        from slime.device import get_device
        from slime.parallel import init_ranks
        from slime.training.hooks import load_hook

        prepare()  # the user's hook may import megatron.core
        path = self._config.algorithm.custom_megatron_init_path
        after_init = load_hook("--custom-megatron-init-path", path)
        device = self._device = get_device()
        device.init_process(self._device_index)
        timeout = timedelta(minutes=self._config.parallel.distributed_timeout_minutes)
        if self._store is None:
            self._store = dist.TCPStore(*store_address, self._world_size, is_master=False, timeout=timeout)
        dist.init_process_group(
            device.backend,
            store=dist.PrefixStore("slime", self._store),
            rank=self._rank,
            world_size=self._world_size,
            timeout=timeout,
        )
        self._ranks = init_ranks(
            self._config.parallel, rank=self._rank, world_size=self._world_size, device=device, seed=self._config.model.seed
        )
        if after_init is not None:
            after_init(self._config.args)
        return self._build()

    def _build(self) -> RankShare:
        from slime.model.build import build_model
        from slime.model.hf_config import read_hf_config
        from slime.training.share import share_of
        from slime.training.trainer import Trainer

        hf_config = self._hf_config = read_hf_config(self._config.checkpoint.hf_checkpoint)
        self._device.reset_peak()
        before = self._device.memory()
        model = build_model(self._config, hf_config, self._ranks, self._device)
        needs_ref = self._config.algorithm.use_kl_loss or self._config.algorithm.kl_coef != 0
        self._trainer = Trainer(self._config, self._device, self._ranks, model, ref=needs_ref)
        if self._config.algorithm.advantage_estimator == "ppo" and self._config.trains:
            self._trainer.critic = self._build_critic()
        self._trainer.peaks.note("start", before)
        self._trainer.peaks.note("load", self._device.memory())
        return share_of(self._trainer)

    def _build_critic(self):
        from slime.config.roles import critic_sections
        from slime.model.build import build_model
        from slime.training.critic import Critic

        config = replace(self._config, **critic_sections(self._config))
        model = build_model(config, self._hf_config, self._ranks, self._device, value_head=True)
        return Critic(config, self._device, self._ranks, model)

    def load(self):
        with self._trainer.peaks("load"):
            loaded = self._trainer.load()
        self._resumes = loaded.data_state is not None and not self._config.checkpoint.no_load_optim
        return loaded

    def restore(self, path: str) -> None:
        """In the place of `load`, of a rank that takes the place of another: what that one wrote into memory."""
        from slime.training import rank_snapshot

        with self._trainer.peaks("load"):
            rank_snapshot.restore(self._trainer, path)
        self._resumes = True

    def snapshot_bytes(self) -> int:
        from slime.training.rank_snapshot import RankSnapshot

        self._snapshot = RankSnapshot(self._trainer)
        return self._snapshot.nbytes

    def write_snapshot(self, path: str) -> str | None:
        """What `snapshot_bytes` measured. Why it could not be, where the memory has gone with its keeper."""
        snapshot, self._snapshot = self._snapshot, None
        try:
            snapshot.write(path)
        except OSError as error:
            return f"{type(error).__name__}: {error}"
        return None

    def train(self, batch: RolloutBatch, steps: Sequence[StepPlan]):
        return self._trainer.train(batch, list(steps))

    def save(self, rollout_id: int, data_state: dict | None) -> None:
        with self._trainer.peaks("checkpoint"):
            self._trainer.save(rollout_id, data_state=data_state)

    def finish_save(self) -> None:
        self._trainer.finish_save()

    def export_hf(self, folder: str) -> None:
        """Write the policy as a Hugging Face checkpoint (all ranks take part)."""
        self._weight_stream().save_hf(folder, origin=self._config.checkpoint.hf_checkpoint)

    def sleep(self, what: str) -> None:
        """Leave the device with "steps" (gradients, optimizer) or with "weights" (the parameters themselves)."""
        from slime.training import memory

        actor, critic = self._trainer, self._trainer.critic and self._trainer.critic.trainer
        if what == "steps":
            kept, unread = memory.step_tensors(actor), memory.gradient_tensors(actor)
            if critic is not None:  # its weights go nowhere, so they leave with the rest
                kept |= _of_critic(memory.step_tensors(critic) | memory.weight_tensors(critic))
                unread |= _of_critic(memory.gradient_tensors(critic))
            report = self._device.sleep(kept, unread=unread)
        else:
            report = self._device.sleep(memory.weight_tensors(actor))
        logger.debug("sleep %s: %.2f GB in %.2f s", what, report.nbytes / 1e9, report.seconds)

    def wake(self) -> None:
        with self._trainer.peaks("hand-over"):
            report = self._device.wake()
        logger.debug("wake: %.2f GB in %.2f s", report.nbytes / 1e9, report.seconds)

    def stream(self, version: int, to: Destinations) -> StreamReport:
        """Send all weights to the engines, each rank of them what it serves."""
        with self._trainer.peaks("weight sync"):
            self._trainer.note_sent(version)
            if self._config.engine.update_weight_transport == "disk":
                return self._weight_files().publish(version, to.engines)
            return self._weight_stream().send(version, to)

    def check_weights(self, version: int, to: Destinations) -> list[ReadBack]:
        """Compare what the engines of this rank hold with what it sent to them."""
        from slime.weights.read_back import ReadBack

        if self._config.engine.update_weight_transport == "disk":
            # What was written is read by the engines themselves: loaded twice, it must change nothing.
            return [ReadBack(engine.name, "", complete=False) for engine in to.engines] if self._rank == 0 else []
        return self._weight_stream().check(version, to)

    def memory(self) -> RankMemory:
        """Peaks of this rank so far, for the file that a rehearsal reads (`--measured`)."""
        trainer = self._trainer
        return RankMemory(
            self._rank,
            self._ranks.pp_rank,
            self._device.kind,
            trainer.largest_micro_batch,
            trainer.most_micro_batches,
            self._resumes,
            {phase: {"tensors": peak.tensors, "reserved": peak.reserved} for phase, peak in trainer.peaks.phases.items()},
        )

    def _weight_files(self):
        from slime.ray.weight_files import WeightFiles
        from slime.training.hooks import POST_WRITE, load_hook

        if self._files is None:
            hook = load_hook(POST_WRITE, self._config.engine.custom_update_weight_post_write_path)
            self._files = WeightFiles(
                self._trainer.model,
                self._hf_config,
                self._ranks,
                self._config.engine,
                origin=self._config.checkpoint.hf_checkpoint,
                with_mtp=bool(self._config.model.mtp_num_layers),
                post_write=hook and partial(hook, self._config.args),
            )
        return self._files

    def _weight_stream(self):
        from slime.ray.weight_stream import WeightStream

        if self._stream is None:
            limit = self._config.engine.update_weight_buffer_size
            self._stream = WeightStream(
                self._trainer.model,
                self._hf_config,
                self._ranks,
                self._device,
                limit_bytes=limit,
                read_back=self._config.engine.check_weight_update_equal,
                with_mtp=bool(self._config.model.mtp_num_layers),
                peer_seconds=60.0 * self._config.parallel.distributed_timeout_minutes,
            )
        return self._stream


def _of_critic(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {f"critic {name}": tensor for name, tensor in tensors.items()}
