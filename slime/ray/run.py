"""One run as the driver sees it: the cluster, the trainer, the engines, and what one iteration asks of them."""

from __future__ import annotations

import logging
import os
import secrets
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import ray

from slime.batch.flops import forward_flops
from slime.batch.plan import plan_steps
from slime.config import Config
from slime.model.hf_config import read_hf_config
from slime.observability.identities import check_training
from slime.observability.log import run_folder
from slime.observability.tracking import Start
from slime.ray.cluster_watch import ClusterWatch, parts_here
from slime.ray.environment import QUIET
from slime.ray.in_flight import InFlight, Rollout
from slime.ray.lasting import Trainers, make_trainers
from slime.ray.lease import Awake, FreeLease, Holder, Lease
from slime.ray.leaving import Leaving
from slime.ray.machines import alive_nodes, watched
from slime.ray.placement import Placement, place, slot_counts, this_node
from slime.ray.rollout_actor import RolloutActor, RolloutSide
from slime.ray.same_packages import SamePackages
from slime.ray.standstill import Patience
from slime.ray.telling import Telling, Training
from slime.rollout.reports import Report
from slime.rollout.staleness import staleness_metrics
from slime.training.start_page import start_page
from slime.weights.digest import KEY_VARIABLE, rehearsed_digest
from slime.weights.protocol import SyncReport, sync_weights

logger = logging.getLogger(__name__)

T = TypeVar("T")

TOKEN_VARIABLE = "SLIME_ENGINE_TOKEN"
"""Environment variable with the run's token, where a router that somebody else runs has to know it; else it is drawn."""
# A server that dies in every attempt has a cause that a restart does not take away.
_GENERATE_AGAIN = 2
_SEND_AGAIN = 2
# From the first call that a dying server does not answer to the end of its process.
_DYING_SECONDS = 10.0
# The same where the run ends in any case, and what a look at engines may take then.
_REAPING_SECONDS = 3.0
_TELLING_SECONDS = 75.0


@dataclass(frozen=True)
class _Evaluation:
    """One that goes on beside other work."""

    rollout_id: int
    when: str
    wait: Callable[[], tuple[dict[str, float], Report]]
    num_mended: int
    """How often servers had been started again when it began."""


def start_ray(slots: int) -> None:
    """A local cluster of this run alone. Raises RuntimeError with Ray's reason where it does not come up within Ray's 30 s."""
    try:
        # "local": without it Ray would join any cluster that runs on this machine, and refuse to change its size.
        ray.init("local", num_gpus=slots, num_cpus=slots + 4, include_dashboard=False, logging_level=logging.WARNING)
    except Exception as error:  # a class of its own Ray has for none of them
        raise RuntimeError(
            f"Ray did not start on this machine: {' '.join(str(error).split())}; end what else computes here and try again, "
            "or start it by hand (ray start --head) and name it in RAY_ADDRESS"
        ) from error


class Run:
    """Owns everything that a run starts, and stops it on leaving the `with` block, also after an error."""

    def __init__(self, config: Config, leaving: Leaving | None = None):
        self._config = config
        self.leaving = leaving or Leaving()
        self._has_trainer = not config.debug.debug_rollout_only
        self._has_engines = not config.debug.debug_train_only
        self._placement: Placement | None = None
        self._patience = Patience()
        self._trainers: Trainers | None = None
        self._rollout: RolloutSide | None = None
        self._telling = Telling(config)
        self._version = 0
        self.leaves: str | None = None
        """Why the run ends before its last rollout."""
        self._trained: int | None = None
        self._saved: int | None = None
        self._in_flight = InFlight(lambda: self._rollout, self._recovering)
        self._evaluation: _Evaluation | None = None
        self._num_mended = self._begun_at = 0
        """How often servers were started again, and how often when a rollout was begun last."""
        self._released = False
        self._rehearsed: str | None = None
        self.lease: Lease = FreeLease(self._revive)
        self.start_rollout_id = 0
        self.num_rollout = config.data.num_rollout or 0

    # ------------------------------------------------------------------ start and stop

    def __enter__(self) -> Run:
        self._connect()
        cluster = ray.get_runtime_context()
        self._watch = ClusterWatch(cluster.gcs_address, parts_here(cluster.get_session_name()))
        return self

    def _connect(self) -> None:
        if os.environ.get("RAY_ADDRESS"):
            ray.init(log_to_driver=True, logging_level=logging.WARNING)
            return
        # No cluster was named: a local one with as many logical device slots as the run wants.
        slots = max(slot_counts(**self._slots())[0], 1)
        logger.info("RAY_ADDRESS is not set: starting a local Ray with %d device slots", slots)
        start_ray(slots)

    def __exit__(self, kind: type | None, error: BaseException | None, trace: object) -> None:
        if self._rollout is not None:
            if isinstance(error, Exception):
                self._tell_who_is_gone()
            self._rollout.stop()
        if self._trainers is not None:
            if isinstance(error, Exception) and not self._trainers.has_failed:
                self._rescue_save()
            self._trainers.stop()
        if self._placement is not None:
            self._placement.remove()
        self._telling.close()
        ray.shutdown()
        self._watch.stop()

    def _rescue_save(self) -> None:
        """Engines may be gone while the trainer, which is well, has a checkpoint half-way to disk."""
        try:
            self.finish_save()
        except RuntimeError as error:
            logger.error("%s", error)

    def _tell_who_is_gone(self) -> None:
        """A dead server shows as a refused connection wherever it is missed next; its own log says why."""
        deadline = time.monotonic() + _REAPING_SECONDS
        while not (gone := self._rollout.obituaries(timeout=_TELLING_SECONDS)) and time.monotonic() < deadline:
            time.sleep(0.5)
        for text in gone:
            logger.error("%s", text)
        if gone:
            logger.error("the last checkpoint is intact: run the same command again to resume from it")

    def where(self) -> tuple[set[str], str]:
        """(the addresses of the machines that are used, what is waited for or was at last)."""
        placement = self._placement if self._trainers is None else self._trainers.placement
        return set(alive_nodes()) if placement is None else placement.addresses, self._patience.doing

    def _slots(self) -> dict[str, int | bool]:
        cluster = self._config.cluster
        trainer = cluster.actor_num_nodes * cluster.actor_num_gpus_per_node if self._has_trainer else 0
        engines = (cluster.rollout_num_gpus or 0) if self._has_engines else 0
        return {"num_trainer": trainer, "num_engine": engines, "colocate": cluster.colocate}

    def start(self) -> None:
        """Engines and trainer, one after another where they share GPUs; then the data position, and the first weights."""
        config, started = self._config, time.monotonic()
        if config.engine.rehearsed:  # before anything starts: the file may be wrong
            self._rehearsed = rehearsed_digest(config.engine.rehearsed, key=os.environ.get(KEY_VARIABLE))
        self._placement = place(**self._slots())
        packages = SamePackages(self._placement.addresses)
        # No CPU of the slots, and no other node, whose loss would end the run. Four threads: a rollout, an evaluation, a call
        # of the sync, and `stop`, which must get through whatever the others wait for.
        options = {"num_cpus": 0, "max_concurrency": 4, "runtime_env": {"env_vars": QUIET}, "scheduling_strategy": this_node()}
        actor = RolloutActor.options(**options).remote(
            config, self._placement, run_folder(config.checkpoint.save), os.environ.get(TOKEN_VARIABLE) or secrets.token_hex(16)
        )
        self._patience = Patience(config.upkeep)
        self._patience.gone = watched({slot.node_ip for slot in self._placement.engine_slots})
        self._rollout = RolloutSide(actor, self._patience)
        if self._has_trainer:
            self._trainers = make_trainers(config, self._placement, self._patience)
        self._check_plugins()
        packages.check()
        engines_ready = self._rollout.begin_start()
        if self._has_trainer:
            if config.cluster.colocate and self._has_engines and self._trainers.device_kind() == "cuda":
                # An engine makes its cache as large as what is free when it starts: beside a loading trainer, any size or none.
                self._rollout.finish_start(engines_ready)
                self._release_engines()
            for line in start_page(self._trainers.start(), config):
                logger.info("%s", line)
            loaded = self._trainers.load()
            self.start_rollout_id = loaded.start_rollout_id
        self._rollout.finish_start(engines_ready)
        self.num_rollout = self._rollout.num_rollout()
        if self._has_trainer and loaded.data_state is not None:
            self._rollout.restore(loaded.data_state)
        done = Start(self.start_rollout_id, loaded.train_steps) if self._has_trainer else Start()
        self._telling.open(done)
        if self._has_trainer and self._has_engines:
            self._take_first_lease()
        self.leaving.hold()
        logger.info("ready after %.1f s", time.monotonic() - started)

    def _check_plugins(self) -> None:
        """A wrong dotted path ends the run before engines and trainer take minutes and memory to come up."""
        self._rollout.load_plugins()
        if self._has_trainer:
            self._trainers.check_hooks()

    def _take_first_lease(self) -> None:
        """The first weights: engines were started with a checkpoint's, the trainer's may differ, so they are always sent."""
        if self._config.cluster.colocate:
            lease = Lease(
                self._rollout,
                self._trainers if self._config.cluster.offload_train else Awake(),
                holder=Holder.TRAINER,
                revive=self._revive,
                died_lately=self._died_lately,
            )
            if self._config.cluster.offload_rollout and not self._released:
                lease.release_engines()
            self.lease = lease
        with self.lease.syncing():
            report = self.sync_weights()
        logger.info("%s", report.line())
        self._compare_with_rehearsal(report)

    def _compare_with_rehearsal(self, first: SyncReport) -> None:
        if self._rehearsed is None:
            return
        if first.stream.digest != self._rehearsed:
            raise ValueError(
                f"the weight stream of this run ({first.stream.digest[:16]}, {first.stream.buckets} buckets) is not "
                f"the one of --rehearsed {self._config.engine.rehearsed} ({self._rehearsed[:16]}): "
                "model, layout, serving checkpoint or bucket size changed since; rehearse these flags again"
            )
        logger.info("the weight stream is the rehearsed one (%s)", self._rehearsed[:16])

    def _release_engines(self) -> None:
        if self._config.cluster.offload_rollout and not self._released:
            self._rollout.release_memory()
            self._released = True

    # ------------------------------------------------------------------ one iteration

    def generate(self, rollout_id: int) -> Rollout:
        """The rollout that is trained next. Where the schedule runs ahead, the one after it is generated meanwhile."""
        if not self._in_flight.has_begun(rollout_id):
            self._begin(rollout_id)
        rollout = self._in_flight.finish(rollout_id)
        if self._config.loop.schedule == "one-step-ahead" and rollout_id + 1 < self.num_rollout:
            self._begin(rollout_id + 1)
        return rollout

    def _begin(self, rollout_id: int) -> None:
        if self._tolerates_deaths:
            self._mend()  # who died while the devices changed hands
        may_go_back = self._tolerates_deaths or self.leaving.saves_on_signal or self._config.loop.schedule == "one-step-ahead"
        saving = rollout_id - 1 if self._config.checkpoint.save and rollout_id > self.start_rollout_id else None
        # What a server broke that died beside training, and has been started again since.
        anew = self._config.loop.schedule == "fully-async" and self._num_mended != self._begun_at
        self._begun_at = self._num_mended
        self._in_flight.begin(rollout_id, keeps_position=may_go_back, saving=saving, anew=anew)

    def _recovering(self, wait: Callable[[], T], again: Callable[[], None]) -> T:
        """`wait()` for engines; with --use-fault-tolerance dead servers are started again, and what they broke is done again.

        Where the others could do the work of the dead one its result stands, else `again()` asks for it once more, from the
        same prompts.
        """

        def answer() -> T:
            with self.leaving.interruptible():
                return wait()

        if not self._tolerates_deaths:
            return answer()
        for _ in range(_GENERATE_AGAIN):
            try:
                result, error = answer(), None
            except RuntimeError as broken:
                error = broken
            started_again = self._mend()
            if error is None:
                return result
            if not started_again:
                raise error
            logger.warning("generating again, from the same prompts; what broke: %s", error)
            again()
        return answer()

    def _mend(self) -> list[str]:
        """Dead servers are started again and get the trainer's weights: which."""
        started_again = self._revive()
        if started_again:
            with self.lease.training():
                pass  # on shared devices the trainer has to be awake to send weights
            with self.lease.syncing():
                self.sync_weights()
        return started_again

    @property
    def _tolerates_deaths(self) -> bool:
        return self._config.engine.use_fault_tolerance and self._has_engines

    def _revive(self, prepare: Callable[[], None] = lambda: None) -> list[str]:
        """Start dead servers again, where the flags say so: what was started. They hold the checkpoint's weights.

        prepare: called before that, if there are any.
        """
        if not self._tolerates_deaths or not self._rollout.obituaries():
            return []
        prepare()
        if started_again := self._rollout.recover():
            self._num_mended += 1
            logger.warning("started again: %s", ", ".join(started_again))
        return started_again

    def train(self, rollout: Rollout) -> Training:
        started, config, batch = time.monotonic(), self._config, rollout.batch
        sizes = config.parallel
        steps = plan_steps(
            batch.total_lengths,
            batch.trajectories,
            batch.mask_sums,
            dp_size=sizes.data_parallel_size,
            cp_size=sizes.context_parallel_size,
            vpp_group=sizes.pipeline_model_parallel_size if (sizes.virtual_pipeline_model_parallel_size or 1) > 1 else 1,
            batch=config.batch,
            per_token=config.algorithm.calculate_per_token_loss,
            costs=sample_costs(config, batch.total_lengths),
        )
        report = self._trainers.train(rollout.batch_ref, steps)
        self._trained = rollout.rollout_id
        self._in_flight.trained(rollout.rollout_id)
        check_training(config.debug, rollout.rollout_id, report.metrics, report.per_step)
        metrics = dict(report.metrics) | staleness_metrics(batch.weight_versions, self._version)
        return Training(metrics, list(report.per_step), time.monotonic() - started)

    def sync_if_due(self, rollout_id: int) -> SyncReport | None:
        """Send the weights every --update-weights-interval rollouts, before an evaluation and after the last rollout.

        What is being generated ends first: no answer is of two versions.
        """
        interval = self._config.engine.update_weights_interval
        if not (_is_due(rollout_id, interval, self.num_rollout, last=True) or self._evaluates_after(rollout_id)):
            return None
        self._in_flight.finish_all()
        self.finish_evaluation()
        with self.lease.syncing():
            return self.sync_weights()

    def sync_weights(self) -> SyncReport | None:
        """The next weight version, on every engine; None where there are no engines.

        A lost engine (--use-fault-tolerance) or trainer (--snapshot-interval) is started again, and the update made anew.
        """
        if not (self._has_trainer and self._has_engines):
            return None
        self._version += 1
        for _ in range(_SEND_AGAIN):
            try:
                return self._send_weights()
            except RuntimeError as broken:
                if self._trainers.can_recover(broken):
                    self.lease.restart_trainers(self._trainers.recover, broken)
                elif self._trainers.has_failed or not self._died_lately() or not self.lease.restart_engines():
                    raise
                logger.warning("sending weights v%d again, to all engines; what broke: %s", self._version, broken)
        return self._send_weights()

    def _send_weights(self) -> SyncReport:
        # An engine may have been started anew, a rank on a spare node.
        self._trainers.destinations = self._rollout.destinations(self._trainers.placement.trainer_slots)
        read_back = self._config.engine.check_weight_update_equal
        return sync_weights(self._rollout, self._trainers, version=self._version, read_back=read_back)

    def _died_lately(self) -> bool:
        """Whether a server is dead, or within seconds: it stops answering before its process has ended."""
        if not self._tolerates_deaths:
            return False
        deadline = time.monotonic() + _DYING_SECONDS
        while not self._rollout.obituaries():
            if time.monotonic() > deadline:
                return False
            time.sleep(0.5)
        return True

    def leaves_after(self, rollout_id: int) -> bool:
        self.leaves = self.leaving.why_after(rollout_id, is_last=rollout_id + 1 == self.num_rollout)
        return self.leaves is not None

    def save_if_due(self, rollout_id: int) -> None:
        """Where the run leaves after this rollout, a save is due whatever the interval."""
        checkpoint = self._config.checkpoint
        leaves = self.leaves_after(rollout_id)
        is_due = _is_due(rollout_id, checkpoint.save_interval, self.num_rollout, last=True)
        if checkpoint.save and (is_due or leaves):
            self._save(rollout_id, self._position_after(rollout_id))

    def _position_after(self, rollout_id: int) -> dict | None:
        """Of the prompts behind those of `rollout_id`, whatever was begun since."""
        before_next = self._in_flight.position_after(rollout_id)
        return before_next if before_next is not None else self._rollout.state(rollout_id)

    def _save(self, rollout_id: int, data_state: dict | None) -> None:
        checkpoint = self._config.checkpoint
        started = time.monotonic()
        self._trainers.save(rollout_id, data_state)
        self._saved = rollout_id
        done = "saved rollout %d under %s in %.1f s"
        if checkpoint.async_save:
            done = "rollout %d is being written under %s beside training, which waited %.1f s"
        logger.info(done, rollout_id + 1, checkpoint.save, time.monotonic() - started)
        if checkpoint.save_hf:
            self._trainers.export_hf(checkpoint.save_hf.format(rollout_id=rollout_id))

    def save_trained(self) -> None:
        """After a signal: the last trained rollout, unless a checkpoint has it. Engines end, the devices are its own."""
        self.leaves = self.leaving.signal
        if self._trained in (None, self._saved) or not self._config.checkpoint.save:
            logger.info("nothing was trained that is not saved")
            return
        position = self._position_after(self._trained)
        self._rollout.stop()
        self._rollout = None
        self._trainers.wake()
        self._save(self._trained, position)

    def finish_save(self) -> None:
        """Wait for the files of the last save, where they are written beside training."""
        if self._config.checkpoint.async_save and self._saved is not None:
            self._trainers.finish_save()

    def evaluate_if_due(self, rollout_id: int, *, when: str) -> None:
        """Where the schedule runs ahead it goes on beside what follows, until the weights change or the run ends."""
        if not self._evaluates_after(rollout_id):
            return
        if self._tolerates_deaths:
            self._mend()
        wait = self._rollout.begin_evaluation(rollout_id)
        self._evaluation = _Evaluation(rollout_id, when, wait, self._num_mended)
        if not self._config.loop.runs_ahead:
            self.finish_evaluation()

    def _evaluates_after(self, rollout_id: int) -> bool:
        evaluation, alone = self._config.evaluation, self.num_rollout == 0
        if not evaluation.datasets or not self._has_engines or (evaluation.eval_interval is None and not alone):
            return False
        if rollout_id < self.start_rollout_id:
            return alone or not evaluation.skip_eval_before_train
        return _is_due(rollout_id, evaluation.eval_interval, self.num_rollout, last=True)

    def finish_evaluation(self) -> None:
        """Wait for the one that is going on, if there is one, and tell its scores."""
        if self._evaluation is None:
            return
        begun, self._evaluation = self._evaluation, None
        wait = begun.wait

        def again() -> None:
            nonlocal wait
            wait = self._rollout.begin_evaluation(begun.rollout_id)

        if begun.num_mended != self._num_mended:  # its requests were ended with those of the dead server
            again()
        scores, report = self._recovering(lambda: wait(), again)
        self._telling.evaluation(begun.rollout_id, scores, report, when=begun.when)

    # ------------------------------------------------------------------ what the user sees

    def report(
        self, rollout: Rollout, training: Training | None = None, sync: SyncReport | None = None, *, seconds: float
    ) -> None:
        if training is not None:
            self._telling.memory(self._trainers.memory())
        self._telling.rollout(rollout, training, sync, num_rollout=self.num_rollout, seconds=seconds)

    def farewell(self) -> None:
        self._telling.farewell(saved=self._saved, num_rollout=self.num_rollout, leaves=self.leaves)


def sample_costs(config: Config, lengths: np.ndarray) -> np.ndarray | None:
    """Work per sample for --balance-data: estimated FLOPs. None (tokens will do) where nothing is balanced."""
    if not config.batch.balance_data:
        return None
    hf_config = read_hf_config(config.checkpoint.hf_checkpoint)
    attended = hf_config["index_topk"] if hf_config.has_indexer else None
    return forward_flops(lengths, config.model.megatron, vocab_size=hf_config["vocab_size"], attended=attended)


def _is_due(rollout_id: int, interval: int | None, num_rollout: int, *, last: bool) -> bool:
    if interval is None:
        return False
    return (rollout_id + 1) % interval == 0 or (last and rollout_id + 1 == num_rollout)
