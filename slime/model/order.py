"""The order in which a built model has its parameters: that of the weight stream. A test compares it with real ranks."""

from __future__ import annotations

from slime.model.names import Entry

# The order in which the layer's modules register their parameters. `check_ranks` compares it with the built model's.
_IN_LAYER = (
    "input_layernorm.weight",
    "self_attention.linear_q_proj.weight",
    "self_attention.linear_q_down_proj.weight",
    "self_attention.linear_q_up_proj.weight",
    "self_attention.linear_q_up_proj.layer_norm_weight",
    "self_attention.linear_kv_down_proj.weight",
    "self_attention.linear_kv_up_proj.weight",
    "self_attention.linear_kv_up_proj.layer_norm_weight",
    "self_attention.linear_qkv.weight",
    "self_attention.linear_qkv.bias",
    "self_attention.linear_qkv.layer_norm_weight",
    "self_attention.q_layernorm.weight",
    "self_attention.k_layernorm.weight",
    "self_attention.linear_proj.weight",
    "self_attention.wq_b.weight",
    "self_attention.wk.weight",
    "self_attention.k_norm.weight",
    "self_attention.k_norm.bias",
    "self_attention.weights_proj.weight",
    "post_self_attn_layernorm.weight",
    "pre_mlp_layernorm.weight",
    "mlp.router.weight",
    "mlp.experts.linear_fc1.weight",
    "mlp.experts.linear_fc2.weight",
    "mlp.shared_experts.linear_fc1.weight",
    "mlp.shared_experts.linear_fc2.weight",
    "mlp.linear_fc1.weight",
    "mlp.linear_fc1.layer_norm_weight",
    "mlp.linear_fc2.weight",
    "post_mlp_layernorm.weight",
    "mlp.router.expert_bias",
)
# The MTP layer's own order, around its decoder layer.
_IN_MTP = (
    *("enorm.weight", "hnorm.weight", "eh_proj.weight"),
    *(f"transformer_layer.{name}" for name in _IN_LAYER),
    "final_layernorm.weight",
)
_PLACE = {name: place for names in (_IN_LAYER, _IN_MTP) for place, name in enumerate(names)}


def model_order(entry: Entry) -> tuple[int, int, int, int]:
    """Sort key: parameters before buffers; embedding, layers, final norm, MTP layer, head; a layer's own order; the expert."""
    layer = 10**6 + 1 if entry.is_mtp else entry.layer
    if layer is None:
        where = -1 if entry.name.startswith("embedding.") else 10**6 + 2 * ("output_layer" in entry.name)
        return int(entry.float32), where, 0, 0
    suffix = entry.name.split(".", 3)[3]
    if entry.expert is not None:
        suffix = suffix.removesuffix(str(entry.expert))
    return int(entry.float32), layer, _PLACE[suffix], entry.expert or 0
