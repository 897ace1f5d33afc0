"""Options of SGLang that its own checks refuse once the processes are up, alone or beside others of the same engine."""

from __future__ import annotations

from typing import TYPE_CHECKING

from slime.config.engine_sizes import EngineSizes
from slime.config.rules.engine_model import served
from slime.config.rules.engines import engines_of

if TYPE_CHECKING:
    from slime.config.rules.book import Values

AT_LEAST_ONE = (
    "tokenizer_worker_num", "max_total_tokens", "max_prefill_tokens", "stream_interval", "speculative_num_steps",
    "speculative_eagle_topk", "speculative_num_draft_tokens", "decode_log_interval", "num_continuous_decode_steps",
    "triton_attention_num_kv_splits",
)  # fmt: skip
AT_LEAST_ZERO = ("schedule_conservativeness",)
THRESHOLDS = ("speculative_accept_threshold_single", "speculative_accept_threshold_acc")
LEVELS = ("debug", "info", "warning", "error", "critical")
"""Words that Python's logging, by which SGLang says things, and its web server both know."""


def options(v: Values) -> None:
    for engine in engines_of(v):
        _ranges(v, engine)
        _together(v, engine)
    for engine in served(v):
        _cache_of_a_sample(v, engine)
        _of_the_model(v, engine)


def _ranges(v: Values, engine: EngineSizes) -> None:
    for name in AT_LEAST_ONE:
        said = engine.whole(name)
        v.require(said is None or said >= 1, f"{engine.where}: {name} {said}; give 1 or more, or leave the option out")
    for name in AT_LEAST_ZERO:
        said = engine.number(name)
        v.require(said is None or said >= 0, f"{engine.where}: {name} {said}; give 0 or more, or leave the option out")
    for name in ("log_level", "log_level_http"):
        said = engine.text(name)
        v.require(
            said is None or said.lower() in LEVELS,
            f"{engine.where}: {name} {said} is no level; write one of {', '.join(LEVELS)}",
        )


def _together(v: Values, engine: EngineSizes) -> None:
    """SGLang keeps no prefix cache in a decode engine unless told, and drafts over pipeline stages only while prefilling."""
    prefixes = not engine.on("disable_radix_cache") and (
        engine.role != "decode" or engine.on("disaggregation_decode_enable_radix_cache")
    )
    v.require(
        prefixes or not engine.on("enable_hierarchical_cache"),
        f"{engine.where}: enable_hierarchical_cache keeps prefixes, and this engine has no prefix cache"
        + (" (disable_radix_cache)" if engine.on("disable_radix_cache") else " (it decodes what others prefill)")
        + "; remove enable_hierarchical_cache here",
    )
    algorithm = engine.text("speculative_algorithm")
    v.require(
        engine.pp == 1 or algorithm is None or engine.role == "prefill",
        f"{engine.where}: pp_size {engine.pp} with speculative_algorithm {algorithm}, which SGLang takes in prefill engines "
        "alone; remove pp_size or the speculative options",
    )
    v.require(
        not engine.on("enable_lora")
        or engine.text("lora_paths")
        or (engine.whole("max_lora_rank") and engine.text("lora_target_modules")),
        f"{engine.where}: enable_lora wants lora_paths, or max_lora_rank and lora_target_modules; adapters are not trained "
        "here: remove enable_lora",
    )
    _priorities(v, engine)
    v.require(
        not engine.on("export_metrics_to_file") or engine.text("export_metrics_to_file_dir"),
        f"{engine.where}: export_metrics_to_file has no folder; add export_metrics_to_file_dir",
    )
    off = (engine.text("enable_memory_saver") or "true").lower() in ("false", "0")
    v.require(
        not off or not v["offload_rollout"],
        f"{engine.where}: enable_memory_saver false, and --offload-rollout (which --colocate implies) has the engines give "
        "their memory away; remove the option",
    )


def _priorities(v: Values, engine: EngineSizes) -> None:
    by_priority, policy = engine.on("enable_priority_scheduling"), engine.text("schedule_policy")
    v.require(
        not by_priority or policy in (None, "fcfs", "lof"),
        f"{engine.where}: enable_priority_scheduling goes with schedule_policy fcfs or lof, not {policy}; change one",
    )
    v.require(
        by_priority or engine.text("retraction_policy") != "priority",
        f"{engine.where}: retraction_policy priority without enable_priority_scheduling; remove it: no request has a priority",
    )


def accepted_drafts(v: Values) -> None:
    """Drafts are accepted by the model's own probabilities, and made by a layer that was loaded."""
    for engine in served(v):
        if engine.text("speculative_algorithm") is None:
            continue
        loose = [name for name in THRESHOLDS if (engine.number(name) or 1) < 1]
        exact = engine.on("speculative_use_rejection_sampling")
        v.require(
            not loose or not exact,
            f"{engine.where}: speculative_use_rejection_sampling has no use for {' and '.join(loose)}, and SGLang refuses "
            "both; leave one out",
        )
        if loose and not exact:
            v.notes.append(
                f"{engine.where}: {' and '.join(loose)} below 1 accepts drafts more often than the model would have drawn "
                "them: training is off-policy by that much"
            )
        own = engine.text("speculative_draft_model_path") is None and not v["mtp_num_layers"]
        v.require(
            engine.text("load_format") != "dummy" or not own,
            f"{engine.where}: load_format dummy leaves the draft layer as noise, since the trainer sends what it trains alone; "
            "leave load_format out, or train the layer with --mtp-num-layers 1 --enable-mtp-training",
        )


def _cache_of_a_sample(v: Values, engine: EngineSizes) -> None:
    """A cap of the KV cache that is below the longest response."""
    cap, longest = engine.whole("max_total_tokens"), v["rollout_max_response_len"]
    v.require(
        cap is None or cap < 1 or longest is None or cap > longest,
        f"{engine.where}: a KV cache of max_total_tokens {cap} holds no response of --rollout-max-response-len {longest} with "
        "its prompt; raise it, or leave the option out",
    )


def _of_the_model(v: Values, engine: EngineSizes) -> None:
    other = engine.text("json_model_override_args")
    v.require(
        other is None or other.strip() in ("", "{}"),
        f"{engine.where}: json_model_override_args {other!s:.60} would serve another model than the one that is trained; write "
        "its fields into config.json, or leave it out",
    )
    hf = v.hf
    if hf is None:
        return
    spare = engine.whole("ep_num_redundant_experts") or 0
    v.require(
        spare == 0 or (hf.num_experts or 0) and (hf.num_experts + spare) % engine.ep == 0,
        f"{engine.where}: {hf.num_experts or 0} experts and {spare} redundant ones (ep_num_redundant_experts) do not divide "
        f"over ep_size {engine.ep}; give a multiple of {engine.ep}",
    )
    v.require(
        not hf.has_indexer or not engine.on("enable_deterministic_inference"),
        f"{engine.where}: enable_deterministic_inference with sparse attention, which has no deterministic kernel in SGLang; "
        "remove the option",
    )
