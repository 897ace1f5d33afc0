"""User functions that the trainer calls, named by dotted paths in flags. `check_hooks` runs before anything large starts."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from slime.config.dotted import Call, find_callable

if TYPE_CHECKING:
    from slime.config import Config

POST_WRITE = "--custom-update-weight-post-write-path"
_TIS = ("args", "pg_loss", "train_log_probs", "rollout_log_probs", "loss_masks", "total_lengths", "response_lengths")

CALLS: dict[str, Call] = {
    "--custom-megatron-init-path": Call("fn(args)", 1),
    "--custom-megatron-before-log-prob-hook-path": Call("fn(args, model, store_prefix)", 3),
    "--custom-megatron-before-train-step-hook-path": Call("fn(args, rollout_id, step_id, model, optimizer, scheduler)", 6),
    "--custom-advantage-function-path": Call("fn(args, rollout_data)", 2),
    "--rollout-data-postprocess-path": Call("fn(args, rollout_id, rollout_data)", 3),
    "--custom-loss-function-path": Call("fn(args, batch, logits, sum_of_sample_mean)", 4),
    "--custom-tis-function-path": Call(f"fn(*, {', '.join(_TIS)})", 0, _TIS),
    "--custom-pg-loss-reducer-function-path": Call(
        "fn(total_lengths, response_lengths, loss_masks, calculate_per_token_loss)", 4
    ),
    POST_WRITE: Call("fn(args, version_dir, rollout_engines)", 3),
}
_SPEC = Call("fn(args, config, vp_stage)", 3)
PROVIDER = Call("fn(pre_process, post_process[, vp_stage])", 0, ("pre_process", "post_process"), offered=("vp_stage",))


def load_hook(flag: str, path: str | None) -> Callable[..., Any] | None:
    """The function at `path` (package.module.function), which can be called as the flag does; None for no path."""
    return None if path is None else find_callable(flag, path, CALLS[flag])


def named_hooks(config: Config) -> list[tuple[str, str, Call]]:
    """(flag, path, how it is called) of the functions of a user's that the trainer's flags name."""
    sections = {POST_WRITE: config.engine}
    named = [
        (flag, getattr(sections.get(flag, config.algorithm), flag.removeprefix("--").replace("-", "_")), call)
        for flag, call in CALLS.items()
    ]
    named.append(("--custom-model-provider-path", config.model.custom_model_provider_path, PROVIDER))
    spec = config.model.spec
    if spec and not spec[0].startswith("slime_plugins."):  # ours are known, and take seconds to import
        named.append(("--spec", ".".join(spec), _SPEC))
    return [row for row in named if row[1] is not None]


def check_hooks(config: Config) -> None:
    """Import and check them. Raises ValueError with every failing flag in one message."""
    failures = []
    for flag, path, call in named_hooks(config):
        try:
            find_callable(flag, path, call)
        except ValueError as error:
            failures.append(str(error))
    if failures:
        raise ValueError("\n".join(failures))
