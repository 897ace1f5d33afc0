"""Generation that never stops: a thread of its own keeps groups in flight, a rollout takes what is ready."""

import asyncio
import queue
import threading

from slime.rollout.sglang_rollout import GenerateState, generate_and_rm_group
from slime.utils.async_utils import run

_worker = None


class Worker:
    def __init__(self, args, data_buffer):
        self.args, self.data_buffer, self.running = args, data_buffer, True
        self.ready = queue.Queue()
        self.state = GenerateState(args)
        self.thread = threading.Thread(target=lambda: asyncio.run(self.loop()), daemon=True)
        self.thread.start()

    async def loop(self):
        active = set()
        while self.running:
            while len(active) < 2:
                (group,) = self.data_buffer.get_samples(1)
                call = generate_and_rm_group(
                    self.args, group, sampling_params=self.state.sampling_params.copy(), evaluation=False
                )
                active.add(asyncio.create_task(call))
            done, active = await asyncio.wait(active, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                self.ready.put(task.result())

    def stop(self):
        self.running = False
        self.thread.join(timeout=10)


async def take(args, count):
    groups = []
    while len(groups) < count:
        try:
            groups.append(_worker.ready.get_nowait())
        except queue.Empty:
            await asyncio.sleep(0.01)
    return sorted(groups, key=lambda group: group[0].index)


def generate_rollout(args, rollout_id, data_buffer, evaluation=False):
    global _worker
    if evaluation:
        raise ValueError("no evaluation here")
    if _worker is None:
        _worker = Worker(args, data_buffer)
    return run(take(args, args.rollout_batch_size))
