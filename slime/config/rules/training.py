"""What the trainer's constructors refuse, said before anything is started."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from slime.config.rules.layout import chunks_of

if TYPE_CHECKING:
    from slime.config.rules.book import Values

DISPATCHER_EXTRAS = ("moe_enable_deepep", "moe_flex_dispatcher_backend", "moe_deepep_num_sms", "moe_hybridep_num_sms")

MODULES = ("core_attn", "layernorm", "mla_up_proj", "mlp", "moe", "moe_act", "shared_experts")
"""What selective recomputation can name in megatron-core."""


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
    kinds = mega.get("moe_router_load_balancing_type", "aux_loss")
    v.require(
        kinds in ("none", "aux_loss", "seq_aux_loss", "global_aux_loss"),
        f"--moe-router-load-balancing-type {' '.join(kinds) if isinstance(kinds, list) else kinds}: there is no router loss, "
        "and experts are chosen by their probabilities; pass none",
    )
    aux, z = mega.get("moe_aux_loss_coeff") or 0, mega.get("moe_z_loss_coeff") or 0
    v.require(
        not any(aux if isinstance(aux, list) else [aux]) and not z,
        f"--moe-aux-loss-coeff {aux} / --moe-z-loss-coeff {z}: a step is the weighted sum of token losses and has no router "
        "loss; pass 0 (--moe-router-bias-update-rate balances experts)",
    )


def schedule(v: Values) -> None:
    """Warm-up and decay in trajectories, as the trainer counts them; where learning rate and weight decay begin and end."""
    v.require(
        v["lr_warmup_init"] <= v["lr"],
        f"--lr-warmup-init {v['lr_warmup_init']:g} is above --lr {v['lr']:g}; a warm-up rises, so lower it",
    )
    _weight_decay(v)
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


def _weight_decay(v: Values) -> None:
    """Constant, or growing from one value to another."""
    start, end, style = v["start_weight_decay"], v["end_weight_decay"], v["weight_decay_incr_style"]
    both = v.require(
        (start is None) == (end is None),
        f"--start-weight-decay {start} and --end-weight-decay {end}: a growing weight decay has both; give the other, or "
        "--weight-decay alone",
    )
    if start is None or end is None:
        v.require(
            style == "constant" or not both,
            f"--weight-decay-incr-style {style} grows from --start-weight-decay to --end-weight-decay, which are not given; "
            "give both, or leave it out",
        )
        return
    v.require(start <= end, f"--start-weight-decay {start:g} is above --end-weight-decay {end:g}; swap them")
    v.require(
        style != "constant" or start == end,
        f"--start-weight-decay {start:g} and --end-weight-decay {end:g} with --weight-decay-incr-style constant; pass linear "
        "or cosine",
    )


def offloading(v: Values) -> None:
    asked = [name for name in ("optimizer_cpu_offload", "use_precision_aware_optimizer") if v[name]]
    v.require(
        v["optimizer"] == "adam" or not asked,
        f"--optimizer {v['optimizer']} with {' and '.join('--' + name.replace('_', '-') for name in asked)}, which only Adam "
        "has; leave one of them out",
    )
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
    if v["recompute_activations"]:
        mega.setdefault("recompute_granularity", "selective")
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
    unknown = [one for one in mega.get("recompute_modules") or () if one not in MODULES]
    v.require(
        not unknown,
        f"--recompute-modules {' '.join(unknown)}: there are {', '.join(MODULES)}; correct the name",
    )
    if mega.get("recompute_modules") and granularity != "selective":
        v.notes.append("--recompute-modules changes nothing without --recompute-granularity selective")
    chunks = chunks_of(v)
    if granularity != "full" or method != "uniform" or not stride or not chunks:
        return
    odd = [len(chunk.layers) for chunk in chunks if len(chunk.layers) % stride]
    v.require(
        not odd,
        f"--recompute-method uniform --recompute-num-layers {stride}: a pipeline stage has {odd[0] if odd else 0} layers, no "
        "multiple of it; pass 1, a divisor of every stage's layers, or --recompute-method block",
    )
