"""What a run says to people: metrics for the trackers, a line for each rollout, and where things are at the end."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from slime.config import Config
from slime.observability.advice import Advisor
from slime.observability.log import run_folder, write_whole
from slime.observability.owner import LAUNCH_VARIABLE
from slime.observability.report import RolloutLine, evaluation_line
from slime.observability.sinks import open_tracker
from slime.observability.tracking import Axis, Start, Tracker
from slime.ray.in_flight import Rollout
from slime.ray.train_actor import RankMemory
from slime.rollout.reports import Report
from slime.weights.protocol import SyncReport

logger = logging.getLogger(__name__)

UNFINISHED = "left-early.txt"
"""In the run's folder: why a run that ended well has not done all its rollouts. Launchers look for it."""


@dataclass(frozen=True)
class Training:
    metrics: dict[str, float]
    per_step: list[dict[str, float]]
    seconds: float


class Telling:
    """Silent towards the trackers until it is opened."""

    def __init__(self, config: Config):
        self._config = config
        self._tracker = Tracker()
        self._advisor = Advisor(config)

    def open(self, done: Start) -> None:
        """done: what a resumed run has behind it."""
        self._tracker = open_tracker(self._config, self._folder, done)

    def close(self) -> None:
        self._tracker.close()

    @property
    def _folder(self) -> Path:
        return run_folder(self._config.checkpoint.save)

    def rollout(
        self, rollout: Rollout, training: Training | None, sync: SyncReport | None, *, num_rollout: int, seconds: float
    ) -> None:
        """seconds: of the whole iteration. training: None where nothing is trained. sync: None where no weights were sent."""
        told = rollout.report.metrics
        metrics = dict(told) if rollout.report.to_trackers else {}
        metrics["perf/rollout_time"] = rollout.seconds
        metrics["perf/rollout_wait_time"] = rollout.waited
        metrics["perf/step_time"] = seconds
        last_step: dict[str, float] = {}
        if training is not None:
            last_step = training.per_step[-1]
            metrics["perf/train_time"] = training.seconds
            for step in training.per_step:
                self._tracker.write(step, Axis.TRAIN_STEP, int(step["train/step"]))
            metrics.update(training.metrics)
        if sync is not None:
            metrics["perf/update_weights_time"] = sync.pause_seconds
            metrics["perf/update_weights_wire_bytes"] = float(sync.stream.nbytes)
            spent = sync.stream.seconds
            metrics["perf/update_weights_make_time"] = spent.make
            metrics["perf/update_weights_exchange_time"] = spent.exchange
            metrics["perf/update_weights_hand_over_time"] = spent.hand_over
            metrics["perf/update_weights_engine_time"] = sync.engine_seconds
            steps = ", ".join(f"{step} {seconds:.3f}" for step, seconds in sync.steps.items())
            logger.debug("%s; slowest ranks: %s; steps, s: %s", sync.line(), spent, steps)
        self._tracker.write(metrics, Axis.ROLLOUT, rollout.rollout_id + 1)
        line = RolloutLine(
            rollout_id=rollout.rollout_id,
            num_rollout=num_rollout,
            reward=None if self._config.algorithm.loss_type == "sft_loss" else float(rollout.batch.raw_rewards.mean()),
            response_length=told.get("rollout/response_len/mean", 0.0),
            log_prob_gap=last_step.get("train/train_rollout_logprob_abs_diff"),
            entropy=last_step.get("train/entropy_loss"),
            loss=last_step.get("train/loss"),
            generate_seconds=rollout.seconds,
            train_seconds=training.seconds if training else 0.0,
            sync_seconds=sync.pause_seconds if sync else 0.0,
            step_seconds=seconds,
        )
        logger.info("%s", line.text())
        for advice in self._advisor.after(rollout.batch, training.per_step if training else (), num_rollout=num_rollout):
            logger.warning("%s", advice)

    def evaluation(self, rollout_id: int, scores: Mapping[str, float], report: Report, *, when: str) -> None:
        """rollout_id: the last one that its weights were trained with; -1 before the first."""
        if report.to_trackers:
            self._tracker.write(report.metrics, Axis.ROLLOUT, rollout_id + 1)
        logger.info("%s", evaluation_line(rollout_id + 1, scores, when=when))

    def memory(self, ranks: Sequence[RankMemory]) -> None:
        """Measured peaks of every trainer rank, for `python3 -m slime.rehearse --measured`; replaced after every rollout."""
        file = self._folder / "memory.json"
        text = json.dumps({"ranks": [vars(row) for row in ranks]}, indent=1) + "\n"
        self._tracker.attempt(str(file), lambda: write_whole(file, text))

    def farewell(self, *, saved: int | None, num_rollout: int, leaves: str | None) -> None:
        """Where things are, and how to go on. saved: the last rollout in a checkpoint. leaves: why the run ends early."""
        checkpoint, unfinished = self._config.checkpoint, self._folder / UNFINISHED
        unfinished.unlink(missing_ok=True)
        if saved is not None:
            logger.info("checkpoint: %s (rollout %d of %d)", checkpoint.save, saved + 1, num_rollout)
        if leaves:
            logger.info("left early (%s): the same command goes on from there", leaves)
            self._tracker.attempt(str(unfinished), lambda: write_whole(unfinished, f"{leaves}\n"))
        elif saved is not None:
            if LAUNCH_VARIABLE not in os.environ:  # a launcher says how it was called
                logger.info(
                    "to go on: run the same command with --num-rollout %d (or more); it resumes from there",
                    num_rollout * 2,
                )
        for sink in self._tracker.places():
            logger.info("metrics: %s", sink)
        logger.info("logs of every process: %s", self._folder)
