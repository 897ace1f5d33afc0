"""A rollout function of one's own on the stock pieces: submit, filter, abort what is left, give it back to the source."""

import asyncio

from slime.rollout.base_types import RolloutFnTrainOutput
from slime.rollout.filter_hub.base_types import MetricGatherer, call_dynamic_filter
from slime.rollout.sglang_rollout import GenerateState, abort, eval_rollout
from slime.utils.async_utils import run
from slime.utils.misc import load_function


async def collect(args, rollout_id, get_samples):
    state = GenerateState(args)
    data, counts = [], MetricGatherer()
    wanted = load_function(args.dynamic_sampling_filter_path) if args.dynamic_sampling_filter_path else None
    while len(data) < args.rollout_batch_size:
        while state.remaining_batch_size < args.rollout_batch_size:
            state.submit_generate_tasks(get_samples(args.over_sampling_batch_size))
        done, state.pendings = await asyncio.wait(state.pendings, return_when=asyncio.FIRST_COMPLETED)
        for task in done:
            group = task.result()
            verdict = call_dynamic_filter(wanted, args, group)
            if not verdict.keep:
                counts.on_dynamic_filter_drop(reason=verdict.reason)
                state.remaining_batch_size -= 1
                continue
            if len(data) < args.rollout_batch_size:
                data.append(group)
    rest = await abort(args, rollout_id)
    state.reset()
    data.sort(key=lambda group: group[0].index)
    return RolloutFnTrainOutput(samples=data, metrics=counts.collect()), rest


def generate_rollout(args, rollout_id, data_source, evaluation=False):
    if evaluation:
        output, _ = run(eval_rollout(args, rollout_id))
        return output
    output, rest = run(collect(args, rollout_id, data_source.get_samples))
    if rest:
        data_source.add_samples(rest)
    return output
