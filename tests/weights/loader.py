"""What SGLang's loader copies of a tensor on a rank of an engine, by the tensor's name in a checkpoint."""

from __future__ import annotations

from dataclasses import dataclass

from slime.weights.plan import Receiver

VOCABULARY = ("embed_tokens", "lm_head")
AXIS = {
    **dict.fromkeys(("q_proj", "k_proj", "v_proj", "q_b_proj", "kv_b_proj", "gate_proj", "up_proj", *VOCABULARY), 0),
    **dict.fromkeys(("o_proj", "down_proj"), 1),
}
"""Of the matrices that a layer of tensor parallelism cuts."""


@dataclass(frozen=True)
class Loader:
    """block: of FP8, None without. padding: to which rows of a vocabulary are padded. mlp, expert: to which their rows are."""

    block: int | None
    padding: int = 64
    mlp: int = 32
    expert: int = 128

    def share(self, receiver: Receiver, gpu: int, name: str, shape: tuple[int, ...]) -> tuple[slice, ...]:
        """What is copied of a tensor of this name; all of it where it must come whole: what is not cut, a share that is not
        whole blocks or that SGLang would pad, a shared expert beside experts apart, and experts that move."""
        module, expert = name.split(".")[-2], ".experts." in name
        size = receiver.tp // receiver.ep if expert else receiver.tp
        whole = (slice(None),) * len(shape)
        cuts = receiver.cuts or (receiver.cuts_head and module == "lm_head")
        if not cuts or size == 1 or module not in AXIS or (expert and not receiver.fixed_experts):
            return whole
        if "shared_experts" in name and receiver.ep > 1:
            return whole
        axis, unit = AXIS[module], self.block if name.endswith("_scale_inv") else 1
        length = shape[axis] * unit
        if module in VOCABULARY:
            length += -length % self.padding
        elif (
            (length // size) % (self.block or 1) or ".mlp." in name and (length // size) % (self.expert if expert else self.mlp)
        ):
            return whole
        rank = receiver.gpus.index(gpu) % receiver.tp % size
        one = slice(length // size * rank // unit, length // size * (rank + 1) // unit)
        return tuple(one if number == axis else slice(None) for number in range(len(shape)))
