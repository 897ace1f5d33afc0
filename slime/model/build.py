"""Build this rank's model chunks."""

from __future__ import annotations

import importlib
import logging
import re
from collections.abc import Callable

import torch

from slime.compat.megatron import prepare

prepare()

from megatron.core.models.gpt.gpt_model import GPTModel  # noqa: E402
from megatron.core.transformer.spec_utils import ModuleSpec  # noqa: E402
from megatron.core.transformer.transformer_config import TransformerConfig  # noqa: E402

from slime.config.dotted import accepted_keywords  # noqa: E402
from slime.config.hf_check import differences  # noqa: E402
from slime.config.hf_fields import faults  # noqa: E402
from slime.device import Device  # noqa: E402
from slime.model.dispatcher import own_dispatchers  # noqa: E402
from slime.model.head import LastChunk  # noqa: E402
from slime.model.hf_config import HfConfig  # noqa: E402
from slime.model.local import VALUE_HEAD, local_tensors  # noqa: E402
from slime.model.mtp import MtpGPTModel, mtp_block_spec  # noqa: E402
from slime.model.names import NameTable  # noqa: E402
from slime.model.relay import Relay, describe, relay_indices  # noqa: E402
from slime.model.spec import decoder_spec, mtp_layer_spec, stage_layers  # noqa: E402
from slime.model.transformer_config import transformer_config  # noqa: E402
from slime.model.value import ValueChunk  # noqa: E402
from slime.parallel import Ranks  # noqa: E402

logger = logging.getLogger(__name__)


def build_model(
    config: object,
    hf: HfConfig,
    ranks: Ranks,
    device: Device,
    *,
    dtype: torch.dtype | None = None,
    weights_only: bool = False,
    value_head: bool = False,
) -> list[GPTModel]:
    """This rank's chunks (one, or one per virtual stage), without DDP and with uninitialised weights: load a checkpoint next.

    dtype: of the parameters, where it is not the config's to say (conversion keeps the checkpoint's). weights_only: the model
    will never compute. value_head: a critic, with one value per token in the place of the output layer, whole and untied.
    Raises ValueError, listing all differences, when MODEL_ARGS and config.json describe different models,
    and for layouts that cannot compute what was asked.
    """
    megatron, notes = transformer_config(config, device, dtype=dtype, weights_only=weights_only)
    if ranks.rank == 0:
        for note in notes:
            logger.debug("model: %s", note)
    if lines := faults(hf) or differences(hf, vars(config.model), config.model.megatron):
        raise ValueError(f"MODEL_ARGS and {hf.source} describe different models:\n  " + "\n  ".join(lines))
    _check_mtp(config.model, hf)
    stages = range(ranks.vpp_size) if ranks.vpp_size else [None]
    chunks = [_chunk(config, megatron, hf, ranks, vp_stage, value_head=value_head) for vp_stage in stages]
    for chunk in chunks:
        own_dispatchers(chunk)
    if config.parallel.dsa_send_indices and hf.has_indexer:
        _send_indices(chunks, config, hf, ranks)
    _check_recomputation(chunks, megatron)
    mark_sharded(chunks, trained_table(config.model, hf), ranks)
    if not value_head:
        freeze(chunks, config.model)
    return chunks


def _send_indices(chunks: list[GPTModel], config: object, hf: HfConfig, ranks: Ranks) -> None:
    for chunk in chunks:
        relay = Relay.for_chunk(hf, stage_layers(chunk.config, chunk.vp_stage))
        relay_indices(chunk.decoder, relay, ranks)
        if relay.sends is not None and ranks.is_dense_source:
            logger.info("model: %s", describe(relay, ranks, config.batch.max_tokens_per_gpu))


def trained_table(model: object, hf: HfConfig) -> NameTable:
    """Names of what is built: the multi-token-prediction layer is among them with --mtp-num-layers. model: its section."""
    return NameTable.for_model(hf, with_mtp=bool(model.mtp_num_layers))


def _check_mtp(model: object, hf: HfConfig) -> None:
    if not model.mtp_num_layers:
        return
    if model.mtp_num_layers != 1 or hf.num_mtp_layers != 1:
        raise ValueError(
            f"--mtp-num-layers {model.mtp_num_layers}: {hf.source} has {hf.num_mtp_layers} multi-token-prediction layers "
            "(num_nextn_predict_layers), and exactly one can be built; leave the flag out for a model without"
        )
    if hf.get("tie_word_embeddings", False):
        raise ValueError(f"--mtp-num-layers 1: {hf.source} ties embedding and output layer, which megatron-core cannot do here")
    if model.custom_model_provider_path:
        raise ValueError("--mtp-num-layers builds into this project's model; leave out --custom-model-provider-path")


def _check_recomputation(chunks: list[GPTModel], megatron: TransformerConfig) -> None:
    """Uniform recomputation walks through a chunk in equal strides, and past its end where they do not fit."""
    stride = megatron.recompute_num_layers
    if megatron.recompute_granularity != "full" or megatron.recompute_method != "uniform":
        return
    for chunk in chunks:
        if len(chunk.decoder.layers) % stride:
            raise ValueError(
                f"--recompute-method uniform --recompute-num-layers {stride}: this pipeline stage has "
                f"{len(chunk.decoder.layers)} layers, no multiple of it; pass 1, a divisor of every stage's layers, or "
                "--recompute-method block"
            )


def mark_sharded(chunks: list[GPTModel], table: NameTable, ranks: Ranks) -> None:
    """Tell the optimizer which parameters are parts of a whole: grad norms count the others on tensor-parallel rank 0 only.

    megatron-core sets these attributes while it initialises weights, which is skipped here; without them a norm under TP > 1
    would silently miss every other rank's shard. Experts are parts always, as in megatron-core: their replicas are told apart
    by the expert-data-parallel group.
    """
    for local in local_tensors(chunks, ranks, experts=False):
        if local.parameter is None or local.name == VALUE_HEAD:
            continue
        split = "rows" if local.is_expert else table[local.name].split
        if split != "none":
            local.parameter.tensor_model_parallel = True
            local.parameter.partition_dim = 1 if split == "columns" else 0
            local.parameter.partition_stride = 2 if split == "gated_rows" else 1


def padded_vocab_size(config: object, hf: HfConfig) -> int:
    """Rows of the embedding: --padded-vocab-size, else the vocabulary up to a multiple of divisible-by x TP."""
    if config.model.padded_vocab_size:
        return config.model.padded_vocab_size
    unit = config.model.make_vocab_size_divisible_by * config.parallel.tensor_model_parallel_size
    return -(-hf["vocab_size"] // unit) * unit


def own_vocabulary(padded_vocab: int, hf: HfConfig, ranks: Ranks) -> range:
    """Global token ids of this tensor-parallel rank's logit columns, padding excluded.

    Keep `logits[..., : len(range)]`: a padded column's logit is 0, not -inf, and would take part in every softmax.
    """
    share = padded_vocab // ranks.tp_size
    first = ranks.tp_rank * share
    return range(first, max(first, min(first + share, hf["vocab_size"])))


def load_attribute(module: str, name: str) -> Callable:
    """`name` of `module`, with an error that says which flag's value was wrong."""
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as missing:
        raise ValueError(f"{module} {name}: {missing}") from missing


def _chunk(
    config: object, megatron: TransformerConfig, hf: HfConfig, ranks: Ranks, vp_stage: int | None, *, value_head: bool
) -> GPTModel:
    first = ranks.is_first_stage and vp_stage in (None, 0)
    last = ranks.is_last_stage and vp_stage in (None, (ranks.vpp_size or 1) - 1)
    if config.model.custom_model_provider_path:
        module, _, name = config.model.custom_model_provider_path.rpartition(".")
        provider = load_attribute(module, name)
        return provider(pre_process=first, post_process=last, **accepted_keywords(provider, {"vp_stage": vp_stage}))
    if config.model.spec:
        spec = load_attribute(*config.model.spec)(config.args, megatron, vp_stage)
    else:
        spec = decoder_spec(megatron, hf, contiguous_cp=config.parallel.allgather_cp, vp_stage=vp_stage)
    drafts = bool(last and config.model.mtp_num_layers and not value_head)
    kind = MtpGPTModel if drafts else LastChunk if last else GPTModel
    if last and value_head:
        kind = ValueChunk
    return kind(
        config=megatron,
        transformer_layer_spec=spec,
        vocab_size=padded_vocab_size(config, hf),
        max_sequence_length=hf.get("max_position_embeddings", config.model.seq_length),
        pre_process=first,
        post_process=last,
        parallel_output=True,
        share_embeddings_and_output_weights=not (config.model.untie_embeddings_and_output_weights or value_head),
        position_embedding_type="none",  # rotary tables belong to the attention modules, which know the packed positions
        mtp_block_spec=mtp_block_spec(_mtp_layer_spec(config, megatron, hf)) if drafts else None,
        vp_stage=vp_stage,
    )


def _mtp_layer_spec(config: object, megatron: TransformerConfig, hf: HfConfig) -> ModuleSpec:
    if not config.model.spec:
        return mtp_layer_spec(megatron, hf, contiguous_cp=config.parallel.allgather_cp)
    module, function = config.model.spec
    try:
        make = load_attribute(module, "get_mtp_layer_spec")
    except ValueError as missing:
        raise ValueError(
            f"--mtp-num-layers 1: the module of --spec {module} {function} must define get_mtp_layer_spec(args, config), "
            "which gives the decoder layer inside the multi-token-prediction layer"
        ) from missing
    return make(config.args, megatron)


def freeze(chunks: list[GPTModel], model: object) -> None:
    """--only-train-params-name-list or --freeze-params-name-list: regular expressions on parameter names."""
    only, frozen = model.only_train_params_name_list, model.freeze_params_name_list
    if only and frozen:
        raise ValueError("--only-train-params-name-list and --freeze-params-name-list exclude each other; pass one")
    for chunk in chunks:
        for name, parameter in chunk.named_parameters():
            if only and not any(re.search(pattern, name) for pattern in only):
                parameter.requires_grad = False
            if frozen and any(re.search(pattern, name) for pattern in frozen):
                parameter.requires_grad = False
