"""Building blocks that megatron-core has only with TransformerEngine: norms, fused-norm and duplicated linears.

Parameters keep TransformerEngine's names (`linear_qkv.layer_norm_weight`), which flags such as --freeze-params-name-list match.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn import Parameter

from slime.compat.megatron import prepare
from slime.device import get_device

prepare()

from megatron.core.tensor_parallel.layers import ColumnParallelLinear  # noqa: E402
from megatron.core.transformer.transformer_config import TransformerConfig  # noqa: E402
from megatron.core.transformer.transformer_layer import TransformerLayer  # noqa: E402


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension; float32 inside (float64 stays), rounded once to x's dtype."""
    return F.rms_norm(x, weight.shape, weight.to(x.dtype), eps)


def new_parameter(config: TransformerConfig, *shape: int, fill: float | None = None, sharded_tokens: bool = True) -> Parameter:
    """A replicated parameter on the model's device, `fill`ed or left for the checkpoint.

    sharded_tokens: it meets only this rank's slice of the tokens under sequence parallelism, so that its gradient is a partial
    sum which finalize_model_grads adds up over the tensor-parallel group (attribute `sequence_parallel`).
    """
    device = None if config.use_cpu_initialization else get_device().torch_device
    data = torch.empty(*shape, dtype=config.params_dtype, device=device)
    parameter = Parameter(data if fill is None else data.fill_(fill))
    parameter.sequence_parallel = bool(sharded_tokens and config.sequence_parallel)
    return parameter


class RMSNorm(torch.nn.Module):
    """RMSNorm with the constructor that megatron-core's layer specs call."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **_: object) -> None:
        super().__init__()
        self.eps = eps
        self.weight = new_parameter(config, hidden_size, fill=1.0)

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight, self.eps)


class LayerNorm(torch.nn.Module):
    """LayerNorm with bias, in float32 whatever the dtype (the indexer's key norm)."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float, **_: object) -> None:
        super().__init__()
        self.eps = eps
        self.weight = new_parameter(config, hidden_size, fill=1.0)
        self.bias = new_parameter(config, hidden_size, fill=0.0)

    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x.float(), self.weight.shape, self.weight.float(), self.bias.float(), self.eps).to(x.dtype)


class NormColumnParallelLinear(ColumnParallelLinear):
    """RMSNorm, then a column-parallel linear. The norm runs on this rank's slice of the sequence, before it is gathered."""

    def __init__(self, input_size: int, output_size: int, *, config: TransformerConfig, **kwargs: object) -> None:
        super().__init__(input_size, output_size, config=config, **kwargs)
        self.eps = config.layernorm_epsilon
        self.layer_norm_weight = new_parameter(config, input_size, fill=1.0)

    def normalised(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.layer_norm_weight, self.eps)

    def forward(self, x: Tensor, *args: object, **kwargs: object) -> tuple[Tensor, Tensor | None]:
        return super().forward(self.normalised(x), *args, **kwargs)


class DuplicatedLinear(torch.nn.Module):
    """The whole matrix on every tensor-parallel rank, applied to its own slice of the sequence; no bias.

    megatron-core's local substitute (ColumnParallelLinear) gathers its output and halves gradients silently under TP > 1.
    """

    def __init__(self, input_size: int, output_size: int, *, config: TransformerConfig, **_: object) -> None:
        super().__init__()
        self.weight = new_parameter(config, output_size, input_size)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight)


class SandwichLayer(TransformerLayer):
    """A layer that also normalises what attention and feed-forward return, before the residual sums (GLM-4)."""

    def __init__(self, config: TransformerConfig, *args: object, **kwargs: object) -> None:
        super().__init__(config, *args, **kwargs)
        self.post_self_attn_layernorm = RMSNorm(config, config.hidden_size, config.layernorm_epsilon)
        self.post_mlp_layernorm = RMSNorm(config, config.hidden_size, config.layernorm_epsilon)
        self.self_attn_bda = _normed_first(self.self_attn_bda, self.post_self_attn_layernorm)
        self.mlp_bda = _normed_first(self.mlp_bda, self.post_mlp_layernorm)


def _normed_first(bias_dropout_add: Callable, norm: RMSNorm) -> Callable:
    def choose(training: bool, fused: bool) -> Callable:
        add = bias_dropout_add(training, fused)

        def apply(output_with_bias: tuple[Tensor, Tensor | None], residual: Tensor, dropout: float) -> Tensor:
            output, bias = output_with_bias
            return add((norm(output if bias is None else output + bias), None), residual, dropout)

        return apply

    return choose
