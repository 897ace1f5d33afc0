"""Single mistakes in SGLang's options that its own checks find once the processes are up: name -> (the edit, what the rule book
must say of it)."""

from __future__ import annotations

from tests.rehearse.edits import DISPATCH, SPECULATIVE, Edit, all_of, env, flags, in_group, without


def option(role: str, text: str) -> Edit:
    """One more override of a group."""
    return in_group(role, ("dp_size: 64", f"dp_size: 64\n          {text}"))


def stages(role: str) -> Edit:
    """Engines of a group in two pipeline stages of 32 GPUs."""
    return in_group(role, ("dp_size: 64", "dp_size: 32\n          pp_size: 2"), ("ep_size: 64", "ep_size: 32"))


EXTERNAL = "--rollout-external-engine-addrs"
WRONG_ENGINES: dict[str, tuple[Edit, str]] = {
    "somebody else's engine on the trainer's GPUs": (
        flags(EXTERNAL, "10.0.0.7:30000"),
        "--colocate is about engines that the run starts, and --rollout-external-engine-addrs names some that already run",
    ),
    "receivers beside somebody else's engines": (
        flags(EXTERNAL, "10.0.0.7:30000", "--update-weight-transport", "receivers"),
        "starts a process beside each engine rank, which external engines do not have",
    ),
    "a broadcast to engines of two stages": (
        all_of(without("--colocate"), flags("--rollout-num-gpus", "256"), stages("prefill")),
        "default prefill: pp_size 2 on GPUs of its own with --update-weight-transport nccl",
    ),
    "a broadcast to one engine of two stages behind the trainer's GPUs": (
        all_of(
            flags("--rollout-num-gpus", "320"),
            lambda recipe: recipe.with_yaml("num_gpus: 192", "num_gpus: 256"),
            without(*SPECULATIVE),
            stages("decode"),
        ),
        "default decode: pp_size 2 on GPUs of its own with --update-weight-transport nccl",
    ),
    "weights by IPC that nobody sends": (
        flags("--sglang-checkpoint-engine-wait-weights-before-ready"),
        "default prefill: checkpoint_engine_wait_weights_before_ready makes an engine wait for /update_weights_from_ipc",
    ),
    "weights by RDMA that nobody writes": (
        option("decode", "remote_instance_weight_loader_start_seed_via_transfer_engine: true"),
        "default decode: remote_instance_weight_loader_start_seed_via_transfer_engine registers an engine's parameters",
    ),
    "somebody else's engine by its name alone": (flags(EXTERNAL, "node7"), "'node7' is no host:port"),
    "somebody else's engine twice": (
        flags(EXTERNAL, "10.0.0.7:30000", "http://10.0.0.7:30000/"),
        "names http://10.0.0.7:30000 twice",
    ),
    "nobody reads the text": (flags("--sglang-tokenizer-worker-num", "0"), "tokenizer_worker_num 0; give 1 or more"),
    "a stream of nothing": (option("decode", "stream_interval: 0"), "default decode: stream_interval 0"),
    "a prefill of nothing": (option("prefill", "max_prefill_tokens: 0"), "default prefill: max_prefill_tokens 0"),
    "a chain of no steps": (
        flags("--sglang-speculative-num-steps", "0", "--sglang-speculative-num-draft-tokens", "1"),
        "speculative_num_steps 0; give 1 or more",
    ),
    "a level of no name": (flags("--sglang-log-level", "verbose"), "log_level verbose is no level; write one of debug, info"),
    "a cache of no token": (option("decode", "max_total_tokens: 0"), "default decode: max_total_tokens 0"),
    "a cache below a response": (
        option("decode", "max_total_tokens: 30000"),
        "max_total_tokens 30000 holds no response of --rollout-max-response-len 65536",
    ),
    "prefixes where none are kept": (
        flags("--sglang-enable-hierarchical-cache"),
        "default decode: enable_hierarchical_cache keeps prefixes, and this engine has no prefix cache (it decodes",
    ),
    "prefixes that are off": (
        option("prefill", "enable_hierarchical_cache: true\n          disable_radix_cache: true"),
        "default prefill: enable_hierarchical_cache keeps prefixes, and this engine has no prefix cache (disable_radix_cache)",
    ),
    "drafts over pipeline stages": (
        stages("decode"),
        "default decode: pp_size 2 with speculative_algorithm EAGLE, which SGLang takes in prefill engines alone",
    ),
    "adapters of no rank": (flags("--sglang-enable-lora"), "enable_lora wants lora_paths, or max_lora_rank"),
    "spare experts that do not divide": (
        flags("--sglang-ep-num-redundant-experts", "32"),
        "256 experts and 32 redundant ones (ep_num_redundant_experts) do not divide over ep_size 64; give a multiple of 64",
    ),
    "another model in the engines": (
        flags("--sglang-json-model-override-args", '{"num_hidden_layers": 4}'),
        'json_model_override_args {"num_hidden_layers": 4} would serve another model',
    ),
    "sparse attention that repeats itself": (
        flags("--sglang-enable-deterministic-inference"),
        "enable_deterministic_inference with sparse attention",
    ),
    "choices of one stage": (
        all_of(
            flags("--use-rollout-routing-replay"),
            stages("prefill"),
        ),
        "default prefill: --use-rollout-routing-replay with pp_size 2, but a stage records its own layers",
    ),
    "choices that a cache forgets": (
        all_of(flags("--use-rollout-routing-replay"), option("prefill", "enable_hierarchical_cache: true")),
        "default prefill: --use-rollout-routing-replay with enable_hierarchical_cache, which brings prefixes back without",
    ),
    "choices asked of one reader": (
        flags("--use-rollout-routing-replay", "--sglang-tokenizer-worker-num", "2"),
        "--use-rollout-routing-replay with tokenizer_worker_num 2, but one process reads",
    ),
    # What a process is told by its place, and what keeps it from what the run does with it.
    "a prefill engine that decodes": (
        option("decode", "disaggregation_mode: prefill"),
        "disaggregation_mode are set per process",
    ),
    "another's GPUs": (option("prefill", "base_gpu_id: 4"), "default prefill: base_gpu_id are set per process by slime"),
    "engines that do not sleep": (
        option("decode", "enable_memory_saver: false"),
        "default decode: enable_memory_saver false, and --offload-rollout",
    ),
    "a cache that goes nowhere": (
        flags("--sglang-disaggregation-transfer-backend", "fake"),
        "default: disaggregation_transfer_backend fake moves no cache",
    ),
    "prompts without sparse attention": (
        option("prefill", "prefill_attention_backend: triton"),
        "default prefill: prefill_attention_backend triton is not sparse attention",
    ),
    "decoding without sparse attention": (
        flags("--sglang-decode-attention-backend", "fa3"),
        "default decode: decode_attention_backend fa3 is not sparse attention",
    ),
    "a tree of drafts over pages": (
        all_of(
            flags("--sglang-speculative-eagle-topk", "4", "--sglang-speculative-num-steps", "3"),
            flags("--sglang-speculative-num-draft-tokens", "8"),
            env(**{DISPATCH: "128"}),
        ),
        "speculative_eagle_topk 4 drafts a tree, which SGLang writes into pages of 64 tokens with flashinfer, fa3, triton "
        "alone, not dsa",
    ),
    "drafts taken twice otherwise": (
        flags("--sglang-speculative-use-rejection-sampling", "--sglang-speculative-accept-threshold-acc", "0.8"),
        "speculative_use_rejection_sampling has no use for speculative_accept_threshold_acc",
    ),
    "drafts of noise": (flags("--sglang-load-format", "dummy"), "load_format dummy leaves the draft layer as noise"),
    "priorities that nobody has": (
        flags("--sglang-retraction-policy", "priority"),
        "retraction_policy priority without enable_priority_scheduling",
    ),
    "priorities in another order": (
        flags("--sglang-enable-priority-scheduling", "--sglang-schedule-policy", "lpm"),
        "goes with schedule_policy fcfs or lof, not lpm",
    ),
    "less than no caution": (flags("--sglang-schedule-conservativeness", "-0.5"), "schedule_conservativeness -0.5; give 0"),
    "answers without text": (flags("--sglang-skip-tokenizer-init"), "an engine with skip_tokenizer_init answers without text"),
    "embeddings": (flags("--sglang-is-embedding"), "an engine with is_embedding serves embeddings"),
    "another protocol": (option("decode", "grpc_mode: true"), "default decode: an engine with grpc_mode is asked by gRPC"),
    "encrypted requests": (
        flags("--sglang-ssl-keyfile", "/k.pem"),
        "an engine with ssl_keyfile answers encrypted requests alone",
    ),
    "a checkpoint that removes itself": (
        flags("--sglang-delete-ckpt-after-loading"),
        "delete_ckpt_after_loading removes the folder that it was started from",
    ),
    "adapters": (flags("--sglang-lora-paths", "a=/b"), "an engine with lora_paths serves adapters"),
    "a draw that nobody knows of": (
        option("decode", "preferred_sampling_params: '{\"min_p\": 0.1}'"),
        'preferred_sampling_params {"min_p": 0.1} changes how tokens are drawn',
    ),
    "a loader's options that are no JSON": (
        flags("--sglang-model-loader-extra-config", "threads=8"),
        "model_loader_extra_config threads=8 is no JSON object",
    ),
    "a watchdog without patience": (flags("--sglang-watchdog-timeout", "0"), "watchdog_timeout 0.0 is no time"),
    "a line of the log every 0 steps": (flags("--sglang-decode-log-interval", "0"), "decode_log_interval 0; give 1"),
    "decoding in steps of none": (flags("--sglang-num-continuous-decode-steps", "0"), "decode_steps 0; give 1"),
    "metrics to no folder": (flags("--sglang-export-metrics-to-file"), "export_metrics_to_file has no folder"),
    "a size that is said twice": (
        option("decode", "dp_size: 32"),
        "has dp_size twice, at lines ",
    ),
}
