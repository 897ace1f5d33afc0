"""Number types, the optimizer and its schedule."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from slime.config.rules.book import Values


def numbers(v: Values) -> None:
    if v["bf16"]:
        v.require(v["params_dtype"] in ("auto", "bf16"), "--bf16 and --params-dtype fp32 contradict each other")
        v.derive("params_dtype", "bf16", "--bf16 is given")
    if not v["use_distributed_optimizer"]:
        v.derive("use_distributed_optimizer", True, "checkpoints and sharded state are built on it")
    v.derive("accumulate_allreduce_grads_in_fp32", True, "gradients are summed in fp32 on every device")
    v.require(
        not v["overlap_cpu_optimizer_d2h_h2d"] or v["optimizer_cpu_offload"],
        "--overlap-cpu-optimizer-d2h-h2d needs --optimizer-cpu-offload",
    )
    odd = [name for name in ("main_grads_dtype", "exp_avg_dtype", "exp_avg_sq_dtype") if v[name] != "fp32"]
    v.require(
        not odd or v["use_precision_aware_optimizer"],
        f"{', '.join('--' + name.replace('_', '-') for name in odd)} needs --use-precision-aware-optimizer",
    )
    v.require(
        not (v["only_train_params_name_list"] and v["freeze_params_name_list"]),
        "--only-train-params-name-list and --freeze-params-name-list are two answers to one question; give one",
    )
    for name in ("only_train_params_name_list", "freeze_params_name_list"):
        for pattern in v[name] or ():
            try:
                re.compile(pattern)
            except re.error as odd:
                v.mistakes.append(f"--{name.replace('_', '-')} {pattern} is no regular expression ({odd}); correct it")
    v.require(
        not (v["override_opt_param_scheduler"] and v["use_checkpoint_opt_param_scheduler"]),
        "--override-opt-param-scheduler and --use-checkpoint-opt-param-scheduler exclude each other",
    )
    v.require(
        v["lr_warmup_fraction"] is None or not v["lr_warmup_iters"],
        "--lr-warmup-fraction and --lr-warmup-iters exclude each other",
    )
    v.require(v["min_lr"] <= v["lr"], f"--min-lr {v['min_lr']} is above --lr {v['lr']}")
