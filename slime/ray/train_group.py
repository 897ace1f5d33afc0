"""All trainer ranks, as one."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import ray

from slime.config import Config
from slime.ray.calls import gather
from slime.ray.destinations import Destinations, receivers_of
from slime.ray.fates import Process, end, until_gone
from slime.ray.placement import TRAINER_SHARE, Placement, rank_environment
from slime.ray.standstill import Patience
from slime.ray.train_actor import RankMemory, TrainActor
from slime.weights.protocol import StreamReport
from slime.weights.stopwatch import StreamSeconds

if TYPE_CHECKING:
    from slime.training.start_page import RankShare

logger = logging.getLogger(__name__)


class TrainGroup:
    """One actor per trainer slot, all called at once. Implements the trainer's side of lease and weight protocol."""

    def __init__(self, config: Config, placement: Placement, patience: Patience):
        self.placement, self._patience = placement, patience
        self._nodes = [slot.node_ip for slot in placement.trainer_slots]
        self._actors = {
            f"trainer rank {rank}": TrainActor.options(
                num_gpus=TRAINER_SHARE,
                num_cpus=TRAINER_SHARE,
                scheduling_strategy=placement.strategy(slot),
                runtime_env={"env_vars": rank_environment(one_node=len(set(self._nodes)) == 1)},
            ).remote(config, rank, len(placement.trainer_slots), slot.device_index)
            for rank, slot in enumerate(placement.trainer_slots)
        }
        self.destinations = Destinations()
        self.processes: dict[str, Process] = {}
        """By rank's name, once they are started."""
        self.has_failed = False
        """A call failed: ranks may hang in a collective, so no further call would be answered."""

    def device_kind(self) -> str:
        """ "cuda" or "host"; asked before any rank takes memory."""
        first = next(iter(self._actors.values()))
        return gather({"trainer rank 0": first.device_kind.remote()}, doing="looking at its device")["trainer rank 0"]

    def check_hooks(self) -> None:
        """Import the trainer's functions that flags name, on one rank. Raises RuntimeError naming the flags of wrong ones."""
        first = next(iter(self._actors.values()))
        gather({"trainer rank 0": first.check_hooks.remote()}, doing="loading the functions that flags name")

    def start(self) -> list[RankShare]:
        """Build the model on every rank; the ranks' shares, in order."""
        asked = {name: actor.process.remote() for name, actor in self._actors.items()}
        self.processes = gather(asked, doing="starting their processes")
        self._patience.processes |= self.processes
        first = next(iter(self._actors.values()))
        address = gather({"trainer rank 0": first.open_store.remote(self._nodes)}, doing="opening the rendezvous store")[
            "trainer rank 0"
        ]
        return list(self._call("start", address, doing="starting the trainer").values())

    def load(self):
        """Load the checkpoint that the flags name; what rank 0 found (start rollout, data position)."""
        return self._first(self._call("load", doing="loading the checkpoint"))

    def restore(self, paths: Sequence[str]) -> None:
        """In the place of `load`: the state of a snapshot. paths: by rank, on the rank's own node."""
        self._call_each("restore", paths, doing="taking back its snapshot")

    def snapshot_bytes(self) -> list[int]:
        """Memory of each rank's snapshot, of which `write_snapshot` comes next."""
        return list(self._call("snapshot_bytes", doing="measuring its snapshot").values())

    def write_snapshot(self, paths: Sequence[str]) -> list[str]:
        """Why ranks could not write theirs; empty where all did."""
        return [why for why in self._call_each("write_snapshot", paths, doing="writing its snapshot").values() if why]

    def train(self, batch: ray.ObjectRef, steps: Sequence):
        return self._first(self._call("train", batch, ray.put(list(steps)), doing="training"))

    def save(self, rollout_id: int, data_state: dict | None) -> None:
        self._call("save", rollout_id, data_state, doing=f"saving rollout {rollout_id + 1}")

    def finish_save(self) -> None:
        """Wait until a save that is written beside training (--async-save) is in force."""
        self._call("finish_save", doing="finishing the save of an earlier rollout")

    def export_hf(self, folder: str) -> None:
        self._call("export_hf", folder, doing=f"writing the Hugging Face checkpoint {folder}")

    def stream(self, version: int) -> StreamReport:
        beside = {name: receiver.process for name, receiver in receivers_of(self.destinations.engines).items()}
        reports = self._call("stream", version, self.destinations, doing=f"sending weights v{version}", beside=beside)
        lost = tuple(engine for report in reports.values() for engine in report.lost)
        seconds = StreamSeconds.slowest(report.seconds for report in reports.values())
        return replace(self._first(reports), lost=lost, seconds=seconds)

    def check(self, version: int) -> list[str]:
        """Every engine's weights against those that were sent (--check-weight-update-equal); the engines that could not give
        all of them back by name."""
        answers = self._call("check_weights", version, self.destinations, doing=f"reading weights v{version} back")
        found = [engine for engines in answers.values() for engine in engines]
        for line in filter(None, (engine.line for engine in found)):
            logger.info("%s", line)
        return [engine.engine for engine in found if not engine.complete]

    def memory(self) -> list[RankMemory]:
        return list(self._call("memory", doing="reading its memory peaks").values())

    def sleep(self, what: str) -> None:
        self._call("sleep", what, doing=f"putting the trainer's {what} to sleep")

    def wake(self) -> None:
        self._call("wake", doing="waking the trainer")

    def stop(self) -> None:
        for actor in self._actors.values():
            ray.kill(actor)
        if self.has_failed:
            end(self.processes)  # a stopped one does not hear Ray

    def stop_and_wait(self) -> None:
        """Until the processes have ended, and their memory is free."""
        self.has_failed = True
        self.stop()
        until_gone(self.processes)

    def can_recover(self, error: RuntimeError) -> bool:
        """Whether `recover` may be called after it: not without snapshots (slime.ray.lasting)."""
        return False

    def recover(self, error: RuntimeError) -> None:
        raise error

    def _call(self, method: str, *args, doing: str, beside: Mapping[str, Process] | None = None) -> dict[str, object]:
        return self._call_each(method, *([arg] * len(self._actors) for arg in args), doing=doing, beside=beside)

    def _call_each(
        self, method: str, *args: Sequence, doing: str, beside: Mapping[str, Process] | None = None
    ) -> dict[str, object]:
        """args: each by rank. beside: as in `gather`."""
        refs = {
            name: getattr(actor, method).remote(*(arg[rank] for arg in args))
            for rank, (name, actor) in enumerate(self._actors.items())
        }
        try:
            return gather(refs, doing=doing, processes=self.processes, beside=beside, patience=self._patience)
        except RuntimeError:
            self.has_failed = True
            raise

    @staticmethod
    def _first(results: dict[str, object]):
        return next(iter(results.values()))
