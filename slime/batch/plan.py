"""From the samples of a rollout to optimizer steps: pure arithmetic, done once by the driver.

Invariants, whatever the sizes: every sample is in exactly one step, one rank and one micro-batch; samples of one trajectory
share a step; all ranks have equally many micro-batches, a multiple of the virtual-pipeline group; the loss weights of a step
sum, over trained tokens, to 1.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from typing import Protocol

import numpy as np

from slime.types import StepPlan


class PackingRules(Protocol):
    """The part of slime.config's batch section that planning reads."""

    global_batch_size: int
    micro_batch_size: int
    use_dynamic_batch_size: bool
    max_tokens_per_gpu: int | None
    balance_data: bool
    balance_by_flops: bool


def plan_steps(
    lengths: Sequence[int] | np.ndarray,
    trajectories: Sequence[int] | np.ndarray,
    mask_sums: Sequence[float] | np.ndarray,
    *,
    dp_size: int,
    cp_size: int,
    vpp_group: int = 1,
    batch: PackingRules,
    per_token: bool,
    costs: Sequence[float] | np.ndarray | None = None,
) -> list[StepPlan]:
    """Plan every optimizer step of one rollout.

    lengths, trajectories, mask_sums: one value per sample (tokens, trajectory id, trained tokens). `costs` is the work of each
    sample in any unit (see batch.flops), used for balancing; tokens where it is not given.
    `vpp_group`: microbatch_group_size_per_vp_stage under virtual pipelining, else 1.

    The number of steps is floor(trajectories / global_batch_size), at least 1; a remainder is spread over the steps instead of
    being dropped, so steps differ by at most one trajectory. A rank without a sample gets an empty micro-batch, so that the
    pipeline and every collective run on all ranks alike.
    """
    lengths, mask_sums = np.asarray(lengths, dtype=np.int64), np.asarray(mask_sums, dtype=np.float64)
    trajectories = np.asarray(trajectories, dtype=np.int64)
    if not len(lengths) == len(trajectories) == len(mask_sums) > 0:
        raise ValueError(
            f"lengths, trajectories, mask sums: {len(lengths)}, {len(trajectories)}, {len(mask_sums)} must be equal, > 0"
        )
    costs = lengths.astype(np.float64) if costs is None else np.asarray(costs, dtype=np.float64)
    members: dict[int, list[int]] = {}
    for position, trajectory in enumerate(trajectories.tolist()):
        members.setdefault(trajectory, []).append(position)

    plans = []
    for step_id, ids in enumerate(_spread_evenly(list(members), batch.global_batch_size)):
        positions = [position for trajectory in ids for position in members[trajectory]]
        packed = _pack_positions(positions, lengths, costs, cp_size=cp_size, batch=batch)
        packed = _fill_up(packed, lengths, multiple=dp_size * vpp_group)
        ranks = [packed[rank::dp_size] for rank in range(dp_size)]
        if batch.balance_data:
            # Heaviest first is nearly always better, but not always.
            ranks = min(_balance(packed, costs, dp_size), ranks, key=lambda dealt: _greatest_load(dealt, costs))
        weight = _loss_weights([members[trajectory] for trajectory in ids], mask_sums, per_token=per_token)
        plans.append(
            StepPlan(
                step_id=step_id,
                micro_batches=tuple(tuple(tuple(micro) for micro in rank) for rank in ranks),
                loss_weight=weight,
                num_trajectories=len(ids),
                denominator=max(float(mask_sums[positions].sum()), 1.0) if per_token else float(len(ids)),
            )
        )
    return plans


def _spread_evenly(ids: list[int], global_batch_size: int) -> list[list[int]]:
    if global_batch_size < 1:
        raise ValueError(f"--global-batch-size {global_batch_size} must be at least 1")
    num_steps = max(1, len(ids) // global_batch_size)
    bounds = [len(ids) * step // num_steps for step in range(num_steps + 1)]
    return [ids[low:high] for low, high in zip(bounds[:-1], bounds[1:], strict=True)]


def _loss_weights(trajectories: list[list[int]], mask_sums: np.ndarray, *, per_token: bool) -> np.ndarray:
    """Mean over trajectories of the mean over a trajectory's trained tokens; or the mean over all trained tokens of the step.

    A trajectory without a trained token counts in the denominator and adds nothing, as in slime (its mask sum is clamped to 1).
    """
    weight = np.zeros(len(mask_sums))
    if per_token:
        positions = [position for samples in trajectories for position in samples]
        weight[positions] = 1.0 / max(mask_sums[positions].sum(), 1.0)
        return weight
    for samples in trajectories:
        weight[samples] = 1.0 / (max(mask_sums[samples].sum(), 1.0) * len(trajectories))
    return weight


def _pack_positions(
    positions: list[int], lengths: np.ndarray, costs: np.ndarray, *, cp_size: int, batch: PackingRules
) -> list[list[int]]:
    if not batch.use_dynamic_batch_size:
        size = batch.micro_batch_size
        return [positions[start : start + size] for start in range(0, len(positions), size)]
    if not batch.max_tokens_per_gpu:
        raise ValueError("--use-dynamic-batch-size needs --max-tokens-per-gpu, the tokens one GPU takes in a micro-batch")
    capacity = batch.max_tokens_per_gpu * cp_size
    if batch.balance_by_flops:
        return _even_bins_with_room(positions, lengths, costs, capacity)
    return _first_fit(positions, lengths, capacity)


def _first_fit(positions: list[int], lengths: np.ndarray, capacity: int) -> list[list[int]]:
    """Each sample goes to the first micro-batch with room; one longer than the capacity is alone in its own."""
    bins: list[list[int]] = []
    # The most room of any micro-batch below each node of a binary tree; those that are not begun have all. So the first with
    # room is found in as many steps as the tree is high, where a search through all would take hours for 100,000 samples.
    leaves = 1 << max(0, len(positions) - 1).bit_length()
    room = [capacity] * (2 * leaves)
    for position in positions:
        need, node = int(lengths[position]), 1
        if need > capacity:
            node = leaves + len(bins)
        while node < leaves:
            node *= 2
            node += room[node] < need
        if node - leaves == len(bins):
            bins.append([])
        bins[node - leaves].append(position)
        room[node] = room[node] - need if need <= capacity else -1
        while node > 1:
            node //= 2
            room[node] = max(room[2 * node], room[2 * node + 1])
    return bins


def _even_bins_with_room(positions: list[int], lengths: np.ndarray, costs: np.ndarray, capacity: int) -> list[list[int]]:
    """As few bins of even work as hold no more tokens than the capacity; a sample longer than that is alone in its own."""
    num_bins, stride = -(-int(lengths[positions].sum()) // capacity), 1 + len(positions) // 1000
    while True:
        bins = [bin_ for bin_ in _even_bins(positions, costs, num_bins) if bin_]
        if all(len(bin_) == 1 or lengths[bin_].sum() <= capacity for bin_ in bins):
            return bins
        num_bins += stride  # of thousands of samples a few bins more or less are nothing, and each try sorts them all


def _even_bins(positions: list[int], costs: np.ndarray, num_bins: int) -> list[list[int]]:
    """Largest first, each into the lightest bin; ties go to the lowest bin, so the result depends on nothing but the input."""
    bins: list[list[int]] = [[] for _ in range(num_bins)]
    heap = [(0.0, index) for index in range(num_bins)]
    for position in sorted(positions, key=lambda p: (-costs[p], p)):
        load, index = heapq.heappop(heap)
        bins[index].append(position)
        heapq.heappush(heap, (load + float(costs[position]), index))
    return bins


def _fill_up(bins: list[list[int]], lengths: np.ndarray, *, multiple: int) -> list[list[int]]:
    """Bring the number of micro-batches to a multiple: halve the longest that hold several samples, then add empty ones."""
    bins = [list(bin_) for bin_ in bins]
    costs = lengths.astype(np.float64)
    tokens = [int(lengths[bin_].sum()) for bin_ in bins]
    while len(bins) % multiple:
        several = [index for index, bin_ in enumerate(bins) if len(bin_) > 1]
        if not several:
            bins.append([])
            tokens.append(0)
            continue
        longest = max(several, key=lambda index: (tokens[index], -index))
        halves = _even_bins(bins[longest], costs, 2)
        bins[longest : longest + 1] = halves
        tokens[longest : longest + 1] = [int(lengths[bin_].sum()) for bin_ in halves]
    return bins


def _greatest_load(ranks: list[list[list[int]]], costs: np.ndarray) -> float:
    return max(float(sum(costs[bin_].sum() for bin_ in rank if bin_)) for rank in ranks)


def _balance(bins: list[list[int]], costs: np.ndarray, dp_size: int) -> list[list[list[int]]]:
    """Deal micro-batches to ranks, equally many each, heaviest first to the rank with the least work so far."""
    quota = len(bins) // dp_size
    ranks: list[list[list[int]]] = [[] for _ in range(dp_size)]
    load = [0.0] * dp_size
    for bin_ in sorted(bins, key=lambda b: -float(costs[b].sum()) if b else 0.0):
        rank = min((r for r in range(dp_size) if len(ranks[r]) < quota), key=lambda r: (load[r], r))
        ranks[rank].append(bin_)
        load[rank] += float(costs[bin_].sum()) if bin_ else 0.0
    return ranks
