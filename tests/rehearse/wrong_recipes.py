"""Single mistakes in the recipe of 256 GPUs: name -> (the edit, what the rule book must say of it)."""

from __future__ import annotations

from dataclasses import replace

from tests.rehearse.edits import DISPATCH, Edit, all_of, env, flags, in_group, unset, without

SFT = ("--rollout-function-path", "slime.rollout.sft_rollout.generate_rollout", "--loss-type", "sft_loss")

JUDGE = "  - name: judge\n    model_path: /models/j\n    server_groups: [{num_gpus: 64, num_gpus_per_engine: 8}]\n"
DISK = ("--update-weight-transport", "disk", "--update-weight-disk-dir", "/weights")

WRONG: dict[str, tuple[Edit, str]] = {
    # What is asked of an engine, against its context of 1,048,576 tokens; the flags of supervised training.
    "responses of a whole context": (flags("--rollout-max-response-len", "1048576"), "leaves no room for a prompt"),
    "a context of more than an engine's": (flags("--rollout-max-context-len", "1048577"), "pass at most 1048576"),
    "an evaluation beyond the context": (
        flags("--eval-interval", "1", "--eval-prompt-data", "a", "a.jsonl", "--eval-max-response-len", "2000000"),
        "evaluation a: max_response_len 2000000 leaves no room",
    ),
    "a small context": (flags("--sglang-context-length", "8192"), "the engines' context is 8192 (--sglang-context-length)"),
    "prompt and response beyond the context": (
        flags("--sglang-context-length", "66000", "--rollout-max-prompt-len", "1000"),
        "are 66536 tokens together",
    ),
    "conversations twice": (flags(*SFT), "takes each conversation once, and --n-samples-per-prompt is 8"),
    "conversations as text": (
        flags(*SFT, "--n-samples-per-prompt", "1", "--apply-chat-template"),
        "makes a text of a conversation",
    ),
    "conversations without a loss": (
        all_of(flags(*SFT), flags("--loss-type", "policy_loss")),
        "learns nothing",
    ),
    # DeepEP: what one rank sends at once, against its buffer (64 tokens in the recipe, five draft tokens a request).
    "prefill takes prompts by low latency": (
        in_group("prefill", ("deepep_mode: auto", "deepep_mode: low_latency")),
        "chunks of 131,072 tokens over 64 ranks = 2,048",
    ),
    "prefill by low latency in small chunks": (
        in_group("prefill", ("deepep_mode: auto", "deepep_mode: low_latency"), ("size: 131072", "size: 8192")),
        "64 ranks = 128",
    ),
    "prefill by low latency, whole prompts": (
        in_group("prefill", ("deepep_mode: auto", "deepep_mode: low_latency"), ("size: 131072", "size: -1")),
        "whole prompts",
    ),
    "4096 requests": (
        in_group("decode", ("requests: 768", "requests: 4096")),
        "4096 over 64 ranks x draft tokens 5 = 320), which DeepEP's",
    ),
    "833 requests": (in_group("decode", ("requests: 768", "requests: 833")), "833 over 64 ranks x draft tokens 5 = 70"),
    "graphs of 13": (in_group("decode", ("max_bs: 12", "max_bs: 13")), "cuda_graph_max_bs 13 x draft tokens 5 = 65"),
    "six draft tokens": (
        flags("--sglang-speculative-num-draft-tokens", "6", "--sglang-speculative-num-steps", "5"),
        "x draft tokens 6 = 72",
    ),
    "buffer of 59 tokens": (env(**{DISPATCH: "59"}), f"{DISPATCH} is 59, below the largest decode batch"),
    "buffer of 1025 tokens": (env(**{DISPATCH: "1025"}), "SGLang takes whole numbers from 1 to 1024"),
    "buffer of 4096 tokens": (env(**{DISPATCH: "4096"}), "SGLang takes whole numbers from 1 to 1024"),
    "buffer of no tokens": (env(**{DISPATCH: "0"}), "SGLang takes whole numbers from 1 to 1024"),
    "buffer of many": (env(**{DISPATCH: "many"}), "is 'many'; SGLang takes whole numbers"),
    "DeepEP over 192 ranks": (
        in_group(
            "decode", ("per_engine: 64", "per_engine: 192"), ("dp_size: 64", "dp_size: 192"), ("ep_size: 64", "ep_size: 192")
        ),
        "no dispatch configuration for EP 192",
    ),
    "DeepEP with one expert rank": (in_group("decode", ("ep_size: 64", "ep_size: 1")), "has nobody to dispatch to"),
    "mode without DeepEP": (flags("--sglang-moe-a2a-backend", "none"), "deepep_mode auto without DeepEP"),
    "normal mode in decode": (in_group("decode", ("mode: low_latency", "mode: normal")), "cannot be captured in CUDA graphs"),
    "a mode of no name": (in_group("decode", ("mode: low_latency", "mode: fast")), "is one of auto, low_latency, normal"),
    # Dense layers, experts, heads, blocks.
    "dense layers over 2": (
        in_group("decode", ("moe_dense_tp_size: 1", "moe_dense_tp_size: 2")),
        "SGLang takes none, 1 or the",
    ),
    "dense layers over 32": (
        in_group("prefill", ("moe_dense_tp_size: 1", "moe_dense_tp_size: 32")),
        "none, 1 or the engine's 64",
    ),
    "dense layers over all ranks": (
        in_group("decode", ("moe_dense_tp_size: 1", "moe_dense_tp_size: 64")),
        "width 12288, 192 columns each, which cuts FP8",
    ),
    "dense layers by default": (
        all_of(
            without("--sglang-moe-dense-tp-size"),
            in_group("prefill", ("          moe_dense_tp_size: 1\n", "")),
            in_group("decode", ("          moe_dense_tp_size: 1\n", "")),
        ),
        "64 ranks share the dense feed-forward of width 12288, 192 columns each",
    ),
    "experts over 24": (
        in_group("decode", ("ep_size: 64", "ep_size: 24")),
        "ep_size 24 must divide the tensor parallel size 64",
    ),
    "two ranks an expert": (
        in_group("decode", ("ep_size: 64", "ep_size: 2")),
        "32 ranks share an expert of width 2048, 64 each",
    ),
    "shared expert in parts": (
        all_of(
            flags("--sglang-moe-a2a-backend", "none"),
            lambda r: (
                r.with_yaml("          deepep_mode: auto\n", "")
                .with_yaml("          deepep_mode: low_latency\n", "")
                .without("--sglang-deepep-mode")
            ),
        ),
        "64 ranks share the shared expert of width 2048, 32 each",
    ),
    "attention over 3": (
        all_of(
            in_group(
                "decode", ("per_engine: 64", "per_engine: 48"), ("dp_size: 64", "dp_size: 16"), ("ep_size: 64", "ep_size: 16")
            ),
        ),
        "64 heads do not divide over 3 attention ranks",
    ),
    "ranks that do not divide": (
        in_group("decode", ("dp_size: 64", "dp_size: 48")),
        "dp_size 48 must divide the tensor parallel",
    ),
    "attention DP without its switch": (
        all_of(
            in_group("decode", ("          enable_dp_attention: true\n", "")),
            without("--sglang-enable-dp-attention"),
        ),
        "dp_size 64 means attention data parallelism here",
    ),
    "pipeline of 3": (flags("--sglang-pp-size", "3"), "64 GPUs are not tensor parallel 21 x pipeline parallel 3"),
    "size of no number": (in_group("decode", ("ep_size: 64", "ep_size: all")), "ep_size is 'all', not a whole number"),
    "size 0": (in_group("decode", ("dp_size: 64", "dp_size: 0")), "dp_size is 0; sizes start at 1"),
    "two sizes": (
        in_group("decode", ("dp_size: 64", "dp_size: 64\n          data_parallel_size: 32")),
        "say different things; keep one",
    ),
    # Groups.
    "engines of 12 GPUs": (
        in_group("decode", ("per_engine: 64", "per_engine: 12"), ("dp_size: 64", "dp_size: 12"), ("ep_size: 64", "ep_size: 4")),
        "12 GPUs do not fill 2 nodes of 8",
    ),
    "across two nodes": (
        all_of(
            in_group(
                "prefill",
                ("num_gpus: 64", "num_gpus: 66"),
                ("per_engine: 64", "per_engine: 6"),
                ("dp_size: 64", "dp_size: 6"),
                ("ep_size: 64", "ep_size: 2"),
            ),
            in_group(
                "decode",
                ("num_gpus: 192", "num_gpus: 190"),
                ("per_engine: 64", "per_engine: 2"),
                ("dp_size: 64", "dp_size: 2"),
                ("ep_size: 64", "ep_size: 2"),
            ),
        ),
        "would lie on GPUs 6 to 11, across two nodes of 8",
    ),
    "a wide engine inside a node": (
        all_of(
            in_group(
                "prefill",
                ("num_gpus: 64", "num_gpus: 4"),
                ("per_engine: 64", "per_engine: 4"),
                ("dp_size: 64", "dp_size: 4"),
                ("ep_size: 64", "ep_size: 4"),
            ),
            in_group(
                "decode",
                ("num_gpus: 192", "num_gpus: 252"),
                ("per_engine: 64", "per_engine: 84"),
                ("dp_size: 64", "dp_size: 84"),
                ("ep_size: 64", "ep_size: 84"),
            ),
        ),
        "84 GPUs do not fill",
    ),
    "two models, the trained one second": (
        lambda r: replace(
            r,
            yaml="sglang:\n" + JUDGE + r.yaml.replace("num_gpus: 192", "num_gpus: 128").replace("sglang:\n", ""),
        ),
        "judge stands first, so prompts would go to it, and default is the model that is trained",
    ),
    "two models of which none is trained": (
        lambda r: replace(
            r,
            yaml=r.yaml.replace("num_gpus: 192", "num_gpus: 128").replace(
                "  - name: default\n", "  - name: default\n    update_weights: false\n"
            )
            + JUDGE,
        ),
        "update_weights is false for default, judge, so no engine",
    ),
    "placeholders alone": (
        lambda r: replace(
            r, yaml="sglang:\n  - name: default\n    server_groups: [{worker_type: placeholder, num_gpus: 256}]\n"
        ),
        "has only placeholder groups",
    ),
    "no group": (lambda r: replace(r, yaml="sglang:\n  - name: default\n    server_groups: []\n"), "= 0, but rollout has 256"),
    "a model without weights": (
        lambda r: r.with_yaml("  - name: default\n", "  - name: default\n    update_weights: false\n"),
        "no engine would get what is trained",
    ),
    "regular beside prefill": (
        lambda r: r.with_yaml("num_gpus: 192", "num_gpus: 128").with_yaml(
            "      - worker_type: decode", "      - worker_type: regular\n        num_gpus: 64\n      - worker_type: decode"
        ),
        "mixes regular groups with prefill and decode groups",
    ),
    "an encoder": (
        lambda r: r.with_yaml("num_gpus: 192", "num_gpus: 128").with_yaml(
            "      - worker_type: decode", "      - worker_type: encoder\n        num_gpus: 64\n      - worker_type: decode"
        ),
        "encoder groups serve image models",
    ),
    "an address in an override": (
        in_group("decode", ("dp_size: 64", "dp_size: 64\n          port: 80")),
        "are set per process by",
    ),
    "a token in an override": (in_group("decode", ("dp_size: 64", "dp_size: 64\n          api-key: x")), "api_key are set per"),
    "an unknown override": (in_group("decode", ("max_bs: 12", "max_batch: 12")), "has no such option"),
    "another unknown override": (in_group("prefill", ("enable_dp_lm_head", "enable_lm_head_dp")), "has no such option"),
    "an override of the wrong type": (in_group("decode", ("requests: 768", "requests: lots")), "takes a value of type int"),
    # What prefill and decode share.
    "caches differ": (
        in_group("prefill", ("mode: auto", "mode: auto\n          kv_cache_dtype: bf16")),
        "differ on the KV cache",
    ),
    "pages differ": (in_group("decode", ("dp_size: 64", "dp_size: 64\n          page_size: 128")), "pages of 64"),
    "speculation in one": (
        in_group("prefill", ("mode: auto", "mode: auto\n          speculative_algorithm: NGRAM")),
        "speculative_algorithm: prefill NGRAM",
    ),
    "sent one way, awaited another": (
        in_group("decode", ("dp_size: 64", "dp_size: 64\n          disaggregation_transfer_backend: nixl")),
        "receives by nixl",
    ),
    "fa3 over an FP8 cache": (flags("--sglang-nsa-decode-backend", "fa3"), "decode backend fa3 reads a bf16 cache"),
    "fa3 over an FP8 cache in prefill": (
        flags("--sglang-nsa-prefill-backend", "fa3"),
        "prefill backend fa3 reads a bf16 cache",
    ),
    "flashmla_kv over bf16": (
        flags("--sglang-kv-cache-dtype", "bfloat16"),
        "flashmla_kv reads an FP8 cache, the KV cache is bf16",
    ),
    "cache e5m2": (flags("--sglang-kv-cache-dtype", "fp8_e5m2"), "has no sparse-attention kernel"),
    "pages of 1": (flags("--sglang-page-size", "1"), "page_size 1; sparse attention works on pages of 64"),
    "dense attention": (flags("--sglang-attention-backend", "triton"), "is not sparse attention"),
    "fraction 1": (flags("--sglang-mem-fraction-static", "1"), "mem_fraction_static 1 is no share of the GPU"),
    "fraction 70": (flags("--sglang-mem-fraction-static", "70"), "mem_fraction_static 70 is no share of the GPU"),
    # Drafts.
    "a chain with a token too few": (flags("--sglang-speculative-num-draft-tokens", "4"), "of 4 steps has 5 tokens, not 4"),
    "a chain without its steps": (
        without("--sglang-speculative-num-steps"),
        "wants num_steps, eagle_topk and num_draft_tokens",
    ),
    "EAGLE3 without a draft": (flags("--sglang-speculative-algorithm", "EAGLE3"), "EAGLE3 needs a draft model"),
    # The router.
    "a policy that none has": (
        flags("--router-policy", "robin"),
        "--router-policy wants one of cache_aware, consistent_hashing",
    ),
    "a policy misspelled": (flags("--router-policy", "cache-aware"), "got 'cache-aware'; did you mean cache_aware?"),
    "a router flag misspelled": (flags("--router-polcy", "x"), "unknown flag --router-polcy; did you mean --router-policy?"),
    "a router flag of no meaning": (flags("--router-colour", "x"), "unknown flag --router-colour"),
    "a router number": (flags("--router-queue-size", "long"), "--router-queue-size wants a number (int), got 'long'"),
    "a router switch with a value": (flags("--router-dp-aware", "yes"), "--router-dp-aware is a switch and takes no value"),
    "a router flag without its value": (flags("--router-log-level"), "--router-log-level wants a value"),
    "a router log level": (flags("--router-log-level", "trace"), "--router-log-level wants one of debug, error, info, warn"),
    # The job's environment.
    "NVSHMEM may load its NCCL": (unset("NVSHMEM_DISABLE_NCCL"), "NVSHMEM_DISABLE_NCCL is not set"),
    "NVSHMEM does load its NCCL": (env(NVSHMEM_DISABLE_NCCL="0"), "NVSHMEM_DISABLE_NCCL is 0"),
    "NVLink multicast": (env(NCCL_NVLS_ENABLE="1"), "NCCL_NVLS_ENABLE is 1: NCCL would hold memory"),
    "NCCL keeps memory": (env(NCCL_CUMEM_ENABLE="1"), "NCCL_CUMEM_ENABLE is 1: NCCL would hold memory"),
    "three interfaces": (env(GLOO_SOCKET_IFNAME="eth1", TP_SOCKET_IFNAME="ib0"), "would go over different interfaces"),
    "two interfaces": (env(NCCL_SOCKET_IFNAME="ib0"), "would go over different interfaces"),
    "the first node is everybody": (env(MASTER_ADDR="127.0.0.1"), "MASTER_ADDR is 127.0.0.1, which every one of the 32 nodes"),
    "the first node is localhost": (env(MASTER_ADDR="localhost"), "MASTER_ADDR is localhost"),
    "expandable segments": (env(PYTORCH_CUDA_ALLOC_CONF="expandable_segments:True"), "expandable segments and memory that is"),
    "expandable segments, new name": (env(PYTORCH_ALLOC_CONF="a:1,expandable_segments: true"), "PYTORCH_ALLOC_CONF is"),
    "seven RDMA devices": (
        flags("--sglang-disaggregation-ib-device", ",".join(f"mlx5_{n}" for n in range(7))),
        "7 RDMA devices for the 8 GPUs",
    ),
    "three RDMA devices": (flags("--sglang-disaggregation-ib-device", "a,b,c"), "3 RDMA devices for the 8 GPUs"),
    "an RDMA device twice": (
        flags("--sglang-disaggregation-ib-device", ",".join(f"mlx5_{n % 7}" for n in range(8))),
        "names mlx5_0 more than once",
    ),
    "a variable misspelled": (env(SGLANG_DEEPEP_NUM_MAX_DISPATCH_TOKEN_PER_RANK="64"), f"did you mean {DISPATCH}?"),
    "another variable misspelled": (env(NVSHMEM_DISABLE_NCLL="1"), "did you mean NVSHMEM_DISABLE_NCCL?"),
    "a third variable misspelled": (env(NCCL_SOKCET_IFNAME="eth0"), "did you mean NCCL_SOCKET_IFNAME?"),
    # The trainer.
    "router loss": (flags("--moe-aux-loss-coeff", "0.01"), "--moe-aux-loss-coeff 0.01 / --moe-z-loss-coeff 0"),
    "z loss": (flags("--moe-z-loss-coeff", "1e-3"), "has no router loss"),
    "dropout": (flags("--attention-dropout", "0.1"), "--attention-dropout 0.1: dropout would separate"),
    "layernorm 1p": (flags("--apply-layernorm-1p"), "--apply-layernorm-1p is for models trained with it"),
    "warm-up longer than the decay": (
        flags("--lr-warmup-iters", "100000", "--lr-decay-iters", "3000"),
        "warms up for 6400000 samples, but the run has 192000",
    ),
    "warm-up as long as the run": (flags("--lr-warmup-iters", "3000"), "warms up for 192000 samples, but the run has 192000"),
    "warm-up of all": (flags("--lr-warmup-fraction", "1"), "warms up for 192000 samples, but the run has 192000"),
    "WSD without its decay": (flags("--lr-decay-style", "WSD"), "give --lr-wsd-decay-iters"),
    "WSD longer than the run": (
        flags("--lr-decay-style", "WSD", "--lr-wsd-decay-iters", "4000"),
        "4000 steps are longer than the whole decay of 3000",
    ),
    "least learning rate above": (flags("--min-lr", "1e-5"), "--min-lr 1e-05 is above --lr 1e-06"),
    "offload in float32": (flags("--params-dtype", "fp32"), "keeps float32 copies of bf16 parameters"),
    "a share of no offload": (
        all_of(
            without("--optimizer-cpu-offload", "--overlap-cpu-optimizer-d2h-h2d"), flags("--optimizer-offload-fraction", "0.5")
        ),
        "has no effect without --optimizer-cpu-offload",
    ),
    "recomputation without a method": (without("--recompute-method"), "pass uniform or block"),
    "recomputation without a number": (without("--recompute-num-layers"), "needs --recompute-num-layers"),
    "uniform recomputation in threes": (
        flags("--recompute-num-layers", "3"),
        "a pipeline stage has 14 layers, no multiple of it",
    ),
    "selective by blocks": (flags("--recompute-granularity", "selective"), "belongs to --recompute-granularity full"),
    "a stage of 7 layers in twos": (
        flags("--decoder-first-pipeline-num-layers", "14", "--recompute-num-layers", "4"),
        "a pipeline stage has 14 layers",
    ),
    "the draft layer on tied weights": (
        all_of(flags("--mtp-num-layers", "1", "--enable-mtp-training"), without("--untie-embeddings-and-output-weights")),
        "ties embedding and output layer",
    ),
    "two draft layers": (
        flags("--mtp-num-layers", "2", "--enable-mtp-training"),
        "one multi-token-prediction layer can be built",
    ),
    # Layout.
    "without sequence parallelism": (
        without("--sequence-parallel"),
        "--tensor-model-parallel-size 4 without --sequence-parallel",
    ),
    "without contiguous shards": (without("--allgather-cp"), "needs contiguous shards; pass --allgather-cp"),
    "without its layer spec": (without("--spec"), "glm_moe_dsa needs the sparse-attention layer spec"),
    "with another layer spec": (
        flags("--spec", "made.up", "get_spec"),
        "needs the sparse-attention layer spec, not made.up get_spec",
    ),
    "15 and 15": (
        flags("--decoder-first-pipeline-num-layers", "15", "--decoder-last-pipeline-num-layers", "15"),
        "stage 1 starts at layer 16",
    ),
    "16 and 14": (
        flags("--decoder-first-pipeline-num-layers", "16", "--decoder-last-pipeline-num-layers", "14"),
        "stage 1 starts at layer 17",
    ),
    "78 over 7 others": (without("--decoder-last-pipeline-num-layers"), "64 layers over the 7 other stages"),
    "virtual stages on shared layers": (
        flags("--num-virtual-stages-per-pipeline-rank", "2"),
        "which reuses the indices of layer",
    ),
    "EP 64": (flags("--expert-model-parallel-size", "64"), "expert-TP 1 x EP 64 x PP 8"),
    "EP 12": (
        flags("--expert-model-parallel-size", "12"),
        "--num-experts 256 is no multiple of --expert-model-parallel-size 12",
    ),
    "expert TP 3": (flags("--expert-tensor-parallel-size", "3"), "--expert-tensor-parallel-size 3 does not divide"),
    "TP 5": (flags("--tensor-model-parallel-size", "5"), "--num-attention-heads 64 is no multiple"),
    "TP 128": (flags("--tensor-model-parallel-size", "128"), "--num-attention-heads 64 is no multiple"),
    "33 nodes": (flags("--actor-num-nodes", "33"), "264 training GPUs are no multiple of TP 4 x PP 8 x CP 8"),
    "a layout string that ends early": (
        all_of(
            without("--decoder-first-pipeline-num-layers", "--decoder-last-pipeline-num-layers"),
            flags("--pipeline-model-parallel-layout", "10,12,8,12,8,12,8,7"),
        ),
        "places 77 layers, the model has 78",
    ),
    "a layout string of strange letters": (
        all_of(
            without("--decoder-first-pipeline-num-layers", "--decoder-last-pipeline-num-layers"),
            flags("--pipeline-model-parallel-layout", "Ex*10|t*68L"),
        ),
        "it is made of E (embedding), t (layer)",
    ),
    "a stage without layers": (
        all_of(
            without("--decoder-first-pipeline-num-layers", "--decoder-last-pipeline-num-layers"),
            flags("--pipeline-model-parallel-layout", "E|t*14|t*8|t*12|t*8|t*12|t*16|t*8L"),
        ),
        "pipeline stages [0] hold no layer",
    ),
    # Batches.
    "a step over 3 ranks": (
        all_of(flags("--global-batch-size", "64", "--actor-num-nodes", "96"), without("--use-dynamic-batch-size")),
        "a step's 64 samples do not divide over 3 data-parallel ranks",
    ),
    "48 of 64": (flags("--global-batch-size", "48"), "64 samples (8 x 8) are no multiple of --global-batch-size 48"),
    "three steps": (flags("--num-steps-per-rollout", "3"), "do not divide into --num-steps-per-rollout 3"),
    "padding above the batch": (flags("--data-pad-size-multiplier", "4096"), "padded to a multiple of 131,072"),
    "fewer prompts than wanted": (flags("--over-sampling-batch-size", "4"), "is below --rollout-batch-size 8"),
    # Names.
    "an estimator of no name": (flags("--advantage-estimator", "grop"), "wants one of grpo, gspo, cispo"),
    "another KL": (flags("--kl-loss-type", "k4"), "wants one of k1, k2, k3, low_var_kl"),
    "a decay of no name": (flags("--lr-decay-style", "exponential"), "wants one of constant, linear"),
    "an unknown flag": (flags("--fuse-everything"), "unknown flag --fuse-everything"),
    "a value too many": (flags("--lr", "1e-6", "1e-5"), "--lr wants exactly 1, got '1e-6 1e-5'"),
    "the port": (flags("--sglang-port", "1"), "--sglang-port is set by slime itself"),
    "lr inf": (flags("--lr", "inf"), "--lr must be a finite number, got inf"),
    "clip bounds crossed": (flags("--tis-clip-low", "3"), "--tis-clip-low 3.0 is above --tis-clip 2.0"),
    "negative clip": (flags("--eps-clip", "-0.2"), "--eps-clip must be at least 0"),
    "no buffer": (flags("--update-weight-buffer-size", "0"), "--update-weight-buffer-size must be at least 1"),
    "negative padding": (flags("--data-pad-size-multiplier", "-1"), "--data-pad-size-multiplier must be at least 1"),
    # Rewards, files, lengths.
    "a grader misspelled": (flags("--rm-type", "deepscalar"), "did you mean deepscaler?"),
    "another grader misspelled": (flags("--rm-type", "gpaq"), "did you mean gpqa?"),
    "nobody grades": (without("--rm-type"), "nothing grades the samples"),
    "a mapping without its key": (flags("--rm-type", "dapo"), "--rm-type dapo gives a mapping with score and acc"),
    "a mapping's wrong key": (
        flags("--rm-type", "dapo", "--reward-key", "points"),
        "--reward-key is points; pass --reward-key score",
    ),
    "a label that no column has": (all_of(flags("--rm-type", "math"), without("--label-key")), "compares with a label"),
    "f1 without a label": (all_of(flags("--rm-type", "f1"), without("--label-key")), "compares with a label"),
    "a server without an address": (flags("--rm-type", "remote_rm"), "give its address with --rm-url"),
    "a router without a port": (flags("--sglang-router-ip", "10.0.0.7"), "its port is not said; add --sglang-router-port"),
    "options for another's router": (
        flags("--sglang-router-ip", "10.0.0.7", "--sglang-router-port", "3000", "--router-policy", "round_robin"),
        "leave --router-policy out",
    ),
    "weights on disk without a folder": (flags("--update-weight-transport", "disk"), "has no folder to write to"),
    "differences without files": (flags("--update-weight-mode", "delta"), "delta travels in files alone"),
    "differences on shared GPUs": (
        flags(*DISK, "--update-weight-mode", "delta", "--update-weight-local-checkpoint-dir", "/local"),
        "keeps an engine's weights from one version to the next",
    ),
    "differences to nothing": (flags(*DISK, "--update-weight-mode", "delta"), "changes a copy of the serving checkpoint"),
    "published over the reference": (
        flags(*DISK[:3], "/BASE_DIR/GLM-5.2_torch_dist/"),
        "is --ref-load, which would be overwritten",
    ),
    "rehearsed, from disk": (flags(*DISK, "--rehearsed", "/report.json"), "--update-weight-transport disk has none"),
    "saving into the checkpoint": (
        flags("--save", "/BASE_DIR/GLM-5.2-FP8"),
        "is --hf-checkpoint, which a checkpoint would overwrite",
    ),
    "saving into the reference": (flags("--save", "/BASE_DIR/GLM-5.2_torch_dist/"), "is --ref-load, which a checkpoint would"),
    "an export into the checkpoint": (flags("--save-hf", "/BASE_DIR/GLM-5.2-FP8"), "is --hf-checkpoint; name another folder"),
    "a bound without checkpoints": (
        all_of(flags("--keep-checkpoints", "2"), without("--save", "--save-interval")),
        "; pass --save",
    ),
    "a signal that saves nowhere": (
        all_of(flags("--save-on-signal"), without("--save", "--save-interval")),
        "--save-on-signal has nowhere to save; pass --save",
    ),
    "a time for a signal that is not heard": (
        flags("--save-on-signal-seconds", "60"),
        "--save-on-signal-seconds 60 has no effect without --save-on-signal; add it",
    ),
    "restarts without snapshots": (
        flags("--max-trainer-restarts", "5"),
        "--max-trainer-restarts 5 has no effect without --snapshot-interval; add it",
    ),
    "no copies of no snapshots": (flags("--no-snapshot-peer"), "--no-snapshot-peer has no effect without --snapshot-interval"),
    "snapshots of no trainer": (
        flags("--snapshot-interval", "1", "--debug-rollout-only"),
        "--snapshot-interval 1: --debug-rollout-only has no trainer; leave one of them out",
    ),
    "one snapshot in one place": (
        flags("--snapshot-interval", "2", "--snapshot-versions", "1", "--no-snapshot-peer"),
        "--snapshot-versions 1: while the only snapshot is written none is whole",
    ),
    "differences that new ranks do not know": (
        flags(
            "--snapshot-interval",
            "2",
            "--snapshot-versions",
            "1",
            "--update-weight-transport",
            "disk",
            "--update-weight-disk-dir",
            "/BASE_DIR/w",
            "--update-weight-mode",
            "delta",
        ),
        "--snapshot-interval 2: differences rest on what trainer ranks have sent before",
    ),
    "a window that the model has not": (flags("--window-size", "4096,0"), "--window-size (4096, 0) would make another model"),
    "a softmax scale of its own": (flags("--softmax-scale", "0.1"), "--softmax-scale 0.1 would make another model"),
    "groups of experts": (flags("--moe-router-num-groups", "4"), "--moe-router-num-groups 4 would make another model"),
    "a stretch of RoPE": (flags("--mscale-all-dim", "0.7"), "--mscale-all-dim is 0.7 here"),
    "pairs of neighbours in RoPE's words": (flags("--rope-type", "spiral"), "--rope-type is spiral here; leave it out"),
    "an export's unknown field": (flags("--save-hf", "/out/{iteration}"), "{iteration} is filled in by nobody"),
    "an export's open brace": (flags("--save-hf", "/out/{rollout_id"), "may stand in braces"),
    "responses without an end": (without("--rollout-max-response-len"), "pass --rollout-max-response-len"),
    "an evaluation of millions": (
        flags("--eval-prompt-data", "a", "/a.jsonl", "--eval-interval", "5", "--eval-max-response-len", "4000000"),
        "max_response_len 4000000 leaves no room for a prompt",
    ),
    # What SGLang asserts of its own arguments.
    "chunks of no whole page": (
        in_group("prefill", ("size: 131072", "size: 100000")),
        "is 1562 tokens, no multiple of page_size 64",
    ),
    "chunks smaller than the ranks": (
        in_group("prefill", ("size: 131072", "size: 32")),
        "is 0 tokens, no multiple of page_size",
    ),
    "fewer requests than ranks": (
        in_group("decode", ("requests: 768", "requests: 63")),
        "leaves a rank none; give at least 64",
    ),
    "a context beyond the positions": (flags("--sglang-context-length", "2000000"), "is above the model's 1048576 positions"),
}
