"""One rank's whole training state in a piece of main memory, for a process that takes this one's place under the same layout.

    u64 length of the index, the index (pickled), tensors at multiples of 64 bytes

A checkpoint on disk can be loaded under any layout; this is a plain copy of what the rank holds, without a collective.
Trained weights are not in it: they are their main parameters, rounded, and are made from them again. What they must be is
known by a sum, and compared.
"""

from __future__ import annotations

import mmap
import os
import pickle
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from slime.training import checkpoint, state
from slime.training.memory import torch_optimizers
from slime.training.optimizer import parts_of, restore_schedule
from slime.training.snapshots import weights_of

if TYPE_CHECKING:
    from slime.training.trainer import Trainer

_ALIGN = 64
_SUM_CHUNK = 1 << 24  # numbers added at once: an integer sum works on a copy of eight bytes each


@dataclass(frozen=True)
class _Place:
    """Where a tensor lies, and on which kind of device it belongs."""

    offset: int
    dtype: torch.dtype
    shape: tuple[int, ...]
    device: str


class RankSnapshot:
    """What `trainer` holds now, ready to be written; nothing may change in between."""

    def __init__(self, trainer: Trainer) -> None:
        values = {"ranks": (trainer.ranks.rank, trainer.ranks.world_size), "random": _random(trainer)}
        self._tensors: dict[str, Tensor] = {}
        for name, one in _trainers(trainer).items():
            values[name] = _values(one)
            self._tensors |= {f"{name}{key}": tensor for key, tensor in _tensors(one).items()}
        places, offset = {}, 0
        for key, tensor in self._tensors.items():
            places[key] = _Place(offset, tensor.dtype, tuple(tensor.shape), tensor.device.type)
            offset += _aligned(_nbytes(tensor))
        self._places = places
        self._index = pickle.dumps((places, values))
        self._begin = _aligned(8 + len(self._index))
        self.nbytes = self._begin + offset

    def write(self, path: str) -> None:
        """path: a file of at least `nbytes`, which is in memory."""
        with open(path, "r+b") as file:
            memory = mmap.mmap(file.fileno(), self.nbytes)  # for as long as a tensor lies in it
        memory[:8] = struct.pack("<Q", len(self._index))
        memory[8 : 8 + len(self._index)] = self._index
        flat = torch.frombuffer(memory, dtype=torch.uint8)[self._begin :]
        for key, tensor in self._tensors.items():
            _at(flat, self._places[key]).copy_(tensor)


@torch.no_grad()
def restore(trainer: Trainer, path: str) -> None:
    """Set a newly built trainer to the state that was written; a reference that stands still, and a teacher, come from their
    files. Called by all ranks together.

    Raises ValueError where it is another rank's, or the weights that come of it are not those that were.
    """
    state.load_beside(trainer)
    with open(path, "rb") as file:
        memory = mmap.mmap(file.fileno(), os.fstat(file.fileno()).st_size, mmap.MAP_PRIVATE)
    (length,) = struct.unpack("<Q", memory[:8])
    # Written by a process of this run, in memory that no other user can open.
    places, values = pickle.loads(memory[8 : 8 + length])
    own = (trainer.ranks.rank, trainer.ranks.world_size)
    if values["ranks"] != own:
        raise ValueError(f"{path} is the snapshot of rank {values['ranks'][0]} of {values['ranks'][1]}, not of {own[0]}")
    flat = torch.frombuffer(memory, dtype=torch.uint8)[_aligned(8 + length) :]
    kept = {key: (_at(flat, place), place.device) for key, place in places.items()}
    for name, one in _trainers(trainer).items():
        _fill(one, kept, values[name], name)
    checkpoint.restore_random_state(values["random"])


def _trainers(trainer: Trainer) -> dict[str, Trainer]:
    """By the beginning of their tensors' names."""
    return {"policy ": trainer} | ({"critic ": trainer.critic.trainer} if trainer.critic is not None else {})


# --- what is kept ---


def _tensors(trainer: Trainer) -> dict[str, Tensor]:
    found = {f"weight {name}": tensor for name, tensor in _untrained(trainer)}
    if _reference_moves(trainer):
        found |= {f"reference {number}": tensor for number, tensor in enumerate(trainer.snapshots.kept("ref"))}
    for number, optimizer in enumerate(_inner_optimizers(trainer)):
        for index, parameter in enumerate(_parameters(optimizer)):
            found[f"main {number} {index}"] = parameter.data
            found |= {f"state {number} {index} {name}": value for name, value in _moments(optimizer, parameter).items()}
    return found


def _values(trainer: Trainer) -> dict[str, Any]:
    return {
        "groups": [
            [{name: value for name, value in group.items() if name != "params"} for group in optimizer.param_groups]
            for optimizer in _all_optimizers(trainer)
        ],
        "states": [
            [(list(_moments(optimizer, parameter)), _numbers(optimizer, parameter)) for parameter in _parameters(optimizer)]
            for optimizer in _inner_optimizers(trainer)
        ],
        "schedule": None if trainer.scheduler is None else trainer.scheduler.state_dict(),
        "steps_done": trainer.steps_done,
        "skipped": trainer.guard.skipped,
        "spikes": trainer.guard.spikes.state(),
        "weights": weight_sum(trainer),
    }


def _moments(optimizer: Optimizer, parameter: Tensor) -> dict[str, Tensor]:
    """None before the first step. An offloading optimizer lists the main parameter itself among them."""
    held = optimizer.state.get(parameter, {}).items()
    return {name: value for name, value in held if isinstance(value, Tensor) and value is not parameter}


def _numbers(optimizer: Optimizer, parameter: Tensor) -> dict[str, Any]:
    return {name: value for name, value in optimizer.state.get(parameter, {}).items() if not isinstance(value, Tensor)}


def _fill(trainer: Trainer, kept: dict[str, tuple[Tensor, str]], values: dict[str, Any], whose: str) -> None:
    """kept: name -> (the tensor in memory, where it belongs). whose: how the names of this trainer's begin."""
    for key, tensor in _tensors(trainer).items():  # of a new optimizer they are main parameters alone
        tensor.copy_(kept[whose + key][0])
    for number, (optimizer, states) in enumerate(zip(_inner_optimizers(trainer), values["states"], strict=True)):
        for index, (parameter, (names, numbers)) in enumerate(zip(_parameters(optimizer), states, strict=True)):
            found = {name: kept[f"{whose}state {number} {index} {name}"] for name in names}
            if names or numbers:
                moments = {name: tensor.to(place, copy=True) for name, (tensor, place) in found.items()}
                optimizer.state[parameter] = moments | numbers
    if trainer.optimizer is not None:
        _round_weights(trainer)
        restore_schedule(trainer.scheduler, values["schedule"], take="same")
    for optimizer, groups in zip(_all_optimizers(trainer), values["groups"], strict=True):
        for group, old in zip(optimizer.param_groups, groups, strict=True):
            group.update(old)
    trainer.steps_done, trainer.guard.skipped = values["steps_done"], values["skipped"]
    trainer.guard.spikes.restore(values["spikes"])
    if weight_sum(trainer) != values["weights"]:
        raise ValueError(
            f"rank {trainer.ranks.rank}: the weights made from a snapshot are not those that it was taken of; "
            "run the same command again to resume from the last checkpoint"
        )


def _round_weights(trainer: Trainer) -> None:
    """Trained weights from main parameters, as after a step."""
    for part in parts_of(trainer.optimizer):
        if getattr(part, "is_stub_optimizer", False):
            continue
        hybrid = part.optimizer
        if hasattr(hybrid, "sub_optimizers"):  # of --optimizer-cpu-offload
            for weight, main in hybrid.param_to_inner_param.items():
                weight.data.copy_(main.data)
            hybrid._sync_sub_optimizers_state_to_hdo()
        part._copy_main_params_to_model_params()
    for chunk in trainer.pipeline.chunks:
        chunk.start_param_sync()


def _untrained(trainer: Trainer) -> Iterator[tuple[str, Tensor]]:
    """Frozen parameters, and the models' buffers; every parameter where nothing is trained."""
    trained = set()
    if trainer.optimizer is not None:
        trained = {
            id(parameter)
            for part in parts_of(trainer.optimizer)
            for buffer in getattr(part, "buffers", ())
            for parameter in buffer.param_index_map
        }
    for number, chunk in enumerate(trainer.model):
        yield from ((f"{number} {name}", p.data) for name, p in chunk.named_parameters() if id(p) not in trained)
        yield from ((f"{number} buffer {name}", buffer) for name, buffer in chunk.named_buffers())


def _reference_moves(trainer: Trainer) -> bool:
    """Else it is on disk as it was."""
    return bool(trainer.config.checkpoint.ref_update_interval) and trainer.keeps_reference and "ref" in trainer.snapshots


def _all_optimizers(trainer: Trainer) -> list[Optimizer]:
    outer = list(torch_optimizers(trainer.optimizer))
    return outer + [one for one in _inner_optimizers(trainer) if all(one is not other for other in outer)]


def _inner_optimizers(trainer: Trainer) -> list[Optimizer]:
    """An offloading optimizer keeps a part of the parameters in each of several."""
    return [one for outer in torch_optimizers(trainer.optimizer) for one in getattr(outer, "sub_optimizers", [outer])]


def _parameters(optimizer: Optimizer) -> list[Tensor]:
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def _random(trainer: Trainer) -> dict[str, Any]:
    return checkpoint.random_state(trainer.ranks)["rng_state"].data


def weight_sum(trainer: Trainer) -> int:
    """Of the bits of all weights, as integers modulo 2**64."""
    integers = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    total = 0
    for weight in weights_of(trainer.model):
        for piece in weight.reshape(-1).view(integers[weight.element_size()]).split(_SUM_CHUNK):
            total += int(piece.sum(dtype=torch.int64))
    return total % 2**64


# --- bytes ---


def _nbytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _aligned(count: int) -> int:
    return -(-count // _ALIGN) * _ALIGN


def _at(flat: Tensor, place: _Place) -> Tensor:
    count = torch.Size(place.shape).numel() * place.dtype.itemsize
    return flat[place.offset : place.offset + count].view(place.dtype).view(place.shape)
