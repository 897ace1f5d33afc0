"""By which way an engine gets its weights: from the trainer rank on each of its GPUs, or, elsewhere, by a broadcast to all."""

from __future__ import annotations

from collections.abc import Sequence

from slime.weights.serving import Receiver

BROADCAST = -1
"""The engine_id of the receiver that stands for all engines of the broadcast."""


def is_elsewhere(receiver: Receiver, trainer_gpus: int) -> bool:
    """None of its GPUs is a trainer rank's."""
    return min(receiver.gpus) >= trainer_gpus


def planned(receivers: Sequence[Receiver], *, trainer_gpus: int, num_gpus: int, broadcasts: bool) -> tuple[Receiver, ...]:
    """The receivers that a plan is made for. With a broadcast, engines that are wholly elsewhere are one, on a GPU of its own
    behind all others (number `num_gpus`): one trainer rank gathers the whole model there and sends it to every rank of them."""
    if not broadcasts:
        return tuple(receivers)
    here = [receiver for receiver in receivers if not is_elsewhere(receiver, trainer_gpus)]
    away = [receiver for receiver in receivers if is_elsewhere(receiver, trainer_gpus)]
    if not away:
        return tuple(here)
    return (*here, Receiver(BROADCAST, (num_gpus,), tp=1, drafts=any(receiver.drafts for receiver in away)))
