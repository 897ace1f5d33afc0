"""What may go on at the same time."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from slime.config.rules.book import Values

IN_TURN = "slime.rollout.sglang_rollout.generate_rollout"
ALL_THE_TIME = "slime.rollout.fully_async_rollout.generate_rollout_fully_async"
OF_ALL_THE_TIME = ("max_weight_staleness", "on_stale_group", "pause_generation_mode")
OFF_POLICY_REMEDIES = ("use_tis", "use_rs", "use_opsm", "use_rollout_logprobs", "custom_tis_function_path")
"""Any of them looks at the engines' own log-probs."""


def chosen(v: Values) -> None:
    """The schedule, which slime names by the rollout function."""
    if v["rollout_function_path"] == ALL_THE_TIME:
        v.require(
            not ("schedule" in v.given and v["schedule"] == "sync"),
            f"--rollout-function-path {ALL_THE_TIME} generates all the time, and --schedule sync in turn; leave one out",
        )
        v.derive("schedule", "fully-async", f"--rollout-function-path {ALL_THE_TIME} generates all the time")
    if v["debug_rollout_only"]:
        v.derive("schedule", "sync", "--debug-rollout-only trains nothing that a rollout could run ahead of")
        if v["rollout_function_path"] == ALL_THE_TIME:
            v.derive("rollout_function_path", IN_TURN, "--debug-rollout-only generates in turn")
    elif v["schedule"] == "fully-async" and v["rollout_function_path"] == IN_TURN:
        v.derive("rollout_function_path", ALL_THE_TIME, "--schedule fully-async generates all the time")


def schedule(v: Values) -> None:
    """A schedule that runs ahead has devices for it, and the interval of weight syncs a meaning."""
    asked = f"--schedule {v['schedule']}"
    if v["schedule"] == "sync":
        v.derive("update_weights_interval", 1, "--schedule sync sends the weights after every rollout")
        _no_old_actor(v)
    else:
        v.derive("runs_ahead", True, f"{asked} generates while the trainer trains")
        _ahead(v, asked)
    if v["schedule"] == "fully-async":
        _all_the_time(v, asked)
    else:
        v.notes += [
            f"--{name.replace('_', '-')} changes nothing: with {asked} no weights change while samples are generated"
            for name in OF_ALL_THE_TIME
            if name in v.given
        ]


def _ahead(v: Values, asked: str) -> None:
    v.require(
        not v["colocate"],
        f"{asked} generates while the trainer trains, and --colocate gives both the same GPUs, one at a time; leave --colocate "
        "out and give the engines GPUs of their own with --rollout-num-gpus",
        holds="generation and training have GPUs of their own",
    )
    if v["debug_train_only"]:
        _no_old_actor(v)
    for name, why in (
        ("use_rollout_logprobs", "both say what old log-probs are"),
        ("partial_rollout", "a sample is then of several weights"),
    ):
        v.require(
            not (v["keep_old_actor"] and v[name]),
            f"--keep-old-actor with --{name.replace('_', '-')}: {why}; use one",
        )
    weighs = v["keep_old_actor"] or any(v[name] for name in OFF_POLICY_REMEDIES)
    if v["loss_type"] == "policy_loss" and not v["debug_train_only"] and not weighs:
        v.notes.append(
            f"{asked} trains samples of older weights and nothing here weighs that; --use-tis, or --use-rollout-logprobs, does"
        )


def _all_the_time(v: Values, asked: str) -> None:
    v.require(
        not v["debug_train_only"],
        f"{asked} keeps engines generating, and --debug-train-only (which --load-debug-rollout-data implies) starts none; take "
        "--schedule one-step-ahead",
    )
    v.require(
        v["rollout_function_path"] == ALL_THE_TIME,
        f"{asked} generates by this project's own loop, and --rollout-function-path is {v['rollout_function_path']}; leave it "
        "out (--custom-generate-function-path makes one sample), or take --schedule one-step-ahead",
    )
    v.require(
        not v["keep_old_actor"],
        f"--keep-old-actor with {asked} asks for old log-probs by the weights that generated, maybe several of one answer; "
        "take the engines' own, --use-rollout-logprobs",
    )
    for name in ("partial_rollout", "over_sampling_batch_size"):
        if name in v.given:
            v.notes.append(f"--{name.replace('_', '-')} changes nothing: {asked} begins groups as training takes them")


def _no_old_actor(v: Values) -> None:
    if v["keep_old_actor"]:
        v["keep_old_actor"] = False
        v.notes.append(
            "--keep-old-actor changes nothing: training starts from the weights that generated the rollout, so the old "
            "log-probs are theirs"
        )
