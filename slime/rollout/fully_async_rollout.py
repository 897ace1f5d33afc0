"""Generation that goes on all the time: groups are begun as training takes them, whatever the trainer does meanwhile.

`generate_rollout_fully_async` is the value of --rollout-function-path, under slime's name; --schedule fully-async chooses it.
Each call hands over --rollout-batch-size groups that are ready. `slime.rollout.stock` says where every group is.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
import time
from collections import Counter
from typing import Any

from slime.engine.client import sync
from slime.rollout.base_types import Group, RolloutFnEvalOutput, RolloutFnTrainOutput
from slime.rollout.data_source import made_by, return_to, state_of, with_begun
from slime.rollout.evaluation import evaluate_rollout
from slime.rollout.generation import GenerateState, enter, generate_and_rm_group
from slime.rollout.sglang_rollout import (
    Ledger,
    count_failure,
    drops_limit,
    failure_in,
    hand_over,
    is_unfinished,
    tell_drops,
    why_dropped,
)
from slime.rollout.stock import Started, Stock
from slime.rollout.watch import Watch

__all__ = ["Stream", "generate_rollout_fully_async"]

logger = logging.getLogger(__name__)

_CANCEL_SECONDS = 10.0

_streams: dict[int, Stream] = {}
"""Of data sources that came without one, by their id: a stream keeps its source alive."""


def generate_rollout_fully_async(
    args: Any, rollout_id: int, data_source: Any, evaluation: bool = False
) -> RolloutFnTrainOutput | RolloutFnEvalOutput:
    """data_source: a Stream, or any other, which then has one. args.weight_version: newest that the engines have."""
    if evaluation:
        return sync(evaluate_rollout(args, rollout_id))
    stream = data_source if isinstance(data_source, Stream) else _streams.setdefault(id(data_source), Stream(data_source))
    return sync(stream.hand_over(args, rollout_id))


class Stream:
    """A data source with the generation of its prompts. All of it happens in one event loop; `position` and `go_back` may be
    called from any thread."""

    def __init__(self, source: Any):
        self.source = source
        self._run = secrets.token_hex(4)
        """Versions count anew in another one."""
        self._stock: Stock | None = None
        self._put_back: list[Group] = []
        self._tasks: set[asyncio.Task] = set()

    # ---------------------------------------------------------------------------------------------------------- handing over

    async def hand_over(self, args: Any, rollout_id: int) -> RolloutFnTrainOutput:
        """The next rollout. Raises what broke the generation, which has then ended; `go_back` begins it anew."""
        if self._stock is None:
            self._begin(args)
        self._state.rollout_id = rollout_id
        stock = self._stock
        stock.updated(getattr(args, "weight_version", None) or 0)
        try:
            with Watch(self._waiting, f"rollout {rollout_id + 1}"):
                while (groups := self._taken()) is None:
                    self._changed.clear()
                    await self._changed.wait()
        except Exception:
            await self._end()
            raise
        stock.check()
        self._too_old = stock.num_too_old
        ledger, self._ledger = self._ledger, self._new_ledger()
        seconds, self._since = time.monotonic() - self._since, time.monotonic()
        ledger.kept = groups
        output = hand_over(args, rollout_id, self.source, ledger, seconds=seconds)
        output.metrics |= stock.metrics()
        return output

    def _begin(self, args: Any) -> None:
        self._args = args
        self._stock = Stock(
            self.source,
            batch=args.rollout_batch_size,
            bound=args.max_weight_staleness,
            interval=args.update_weights_interval,
            on_stale=args.on_stale_group,
        )
        self._stock.put_back(self._put_back)
        self._state = GenerateState(args, max_context_len=args.rollout_max_context_len)
        enter(self._state)
        self._ledger, self._since, self._too_old = self._new_ledger(), time.monotonic(), 0
        self._changed = asyncio.Event()
        self._broken: Exception | None = None

    def _new_ledger(self) -> Ledger:
        """What became of groups since the last hand-over, for its metrics and messages; the stock's counts are of the run."""
        self._state.failures, self._state.told = Counter(), set()
        return Ledger(failures=self._state.failures)

    def _waiting(self) -> tuple[list[Group], int]:
        """Groups that are being generated, and how many are back and ready."""
        return [one.original for one in list(self._stock.started.values())], len(self._stock.ready)

    def _taken(self) -> list | None:
        """A rollout's groups, if they are there; what there is room for is begun before and behind."""
        if self._broken is not None:
            raise self._broken
        self._feed()
        groups = self._stock.take()
        self._refuse_what_never_gets_young()
        self._feed()
        return groups

    def _refuse_what_never_gets_young(self) -> None:
        """What is generated again is by the newest weights, whatever the bound; unless a function of the user's says otherwise.
        New weights may make all that was ahead too old at once."""
        args, stock = self._args, self._stock
        if args.max_weight_staleness is None:
            return
        too_old = stock.num_too_old - self._too_old
        ahead = (args.max_weight_staleness + 1) * args.update_weights_interval * args.rollout_batch_size
        if too_old > ahead + drops_limit(args):
            raise RuntimeError(
                f"rollout {self._state.rollout_id + 1}: {too_old} groups were older than --max-weight-staleness "
                f"{args.max_weight_staleness}, and so were those in their place; look at the weight_versions that "
                f"--custom-generate-function-path ({args.custom_generate_function_path}) leaves in its samples"
            )

    # ------------------------------------------------------------------------------------------------------------ generation

    def _feed(self) -> None:
        for one in self._stock.begin():
            self._ledger.submitted += 1
            task = asyncio.create_task(self._follow(one))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def _follow(self, one: Started) -> None:
        """One group until it is back and settled; then others take its place."""
        try:
            answered = await generate_and_rm_group(
                self._args, one.original, dict(self._state.sampling_params), state=self._state
            )
            if one.number not in self._stock.started:
                return  # it did not heed its cancellation
            self._settle(one, answered)
            self._feed()
        except Exception as error:
            self._broken = self._broken or error
        self._changed.set()

    def _settle(self, one: Started, answered: list) -> None:
        args, ledger, stock = self._args, self._ledger, self._stock
        if failure := failure_in(answered):
            stock.drop(one, "failed")
            count_failure(args, ledger, failure)
        elif is_unfinished(answered):
            stock.interrupt(one)
        else:
            ledger.finished.append(answered)
            reason = why_dropped(args, answered, enough_without=True)
            if reason is None:
                stock.finish(one, answered)
                ledger.kept.append(answered)
                ledger.in_a_row = 0
                return
            stock.drop(one, reason)
            ledger.dropped[reason] += 1
        ledger.in_a_row += 1
        tell_drops(args, self._state.rollout_id, ledger)

    def close(self) -> None:
        """End what is being generated; its prompts are begun again by whoever resumes."""
        sync(self._end())

    async def _end(self) -> None:
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks, timeout=_CANCEL_SECONDS)

    # -------------------------------------------------------------------------------------------------------------- position

    def position(self, saving: int | None = None) -> dict[str, Any]:
        """Where the data stands when all that was handed over has been trained. saving: as of state_of."""

        async def look() -> dict[str, Any]:
            state = state_of(self.source, saving=saving)
            if self._stock is None:
                return with_begun(state, self._put_back, run=self._run, version=0)
            return with_begun(state, self._stock.outstanding(), run=self._run, version=self._stock.version)

        return sync(look())

    def go_back(self, state: dict[str, Any]) -> None:
        """To a position of this run or an earlier one; what is being generated is given up."""

        async def go() -> None:
            self._put_back = []
            if self._stock is not None:
                await self._end()
                self._stock.forget()
                self._broken = None
            same_run = made_by(state, self._run)
            return_to(self.source, state, put_back=self._put_back.extend, same_run=same_run)
            if self._stock is not None:
                self._stock.put_back(self._put_back)

        sync(go())
