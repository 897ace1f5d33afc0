"""Prompts, generation, rewards and evaluation."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from slime.config.eval_datasets import EvalDataset
from slime.config.flags import derived, flag, to_json_object
from slime.config.graders import grader_name

_BUFFER_SERVER = "the rollout-buffer server"


@dataclass(frozen=True)
class DataConfig:
    """Prompts and how many of them."""

    prompt_data: str | None = None
    """.jsonl or .parquet file of prompts; a suffix @[start:end] takes a slice."""
    input_key: str = "input"
    """Column of the prompt."""
    label_key: str | None = None
    """Column of the answer."""
    metadata_key: str = "metadata"
    """Column of a mapping that travels with the sample."""
    tool_key: str = "tools"
    """Column of tool definitions."""
    multimodal_keys: Mapping[str, object] | None = flag(None, convert=to_json_object, later="images, audio and video")
    """JSON object: media type -> column."""
    apply_chat_template: bool = False
    """Prompts are messages; render them with the tokenizer's template."""
    apply_chat_template_kwargs: Mapping[str, object] = flag({})
    """JSON object of arguments for the template."""
    rollout_shuffle: bool = False
    """Shuffle the prompts in every epoch."""
    rollout_seed: int = flag(42, low=0, high=2**32 - 1)
    """Seed of the shuffle, of deterministic sampling, and of what plugins draw from Python's and NumPy's own generators."""
    num_rollout: int | None = flag(None, low=0)
    """Rollouts of the run; 0 evaluates only."""
    num_epoch: int | None = flag(None, low=1)
    """The same, said as passes over the prompts."""
    rollout_batch_size: int | None = flag(None, low=1)
    """Prompts of one rollout."""
    n_samples_per_prompt: int = flag(1, low=1)
    """Samples per prompt (one group)."""
    rollout_global_dataset: bool = flag(True, off="--disable-rollout-global-dataset")
    """Off: the rollout function finds its own prompts."""
    data_source_path: str = "slime.rollout.data_source.RolloutDataSourceWithBuffer"
    """Class of the data source."""
    loss_mask_type: Literal["qwen", "qwen3", "qwen3_5", "distill_qwen", "glm", "glm5", "deepseek", "llama3"] = "qwen"
    """Which turns supervised training counts: distill_qwen the last, the others every; the template says what a turn is."""
    on_broken_prompt_line: Literal["refuse", "skip"] = "refuse"
    """A line of the prompt file that cannot be read ends the run, or is left out and counted."""
    rollout_data_transport: Literal["object-store", "nixl"] = flag("object-store", later_values=("nixl",))
    """How rollout data reaches the trainer."""


@dataclass(frozen=True)
class RolloutConfig:
    """Generation, filters and rewards."""

    rollout_function_path: str = "slime.rollout.sglang_rollout.generate_rollout"
    """Function that makes one rollout."""
    rollout_temperature: float = flag(1.0, above=0)
    """Sampling temperature, above 0; the trainer divides its logits by it too."""
    rollout_top_p: float = flag(1.0, above=0, high=1)
    """Nucleus sampling."""
    rollout_top_k: int = flag(-1, low=1, also=(-1,))
    """Top-k sampling; -1 is off."""
    most_kept_words: int = derived(0)
    """Most words that top-p or top-k leave a token, where training takes these again; 0: it does not."""
    rollout_max_context_len: int | None = flag(None, low=2)
    """Longest prompt plus response."""
    rollout_max_prompt_len: int | None = flag(None, low=1)
    """Longer prompts are left out of the data set."""
    rollout_max_response_len: int | None = flag(None, low=1)
    """Most new tokens of a response."""
    rollout_skip_special_tokens: bool = False
    """Leave special tokens out of the text."""
    rollout_stop: tuple[str, ...] | None = None
    """Texts that end a response."""
    rollout_stop_token_ids: tuple[int, ...] | None = flag(None, low=0)
    """Tokens that end a response."""
    over_sampling_batch_size: int | None = flag(None, low=1)
    """Prompts started at once; more than rollout_batch_size feeds a dynamic filter."""
    dynamic_sampling_filter_path: str | None = None
    """Keeps or drops a finished group."""
    max_drops_in_a_row: int | None = flag(None, low=1)
    """Groups that may be dropped one after the other before the run ends; None is 16 rollouts' worth, 512 at least."""
    partial_rollout: bool = False
    """Put unfinished groups back into the buffer."""
    mask_offpolicy_in_partial_rollout: bool = False
    """Zero the loss mask of the part that older weights wrote."""
    custom_generate_function_path: str | None = None
    """Generates one sample."""
    rollout_sample_hook_path: tuple[str, ...] = flag((), append=True)
    """Runs on each sample before its reward; may be given several times."""
    custom_rollout_log_function_path: str | None = None
    """Replaces the log of a rollout."""
    custom_eval_rollout_log_function_path: str | None = None
    """Replaces the log of an evaluation."""
    buffer_filter_path: str | None = None
    """Chooses groups from the buffer."""
    rollout_sample_filter_path: str | None = None
    """Marks samples that must not count."""
    rollout_all_samples_process_path: str | None = None
    """Sees all groups, dropped ones too."""
    rm_type: str | None = flag(None, convert=grader_name)
    """Built-in grader, with boxed_ before its name for the content of the last box alone."""
    rm_workers: int | None = flag(None, low=1, high=256)
    """Gradings at a time, each in a process of its own (an own reward function: a thread); None: one a core, 4 to 16."""
    rm_timeout: float | None = flag(None, above=0)
    """Seconds for one grading; None: 10 for a built-in grader, 600 for an own reward function."""
    rm_url: str | None = None
    """Address of a reward server."""
    reward_key: str | None = None
    """Key of the reward when it is a mapping."""
    group_rm: bool = False
    """Reward a whole group at once."""
    custom_rm_path: str | None = None
    """Own reward."""
    custom_reward_post_process_path: str | None = None
    """Replaces the normalisation of rewards."""
    custom_convert_samples_to_train_data_path: str | None = None
    """Replaces the conversion of samples to training columns."""
    use_distributed_post: bool = False
    """Send HTTP requests from Ray actors."""
    http_proxy: str | None = None
    """Proxy."""
    rollout_buffer_url: str | None = flag(None, later=_BUFFER_SERVER)
    """Address of the buffer server."""
    fetch_trajectory_retry_times: int = flag(-1, later=_BUFFER_SERVER)
    """Retries against it."""
    min_batch_collection_ratio: float = flag(1.0, later=_BUFFER_SERVER)
    """Share of a batch that is enough."""
    rollout_task_type: str = flag("math", later=_BUFFER_SERVER)
    """Its task."""


@dataclass(frozen=True)
class EvalConfig:
    """Evaluation between rollouts."""

    eval_interval: int | None = flag(None, low=1)
    """Evaluate every so many rollouts."""
    eval_prompt_data: tuple[str, ...] | None = None
    """NAME FILE pairs."""
    eval_config: str | None = None
    """YAML of data sets with settings of their own; wins over --eval-prompt-data."""
    eval_function_path: str | None = None
    """Function that evaluates; None takes the rollout function."""
    skip_eval_before_train: bool = False
    """No evaluation before the first rollout."""
    eval_input_key: str | None = None
    """None takes --input-key."""
    eval_label_key: str | None = None
    """None takes --label-key."""
    eval_tool_key: str | None = None
    """None takes --tool-key."""
    eval_reward_key: str | None = None
    """None takes --reward-key."""
    n_samples_per_eval_prompt: int = flag(1, low=1)
    """Samples per prompt."""
    eval_temperature: float | None = flag(None, low=0)
    """None takes the rollout's."""
    eval_top_p: float | None = flag(None, above=0, high=1)
    """None takes the rollout's."""
    eval_top_k: int | None = flag(None, low=1, also=(-1,))
    """None takes the rollout's."""
    eval_max_response_len: int | None = flag(None, low=1)
    """None takes the rollout's."""
    eval_max_prompt_len: int | None = flag(None, low=1)
    """Longer prompts are left out."""
    eval_min_new_tokens: int | None = flag(None, low=0)
    """Fewest new tokens."""
    eval_max_context_len: int | None = flag(None, low=2)
    """None takes the rollout's."""
    datasets: tuple[EvalDataset, ...] = derived(())
    """The data sets with every setting filled in."""
