"""Seconds that a trainer's GPUs exchange while they train one rollout, by axis. Pure arithmetic; none of it hides behind work.

Rows of a rank: its share of the stream, cut over data- and context-parallel ranks. bf16 everywhere but in the sum of gradients.
"""

from __future__ import annotations

from collections.abc import Mapping

from slime.model.hf_config import HfConfig
from slime.model.placement import Grid
from slime.rehearse.model.rates import Rates
from slime.rehearse.model.shares import StageShare

BF16 = 2


def training_exchange(
    hf: HfConfig,
    grid: Grid,
    shares: list[StageShare],
    rates: Rates,
    *,
    tokens: int,
    steps: int,
    passes: int,
    recompute: bool,
    grad_bytes: int,
    gpus_per_node: int,
) -> Mapping[str, float]:
    """Of the stage that exchanges most. passes: forward passes besides training. grad_bytes: of one parameter's gradient."""
    rows, hidden = tokens / (grid.dp * grid.cp), hf["hidden_size"]
    times = passes + 2 + recompute  # forward and backward, and the forward that backward repeats
    layers = max(len(share.layers) for share in shares)
    moe = max(sum(hf.is_moe_layer(layer) for layer in share.layers) for share in shares) if hf.num_experts else 0

    def seconds(nbytes: float, first: int, size: int) -> float:
        """Bytes of one GPU in a group of `size` ranks, neighbours of which are `first` ranks apart."""
        if size == 1:
            return 0.0
        inside = max(1, min(size, gpus_per_node // first))
        outside = (size - inside) / (size - 1)
        return nbytes * (size - 1) / size / 1e9 * (outside / rates.nic_gb_per_s + (1 - outside) / rates.nvlink_gb_per_s)

    keys = hf["kv_lora_rank"] + hf["qk_rope_head_dim"] if hf.is_mla else 2 * hf["num_key_value_heads"] * hf.head_dim / grid.tp
    dense = max(share.trained - share.experts for share in shares) * (grad_bytes + BF16)
    experts = max(share.experts for share in shares) * (grad_bytes + BF16)
    routed = rows / grid.tp * hf.get("num_experts_per_tok", 0) * hidden * BF16
    return {
        # Sequence parallelism: two gathers and two scatters of a layer.
        "TP": times * layers * seconds(4 * rows * hidden * BF16, 1, grid.tp),
        "CP": times * layers * seconds(grid.cp * rows * keys * BF16, grid.tp, grid.cp),
        "EP": times * moe * seconds(2 * routed * grid.etp, grid.etp, grid.ep),
        "DP": steps * (seconds(dense, grid.tp, grid.dp * grid.cp) + seconds(experts, grid.etp * grid.ep, grid.edp)),
        "PP": 2 * seconds(2 * rows / grid.tp * hidden * BF16, gpus_per_node, 2) if grid.pp > 1 else 0.0,
    }
