"""The digest of a weight stream: which tensors travel to which GPU, in which format, in which round.

A rehearsal and a run compute it from their plans, and the run's ranks carry theirs out; equal digests mean that the run moves
the weights as rehearsed. No torch: a rehearsal runs without it.
"""

from __future__ import annotations

import hashlib
import hmac
import json
from pathlib import Path

from slime.weights.plan import SyncPlan

KEY_VARIABLE = "SLIME_REHEARSAL_KEY"
"""Environment variable with the secret that reports are signed with; without it they are not."""


def plan_digest(plan: SyncPlan) -> str:
    """Of what reaches which GPU in which round and format. By which links, and in which order within a round, is left out: both
    depend on the nodes, which a rehearsal may not know."""
    sha = hashlib.sha256(f"{plan.rounds}\n".encode())
    for lane in plan.lanes:
        sha.update(f"{lane.keepers}\n".encode())
        for unit in lane.units:
            sha.update(f"{','.join(tensor.name for entry in unit.entries for tensor in entry.hf)}\t{unit.nbytes}\n".encode())
    for round, lane, part, units in sorted((one.round, one.lane, one.part, one.units) for one in plan.deliveries):
        sha.update(f"{round}\t{lane}\t{part}\t{units}\n".encode())
    return sha.hexdigest()


def plan_size(plan: SyncPlan) -> tuple[int, int]:
    """(bytes of one copy of the model as it travels, tensors of it: a weight and its scale are two)."""
    units = [unit for lane in plan.lanes for unit in lane.units]
    tensors = [tensor for unit in units for entry in unit.entries for tensor in entry.hf]
    return sum(unit.nbytes for unit in units), len(tensors) + sum(map(plan.wire.form.is_fp8, tensors))


def sign(digest: str, key: str) -> str:
    """HMAC-SHA256 of a digest."""
    return hmac.new(key.encode(), digest.encode(), hashlib.sha256).hexdigest()


def rehearsed_digest(report: str, *, key: str | None) -> str:
    """The stream digest in a rehearsal's JSON report. Raises ValueError for another file, or one not signed with `key`."""
    try:
        told = json.loads(Path(report).read_text())
        launchable, weights = told["launchable"], told["weights"]
        digest, signature = weights["stream_digest"], weights["signature"]
    except OSError as error:
        raise ValueError(
            f"--rehearsed {report} cannot be read ({error.strerror}); write it with --rehearse --json FILE"
        ) from None
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise ValueError(f"--rehearsed {report} is no complete rehearsal report ({type(error).__name__}: {error})") from None
    if not launchable:
        raise ValueError(f"--rehearsed {report} says that the run is not launchable; rehearse it again and follow its fixes")
    if key and not hmac.compare_digest(signature or "", sign(digest, key)):
        raise ValueError(
            f"--rehearsed {report} is not signed with this {KEY_VARIABLE}; rehearse the run again where the variable is set"
        )
    return digest
