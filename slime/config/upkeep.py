"""Signals and time limits of a run, and how long it waits."""

from __future__ import annotations

from dataclasses import dataclass

from slime.config.flags import flag


@dataclass(frozen=True)
class UpkeepConfig:
    """When a run leaves by itself, whole and with status 0; and what it does when nothing moves."""

    save_on_signal: bool = flag(False, "--save-on-signal", "--exit-signal-handler")
    """SIGTERM, SIGUSR1 or SIGINT: generation ends at once, a rollout in training is finished; then save and leave with 0."""
    save_on_signal_seconds: int = flag(600, low=1)
    """From the signal to the end of the run; one that is not saved by then leaves with 143, its last checkpoint intact."""
    exit_interval: int | None = flag(None, low=1)
    """Save and leave after every rollout whose number is a multiple of this."""
    exit_duration_in_mins: float | None = flag(None, above=0)
    """Save and leave after the first rollout that ends so many minutes after the start."""
    snapshot_interval: int | None = flag(None, low=1)
    """Keep the trainer's whole state in main memory after every so many rollouts; a rank that dies then costs no more than
    starting the trainer anew from there: engines stay up, and what was generated since is trained again."""
    snapshot_peer: bool = flag(True, off="--no-snapshot-peer")
    """Do not copy each node's snapshots to another one; the loss of a node then ends the run."""
    snapshot_versions: int = flag(2, low=1, high=2)
    """That each place has room for. With 1, half the memory, a node that is lost while copies are made ends the run."""
    max_trainer_restarts: int = flag(3, low=1)
    """Lost trainers that are started anew in one run; the next one ends it, and so does a second loss at the same place."""
    hang_report_minutes: float = flag(30.0, above=0)
    """A wait for trainer or engines that lasts longer (and twice as long as any like it) is explained: where everybody is."""
    hang_exit_minutes: float | None = flag(None, above=0)
    """A wait that lasts longer ends the run, after the same explanation; None waits for ever."""
