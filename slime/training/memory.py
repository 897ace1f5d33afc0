"""Which tensors of a trainer can leave the device while engines use it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from torch import Tensor
from torch.optim import Optimizer

if TYPE_CHECKING:
    from slime.training.trainer import Trainer


def step_tensors(trainer: Trainer) -> dict[str, Tensor]:
    """What optimizer steps keep between them: fp32 main parameters, moments. Nothing that weights share memory with.

    A float32 model and the precision-aware optimizer have no main parameters of their own: theirs are views of the weights,
    which must stay while weights are sent.
    """
    weights = {tensor.untyped_storage()._cdata for tensor in weight_tensors(trainer).values()}
    found: dict[str, Tensor] = {}
    for number, optimizer in enumerate(torch_optimizers(trainer.optimizer)):
        for group in optimizer.param_groups:
            found.update((f"optimizer {number} main {id(p)}", p.data) for p in group["params"])
        for parameter, state in optimizer.state.items():
            found.update(
                (f"optimizer {number} {name} {id(parameter)}", value)
                for name, value in state.items()
                if isinstance(value, Tensor)
            )
    return {name: tensor for name, tensor in found.items() if tensor.untyped_storage()._cdata not in weights}


def gradient_tensors(trainer: Trainer) -> dict[str, Tensor]:
    """The gradient buffers. Every step zeroes them before it adds to them, so what they hold between steps is of no use."""
    return {
        f"chunk {number} {kind} {index} gradients": buffer.grad_data
        for number, chunk in enumerate(trainer.pipeline.chunks)
        for kind in ("buffers", "expert_parallel_buffers")
        for index, buffer in enumerate(_buffers(chunk, kind))
    }


def weight_tensors(trainer: Trainer) -> dict[str, Tensor]:
    """The parameters and buffers of the model itself; needed for sending weights, not for generation."""
    found = {f"chunk {n} {name}": p.data for n, chunk in enumerate(trainer.model) for name, p in chunk.named_parameters()}
    return found | {f"chunk {n} {name}": b for n, chunk in enumerate(trainer.model) for name, b in chunk.named_buffers()}


def _buffers(chunk, kind: str) -> list:
    # A model that only computes log-probs is not wrapped for gradients and owns none: `buffers` is then torch's own method.
    found = getattr(chunk, kind, [])
    return [] if callable(found) else list(found)


def torch_optimizers(optimizer) -> Iterator[Optimizer]:
    """megatron-core chains one optimizer for dense and one for expert parameters; each wraps a torch one."""
    if optimizer is None:
        return
    for part in getattr(optimizer, "chained_optimizers", [optimizer]):
        if part.optimizer is not None:
            yield part.optimizer
