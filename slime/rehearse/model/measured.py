"""Peaks that a run measured, beside the predicted ones.

A run writes `memory.json` into its run folder (SLIME_RUN_DIR, RUN_DIR of a launcher) after every rollout: each trainer rank's
largest memory in every phase. On a CPU that is the resident memory of the process, on a GPU the bytes of live tensors.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from slime.rehearse.model.memory import StageMemory

NOT_TENSORS = (
    "overhead",
    "sleeping engine",
    "engine weights",
    "draft weights",
    "KV cache",
    "engine overhead",
    "DeepEP buffers",
)
"""Parts of a GPU that the trainer's allocator does not count: contexts, libraries, another process."""
TOLERANCE = 0.10


@dataclass(frozen=True)
class Measured:
    """One run's file: the largest over the ranks of each stage."""

    device: str
    """"host" or "cuda"."""
    num_ranks: int
    num_stages: int
    micro_batch_tokens: int
    """Rows of a rank's longest micro-batch: predictions are made for this length."""
    micro_batches: int
    peaks: Mapping[tuple[int, str], int]
    """(stage, phase) -> bytes: `{(0, "train"): 1_234_567_890}`."""
    resumes: bool = True
    """Whether the run began with the optimizer state of a checkpoint."""
    slack: int = 0
    """GPU: by how much the allocator's largest size exceeds the largest of live tensors, which is a part of `overhead_gb`."""


@dataclass(frozen=True)
class Comparison:
    """A predicted peak beside a measured one, bytes."""

    stage: int
    phase: str
    predicted: int
    measured: int

    @property
    def error(self) -> float:
        """Above 0 where the prediction is too large."""
        return (self.predicted - self.measured) / self.measured

    def line(self) -> str:
        return (
            f"stage {self.stage} {self.phase}: predicted {self.predicted / 1e9:.3f} GB, "
            f"measured {self.measured / 1e9:.3f} GB, error {self.error:+.1%}"
        )


def read_measured(path: str) -> Measured:
    """Raises ValueError saying what is wrong with the file."""
    try:
        rows = json.loads(Path(path).read_text())["ranks"]
        peaks: dict[tuple[int, str], int] = {}
        for row in rows:
            for phase, peak in row["peaks"].items():
                where = (int(row["stage"]), phase)
                peaks[where] = max(peaks.get(where, 0), int(peak["tensors"]))
        return Measured(
            rows[0]["device"],
            len(rows),
            len({row["stage"] for row in rows}),
            max(int(row["micro_batch_tokens"]) for row in rows),
            max(int(row["micro_batches"]) for row in rows),
            peaks,
            bool(rows[0].get("resumes", True)),
            max(_largest(row, "reserved") - _largest(row, "tensors") for row in rows),
        )
    except OSError as error:
        raise ValueError(
            f"--measured {path} cannot be read ({error.strerror}); a run writes memory.json into its RUN_DIR"
        ) from None
    except (json.JSONDecodeError, KeyError, IndexError, TypeError, ValueError) as error:
        raise ValueError(f"--measured {path} is not a run's memory.json ({type(error).__name__}: {error})") from None


def _largest(row: Mapping[str, Mapping[str, Mapping[str, int]]], what: str) -> int:
    return max(int(peak[what]) for peak in row["peaks"].values())


def compare(measured: Measured, predicted: Sequence[StageMemory]) -> list[Comparison]:
    """Side by side, for every stage and phase that was measured. Raises ValueError for one that was not predicted.

    What a GPU holds before the model (`start`: a communicator's few bytes) is left out.
    """
    hidden = NOT_TENSORS if measured.device == "cuda" else ()
    rows = []
    for (stage, name), peak in sorted(measured.peaks.items()):
        if not peak or (measured.device == "cuda" and name == "start"):
            continue
        known = [phase.name for phase in predicted[stage].phases] if stage < len(predicted) else []
        if name not in known:
            raise ValueError(
                f"measured stage {stage} phase {name!r} was not predicted; stages 0-{len(predicted) - 1}, phases {known}"
            )
        parts = predicted[stage].phase(name).parts
        rows.append(Comparison(stage, name, sum(count for part, count in parts.items() if part not in hidden), peak))
    order = [phase.name for phase in predicted[0].phases]
    return sorted(rows, key=lambda row: (row.stage, order.index(row.phase)))
