"""A right function for each flag, named as its attribute."""

from __future__ import annotations

import json
from pathlib import Path

import torch

from slime.rollout.data_source import RolloutDataSourceWithBuffer
from slime.rollout.filter_hub.base_types import DynamicFilterOutput
from slime.rollout.sglang_rollout import current_state, generate
from slime.rollout.sglang_rollout import generate_rollout as rollout_function_path
from slime.training.importance_functions import icepop_function as custom_tis_function_path

__all__ = ["custom_tis_function_path", "rollout_function_path"]


async def custom_rm_path(args, sample, **kwargs):
    def one(item):
        return float(f"\\boxed{{{item.label}}}" in item.response)

    return [one(item) for item in sample] if isinstance(sample, list) else one(sample)


async def custom_generate_function_path(args, sample, sampling_params):
    await generate(args, sample, sampling_params)
    ids = current_state().tokenizer.encode("Are you sure?", add_special_tokens=False)
    sample.append_response_tokens(tokens=ids, trainable=False, text="Are you sure?")
    sample.status = sample.Status.COMPLETED
    return sample


def rollout_sample_hook_path(args, sample, *, evaluation):
    sample.metadata["seen"] = evaluation


def eval_function_path(args, rollout_id, data_source, evaluation=False):
    return {"sums": {"rewards": [1.0], "truncated": [False], "samples": []}}


def custom_reward_post_process_path(args, samples):
    raw = [float(sample.reward) for sample in samples]
    return raw, [value - sum(raw) / len(raw) for value in raw]


def custom_convert_samples_to_train_data_path(args, samples):
    return {
        "tokens": [sample.tokens for sample in samples],
        "response_lengths": [sample.response_length for sample in samples],
        "rewards": [sample.reward for sample in samples],
        "loss_masks": [[1] * sample.response_length for sample in samples],
        "rollout_ids": [sample.index for sample in samples],
    }


def dynamic_sampling_filter_path(args, group):
    return DynamicFilterOutput(keep=len({sample.reward for sample in group}) > 1, reason="flat")


def buffer_filter_path(args, rollout_id, buffer, num_samples):
    taken, buffer[:] = buffer[-num_samples:], buffer[:-num_samples]
    return taken


def rollout_sample_filter_path(args, groups):
    for group in groups:
        group[0].remove_sample = True


def rollout_all_samples_process_path(args, all_groups, data_source):
    assert len(data_source) > 0


def custom_rollout_log_function_path(rollout_id, args, samples, extra_metrics, rollout_time):
    return False


def custom_eval_rollout_log_function_path(rollout_id, args, data, extra_metrics):
    return True


class custom_metrics_sink_path:  # noqa: N801
    def __init__(self, args):
        self.lines = []

    def write(self, metrics, axis, position):
        self.lines.append((axis, position, metrics))

    def close(self):
        assert len(self.lines) == 2


class data_source_path(RolloutDataSourceWithBuffer):  # noqa: N801
    pass


def custom_advantage_function_path(args, rollout_data):
    values = [
        torch.full((length,), float(reward))
        for length, reward in zip(rollout_data["response_lengths"], rollout_data["rewards"], strict=True)
    ]
    rollout_data["advantages"] = rollout_data["returns"] = values


def rollout_data_postprocess_path(args, rollout_id, rollout_data):
    rollout_data["advantages"] = [2 * values for values in rollout_data["advantages"]]


def custom_pg_loss_reducer_function_path(total_lengths, response_lengths, loss_masks, calculate_per_token_loss):
    mask = torch.cat(loss_masks)
    return lambda values: (values * mask).sum()


def custom_loss_function_path(args, batch, logits, sum_of_sample_mean):
    log_probs = torch.log_softmax(logits[0].float(), -1)[batch.response_rows]
    entropy = -(log_probs.exp() * log_probs).sum(-1)
    own = log_probs.gather(1, batch.targets[batch.response_rows, None])[:, 0]
    return sum_of_sample_mean(-own), {"entropy": sum_of_sample_mean(entropy)}


def custom_megatron_init_path(args):
    pass


def custom_megatron_before_log_prob_hook_path(args, model, store_prefix):
    pass


def custom_megatron_before_train_step_hook_path(args, rollout_id, step_id, model, optimizer, scheduler):
    pass


def custom_model_provider_path(pre_process, post_process, vp_stage=None):
    pass


def custom_update_weight_post_write_path(args, version_dir, rollout_engines):
    version = json.loads((Path(version_dir) / "version.json").read_text())["version"]
    print(f"version {version} is written for {', '.join(engine.url for engine in rollout_engines)}")
