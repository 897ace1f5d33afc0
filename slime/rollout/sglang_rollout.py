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
from slime.rollout.failures import by_reason
from slime.rollout.filter_hub.base_types import filter_output
from slime.rollout.generation import (
    GenerateState,
    current_state,
    enter,
    generate,
    generate_and_rm,
    generate_and_rm_group,
    state_for,
)
from slime.rollout.http import address_of, router_url
from slime.rollout.plugins import load_function
from slime.rollout.watch import Watch
from slime.types.sample import Sample, Status

__all__ = [
    "GenerateState", "abort", "current_state", "eval_rollout", "generate", "generate_and_rm", "generate_and_rm_group",
    "generate_rollout", "generate_rollout_async", "get_model_url",
]  # fmt: skip

logger = logging.getLogger(__name__)

_ABORT_AGAIN_SECONDS = 2.0
_ABORT_PATIENCE_SECONDS = 120.0
# Where what comes back is dropped, it is waited for only so long as engines need to end it.
_ABORT_PATIENCE_FOR_NOTHING_SECONDS = 15.0
_CANCEL_SECONDS = 10.0
# Drops in a row that end the run: a filter that keeps one group of a hundred fails this once in 170 times.
_MOST_DROPS_IN_A_ROW = 512


def generate_rollout(
    args: Any, rollout_id: int, data_source: Any, evaluation: bool = False
) -> RolloutFnTrainOutput | RolloutFnEvalOutput:
    """The default rollout function. args: the flat view plus sglang_router_ip, sglang_router_port and engine_token."""
    if evaluation:
        return sync(evaluate_rollout(args, rollout_id))
    return sync(generate_rollout_async(args, rollout_id, data_source))


async def eval_rollout(args: Any, rollout_id: int) -> tuple[RolloutFnEvalOutput, list[Group]]:
    """All evaluation data sets, for a plugin's own rollout function; slime gives a second value, which is always empty."""
    return await evaluate_rollout(args, rollout_id), []


def get_model_url(args: Any, model_name: str, endpoint: str = "/generate") -> str:
    """The address of the router of a model of --sglang-config, by its name there; an unknown one is the trained."""
    host, port = (getattr(args, "sglang_model_routers", None) or {}).get(model_name, (None, None))
    return f"{address_of(host, port) if host else router_url(args)}{endpoint}"


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
    failures: Counter = field(default_factory=Counter)
    """What broke -> samples, those of kept groups included."""
    in_a_row: int = 0
    """Groups that came back and were not kept since the last one that was."""
    told: int = 0
    """Drops when they were last told."""

    def drops(self) -> str:
        return ", ".join(f"{reason}: {count}" for reason, count in self.dropped.most_common())

    def check(self) -> None:
        accounted = len(self.kept) + self.dropped.total() + len(self.returned)
        assert self.submitted == accounted, (
            f"{self.submitted} groups were submitted, but {len(self.kept)} kept + {dict(self.dropped)} dropped + "
            f"{len(self.returned)} returned make {accounted}"
        )

    def metrics(self) -> dict[str, float]:
        metrics = {f"rollout/dynamic_filter/drop_{reason}": float(count) for reason, count in sorted(self.dropped.items())}
        metrics |= {f"rollout/failed_samples/{reason}": float(count) for reason, count in sorted(self.failures.items())}
        return metrics | {
            "rollout/groups_submitted": float(self.submitted),
            "rollout/groups_buffered": float(len(self.returned)),
        }


async def generate_rollout_async(args: Any, rollout_id: int, data_source: Any) -> RolloutFnTrainOutput:
    started = time.monotonic()
    state = GenerateState(args, rollout_id=rollout_id, max_context_len=args.rollout_max_context_len)
    enter(state)
    ledger = Ledger(failures=state.failures)
    pending: dict[asyncio.Task, Group] = {}
    try:
        with Watch(lambda: (list(pending.values()), ledger.submitted - len(pending)), f"rollout {rollout_id + 1}"):
            await _collect(args, state, data_source, ledger, pending)
            await _abort_rest(args, state, ledger, pending)
    finally:
        await _cancel(pending)
        await state.client.close()
    return _finish(args, rollout_id, data_source, ledger, seconds=time.monotonic() - started)


async def _collect(
    args: Any, state: GenerateState, data_source: Any, ledger: Ledger, pending: dict[asyncio.Task, Group]
) -> None:
    """Start and gather groups until rollout_batch_size are kept. `pending` keeps what is still running then."""
    target = args.rollout_batch_size
    chunk = max(args.over_sampling_batch_size or target, 1)
    order: dict[asyncio.Task, int] = {}
    while len(ledger.kept) < target:
        while len(pending) + len(ledger.kept) < target:
            groups = data_source.get_samples(chunk)
            if not groups:
                raise ValueError(f"the data source gave no prompts; {len(ledger.kept)} of {target} groups are there")
            for group in groups:
                task = asyncio.create_task(generate_and_rm_group(args, group, state.sampling_params, state=state))
                pending[task], order[task] = group, ledger.submitted
                ledger.submitted += 1
        done, _ = await asyncio.wait(pending, return_when=asyncio.FIRST_COMPLETED)
        for task in sorted(done, key=order.__getitem__):
            group = pending.pop(task)
            kept = len(ledger.kept)
            _settle(args, ledger, task.result(), original=group, num_pending=len(pending), target=target)
            ledger.in_a_row = 0 if len(ledger.kept) > kept else ledger.in_a_row + 1
        tell_drops(args, state.rollout_id, ledger)


def _settle(args: Any, ledger: Ledger, group: list, *, original: Group, num_pending: int, target: int) -> None:
    """Enter one finished group into the ledger."""
    if failure := failure_in(group):
        count_failure(args, ledger, failure)
        return
    if is_unfinished(group):
        # Aborted by us or by somebody else (an operator), or never begun; with --partial-rollout what is there is not lost.
        _put_back(args, ledger, original, reason="aborted")
        return
    ledger.finished.append(group)
    if len(ledger.kept) >= target:
        _put_back(args, ledger, group, reason="surplus")
        return
    if reason := why_dropped(args, group, enough_without=len(ledger.kept) + num_pending >= target):
        ledger.dropped[reason] += 1
        return
    ledger.kept.append(group)


def failure_in(group: list) -> Sample | None:
    """A sample of a group that came back which can never be trained."""
    failed = (sample for sample in flatten(group) if sample.status is Status.FAILED and not sample.is_settled)
    return next(failed, None)


def is_unfinished(group: list) -> bool:
    return any(sample.status not in (Status.COMPLETED, Status.TRUNCATED) and not sample.is_settled for sample in flatten(group))


def why_dropped(args: Any, group: list, *, enough_without: bool) -> str | None:
    """The dynamic filter's reason against a finished group. enough_without: others can take its place."""
    if not args.dynamic_sampling_filter_path:
        return None
    keeps = load_function("--dynamic-sampling-filter-path", args.dynamic_sampling_filter_path)
    verdict = filter_output(keeps(view_for_call(args), group))
    drops = not verdict.keep and (enough_without or not verdict.keep_when_insufficient)
    return (verdict.reason or "filtered") if drops else None


def count_failure(args: Any, ledger: Ledger, failed: Sample) -> None:
    ledger.dropped["failed"] += 1
    ledger.last_error = failed.metadata.get("error", "")
    _refuse_many_failures(args, ledger)


def _refuse_many_failures(args: Any, ledger: Ledger) -> None:
    """One bad prompt is left out; when as many groups failed as a rollout holds (8 at least), and more than came back well,
    something is wrong for all."""
    limit, failed = max(8, args.rollout_batch_size), ledger.dropped["failed"]
    if failed >= limit and 2 * failed > len(ledger.kept) + ledger.dropped.total():
        raise RuntimeError(
            f"{failed} of {ledger.submitted} groups of this rollout failed (the limit is {limit}; samples by reason: "
            f"{by_reason(ledger.failures)}). The last error: {ledger.last_error}"
        )


def tell_drops(args: Any, rollout_id: int, ledger: Ledger) -> None:
    """A line whenever the drops have doubled. Raises RuntimeError when nothing is kept any more."""
    target, total = args.rollout_batch_size, ledger.dropped.total()
    progress = f"rollout {rollout_id + 1}: {len(ledger.kept)} of {target} groups are kept so far"
    if total >= max(8, target, 2 * ledger.told):
        ledger.told = total
        logger.info("%s, %d were dropped (%s)", progress, total, ledger.drops())
    limit = drops_limit(args)
    if ledger.in_a_row >= limit:
        back = f", {len(ledger.returned)} went back into the buffer" if ledger.returned else ""
        raise RuntimeError(
            f"{progress}, and none of the last {ledger.in_a_row} was; dropped: {ledger.drops() or 'none'}{back}. Such prompts "
            f"cannot fill a rollout: change them, the reward or --dynamic-sampling-filter-path "
            f"({args.dynamic_sampling_filter_path}), or raise --max-drops-in-a-row ({limit})"
        )


def drops_limit(args: Any) -> int:
    """Groups in a row without one that is trained, after which the run ends."""
    return args.max_drops_in_a_row or max(_MOST_DROPS_IN_A_ROW, 16 * args.rollout_batch_size)


def _put_back(args: Any, ledger: Ledger, group: list, *, reason: str) -> None:
    if args.partial_rollout and len(group) == args.n_samples_per_prompt:
        ledger.returned.append(group)
    else:
        ledger.dropped[reason] += 1


# --------------------------------------------------------------------------------------------------------------- abort


async def _abort_rest(args: Any, state: GenerateState, ledger: Ledger, pending: dict[asyncio.Task, Group]) -> None:
    """End what still runs and account for it. Nobody waits for a grader: an ungraded group is graded when it is taken again."""
    state.aborted = True
    patience = _ABORT_PATIENCE_SECONDS if args.partial_rollout else _ABORT_PATIENCE_FOR_NOTHING_SECONDS
    deadline = time.monotonic() + patience
    while pending:
        await _abort_engines(args, state)
        done, _ = await asyncio.wait(pending, timeout=_ABORT_AGAIN_SECONDS if state.generating else 0)
        for task in sorted(done, key=lambda done_task: pending[done_task][0].index or 0):
            original = pending.pop(task)
            group = task.result()
            _note_start(state.rollout_id, group)
            _settle(args, ledger, group, original=original, num_pending=0, target=0)
        late, generating = time.monotonic() > deadline, set(state.generating)
        left = {task: group for task, group in pending.items() if late or not any(id(sample) in generating for sample in group)}
        await _cancel(left)
        for task, group in left.items():
            del pending[task]
            if any(id(sample) in generating for sample in group):
                ledger.dropped["abort_timeout"] += 1
            elif any(sample.status is Status.FAILED and not sample.is_settled for sample in group):
                ledger.dropped["failed"] += 1
            else:
                _note_start(state.rollout_id, group)
                _put_back(args, ledger, group, reason="surplus")
        if late and ledger.dropped["abort_timeout"]:
            logger.warning(
                "%d groups did not end within %.0f s of the abort; they are dropped", ledger.dropped["abort_timeout"], patience
            )


async def abort(args: Any, rollout_id: int) -> list[Group]:
    """End what a plugin's own rollout function has in flight (`GenerateState.pendings`).

    Gives the groups back with --partial-rollout, for the data source's add_samples; else nothing.
    """
    state = state_for(args)
    state.aborted = True
    deadline = time.monotonic() + _ABORT_PATIENCE_SECONDS
    tasks, running = state.pendings, state.pendings
    while running and time.monotonic() < deadline:
        await _abort_engines(args, state)
        _, running = await asyncio.wait(running, timeout=_ABORT_AGAIN_SECONDS)
    await _cancel(running)
    state.pendings = set()
    groups = [task.result() for task in tasks if task not in running]
    for group in groups:
        _note_start(rollout_id, group)
    return sorted(groups, key=_index_of) if args.partial_rollout else []


def _note_start(rollout_id: int, group: list) -> None:
    for sample in flatten(group):
        if sample.status is Status.ABORTED:
            sample.metadata.setdefault("start_rollout_id", rollout_id)


async def _cancel(tasks: Iterable[asyncio.Task]) -> None:
    """A task that swallows its cancellation is left alone after some seconds."""
    for task in (tasks := list(tasks)):
        task.cancel()
    if tasks:
        await asyncio.wait(tasks, timeout=_CANCEL_SECONDS)


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
    return hand_over(args, rollout_id, data_source, ledger, seconds=seconds)


def hand_over(args: Any, rollout_id: int, data_source: Any, ledger: Ledger, *, seconds: float) -> RolloutFnTrainOutput:
    """The kept groups in the order of their prompts, as the user's functions leave them, and what became of the others."""
    ledger.kept.sort(key=_index_of)
    if args.rollout_sample_filter_path:
        load_function("--rollout-sample-filter-path", args.rollout_sample_filter_path)(view_for_call(args), ledger.kept)
    if args.rollout_all_samples_process_path:
        process = load_function("--rollout-all-samples-process-path", args.rollout_all_samples_process_path)
        process(view_for_call(args), sorted(ledger.finished, key=_index_of), data_source)
    metrics = ledger.metrics() | {"perf/rollout_time": seconds}
    if ledger.failures:
        logger.warning(
            "rollout %d: samples that failed, by reason: %s; %d groups were replaced",
            rollout_id + 1, by_reason(ledger.failures), ledger.dropped["failed"],
        )  # fmt: skip
    return RolloutFnTrainOutput(samples=ledger.kept, metrics=metrics)
