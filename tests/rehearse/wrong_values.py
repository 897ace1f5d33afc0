"""Single mistakes in values that a constructor, SGLang or torch would find after everything is up: name -> (the edit, what the
rule book must say of it)."""

from __future__ import annotations

import sys

from tests.rehearse.edits import DISPATCH, Edit, all_of, env, flags, in_group, without

SELECTIVE = all_of(without("--recompute-method", "--recompute-num-layers"), flags("--recompute-granularity", "selective"))
PAIR = without("--decoder-first-pipeline-num-layers", "--decoder-last-pipeline-num-layers")
EVAL = ("--eval-interval", "1", "--eval-prompt-data", "a", "a.jsonl")

WRONG_VALUES: dict[str, tuple[Edit, str]] = {
    # Learning rate and weight decay: OptimizerParamScheduler asserts where they begin and end.
    "a warm-up that falls": (flags("--lr-warmup-init", "1e-3"), "--lr-warmup-init 0.001 is above --lr 1e-06"),
    "a growing weight decay of one end": (flags("--start-weight-decay", "0.1"), "a growing weight decay has both"),
    "the other end alone": (flags("--end-weight-decay", "0.1"), "--start-weight-decay None and --end-weight-decay 0.1"),
    "a growth of nothing": (flags("--weight-decay-incr-style", "cosine"), "--weight-decay-incr-style cosine grows from"),
    "a weight decay that falls": (
        flags("--weight-decay-incr-style", "linear", "--start-weight-decay", "0.3", "--end-weight-decay", "0.1"),
        "--start-weight-decay 0.3 is above --end-weight-decay 0.1",
    ),
    "a growth that is constant": (
        flags("--start-weight-decay", "0.1", "--end-weight-decay", "0.3"),
        "with --weight-decay-incr-style constant; pass linear",
    ),
    "SGD on the host": (flags("--optimizer", "sgd"), "--optimizer sgd with --optimizer-cpu-offload and --use-precision-aware"),
    "SGD with narrow moments": (
        all_of(flags("--optimizer", "sgd"), without("--optimizer-cpu-offload", "--overlap-cpu-optimizer-d2h-h2d")),
        "--optimizer sgd with --use-precision-aware-optimizer, which only Adam has",
    ),
    # Experts: what would drop tokens, move them or choose others than the engines do.
    "experts by Sinkhorn": (
        flags("--moe-router-load-balancing-type", "sinkhorn"),
        "--moe-router-load-balancing-type sinkhorn: there is no router loss",
    ),
    "two kinds of balance": (
        flags("--moe-router-load-balancing-type", "aux_loss", "global_aux_loss"),
        "--moe-router-load-balancing-type aux_loss global_aux_loss",
    ),
    "experts that are full": (
        flags("--moe-expert-capacity-factor", "1.5"),
        "--moe-expert-capacity-factor 1.5 would make another",
    ),
    "experts that are filled up": (
        flags("--moe-pad-expert-input-to-capacity"),
        "--moe-pad-expert-input-to-capacity True would",
    ),
    "a shaken router": (flags("--moe-input-jitter-eps", "0.01"), "--moe-input-jitter-eps 0.01 would make another model"),
    # What megatron-core's constructors refuse whatever else is said, or what needs a library that is not there.
    "embedding as a layer": (flags("--account-for-embedding-in-pipeline-split"), "counts embedding and loss as layers"),
    "the loss as a layer": (flags("--account-for-loss-in-pipeline-split"), "counts embedding and loss as layers"),
    "deferred embedding gradients": (flags("--defer-embedding-wgrad-compute"), "apex's fused weight gradients"),
    "shared saved activations": (flags("--distribute-saved-activations"), "saved activations shared"),
    "ring exchange": (flags("--use-ring-exchange-p2p"), "built with ring exchange"),
    "overlap in warm-up": (flags("--overlap-p2p-comm-warmup-flush"), "overlapped transfers in warm-up"),
    "overlapped micro-batches": (flags("--overlap-moe-expert-parallel-comm"), "overlapped micro-batches"),
    "three optimizers": (flags("--num-distributed-optimizer-instances", "3"), "several distributed optimizers"),
    "a module of no name": (
        all_of(SELECTIVE, flags("--recompute-modules", "core_attn", "moo")),
        "--recompute-modules moo: there are core_attn",
    ),
    # Seeds, folders, addresses.
    "a seed beyond NumPy's": (flags("--seed", str(2**32)), "--seed must be at least 0 and at most 4294967295, got 4294967296"),
    "another seed beyond": (flags("--rollout-seed", "9" * 20), "--rollout-seed must be at least 0 and at most 4294967295"),
    "saving over the prompts": (
        flags("--save", "/BASE_DIR/dapo-math-17k/dapo-math-17k.jsonl"),
        "is --prompt-data, which a checkpoint would overwrite",
    ),
    "a reward server of no scheme": (
        flags("--rm-type", "remote_rm", "--rm-url", "10.0.0.9:8000/score"),
        "--rm-url 10.0.0.9:8000/score is no address of a server",
    ),
    "a reward server of another scheme": (flags("--rm-type", "remote_rm", "--rm-url", "ftp://a/b"), "write it as http://HOST"),
    # Lengths of an evaluation, as of a rollout.
    "an evaluation's prompts beyond the context": (
        flags(*EVAL, "--eval-max-prompt-len", "1000000"),
        "evaluation a: max_prompt_len 1000000 and evaluation a: max_response_len 65536 are 1065536 tokens together",
    ),
    "more tokens at least than at most": (
        flags(*EVAL, "--eval-min-new-tokens", "65537"),
        "evaluation a: min_new_tokens 65537 is above max_response_len 65536",
    ),
    # The trainer's own environment, by flag instead of by the launcher.
    "expandable segments of the trainer": (
        flags("--train-env-vars", '{"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True"}'),
        "expandable segments and memory that is",
    ),
    "multicast of the trainer": (
        flags("--train-env-vars", '{"NCCL_NVLS_ENABLE": 1}'),
        "NCCL_NVLS_ENABLE is 1: NCCL would hold",
    ),
    "an interface of the trainer's own": (
        flags("--train-env-vars", '{"NCCL_SOCKET_IFNAME": "ib0"}'),
        "would go over different interfaces",
    ),
    "a misspelled variable of the trainer": (
        flags("--train-env-vars", '{"NCCL_SOKCET_IFNAME": "eth0"}'),
        "did you mean NCCL_SO",
    ),
    "a variable of no text": (flags("--train-env-vars", '{"A": {"b": 1}}'), "--train-env-vars A is {'b': 1}"),
    "an engine's variable for the trainer": (
        flags("--train-env-vars", '{"SGLANG_DEEPEP_NUM_MAX_DISPATCH_TOKENS_PER_RANK": "128"}'),
        "engines read it, and these variables reach the trainer alone",
    ),
    "32 nodes on the loopback": (
        env(GLOO_SOCKET_IFNAME="lo", TP_SOCKET_IFNAME="lo", NCCL_SOCKET_IFNAME="lo"),
        "name the loopback, on which 32 nodes do not meet",
    ),
    "NCCL on the loopback": (env(NCCL_SOCKET_IFNAME="=lo"), "NCCL_SOCKET_IFNAME name the loopback"),
    "an address with its port": (env(MASTER_ADDR="10.0.0.1:29500"), "MASTER_ADDR is 10.0.0.1:29500, neither an IP address nor"),
    "an address of no machine": (env(MASTER_ADDR="256.1.1.1"), "MASTER_ADDR is 256.1.1.1, neither"),
    "an address with its scheme": (env(MASTER_ADDR="http://node0"), "write the first node's address alone"),
    "NCCL on all others": (env(NCCL_SOCKET_IFNAME="^eth0"), "would go over different interfaces"),
    "NCCL on one that begins otherwise": (env(NCCL_SOCKET_IFNAME="=eth"), "would go over different interfaces"),
    "a digit of another script": (env(**{DISPATCH: "6\u00b2"}), "SGLang takes whole numbers from 1 to 1024"),
    # Formats in which the trainer sends nothing.
    "engines of another format": (
        flags("--sglang-quantization", "awq"),
        "quantization awq, and the checkpoint that is served is fp8",
    ),
    "decode of another format": (
        in_group("decode", ("dp_size: 64", "dp_size: 64\n          quantization: w8a8_int8")),
        "default decode: quantization w8a8_int8",
    ),
    "bf16 that is quantised while it loads": (
        flags("--hf-checkpoint", "/BASE_DIR/GLM-5.2", "--sglang-quantization", "fp8"),
        "quantization fp8, and the checkpoint that is served is bf16",
    ),
    "engines in fp16": (flags("--sglang-dtype", "float16"), "dtype float16, and the trainer computes in bf16"),
    "parameters by half an expression": (flags("--freeze-params-name-list", "(router"), "(router is no regular expression"),
    "other parameters by half": (flags("--only-train-params-name-list", "*a"), "*a is no regular expression"),
    "a page of nothing": (
        in_group("prefill", ("dp_size: 64", "dp_size: 64\n          page_size: 0")),
        "page_size 0; a page holds",
    ),
    # Nobody generates, nobody can be asked, nothing is read.
    "training alone on nothing": (flags("--debug-train-only"), "--debug-train-only starts no engine, and --rollout-function"),
    "a teacher of no scheme": (
        flags("--use-opd", "--opd-type", "sglang", "--rm-url", "teacher:30000/generate"),
        "--rm-url teacher:30000/generate is no address of a server",
    ),
    "a slice of nothing": (flags("--prompt-data", "/p.jsonl@[300:100]"), "@[300:100]: the slice takes no row"),
    "a slice from the end of nothing": (flags("--prompt-data", "/p.jsonl@[-1:-5]"), "@[-1:-5]: the slice takes no row"),
    "an evaluation of no row": (
        flags("--eval-interval", "1", "--eval-prompt-data", "a", "a.jsonl@[:0]"),
        "evaluation a: a.jsonl@[:0]: the slice takes no row",
    ),
    "an end in every response": (flags("--rollout-stop", ""), "--rollout-stop has an empty text"),
    "an end beyond the vocabulary": (
        flags("--rollout-stop-token-ids", "154820", "154880"),
        "--rollout-stop-token-ids 154880: the vocabulary ends at 154879",
    ),
    "a variable of two": (flags("--train-env-vars", '{"A=B": "1"}'), "--train-env-vars 'A=B' is no name of a variable"),
    "a variable of no name": (flags("--train-env-vars", '{"": "1"}'), "--train-env-vars '' is no name of a variable"),
    # Folders that are files, or that two write.
    "saving into a program": (flags("--save", sys.executable), f"--save {sys.executable} is a file; name a folder"),
    "kernels in a program": (flags("--kernel-cache", sys.executable), "is a file; name a folder"),
    "a reference of a program": (flags("--ref-load", sys.executable), f"--ref-load {sys.executable} is a file"),
    "saving over the teacher": (
        flags("--use-opd", "--opd-type", "megatron", "--opd-teacher-load", "/t", "--save", "/t/"),
        "--save /t/ is --opd-teacher-load, which a checkpoint would overwrite",
    ),
    "published over an export": (
        flags("--update-weight-transport", "disk", "--update-weight-disk-dir", "/w", "--save-hf", "/w"),
        "--update-weight-disk-dir /w is --save-hf, which would be overwritten",
    ),
    # A layout with a layer that nobody builds, and without one that trains.
    "a draft layer that is not built": (
        all_of(PAIR, flags("--pipeline-model-parallel-layout", "Et*10|t*12|t*12|t*12|t*8|t*8|t*8|t*8mL")),
        "places 1 multi-token-prediction layers (m), and 0 are trained; remove m",
    ),
    "a layout of ten thousand million layers": (
        all_of(PAIR, flags("--pipeline-model-parallel-layout", "Et*9999999999|tL")),
        "--pipeline-model-parallel-layout repeats 9999999999 times; 1000 are the most",
    ),
    "a draft layer without a place": (
        all_of(
            PAIR,
            flags("--mtp-num-layers", "1", "--enable-mtp-training"),
            flags("--pipeline-model-parallel-layout", "Et*10|t*12|t*12|t*12|t*8|t*8|t*8|t*8L"),
        ),
        "places 0 multi-token-prediction layers (m), and 1 are trained; write m before L",
    ),
    # What is filled in, and where it is sent.
    "a folder that wants a text": (
        flags("--save-hf", "/hf/{rollout_id:s}"),
        "--save-hf /hf/{rollout_id:s} is filled in with a whole number, and asks for something else",
    ),
    "a folder that wants what is no conversion": (flags("--save-hf", "/hf/{rollout_id!x}"), "is filled in with a whole number"),
    "a port that there is not": (
        flags("--rm-type", "remote_rm", "--rm-url", "http://judge:99999/score"),
        "--rm-url http://judge:99999/score is no address of a server",
    ),
    "one rank's number for all": (
        flags("--train-env-vars", '{"RANK": "0"}'),
        "--train-env-vars RANK: the run sets it",
    ),
    "one GPU for all": (flags("--train-env-vars", '{"CUDA_VISIBLE_DEVICES": "0"}'), "CUDA_VISIBLE_DEVICES: the run sets it"),
    # What the router is told by this project.
    "the router's engines": (flags("--router-worker-urls", "http://a"), "--router-worker-urls is set by slime itself"),
    "the router's kind": (flags("--router-pd-disaggregation"), "use worker_type in --sglang-config"),
    "the router's token": (flags("--router-api-key", "x"), "--router-api-key is set by slime itself"),
}
