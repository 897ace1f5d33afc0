"""DSA operators of GLM-5.2: sparse MLA and the indexer's top-k.

In: tensors, every dimension read from them. Out: tensors. `get_ops` chooses the implementation once, by what is installed and
what the device is, and logs why; `torch_ops` is the reference and the answer on a CPU. Must never know: configs, process
groups, layers.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from slime_plugins.models.glm5.ops import torch_ops

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Ops:
    """One implementation of each operator, all with the signatures of torch_ops."""

    sparse_mla: Callable[..., tuple[Tensor, Tensor]]
    index_topk: Callable[..., Tensor]
    index_topk_fp8: Callable[..., Tensor]
    reason: str
    """What was chosen, and why."""


@functools.cache
def get_ops(device_type: str, attention_forward: str = "ours") -> Ops:
    """The operators for tensors on `device_type` ("cpu", "cuda"); chosen at the first call, logged, the same afterwards.

    attention_forward: "ours", or "flashmla" for an installed FlashMLA's kernel where ours could run; RuntimeError, with what
    was tried, where no package serves.
    """
    ops = _choose(device_type, attention_forward)
    # Which kernels run decides how fast a GPU is; on a CPU there is nothing to choose.
    logger.log(logging.INFO if device_type == "cuda" else logging.DEBUG, "DSA operators: %s", ops.reason)
    return ops


def _choose(device_type: str, attention_forward: str) -> Ops:
    if device_type != "cuda":
        return Ops(
            sparse_mla=torch_ops.sparse_mla,
            index_topk=torch_ops.index_topk,
            index_topk_fp8=torch_ops.index_topk_fp8,
            reason=f"plain torch (device {device_type})",
        )
    from slime.ops import cuda_build

    obstacle = cuda_build.why_not()
    if obstacle is not None:
        return Ops(
            sparse_mla=torch_ops.sparse_mla,
            index_topk=torch_ops.index_topk,
            index_topk_fp8=torch_ops.index_topk_fp8,
            reason=f"plain torch for attention and indexer ({obstacle})",
        )
    import torch

    from slime_plugins.models.glm5.ops import flash_mla, hopper_ops

    forward, whose = None, "all of sparse attention"
    if attention_forward == "flashmla":
        _, forward, finding = flash_mla.find(torch.device("cuda", torch.cuda.current_device()))
        if forward is None:
            raise RuntimeError(
                f"--dsa-attention-forward flashmla: {finding}. Install sgl-flash-mla (or the sglang-kernel of SGLang 0.5.17), "
                "or leave the flag out: this project's kernel needs no package"
            )
        whose = f"sparse attention's backward, its forward by {finding}"
    return Ops(
        sparse_mla=functools.partial(hopper_ops.sparse_mla, flash_mla=forward),
        index_topk=hopper_ops.index_topk,
        index_topk_fp8=hopper_ops.index_topk_fp8,
        reason=f"our Hopper kernels for the indexer and {whose}",
    )
