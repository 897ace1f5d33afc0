"""Models and groups of engines, and the sizes that each engine is made of."""

from __future__ import annotations

from typing import TYPE_CHECKING

from slime.config.engine_groups import groups_without_yaml, read_models

if TYPE_CHECKING:
    from slime.config.rules.book import Values


def engines(v: Values) -> None:
    """Models and groups of engines; their GPUs must add up."""
    if v["debug_train_only"]:
        v.notes.append("no engine is started (--debug-train-only)")
        return
    per_engine = v["rollout_num_gpus_per_engine"]
    v.require(
        v["sglang_config"] is None or v["prefill_num_servers"] is None,
        "--sglang-config and --prefill-num-servers exclude each other",
    )
    v.stop_if_wrong()
    _attention_dp(v)
    if v["sglang_config"] is not None:
        models, notes = read_models(v["sglang_config"], hf_checkpoint=v["hf_checkpoint"], default_gpus_per_engine=per_engine)
        v.notes += notes
        total = sum(group.num_gpus for model in models for group in model.server_groups)
        if v["rollout_num_gpus"] is None:
            v.derive("rollout_num_gpus", total, f"the groups of {v['sglang_config']} add up to it")
        listed = " + ".join(str(group.num_gpus) for model in models for group in model.server_groups)
        v.require(
            total == v["rollout_num_gpus"],
            f"{v['sglang_config']}: num_gpus of all groups is {listed} = {total}, but rollout has {v['rollout_num_gpus']} GPUs"
            + (" (all training GPUs, because of --colocate)" if v["colocate"] and "rollout_num_gpus" not in v.given else ""),
        )
        v["groups"] = models
        return
    v.require(v["rollout_num_gpus"] is not None, "--rollout-num-gpus is needed without --colocate (0 starts the router alone)")
    v.stop_if_wrong()
    v["groups"] = groups_without_yaml(
        rollout_num_gpus=v["rollout_num_gpus"],
        gpus_per_engine=per_engine,
        prefill_num_servers=v["prefill_num_servers"],
        model_path=v["hf_checkpoint"],
    )


def _attention_dp(v: Values) -> None:
    """Checks of --sglang-* that need no SGLang: whole numbers that must divide."""
    sglang = v["sglang"]
    sizes = {}
    for short, long in (("dp_size", "data_parallel_size"), ("pp_size", "pipeline_parallel_size")):
        text = sglang.get(short, sglang.get(long, "1"))
        v.require(
            str(text).isdigit() and int(text) > 0,
            f"--sglang-{short.replace('_', '-')} must be a whole number above 0, got {text!r}",
        )
        sizes[short] = int(text) if str(text).isdigit() else 1
    v.require(
        sizes["dp_size"] == 1 or sglang.get("enable_dp_attention"),
        f"--sglang-dp-size {sizes['dp_size']} needs --sglang-enable-dp-attention",
    )
    v.require(
        v["rollout_num_gpus_per_engine"] % max(sizes["pp_size"], 1) == 0,
        f"--rollout-num-gpus-per-engine {v['rollout_num_gpus_per_engine']} is no multiple of "
        f"--sglang-pp-size {sizes['pp_size']}",
    )
