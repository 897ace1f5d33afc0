"""Samples of a rollout into steps and micro-batches."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from slime.config.rules.book import Values


def batch(v: Values) -> None:
    prompts, samples = v["rollout_batch_size"], v["n_samples_per_prompt"]
    v.require(prompts is not None, "--rollout-batch-size (prompts per rollout) is needed; give a number above 0")
    v.stop_if_wrong()
    total = prompts * samples
    steps = v["num_steps_per_rollout"]
    if steps is not None:
        v.require(
            total % steps == 0,
            f"{total} samples ({prompts} x {samples}) do not divide into --num-steps-per-rollout {steps}; "
            f"give a divisor of {total}",
        )
        v.stop_if_wrong()
        v.require(
            v["global_batch_size"] in (None, total // steps),
            f"--num-steps-per-rollout {steps} means a global batch of {total // steps}, "
            f"but --global-batch-size is {v['global_batch_size']}; leave one of them out",
        )
        v.derive("global_batch_size", total // steps, f"{prompts} x {samples} samples in {steps} steps")
    if v["global_batch_size"] is None:
        v.derive("global_batch_size", total, f"all {prompts} x {samples} samples of a rollout make one step")
    v.require(
        total % v["global_batch_size"] == 0,
        f"{total} samples ({prompts} x {samples}) are no multiple of --global-batch-size {v['global_batch_size']}, and the "
        f"rest would be lost; give a divisor of {total}",
    )
    if v["balance_by_flops"]:
        v.require(v["use_dynamic_batch_size"], "--balance-by-flops needs --use-dynamic-batch-size; pass both")
        v.derive("balance_data", True, "--balance-by-flops implies it")
    if v["use_dynamic_batch_size"]:
        v.require(v["max_tokens_per_gpu"], "--use-dynamic-batch-size needs --max-tokens-per-gpu; pass both")
    if v["log_probs_max_tokens_per_gpu"] is None and v["max_tokens_per_gpu"] is not None:
        v.derive("log_probs_max_tokens_per_gpu", v["max_tokens_per_gpu"], "it defaults to --max-tokens-per-gpu")
    if v["over_sampling_batch_size"] is None:
        v.derive("over_sampling_batch_size", prompts, "it defaults to --rollout-batch-size")
    v.require(
        v["over_sampling_batch_size"] >= prompts,
        f"--over-sampling-batch-size {v['over_sampling_batch_size']} is below --rollout-batch-size {prompts}; raise it",
    )
    v.require(
        v["partial_rollout"] or v["schedule"] == "fully-async" or not v["mask_offpolicy_in_partial_rollout"],
        "--mask-offpolicy-in-partial-rollout needs --partial-rollout (or --schedule fully-async); pass both",
    )
    _ranks(v)


def _ranks(v: Values) -> None:
    """A step's samples over the data-parallel ranks, and a micro-batch's tokens over padding."""
    size, ranks = v["global_batch_size"], v["data_parallel_size"]
    if ranks and not v["use_dynamic_batch_size"]:
        v.require(
            size % ranks == 0,
            f"a step's {size} samples do not divide over {ranks} data-parallel ranks; make --global-batch-size a multiple of "
            f"{ranks}, or pass --use-dynamic-batch-size",
        )
    if v["max_tokens_per_gpu"]:
        cp = v["context_parallel_size"]
        unit = v["data_pad_size_multiplier"] * v["tensor_model_parallel_size"] * cp
        capacity = v["max_tokens_per_gpu"] * cp
        v.require(
            capacity % unit == 0 or capacity > unit,
            f"a micro-batch holds {capacity:,} tokens, but the stream is padded to a multiple of {unit:,}; lower "
            f"--data-pad-size-multiplier (now {v['data_pad_size_multiplier']}) or raise --max-tokens-per-gpu",
            holds=f"a full micro-batch of {capacity:,} tokens takes padding to multiples of {unit:,}",
        )
