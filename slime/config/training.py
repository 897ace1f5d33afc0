"""Optimizer, checkpoints, batches and the algorithm."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from slime.config.flags import derived, flag

Dtype = Literal["fp32", "bf16"]


@dataclass(frozen=True)
class OptimizerConfig:
    """Adam on Megatron's distributed optimizer, its schedule, and the gradient buffers."""

    optimizer: Literal["adam", "sgd"] = "adam"
    """Algorithm."""
    lr: float = flag(1e-6, above=0, high=1)
    """Peak learning rate."""
    min_lr: float = flag(0.0, low=0)
    """Lowest learning rate of the decay."""
    lr_decay_style: Literal["constant", "linear", "cosine", "inverse-square-root", "WSD"] = "linear"
    """Shape of the decay."""
    lr_decay_iters: int | None = flag(None, low=1)
    """Steps of the decay; None takes the whole run."""
    lr_warmup_fraction: float | None = flag(None, low=0, high=1)
    """Warm-up as a share of the decay."""
    lr_warmup_iters: int = flag(0, low=0)
    """Warm-up in steps."""
    lr_warmup_init: float = flag(0.0, low=0)
    """Learning rate at the start of the warm-up."""
    lr_wsd_decay_iters: int | None = flag(None, low=1)
    """WSD: steps of the final decay."""
    lr_wsd_decay_style: Literal["exponential", "linear", "cosine", "minus_sqrt"] = "exponential"
    """WSD: shape of the final decay."""
    weight_decay: float = flag(0.01, low=0)
    """Decoupled weight decay."""
    start_weight_decay: float | None = flag(None, low=0)
    """Start of a growing weight decay."""
    end_weight_decay: float | None = flag(None, low=0)
    """End of a growing weight decay."""
    weight_decay_incr_style: Literal["constant", "linear", "cosine"] = "constant"
    """Shape of its growth."""
    adam_beta1: float = flag(0.9, low=0, below=1)
    """First-moment decay."""
    adam_beta2: float = flag(0.999, low=0, below=1)
    """Second-moment decay."""
    adam_eps: float = flag(1e-8, above=0)
    """Added to the denominator."""
    sgd_momentum: float = flag(0.9, low=0, below=1)
    """SGD's momentum."""
    clip_grad: float = flag(1.0, low=0)
    """Largest global gradient norm; 0 does not clip."""
    use_distributed_optimizer: bool = False
    """Always on; the flag is accepted because recipes carry it."""
    use_precision_aware_optimizer: bool = False
    """Master weights and moments in the types below."""
    main_grads_dtype: Dtype = "fp32"
    """Gradients, with the precision-aware optimizer."""
    main_params_dtype: Literal["fp32"] = "fp32"
    """Master weights, with the precision-aware optimizer."""
    exp_avg_dtype: Dtype = "fp32"
    """First moment, with the precision-aware optimizer."""
    exp_avg_sq_dtype: Dtype = "fp32"
    """Second moment, with the precision-aware optimizer."""
    optimizer_cpu_offload: bool = False
    """Optimizer state and step on the CPU."""
    optimizer_offload_fraction: float = flag(1.0, low=0, high=1)
    """Share of the state on the CPU."""
    overlap_cpu_optimizer_d2h_h2d: bool = False
    """Copy gradients and weights while the CPU steps."""
    use_torch_optimizer_for_cpu_offload: bool = False
    """torch's Adam instead of the fused one for the offloaded part."""
    overlap_grad_reduce: bool = False
    """Reduce gradients during the backward pass."""
    overlap_param_gather: bool = False
    """Gather weights during the forward pass."""
    accumulate_allreduce_grads_in_fp32: bool = False
    """Always on: gradients are summed in fp32 buffers."""
    check_for_nan_in_loss_and_grad: bool = flag(True, off="--no-check-for-nan-in-loss-and-grad")
    """Stop at the first NaN. Off: a step with a non-finite gradient is skipped, counted and named in the log."""
    skip_spike: float | None = flag(None, above=1)
    """Skip a step whose gradient norm (supervised: or loss) is above this times its median over the last 64 steps."""
    max_skipped_steps: int = flag(3, low=0)
    """Steps that --no-check-for-nan-in-loss-and-grad and --skip-spike may skip in a run; the next one stops it."""
    ddp_bucket_size: int | None = flag(None, low=1)
    """Parameters of one gradient bucket."""
    override_opt_param_scheduler: bool = flag(False, "--override-opt-param-scheduler", "--override-opt_param-scheduler")
    """Take the schedule from the flags although a checkpoint has one."""
    use_checkpoint_opt_param_scheduler: bool = flag(
        False, "--use-checkpoint-opt-param-scheduler", "--use-checkpoint-opt_param-scheduler"
    )
    """Take the schedule from the checkpoint although the flags differ."""
    reset_optimizer_states: bool = False
    """Zero Adam's moments and step count at every rollout."""
    use_stateless_adam: bool = flag(False, later="stateless Adam")
    """Adam that keeps no state between rollouts."""
    megatron: Mapping[str, object] = derived({})
    """Other fields of megatron-core's OptimizerConfig -> value, only what was given."""
    ddp: Mapping[str, object] = derived({})
    """Other fields of megatron-core's DistributedDataParallelConfig -> value, only what was given."""


@dataclass(frozen=True)
class CheckpointConfig:
    """Where weights come from and go to."""

    hf_checkpoint: str | None = None
    """HF folder: tokenizer, the engines' first weights, quantisation, and the config that the model flags must agree with."""
    load: str | None = None
    """Megatron checkpoint to continue from, or an HF folder."""
    ref_load: str | None = None
    """Reference model; also where a first run starts when --load holds nothing."""
    save: str | None = None
    """Folder for Megatron checkpoints."""
    save_interval: int | None = flag(None, low=1)
    """Save every so many rollouts (and at the end)."""
    keep_checkpoints: int | None = flag(None, low=1)
    """Keep so many of the newest checkpoints in --save, and those with a file named PINNED in them; None keeps all."""
    async_save: bool = False
    """Write the checkpoint while training goes on; a failure shows at the next step, save or at the end."""
    save_hf: str | None = None
    """Also write an HF folder at every save; may hold {rollout_id}."""
    no_save_optim: bool = False
    """Save weights only."""
    no_load_optim: bool = False
    """Do not load optimizer and schedule."""
    no_load_rng: bool = False
    """Do not load random states."""
    finetune: bool = False
    """Take the weights only and start counting at 0."""
    ckpt_step: int | None = flag(None, low=0)
    """Iteration of --load to use; None takes the newest."""
    ref_ckpt_step: int | None = flag(None, low=0)
    """Iteration of --ref-load to use."""
    start_rollout_id: int | None = flag(None, low=0)
    """First rollout; None continues after the loaded iteration. An explicit value always wins."""
    rollouts_done: int = derived(0)
    """Rollouts that the checkpoint has done which this run continues; 0 for a run from the beginning."""
    ref_update_interval: int | None = flag(None, low=1)
    """Copy the trained model to the reference every so many rollouts."""


@dataclass(frozen=True)
class BatchConfig:
    """From samples of a rollout to micro-batches of a step."""

    global_batch_size: int | None = flag(None, low=1)
    """Samples (trajectories, when they fan out) of one optimizer step."""
    num_steps_per_rollout: int | None = flag(None, low=1)
    """The same, said as steps per rollout."""
    micro_batch_size: int = flag(1, low=1)
    """Samples of one micro-batch; unused with dynamic batches."""
    use_dynamic_batch_size: bool = False
    """Fill micro-batches up to --max-tokens-per-gpu."""
    max_tokens_per_gpu: int | None = flag(None, low=1)
    """Tokens of one micro-batch per rank; a micro-batch holds this times the context-parallel size."""
    log_probs_max_tokens_per_gpu: int | None = flag(None, low=1)
    """The same for passes without gradient."""
    balance_data: bool = False
    """Spread the samples so that data-parallel ranks get equal work."""
    balance_by_flops: bool = False
    """Also fill micro-batches by estimated FLOPs instead of tokens."""
    data_pad_size_multiplier: int = flag(128, low=1)
    """The packed stream is padded to a multiple of this times the tensor- and context-parallel sizes."""
    log_probs_chunk_size: int = flag(-1, low=1, also=(-1,))
    """Rows of logits that exist at once, 4,096 words of each; -1 is 16,384 rows."""
    recompute_loss_function: bool = False
    """Recompute log-probabilities and loss in the backward pass."""


CENTRED = ("grpo", "gspo", "cispo", "reinforce_plus_plus_baseline")
"""Estimators that compare a sample with the others of its prompt."""


@dataclass(frozen=True)
class AlgorithmConfig:
    """What is optimized."""

    advantage_estimator: Literal[
        "grpo", "gspo", "cispo", "rloo", "reinforce_plus_plus", "reinforce_plus_plus_baseline", "ppo"
    ] = "grpo"
    """How rewards become advantages (and which ratio is clipped)."""
    loss_type: Literal["policy_loss", "sft_loss", "custom_loss"] = "policy_loss"
    """Loss."""
    custom_loss_function_path: str | None = None
    """Loss of --loss-type custom_loss."""
    custom_advantage_function_path: str | None = None
    """Replaces the advantage computation."""
    custom_tis_function_path: str | None = None
    """Replaces the truncated importance weights."""
    custom_pg_loss_reducer_function_path: str | None = None
    """Replaces the reduction of the policy-gradient loss."""
    rollout_data_postprocess_path: str | None = None
    """Runs on the training ranks after advantages."""
    compute_advantages_and_returns: bool = flag(True, off="--disable-compute-advantages-and-returns")
    """Off: no old log-probs, no advantages (supervised training)."""
    eps_clip: float = flag(0.2, low=0)
    """Lower clip distance of the ratio."""
    eps_clip_high: float | None = flag(None, low=0)
    """Upper clip distance; None takes eps_clip."""
    eps_clip_c: float | None = flag(None, above=1)
    """Dual clip, above 1."""
    value_clip: float = flag(0.2, above=0)
    """Clip distance of the value loss."""
    kl_coef: float = flag(0.0, low=0)
    """KL to the reference inside the reward."""
    use_kl_loss: bool = False
    """KL to the reference as a loss term."""
    kl_loss_coef: float = flag(0.0, low=0)
    """Weight of that term."""
    kl_loss_type: Literal["k1", "k2", "k3", "low_var_kl"] = "k1"
    """Estimator of the KL; low_var_kl is k3 with a clamp."""
    use_unbiased_kl: bool = False
    """Weight the KL estimate by the importance ratio."""
    entropy_coef: float = 0.0
    """Entropy bonus."""
    gamma: float = flag(1.0, low=0, high=1)
    """Discount."""
    lambd: float = flag(1.0, low=0, high=1)
    """GAE's lambda."""
    normalize_advantages: bool = False
    """Whiten advantages over the whole batch."""
    grpo_std_normalization: bool = flag(True, off="--disable-grpo-std-normalization")
    """Divide a group's rewards by their standard deviation."""
    rewards_normalization: bool = flag(True, off="--disable-rewards-normalization")
    """Centre rewards within their group."""
    pg_loss_length: int | None = flag(None, low=1)
    """Dr. GRPO: a sample's policy loss is the sum over its tokens divided by this constant instead of by its trained tokens."""
    overlong_buffer_len: int | None = flag(None, low=1)
    """DAPO: rewards of the last so many tokens below --rollout-max-response-len fall linearly, by the factor below at it."""
    overlong_penalty_factor: float = flag(1.0, low=0)
    """What a response of the longest length loses."""
    calculate_per_token_loss: bool = False
    """Every token weighs the same; otherwise every trajectory does."""
    use_rollout_entropy: bool = False
    """Compute the entropy in the log-prob pass."""
    use_rollout_logprobs: bool = False
    """Old log-probs are the engine's."""
    use_tis: bool = False
    """Truncated importance sampling between engine and trainer."""
    tis_clip: float = flag(2.0, above=0)
    """Upper bound of its weight."""
    tis_clip_low: float = flag(0.0, low=0)
    """Lower bound of its weight."""
    tis_mode: Literal["truncate", "clip", "mask", "icepop"] = "clip"
    """What becomes of a ratio outside the bounds: cut at the upper, at both, its token untrained, or its weight 0."""
    tis_level: Literal["token", "sequence", "geometric"] = "token"
    """Whose ratio it is: the token's, the product over its sample's trained tokens, or their geometric mean."""
    tis_upper_bound: float | None = flag(None, above=0)
    """Upper bound of the ratio; None takes --tis-clip."""
    tis_lower_bound: float | None = flag(None, low=0)
    """Lower bound; None takes --tis-clip-low, and with --tis-mode mask or icepop 1 / the upper bound where that is 0."""
    tis_batch_normalize: bool = False
    """Divide the weights by their mean over the step."""
    use_rs: bool = False
    """Rejection sampling: tokens whose ratio lies outside the bounds below are not trained; also without --use-tis."""
    rs_level: Literal["token", "sequence", "geometric"] = "token"
    """Whose ratio decides."""
    rs_upper_bound: float | None = flag(None, above=0)
    """None takes --tis-upper-bound."""
    rs_lower_bound: float | None = flag(None, low=0)
    """None takes --tis-lower-bound, or 1 / the upper bound where that is 0."""
    rs_veto_threshold: float | None = flag(None, above=0)
    """A sample with a trained token whose ratio is below this is not trained at all (--use-rs)."""
    get_mismatch_metrics: bool = False
    """Report the train/rollout mismatch without using it (needs a custom TIS path)."""
    use_opsm: bool = False
    """Mask sequences that are far off-policy."""
    opsm_delta: float = flag(1e-4, low=0)
    """Its threshold."""
    use_routing_replay: bool = False
    """Train with the expert choices of the log-prob pass."""
    use_rollout_routing_replay: bool = False
    """Train with the engine's expert choices."""
    use_rollout_indexer_replay: bool = False
    """Train with the keys that the engine's sparse attention selected."""
    keep_old_actor: bool = False
    """Keep the weights that generated the data on the training side."""
    num_critic_only_steps: int = flag(0, low=0)
    """The first so many rollouts train the critic alone."""
    megatron_config_path: str | None = None
    """YAML with flags per role, actor and critic."""
    critic_lr: float | None = flag(None, above=0, high=1)
    """The critic's peak learning rate; None takes --lr."""
    critic_lr_warmup_iters: int | None = flag(None, low=0)
    """Its warm-up in steps; None takes --lr-warmup-iters."""
    critic_load: str | None = None
    """Its checkpoint, or HF files for all but its head; None: critic/ in --load where the run continues, else the actor's."""
    critic_save: str | None = None
    """Folder of its checkpoints; None takes critic/ in --save."""
    critic: Mapping[str, object] = derived({})
    """What --megatron-config-path says for the critic."""
    use_opd: bool = False
    """On-policy distillation: a token's advantage falls by how much likelier the model finds it than a teacher does."""
    opd_type: Literal["sglang", "megatron"] | None = None
    """Where the teacher runs: a server at --rm-url, or weights that the trainer keeps beside its own."""
    opd_kl_coef: float = flag(1.0, low=0)
    """Weight of the difference of log-probs."""
    opd_teacher_load: str | None = None
    """The teacher's checkpoint, of a model of the trained one's shape: Megatron's or an HF folder."""
    opd_teacher_ckpt_step: int | None = flag(None, low=0)
    """Iteration of --opd-teacher-load to use."""
    custom_megatron_init_path: str | None = None
    """Called with (args) after the ranks are set up."""
    custom_megatron_before_log_prob_hook_path: str | None = None
    """Called with (args, model, store_prefix) before every pass without gradient."""
    custom_megatron_before_train_step_hook_path: str | None = None
    """Called with (args, rollout_id, step_id, model, optimizer, scheduler) before every step."""
