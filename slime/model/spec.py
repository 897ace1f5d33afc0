"""Layer specs: which of our modules megatron-core's TransformerBlock puts where."""

from __future__ import annotations

from slime.compat.megatron import prepare

prepare()

from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add  # noqa: E402
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear  # noqa: E402
from megatron.core.transformer.identity_op import IdentityOp  # noqa: E402
from megatron.core.transformer.mlp import MLP, MLPSubmodules  # noqa: E402
from megatron.core.transformer.moe.moe_layer import MoELayer, MoESubmodules  # noqa: E402
from megatron.core.transformer.moe.shared_experts import SharedExpertMLP  # noqa: E402
from megatron.core.transformer.spec_utils import ModuleSpec  # noqa: E402
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build  # noqa: E402
from megatron.core.transformer.transformer_config import TransformerConfig  # noqa: E402
from megatron.core.transformer.transformer_layer import (  # noqa: E402
    TransformerLayer,
    TransformerLayerSubmodules,
    get_transformer_layer_offset,
)

from slime.model.attention import GqaShape, GroupedQueryAttention, LatentAttention, MlaShape  # noqa: E402
from slime.model.experts import GroupedExperts  # noqa: E402
from slime.model.hf_config import HfConfig  # noqa: E402
from slime.model.layers import NormColumnParallelLinear, RMSNorm, SandwichLayer  # noqa: E402


def stage_layers(config: TransformerConfig, vp_stage: int | None = None, pp_rank: int | None = None) -> range:
    """0-based global layers of a (virtual) pipeline stage; this rank's own unless pp_rank says another."""
    first = get_transformer_layer_offset(config, vp_stage, pp_rank)
    return range(first, first + get_num_layers_to_build(config, vp_stage, pp_rank))


def feed_forward(config: TransformerConfig, hf: HfConfig, layer: int) -> tuple[object, ModuleSpec]:
    """(norm before it, feed-forward) of 0-based `layer`: the norm of a dense one is inside linear_fc1."""
    if not hf.is_moe_layer(layer):
        return IdentityOp, ModuleSpec(
            MLP, submodules=MLPSubmodules(linear_fc1=NormColumnParallelLinear, linear_fc2=RowParallelLinear)
        )
    shared = MLPSubmodules(linear_fc1=ColumnParallelLinear, linear_fc2=RowParallelLinear)
    parts = MoESubmodules(
        experts=ModuleSpec(GroupedExperts),
        shared_experts=ModuleSpec(SharedExpertMLP, submodules=shared),
    )
    return RMSNorm, ModuleSpec(MoELayer, submodules=parts)


def layer_spec(
    config: TransformerConfig, hf: HfConfig, layer: int, attention: ModuleSpec, *, norm_in_attention: bool
) -> ModuleSpec:
    """One decoder layer around `attention`."""
    mlp_norm, mlp = feed_forward(config, hf, layer)
    return ModuleSpec(
        SandwichLayer if hf.has_sandwich_norms else TransformerLayer,
        submodules=TransformerLayerSubmodules(
            input_layernorm=IdentityOp if norm_in_attention else RMSNorm,
            self_attention=attention,
            self_attn_bda=get_bias_dropout_add,
            pre_mlp_layernorm=mlp_norm,
            mlp=mlp,
            mlp_bda=get_bias_dropout_add,
        ),
    )


def decoder_spec(
    config: TransformerConfig, hf: HfConfig, *, contiguous_cp: bool, vp_stage: int | None = None
) -> TransformerBlockSubmodules:
    """This stage's layers for the families without sparse attention."""
    if hf.has_indexer:
        raise ValueError(
            f"{hf.source} is a sparse-attention model ({hf.model_type}); pass --spec "
            "slime_plugins.models.glm5.glm5 get_glm5_spec"
        )
    layers = [_layer_spec(config, hf, layer, contiguous_cp) for layer in stage_layers(config, vp_stage)]
    return TransformerBlockSubmodules(layer_specs=layers, layer_norm=RMSNorm)


def mtp_layer_spec(config: TransformerConfig, hf: HfConfig, *, contiguous_cp: bool) -> ModuleSpec:
    """The decoder layer inside the multi-token-prediction layer of those families."""
    return _layer_spec(config, hf, hf.num_layers, contiguous_cp)


def _layer_spec(config: TransformerConfig, hf: HfConfig, layer: int, contiguous_cp: bool) -> ModuleSpec:
    if hf.is_mla:
        attention = ModuleSpec(LatentAttention, params={"shape": MlaShape.for_model(hf), "contiguous_cp": contiguous_cp})
    else:
        attention = ModuleSpec(GroupedQueryAttention, params={"shape": GqaShape.for_model(hf), "contiguous_cp": contiguous_cp})
    return layer_spec(config, hf, layer, attention, norm_in_attention=not hf.is_mla)
