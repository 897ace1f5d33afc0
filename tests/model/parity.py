"""One training-like step of a tiny model under any layout: log-probabilities and every parameter's whole gradient.

Micro-batches of packed samples go through megatron-core's schedule and DDP, with gradient buffers cut over data-parallel ranks
as the distributed optimizer wants them; the loss is the weighted sum of token log-probs. Shards come back under global
names and are put together with the weight table, so results of different layouts compare directly.
"""

from __future__ import annotations

from dataclasses import dataclass
from types import SimpleNamespace

import torch
import torch.distributed as dist

from slime.compat.megatron import prepare

prepare()

from megatron.core.distributed import (  # noqa: E402
    DistributedDataParallel,
    DistributedDataParallelConfig,
    finalize_model_grads,
)
from megatron.core.distributed.param_and_grad_buffer import shard_buffer  # noqa: E402
from megatron.core.packed_seq_params import PackedSeqParams  # noqa: E402
from megatron.core.pipeline_parallel.schedules import get_forward_backward_func  # noqa: E402
from model.replay import Choices  # noqa: E402
from ranks import end_grid  # noqa: E402

from slime.batch.layout import SequenceLayout  # noqa: E402
from slime.config.hf_check import megatron_values  # noqa: E402
from slime.config.stages import layout_string  # noqa: E402
from slime.device import get_device  # noqa: E402
from slime.model.build import build_model, own_vocabulary, padded_vocab_size  # noqa: E402
from slime.model.hf_config import HfConfig, read_hf_config  # noqa: E402
from slime.model.hf_io import SafetensorsReader, load_hf  # noqa: E402
from slime.model.layout import unshard  # noqa: E402
from slime.model.local import local_tensors, split_of, unwrap  # noqa: E402
from slime.model.names import NameTable  # noqa: E402
from slime.ops.vocab_logprob import vocab_parallel_log_prob  # noqa: E402
from slime.parallel import Ranks, init_ranks  # noqa: E402

GLM4_SPEC = ("slime_plugins.models.glm4", "get_glm_spec")
GLM_SPEC = ("slime_plugins.models.glm5.glm5", "get_glm5_spec")

PARALLEL = {
    "tensor_model_parallel_size": 1,
    "pipeline_model_parallel_size": 1,
    "virtual_pipeline_model_parallel_size": None,
    "context_parallel_size": 1,
    "expert_model_parallel_size": 1,
    "expert_tensor_parallel_size": 1,
    "sequence_parallel": False,
    "decoder_first_pipeline_num_layers": None,
    "decoder_last_pipeline_num_layers": None,
    "pipeline_model_parallel_layout": None,
    "distributed_timeout_minutes": 2,
    "allgather_cp": True,
    "dsa_core_axis": "queries",
    "dsa_move_cost": 20480,
    "dsa_index_scoring": "params",
    "dsa_attention_forward": "ours",
    "dsa_send_indices": False,
}
RECOMPUTE = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
SHORT = {"tp": "tensor_model_parallel_size", "pp": "pipeline_model_parallel_size", "cp": "context_parallel_size",
         "ep": "expert_model_parallel_size", "vpp": "virtual_pipeline_model_parallel_size",
         "first": "decoder_first_pipeline_num_layers", "last": "decoder_last_pipeline_num_layers",
         "axis": "dsa_core_axis", "send_indices": "dsa_send_indices", "move_cost": "dsa_move_cost",
         "scoring": "dsa_index_scoring",
         "stages": "pipeline_model_parallel_layout", "etp": "expert_tensor_parallel_size"}  # fmt: skip


def make_config(folder: str, hf: HfConfig, **layout: object) -> SimpleNamespace:
    """A config with the sections that the model room reads; layout: tp=2, pp=2, first=2, layers=(3, 4), recompute=True,
    zigzag=True, mtp=True, axis="heads", send_indices=True, dtype="bf16" ..."""
    values = megatron_values(hf)
    if hf.is_mla and hf.rope_parameters["rope_type"] == "yarn":
        values.update(rotary_scaling_factor=hf.rope_parameters["factor"])
    if hf.num_experts:
        # finalize_model_grads moves the selection bias by this rate at every step, 0.001 unless told otherwise.
        values.update(moe_router_dtype="fp32", moe_router_bias_update_rate=0.0)
    recompute = layout.pop("recompute", {})
    values.update(RECOMPUTE if recompute is True else recompute)
    zigzag, mtp, dtype = layout.pop("zigzag", False), layout.pop("mtp", False), layout.pop("dtype", "fp32")
    sizes = layout.pop("layers", None)
    parallel = {**PARALLEL, **{SHORT[key]: value for key, value in layout.items()}, "allgather_cp": not zigzag}
    if sizes:
        parallel["pipeline_model_parallel_layout"] = layout_string(sizes)
        parallel["virtual_pipeline_model_parallel_size"] = len(sizes) // layout["pp"] if len(sizes) > layout["pp"] else None
    parallel["sequence_parallel"] = parallel["tensor_model_parallel_size"] > 1
    model = SimpleNamespace(
        megatron=values, swiglu=True, params_dtype=dtype, bf16=dtype == "bf16", multi_latent_attention=hf.is_mla,
        spec=GLM_SPEC if hf.has_indexer else GLM4_SPEC if hf.model_type == "glm4" else None,
        custom_model_provider_path=None, padded_vocab_size=None,
        make_vocab_size_divisible_by=16, seq_length=4096, rotary_base=hf.rope_theta, vocab_size=hf["vocab_size"],
        untie_embeddings_and_output_weights=not hf.get("tie_word_embeddings", False),
        only_train_params_name_list=None, freeze_params_name_list=None,
        mtp_num_layers=1 if mtp else None, position_embedding_type="rope",
        rotary_percent=1.0 if hf.is_mla else hf.partial_rotary_factor,
        use_rope_scaling=False,
        post_self_attn_layernorm=hf.has_sandwich_norms, post_mlp_layernorm=hf.has_sandwich_norms,
    )  # fmt: skip
    args = SimpleNamespace(hf_checkpoint=folder, **parallel)
    batch = SimpleNamespace(max_tokens_per_gpu=None)
    return SimpleNamespace(parallel=SimpleNamespace(**parallel), model=model, batch=batch, args=args)


def build(
    rank: int, world: int, folder: str, **layout: object
) -> tuple[list[torch.nn.Module], Ranks, HfConfig, SimpleNamespace]:
    """Chunks filled from the HF files, on this rank of a fresh grid."""
    end_grid()
    hf = read_hf_config(folder)
    config = make_config(folder, hf, **layout)
    ranks = init_ranks(config.parallel, rank=rank, world_size=world, device=get_device())
    chunks = build_model(config, hf, ranks, get_device())
    load_hf(chunks, NameTable.for_model(hf), SafetensorsReader(folder), ranks, padded_vocab=padded_vocab_size(config, hf))
    return chunks, ranks, hf, config


@dataclass
class StepResult:
    """One rank's share of a step."""

    numbers: tuple[int, ...]
    """Which micro-batches this data-parallel rank had."""
    log_probs: list[torch.Tensor]
    """Per own micro-batch, float32 [tokens]: of the next token (last stage, else empty)."""
    grads: dict[str, tuple[torch.Tensor, int]]
    """Global name -> (this rank's part of the summed gradient, position in its tensor-parallel group)."""
    indices: dict[tuple[int, int], tuple[torch.Tensor, torch.Tensor]]
    """(micro-batch, layer) -> (stream row [n], -1 = padding; selected key rows int32 [n, topk]) as the sparse attention used
    them on this rank."""
    norm_share: float
    """Sum of squares of the gradients that the grad norm counts on this rank."""


def packed(layout: SequenceLayout) -> PackedSeqParams:
    bounds, longest = layout.cu_seqlens, layout.max_seqlen
    return PackedSeqParams(
        qkv_format="thd", cu_seqlens_q=bounds, cu_seqlens_kv=bounds, max_seqlen_q=longest, max_seqlen_kv=longest
    )  # fmt: skip


def samples_of(seed: int, lengths: tuple[int, ...], vocab: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(0, vocab, (length,), generator=generator) for length in lengths]


def run_layouts(
    rank: int, world: int, folder: str, micro_batches: list[list[torch.Tensor]], layouts: dict[str, dict]
) -> dict[str, StepResult]:
    """One step under each layout, one after the other on the same ranks. A failure says which layout it was."""
    results = {}
    for name, layout in layouts.items():
        try:
            results[name] = run_step(rank, world, folder, micro_batches, **layout)
        except BaseException as error:
            error.add_note(f"under {name}: {layout}")
            raise
    return results


def run_step(
    rank: int,
    world: int,
    folder: str,
    micro_batches: list[list[torch.Tensor]],
    choices: Choices | None = None,
    **layout: object,
) -> StepResult:
    """Every micro-batch once over the whole grid: data-parallel rank d takes every dp-th one."""
    chunks, ranks, hf, config = build(rank, world, folder, **layout)
    return step(chunks, ranks, hf, config, micro_batches, choices)


def step(
    chunks: list,
    ranks: Ranks,
    hf: HfConfig,
    config: SimpleNamespace,
    micro_batches: list[list[torch.Tensor]],
    choices: Choices | None = None,
) -> StepResult:
    """choices: recorded, or taken again."""
    device, choices = get_device().torch_device, choices or Choices()
    choices.attach(chunks, ranks)
    megatron = unwrap(chunks[0]).config
    ddp_config = DistributedDataParallelConfig(
        grad_reduce_in_fp32=True, use_distributed_optimizer=True, overlap_grad_reduce=False
    )
    wrapped = [DistributedDataParallel(config=megatron, ddp_config=ddp_config, module=chunk) for chunk in chunks]
    megatron.finalize_model_grads_func = lambda models, tokens, **kwargs: finalize_model_grads(models, None, **kwargs)
    numbers = tuple(range(len(micro_batches))[ranks.dp_rank :: ranks.dp_size])
    vocabulary = own_vocabulary(padded_vocab_size(config, hf), hf, ranks)
    log_probs: list[torch.Tensor] = []
    streams: list[tuple[int, torch.Tensor, PackedSeqParams]] = []

    def forward(iterator: object, model: torch.nn.Module):
        number = next(iterator)
        samples = micro_batches[number]
        make = SequenceLayout.contiguous if config.parallel.allgather_cp else SequenceLayout.zigzag
        layout = make([len(s) for s in samples], cp_rank=ranks.cp_rank, cp_size=ranks.cp_size, multiple=ranks.tp_size)
        choices.begin(number, layout.rows)
        tokens = layout.take(torch.cat(samples), 0).to(device)
        targets = layout.take(torch.cat([torch.cat([s[1:], s[:1]]) for s in samples]), 0).to(device)
        layout = layout.to(device)
        params = packed(layout)
        streams.append((number, layout.rows, params))
        out = model(tokens[None], None, None, packed_seq_params=params)

        def loss(logits: torch.Tensor):
            values, _ = vocab_parallel_log_prob(
                logits[0, :, : len(vocabulary)], targets, group=ranks.tp_group, vocab_start=vocabulary.start
            )
            weights = 1.0 + (torch.arange(layout.length, device=device) % 3).float()
            whole = layout.spread(values.detach())
            dist.all_reduce(whole, group=ranks.cp_group)
            log_probs.append(whole.cpu())
            total = (layout.take(weights, 0.0) * values).sum()
            return total, torch.tensor(1, device=device), {"total": total.detach()}

        return out, loss

    for model in wrapped:
        model.zero_grad_buffer()
    iterators = [iter(numbers) for _ in wrapped]
    schedule = get_forward_backward_func()
    schedule(
        forward_step_func=forward,
        data_iterator=iterators if len(wrapped) > 1 else iterators[0],
        model=wrapped if len(wrapped) > 1 else wrapped[0],
        num_microbatches=len(numbers),
        seq_length=max(sum(len(s) for s in samples) for samples in micro_batches) // ranks.cp_size,
        micro_batch_size=1,
        forward_only=False,
    )
    _gather_gradients(wrapped)
    grads, norm_share = _gradients(wrapped, ranks, hf)
    indices = {}
    for number, rows, params in streams:
        for layer, picked in params._slime_stream.indices.items():
            rows, picked = rows.cpu(), picked.cpu()
            own = rows if len(picked) == len(rows) else rows.chunk(ranks.tp_size)[ranks.tp_rank]
            _, before = indices.setdefault((number, layer), (own, picked))
            assert torch.equal(before, picked), f"layer {layer} was sent as something else"
    return StepResult(numbers, log_probs, grads, indices, norm_share)


def _gather_gradients(wrapped: list) -> None:
    """A rank's buffer holds the sum for its own share alone after the reduce-scatter: hand the shares round."""
    for model in wrapped:
        for group in model.bucket_groups + model.expert_parallel_bucket_groups:
            members, size = group.intra_distributed_optimizer_instance_group, group.intra_distributed_optimizer_instance_size
            for bucket in group.buckets:
                own = shard_buffer(bucket.grad_data, size)[group.intra_distributed_optimizer_instance_rank]
                dist.all_gather_into_tensor(bucket.grad_data, own.clone(), group=members)


def _gradients(wrapped: list, ranks: Ranks, hf: HfConfig) -> tuple[dict[str, tuple[torch.Tensor, int]], float]:
    table = NameTable.for_model(hf)
    grads, norm_share = {}, 0.0
    counted = set()
    for local in local_tensors(wrapped, ranks, of=lambda p: p.main_grad if p.requires_grad else p.data):
        if local.parameter is None or not local.parameter.requires_grad:
            continue
        entry = table[local.name]  # a tied copy goes under its owner's name, and must have its gradient
        grads[entry.name] = (local.tensor.cpu().clone(), split_of(entry, ranks)[0])
        parameter = local.parameter
        if id(parameter) not in counted and not getattr(parameter, "shared", False):
            counted.add(id(parameter))
            replica = ranks.edp_rank if local.is_expert else dist.get_rank(ranks.dp_cp_group)
            if replica == 0 and (getattr(parameter, "tensor_model_parallel", False) or ranks.tp_rank == 0):
                norm_share += parameter.main_grad.double().square().sum().item()
    return grads, norm_share


def whole_grads(hf: HfConfig, results: list[StepResult]) -> dict[str, torch.Tensor]:
    """Every parameter's gradient, put together from all ranks; copies of one shard must agree exactly or nearly."""
    table = NameTable.for_model(hf)
    parts: dict[str, dict[int, torch.Tensor]] = {}
    for result in results:
        for name, (grad, position) in result.grads.items():
            slot = position if table[name].split != "none" else 0
            kept = parts.setdefault(name, {}).setdefault(slot, grad)
            assert torch.allclose(kept, grad, rtol=0, atol=1e-5 * (1e-6 + kept.abs().max().item())), (
                f"replicas of {name} differ"
            )
    return {name: unshard(table[name], [shards[k] for k in sorted(shards)]) for name, shards in parts.items()}


def worst_difference(reference: dict[str, torch.Tensor], found: dict[str, torch.Tensor]) -> tuple[float, str]:
    """Largest |difference| relative to the largest |entry| of the reference tensor, and where; missing names are infinitely
    far."""
    assert set(reference) == set(found), f"different parameters: {sorted(set(reference) ^ set(found))[:5]}"
    worst = (0.0, "")
    for name, expected in reference.items():
        scale = expected.abs().max().item() + 1e-12
        worst = max(worst, ((expected - found[name]).abs().max().item() / scale, name))
    return worst
