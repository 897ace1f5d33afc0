"""One rollout: groups are started until enough have come back and passed the filter; the rest is aborted and accounted for.

    submitted groups = trained + dropped (by reason) + put back into the buffer

holds after every rollout and is asserted there. Kept groups are sorted by their index, so what is trained does not depend on
which finished first. `generate_rollout` is the value of --rollout-function-path.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from slime.config import view_for_call
from slime.engine.client import EngineClient, EngineError, sync
from slime.rollout.base_types import Group, RolloutFnEvalOutput, RolloutFnTrainOutput, flatten
from slime.rollout.evaluation import evaluate_rollout
from slime.rollout.filter_hub.base_types import filter_output
from slime.rollout.generation import (
    GenerateState,
    current_state,
    enter,
    generate,
    generate_and_rm,
    generate_and_rm_group,
)
from slime.rollout.plugins import load_function
from slime.types.sample import Sample, Status

__all__ = ["GenerateState", "current_state", "generate", "generate_and_rm", "generate_and_rm_group", "generate_rollout"]

logger = logging.getLogger(__name__)

_ABORT_AGAIN_SECONDS = 2.0
_ABORT_PATIENCE_SECONDS = 120.0
_SILENCE_SECONDS = 60.0
_LOOK_SECONDS = 5.0


def generate_rollout(
    args: Any, rollout_id: int, data_source: Any, evaluation: bool = False
) -> RolloutFnTrainOutput | RolloutFnEvalOutput:
    """The default rollout function. args: the flat view plus sglang_router_ip, sglang_router_port and engine_token."""
    if evaluation:
        return sync(evaluate_rollout(args, rollout_id))
    return sync(generate_rollout_async(args, rollout_id, data_source))


def _is_waiting(sample: Sample) -> bool:
    return sample.status in (Status.PENDING, Status.ABORTED) or (sample.reward is None and sample.status is not Status.FAILED)


class Silence:
    """Says so when no sample ends for a minute: how many are waiting, and since when; once a minute while it lasts."""

    def __init__(self) -> None:
        self._num_waiting = -1
        self._last_end, self._said = time.time(), time.time()

    def look(self, groups: Iterable[Group], *, any_back: bool) -> None:
        """`groups` are those that have not come back. Progress: one came back since the last look, or fewer samples wait."""
        groups, now = list(groups), time.time()
        waiting = sum(_is_waiting(sample) for group in groups for sample in flatten(group))
        if any_back or waiting != self._num_waiting:
            self._num_waiting, self._last_end, self._said = waiting, now, now
        elif now - self._said >= _SILENCE_SECONDS:
            self._said = now
            logger.info(
                "no sample has ended for %.0f s: %d samples of %d prompts are waiting since %s",
                now - self._last_end, waiting, len(groups), time.strftime("%H:%M:%S", time.localtime(self._last_end)),
            )  # fmt: skip


@dataclass
class Ledger:
    """Where every submitted group went."""

    submitted: int = 0
    kept: list[list] = field(default_factory=list)
    dropped: Counter = field(default_factory=Counter)
    """reason -> groups."""
    returned: list[list] = field(default_factory=list)
    """Groups for the buffer."""
    finished: list[list] = field(default_factory=list)
    """Every group that came back graded, dropped ones too; for --rollout-all-samples-process-path."""
    last_error: str = ""

    def check(self) -> None:
        accounted = len(self.kept) + self.dropped.total() + len(self.returned)
        assert self.submitted == accounted, (
            f"{self.submitted} groups were submitted, but {len(self.kept)} kept + {dict(self.dropped)} dropped + "
            f"{len(self.returned)} returned make {accounted}"
        )

    def metrics(self) -> dict[str, float]:
        metrics = {f"rollout/dynamic_filter/drop_{reason}": float(count) for reason, count in sorted(self.dropped.items())}
        return metrics | {
            "rollout/groups_submitted": float(self.submitted),
            "rollout/groups_buffered": float(len(self.returned)),
        }


async def generate_rollout_async(args: Any, rollout_id: int, data_source: Any) -> RolloutFnTrainOutput:
    started = time.monotonic()
    state = GenerateState(args, rollout_id=rollout_id, max_context_len=args.rollout_max_context_len)
    enter(state)
    ledger = Ledger()
    pending: dict[asyncio.Task, Group] = {}
    try:
        await _collect(args, state, data_source, ledger, pending)
        await _abort_rest(args, state, ledger, pending)
    finally:
        for task in pending:
            task.cancel()
        await asyncio.gather(*pending, return_exceptions=True)
        await state.client.close()
    return _finish(args, rollout_id, data_source, ledger, seconds=time.monotonic() - started)


async def _collect(
    args: Any, state: GenerateState, data_source: Any, ledger: Ledger, pending: dict[asyncio.Task, Group]
) -> None:
    """Start and gather groups until rollout_batch_size are kept. `pending` keeps what is still running then."""
    target = args.rollout_batch_size
    chunk = max(args.over_sampling_batch_size or target, 1)
    order: dict[asyncio.Task, int] = {}
    silence = Silence()
    while len(ledger.kept) < target:
        while len(pending) + len(ledger.kept) < target:
            groups = data_source.get_samples(chunk)
            if not groups:
                raise ValueError(f"the data source gave no prompts; {len(ledger.kept)} of {target} groups are there")
            for group in groups:
                task = asyncio.create_task(generate_and_rm_group(args, group, state.sampling_params, state=state))
                pending[task], order[task] = group, ledger.submitted
                ledger.submitted += 1
        done, _ = await asyncio.wait(pending, return_when=asyncio.FIRST_COMPLETED, timeout=_LOOK_SECONDS)
        silence.look(pending.values(), any_back=bool(done))
        for task in sorted(done, key=order.__getitem__):
            group = pending.pop(task)
            _settle(args, ledger, task.result(), original=group, num_pending=len(pending), target=target)


def _settle(args: Any, ledger: Ledger, group: list, *, original: Group, num_pending: int, target: int) -> None:
    """Enter one finished group into the ledger."""
    samples = flatten(group)
    failed = [sample for sample in samples if sample.status is Status.FAILED and not sample.is_settled]
    if failed:
        ledger.dropped["failed"] += 1
        ledger.last_error = failed[0].metadata.get("error", "")
        _refuse_many_failures(args, ledger)
        return
    if any(sample.status not in (Status.COMPLETED, Status.TRUNCATED) and not sample.is_settled for sample in samples):
        # Aborted by us or by somebody else (an operator), or never begun; with --partial-rollout what is there is not lost.
        _put_back(args, ledger, original, reason="aborted")
        return
    ledger.finished.append(group)
    if len(ledger.kept) >= target:
        _put_back(args, ledger, group, reason="surplus")
        return
    if args.dynamic_sampling_filter_path:
        keeps = load_function("--dynamic-sampling-filter-path", args.dynamic_sampling_filter_path)
        verdict = filter_output(keeps(view_for_call(args), group))
        enough_without = len(ledger.kept) + num_pending >= target
        if not verdict.keep and (enough_without or not verdict.keep_when_insufficient):
            ledger.dropped[verdict.reason or "filtered"] += 1
            return
    ledger.kept.append(group)


def _refuse_many_failures(args: Any, ledger: Ledger) -> None:
    """One bad prompt is left out; when as many groups failed as a rollout holds (8 at least), something is wrong for all."""
    limit = max(8, args.rollout_batch_size)
    if ledger.dropped["failed"] >= limit:
        raise RuntimeError(
            f"{ledger.dropped['failed']} of {ledger.submitted} groups of this rollout failed (the limit is {limit}). "
            f"The last error: {ledger.last_error}"
        )


def _put_back(args: Any, ledger: Ledger, group: list, *, reason: str) -> None:
    if args.partial_rollout and len(group) == args.n_samples_per_prompt:
        ledger.returned.append(group)
    else:
        ledger.dropped[reason] += 1


# --------------------------------------------------------------------------------------------------------------- abort


async def _abort_rest(args: Any, state: GenerateState, ledger: Ledger, pending: dict[asyncio.Task, Group]) -> None:
    """End what still runs and account for it."""
    state.aborted = True
    deadline = time.monotonic() + _ABORT_PATIENCE_SECONDS
    while pending:
        await _abort_engines(args, state)
        done, _ = await asyncio.wait(pending, timeout=_ABORT_AGAIN_SECONDS)
        for task in sorted(done, key=lambda done_task: pending[done_task][0].index or 0):
            original = pending.pop(task)
            group = task.result()
            for sample in flatten(group):
                if sample.status is Status.ABORTED:
                    sample.metadata.setdefault("start_rollout_id", state.rollout_id)
            _settle(args, ledger, group, original=original, num_pending=0, target=0)
        if pending and time.monotonic() > deadline:
            logger.warning(
                "%d groups did not end within %.0f s of the abort; they are dropped", len(pending), _ABORT_PATIENCE_SECONDS
            )
            ledger.dropped["abort_timeout"] += len(pending)
            return


async def _abort_engines(args: Any, state: GenerateState) -> None:
    """Tell every worker of the router; one that does not answer cannot keep the others from ending."""
    try:
        workers = await state.client.workers()
    except EngineError as error:
        logger.warning("the router does not list its workers: %s", error)
        return
    for worker in workers:
        client = EngineClient(worker["url"], getattr(args, "engine_token", None) or "")
        try:
            await client.abort_all()
        except EngineError as error:
            logger.warning("abort: %s", error)
        finally:
            await client.close()


# -------------------------------------------------------------------------------------------------------------- finish


def _index_of(group: list) -> tuple[int, int]:
    first = flatten(group)[0]
    return (first.group_index if first.group_index is not None else -1, first.index if first.index is not None else -1)


def _finish(args: Any, rollout_id: int, data_source: Any, ledger: Ledger, *, seconds: float) -> RolloutFnTrainOutput:
    ledger.check()
    if ledger.returned:
        data_source.add_samples(sorted(ledger.returned, key=_index_of))
    ledger.kept.sort(key=_index_of)
    if args.rollout_sample_filter_path:
        load_function("--rollout-sample-filter-path", args.rollout_sample_filter_path)(view_for_call(args), ledger.kept)
    if args.rollout_all_samples_process_path:
        process = load_function("--rollout-all-samples-process-path", args.rollout_all_samples_process_path)
        process(view_for_call(args), sorted(ledger.finished, key=_index_of), data_source)
    metrics = ledger.metrics() | {"perf/rollout_time": seconds}
    if ledger.dropped["failed"]:
        logger.warning(
            "rollout %d: %d groups failed and were replaced; last: %s", rollout_id, ledger.dropped["failed"], ledger.last_error
        )
    return RolloutFnTrainOutput(samples=ledger.kept, metrics=metrics)
