"""GLM-5 and GLM-5.2 for Megatron: latent attention over keys that an indexer selects (DSA), the selection shared between
layers.

    --spec slime_plugins.models.glm5.glm5 get_glm5_spec

Every dimension comes from config.json of --hf-checkpoint, `index_topk` too. A *computing* layer runs its indexer; a *shared*
one uses the indices of the nearest computing layer before it, which must be on the same (virtual) pipeline stage unless
--dsa-send-indices lets them travel (slime.model.relay). The indexer gets no gradient and is not given to the optimizer: the
selection is discrete, and weight decay alone would shrink it step by step.
"""

from __future__ import annotations

import logging

from slime.compat.megatron import prepare

prepare()

from megatron.core.transformer.spec_utils import ModuleSpec  # noqa: E402
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build  # noqa: E402
from megatron.core.transformer.transformer_config import MLATransformerConfig  # noqa: E402
from megatron.core.transformer.transformer_layer import get_transformer_layer_offset  # noqa: E402

from slime.config.stages import computing_layers, legal_splits  # noqa: E402
from slime.model.attention import MlaShape  # noqa: E402
from slime.model.hf_config import HfConfig, read_hf_config  # noqa: E402
from slime.model.layers import RMSNorm  # noqa: E402
from slime.model.spec import layer_spec  # noqa: E402
from slime_plugins.models.glm5.attention import IndexerShape, SparseLatentAttention  # noqa: E402

logger = logging.getLogger(__name__)


def get_glm5_spec(args: object, config: MLATransformerConfig, vp_stage: int | None = None) -> TransformerBlockSubmodules:
    """Layer specs of this rank's (virtual) pipeline stage.

    args: slime's flat view; hf_checkpoint, allgather_cp and dsa_* are read. config: megatron-core's.
    Raises ValueError when the stage starts on a shared layer and indices do not travel.
    """
    hf = read_hf_config(args.hf_checkpoint)
    if not hf.has_indexer:
        raise ValueError(
            f"{hf.source} ({hf.model_type}) has no indexer; get_glm5_spec builds glm_moe_dsa and deepseek_v32 models"
        )
    if config.context_parallel_size > 1 and not args.allgather_cp:
        raise ValueError(
            "sparse attention splits the stream contiguously: pass --allgather-cp with --context-parallel-size > 1"
        )
    first = get_transformer_layer_offset(config, vp_stage)
    layers = range(first, first + get_num_layers_to_build(config, vp_stage))
    if not args.dsa_send_indices:
        check_stage_start(hf, layers, stage=_stage_number(config, vp_stage), num_stages=_num_stages(config))
    computing = [layer for layer in layers if hf.runs_indexer(layer)]
    logger.debug(
        "glm5: layers %d-%d, indexer on %s; indexer parameters are frozen and not in the optimizer",
        layers.start, layers.stop - 1, computing,
    )  # fmt: skip
    specs = [_layer_spec(args, config, hf, layer) for layer in layers]
    return TransformerBlockSubmodules(layer_specs=specs, layer_norm=RMSNorm)


def get_mtp_layer_spec(args: object, config: MLATransformerConfig) -> ModuleSpec:
    """The decoder layer inside the multi-token-prediction layer: after the last one, with an indexer and experts of its own."""
    hf = read_hf_config(args.hf_checkpoint)
    return _layer_spec(args, config, hf, hf.num_layers)


def _layer_spec(args: object, config: MLATransformerConfig, hf: HfConfig, layer: int) -> ModuleSpec:
    attention = ModuleSpec(
        SparseLatentAttention,
        params={
            "shape": MlaShape.for_model(hf),
            "indexer": IndexerShape.for_model(hf),
            "index_source": hf.index_source(layer) + 1,
            "core_axis": args.dsa_core_axis,
            "move_cost": args.dsa_move_cost,
            "index_scoring": args.dsa_index_scoring,
            "attention_forward": args.dsa_attention_forward,
            "contiguous_cp": True,
        },
    )
    return layer_spec(config, hf, layer, attention, norm_in_attention=False)


def check_stage_start(hf: HfConfig, layers: range, *, stage: int, num_stages: int) -> None:
    """Raise ValueError, naming the legal splits, when `layers` (0-based) begins on a layer that reuses another stage's
    indices."""
    if not layers or hf.runs_indexer(layers.start):
        return
    raise ValueError(
        f"pipeline stage {stage} starts at layer {layers.start + 1}, which reuses the indices of layer "
        f"{hf.index_source(layers.start) + 1} on an earlier stage; every stage must start on one of the "
        f"computing layers {computing_layers(hf)} "
        f"(1-based). {_advice(hf, num_stages)}"
    )


def _advice(hf: HfConfig, num_stages: int) -> str:
    # The slowest stage decides.
    splits = sorted(legal_splits(hf, num_stages), key=max)
    if not splits:
        return (
            f"No first/last split of {hf.num_layers} layers over {num_stages} stages does; change "
            "--pipeline-model-parallel-size, list the layers of each stage with --pipeline-model-parallel-layout, or pass "
            "--dsa-send-indices."
        )
    listed = ", ".join(f"{sizes[0]}/{sizes[-1]}" for sizes in splits[:4])
    return (
        f"Legal --decoder-first-pipeline-num-layers/--decoder-last-pipeline-num-layers with {num_stages} "
        f"stages, best balanced first: {listed}; or pass --dsa-send-indices, which lifts the rule"
    )


def _num_stages(config: MLATransformerConfig) -> int:
    return config.pipeline_model_parallel_size * (config.virtual_pipeline_model_parallel_size or 1)


def _stage_number(config: MLATransformerConfig, vp_stage: int | None) -> int:
    from megatron.core import parallel_state

    return parallel_state.get_pipeline_model_parallel_rank() + (vp_stage or 0) * config.pipeline_model_parallel_size
