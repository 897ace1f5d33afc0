"""What the trainer's constructors refuse, said before anything is started."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from slime.config.rules.layout import chunks_of

if TYPE_CHECKING:
    from slime.config.rules.book import Values

DISPATCHER_EXTRAS = ("moe_enable_deepep", "moe_flex_dispatcher_backend", "moe_deepep_num_sms", "moe_hybridep_num_sms")


def trains(v: Values) -> bool:
    return not v["debug_rollout_only"] and "num_layers" in v["model.megatron"]


def dispatcher(v: Values) -> None:
    """Experts are reached by all-to-all, whatever the recipe asks for: DeepEP in the trainer needs TransformerEngine."""
    mega: dict[str, Any] = v["model.megatron"]
    if mega.get("num_moe_experts") is None:
        return
    asked = mega.get("moe_token_dispatcher_type")
    if asked == "flex":
        mega["moe_token_dispatcher_type"] = "alltoall"
        v.notes.append("moe_token_dispatcher_type = 'alltoall', because flex needs DeepEP and TransformerEngine in the trainer")
    for name in DISPATCHER_EXTRAS:
        if mega.pop(name, None) is not None:
            v.notes.append(f"--{name.replace('_', '-')} changes nothing: the trainer reaches experts by all-to-all")


def probabilities(v: Values) -> None:
    """What would separate the trainer's probabilities from the engines', or the loss from its weights."""
    mega: dict[str, Any] = v["model.megatron"]
    for name in ("hidden_dropout", "attention_dropout"):
        v.require(
            not mega.get(name),
            f"--{name.replace('_', '-')} {mega.get(name)}: dropout would separate trained from served probabilities; pass 0",
        )
    v.require(
        not mega.get("layernorm_zero_centered_gamma"),
        "--apply-layernorm-1p is for models trained with it; none of the supported ones is, so remove it",
    )
    aux, z = mega.get("moe_aux_loss_coeff") or 0, mega.get("moe_z_loss_coeff") or 0
    v.require(
        not any(aux if isinstance(aux, list) else [aux]) and not z,
        f"--moe-aux-loss-coeff {aux} / --moe-z-loss-coeff {z}: a step is the weighted sum of token losses and has no router "
        "loss; pass 0 (--moe-router-bias-update-rate balances experts)",
    )


def schedule(v: Values) -> None:
    """Warm-up and decay in trajectories, as the trainer counts them."""
    batch = v["global_batch_size"]
    if not trains(v) or batch is None:
        return
    style, decay_iters, warmup_iters = v["lr_decay_style"], v["lr_decay_iters"], v["lr_warmup_iters"]
    if decay_iters:
        decay = decay_iters * batch
    elif v["num_rollout"]:
        decay = v["num_rollout"] * v["rollout_batch_size"] * v["n_samples_per_prompt"]
    elif v["num_rollout"] is None and v["num_epoch"] is not None:
        return  # known once the prompts are counted
    else:
        decay = max(2 * warmup_iters * batch, 1)
    warmup = warmup_iters * batch
    if v["lr_warmup_fraction"] is not None:
        warmup = int(v["lr_warmup_fraction"] * decay)
    v.require(
        warmup < decay,
        f"the learning rate warms up for {warmup} samples, but the run has {decay}; lower --lr-warmup-iters {warmup_iters} / "
        f"--lr-warmup-fraction {v['lr_warmup_fraction']} or raise --lr-decay-iters",
    )
    wsd = v["lr_wsd_decay_iters"]
    v.require(
        style != "WSD" or wsd is not None, "--lr-decay-style WSD needs the length of its final decay; give --lr-wsd-decay-iters"
    )
    v.require(
        wsd is None or style != "WSD" or wsd * batch <= decay,
        f"--lr-wsd-decay-iters {wsd} steps are longer than the whole decay of {decay // batch}; lower it",
    )


def offloading(v: Values) -> None:
    v.require(
        not v["optimizer_cpu_offload"] or v["params_dtype"] != "fp32",
        "--optimizer-cpu-offload keeps float32 copies of bf16 parameters, and --params-dtype is fp32; leave one of them out",
    )
    v.require(
        v["optimizer_cpu_offload"] or "optimizer_offload_fraction" not in v.given,
        f"--optimizer-offload-fraction {v['optimizer_offload_fraction']} has no effect without --optimizer-cpu-offload; add it",
    )


def multi_token_prediction(v: Values) -> None:
    """Where the layer can be built."""
    if not v["mtp_num_layers"] or v["debug_rollout_only"]:
        return
    v.require(
        v["untie_embeddings_and_output_weights"],
        "--mtp-num-layers 1: the model ties embedding and output layer, which megatron-core cannot do here; leave it out",
    )
    v.require(
        v["custom_model_provider_path"] is None,
        "--mtp-num-layers builds into this project's model; leave out --custom-model-provider-path",
    )
    layout = v["pipeline_model_parallel_layout"] or ""
    v.require(
        "m" not in layout or "mL" in layout,
        f"--pipeline-model-parallel-layout {layout}: the multi-token-prediction layer (m) shares the output layer's "
        "stage; write "
        "mL, or leave m out and it is added",
    )


def recomputation(v: Values) -> None:
    """Uniform recomputation walks through a chunk in equal strides; the sizes of chunks are known from the layout."""
    mega: dict[str, Any] = v["model.megatron"]
    granularity, method = mega.get("recompute_granularity"), mega.get("recompute_method")
    stride = mega.get("recompute_num_layers")
    v.require(
        granularity != "full" or method in ("uniform", "block"),
        "--recompute-granularity full needs --recompute-method; pass uniform or block",
    )
    v.require(
        granularity != "full" or stride,
        "--recompute-granularity full needs --recompute-num-layers; pass 1",
    )
    v.require(
        granularity != "selective" or method is None,
        f"--recompute-method {method} belongs to --recompute-granularity full, not selective; remove it",
    )
    v.require(
        granularity != "selective" or stride is None,
        f"--recompute-num-layers {stride} belongs to --recompute-granularity full, not selective; remove it",
    )
    if granularity is None and (method is not None or stride is not None):
        v.notes.append("--recompute-method and --recompute-num-layers change nothing without --recompute-granularity full")
    chunks = chunks_of(v)
    if granularity != "full" or method != "uniform" or not stride or not chunks:
        return
    odd = [len(chunk.layers) for chunk in chunks if len(chunk.layers) % stride]
    v.require(
        not odd,
        f"--recompute-method uniform --recompute-num-layers {stride}: a pipeline stage has {odd[0] if odd else 0} layers, no "
        "multiple of it; pass 1, a divisor of every stage's layers, or --recompute-method block",
    )
