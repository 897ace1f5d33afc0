"""Launchers in the habits of the public slime, in our own words: what they do around a training command, and what they pass.

Only habits and flags are theirs; numbers are of the released models and of common recipes.
"""

# ruff: noqa: E501 (a launcher has long lines)

from __future__ import annotations

from dataclasses import dataclass, field

CLEAN_UP = """\
# anything that still runs from an earlier attempt
pkill -9 sglang
sleep 3
ray stop --force
pkill -9 ray
pkill -9 python
sleep 3
"""
NVLINKS = """\
NVLINK_COUNT=$(nvidia-smi topo -m 2>/dev/null | grep -o 'NV[0-9][0-9]*' | wc -l)
if [ "$NVLINK_COUNT" -gt 0 ]; then
    HAS_NVLINK=1
else
    HAS_NVLINK=0
fi
echo "HAS_NVLINK: $HAS_NVLINK (detected $NVLINK_COUNT NVLink references)"
"""
BESIDE = 'SCRIPT_DIR="$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")" &>/dev/null && pwd)"\n'
HEAD = (
    'export MASTER_ADDR=${MASTER_ADDR:-"127.0.0.1"}\n'
    "ray start --head --node-ip-address ${MASTER_ADDR} --num-gpus 8 --disable-usage-stats "
    "--dashboard-host=0.0.0.0 --dashboard-port=8265\n"
)
QUOTED_JSON = """\
RUNTIME_ENV_JSON="{
  \\"env_vars\\": {
    \\"PYTHONPATH\\": \\"/root/Megatron-LM/:${SCRIPT_DIR}\\",
    \\"CUDA_DEVICE_MAX_CONNECTIONS\\": \\"1\\",
    \\"NCCL_NVLS_ENABLE\\": \\"${HAS_NVLINK:-0}\\"
  }
}"
"""
HEREDOC_JSON = """\
RUNTIME_ENV_JSON=$(cat <<EOF
{
  "env_vars": {
    "PYTHONPATH": "/root/Megatron-LM/",
    "CUDA_DEVICE_MAX_CONNECTIONS": "1",
    "MASTER_ADDR": "${MASTER_ADDR}",
    "no_proxy": "localhost,127.0.0.1,${MASTER_ADDR}"
  }
}
EOF
)
"""
SINGLE_QUOTED = """\
RUNTIME_ENV_JSON='{
  "env_vars": {
    "PYTHONPATH": "/root/Megatron-LM/",
    "no_proxy": "localhost,127.0.0.1,${MASTER_ADDR}",
    "MASTER_ADDR": "${MASTER_ADDR}",
    "CUDA_DEVICE_MAX_CONNECTIONS": "1"
  }
}'
"""
"""In which the shell fills nothing in."""
GLM_JSON = QUOTED_JSON.replace('{\n    \\"PYTHON', '{\n    \\"NVSHMEM_DISABLE_NCCL\\": \\"1\\",\n    \\"PYTHON')
SUBMIT = """\
ray job submit --address="http://127.0.0.1:8265" \\
   --runtime-env-json="${RUNTIME_ENV_JSON}" \\
   -- python3 PROGRAM \\
   CLUSTER \\
   ARRAYS
"""
TORN = SUBMIT.replace("CLUSTER \\\n", "CLUSTER\n")
"""The line before the arrays lacks its backslash."""
WORKERS = """\
for WORKER_IP in $(awk '{print $1}' /root/mpi_rack_hostfile); do
  if [[ "$WORKER_IP" == "$MLP_WORKER_0_HOST" ]]; then
    continue
  fi
  echo "Starting Ray worker on ${WORKER_IP}"
  ssh root@"${WORKER_IP}" \\
    "pkill -9 sglang ; ray stop --force ; pkill -9 python ; ray start --address=${MASTER_ADDR}:6379 --num-gpus 8 --node-ip-address ${WORKER_IP}" &
done
wait
"""
WANTS_A_FOLDER = """\
if [ -z "${BASE_FOLDER}" ]; then
  echo "BASE_FOLDER is not set. Please set it to the folder of your checkpoints."
  exit 1
fi
"""

GRPO = "--advantage-estimator grpo --use-kl-loss --kl-loss-coef 0.00 --kl-loss-type low_var_kl --entropy-coef 0.00 --eps-clip 0.2 --eps-clip-high 0.28"
ADAM = "--optimizer adam --lr 1e-6 --lr-decay-style constant --weight-decay 0.1 --adam-beta1 0.9 --adam-beta2 0.98"
OFFLOADED = f"{ADAM} --optimizer-cpu-offload --overlap-cpu-optimizer-d2h-h2d --use-precision-aware-optimizer"
MISC = (
    "--attention-dropout 0.0 --hidden-dropout 0.0 --accumulate-allreduce-grads-in-fp32 --attention-softmax-in-fp32 "
    "--attention-backend flash"
)
RECOMPUTE = "--recompute-granularity full --recompute-method uniform --recompute-num-layers 1"
DAPO = (
    "--prompt-data ROOT/dapo-math-17k/dapo-math-17k.jsonl --input-key prompt --label-key label --apply-chat-template "
    "--rollout-shuffle --rm-type deepscaler --num-rollout 3000 --rollout-batch-size 32 --n-samples-per-prompt 8 "
    "--rollout-max-response-len 8192 --rollout-temperature 1 --global-batch-size 256 --balance-data"
)
AIME = (
    "--eval-interval 20 --eval-prompt-data aime ROOT/aime-2024/aime-2024.jsonl --n-samples-per-eval-prompt 16 "
    "--eval-max-response-len 16384 --eval-top-p 1"
)
WANDB = "--use-wandb --wandb-project slime-dev --wandb-group GROUP --wandb-key ${WANDB_KEY}"


def perf(tp: int, pp: int, cp: int, ep: int, *, tokens: int, more: str = "") -> str:
    return (
        f"--tensor-model-parallel-size {tp} --sequence-parallel --pipeline-model-parallel-size {pp} --context-parallel-size {cp} "
        f"--expert-model-parallel-size {ep} --expert-tensor-parallel-size 1 {RECOMPUTE} --use-dynamic-batch-size "
        f"--max-tokens-per-gpu {tokens} {more}"
    )


@dataclass(frozen=True)
class Foreign:
    """One launcher; its text is `text()`."""

    model: str
    arrays: dict[str, str]
    cluster: str = "--actor-num-nodes 1 --actor-num-gpus-per-node 8 --colocate"
    program: str = "train.py"
    source: str = 'source "${SCRIPT_DIR}/models/MODEL.sh"\n'
    before: tuple[str, ...] = (CLEAN_UP, "set -ex\n", "export PYTHONBUFFERED=16\n", NVLINKS, BESIDE)
    around: tuple[str, ...] = (HEAD, QUOTED_JSON)
    submit: str = SUBMIT
    root: str = "/root"
    reads: tuple[str, ...] = field(default=())
    """Words that must be in the written launcher."""
    gpu: str = "h100"
    """Kind of the GPUs on which it fits: of a trillion parameters a sixteenth is 70 GB."""

    def text(self) -> str:
        arrays = "".join(f"{name}=(\n{_lines(words)})\n\n" for name, words in self.arrays.items())
        names = " \\\n   ".join(f"${{{name}[@]}}" for name in ("MODEL_ARGS", *self.arrays))
        body = "\n".join((*self.before, self.source, arrays, *self.around, self.submit))
        for word, meant in (("MODEL", self.model), ("PROGRAM", self.program), ("CLUSTER", self.cluster), ("ARRAYS", names)):
            body = body.replace(f"{word}.sh", f"{meant}.sh") if word == "MODEL" else body.replace(word, meant)
        return "#!/bin/bash\n\n" + body.replace("ROOT", self.root)


def _lines(words: str) -> str:
    """One flag a line, as arrays are written; a commented one among them."""
    lines: list[str] = []
    for word in words.split():
        if word.startswith("--") or not lines:
            lines.append(word)
        else:
            lines[-1] += f" {word}"
    return "".join(f"   {line}\n" for line in [*lines[:1], "#--save-debug-rollout-data /root/x.pt", *lines[1:]])


def recipe(model: str, folder: str, performance: str, engine: str, **more: str) -> dict[str, str]:
    arrays = {
        "CKPT_ARGS": f"--hf-checkpoint ROOT/{folder} --ref-load ROOT/{folder}_torch_dist --load ROOT/{folder}_slime/ "
        f"--save ROOT/{folder}_slime/ --save-interval 20",
        "ROLLOUT_ARGS": DAPO, "EVAL_ARGS": AIME, "PERF_ARGS": performance, "GRPO_ARGS": GRPO, "OPTIMIZER_ARGS": ADAM,
        "WANDB_ARGS": WANDB.replace("GROUP", f"{model}-run"), "SGLANG_ARGS": engine, "MISC_ARGS": MISC,
    }  # fmt: skip
    return {name: words for name, words in {**arrays, **more}.items() if words}


EAGLE = (
    "--sglang-speculative-algorithm EAGLE --sglang-speculative-num-steps 3 --sglang-speculative-eagle-topk 1 "
    "--sglang-speculative-num-draft-tokens 4"
)
GSM8K = (
    "--prompt-data ROOT/gsm8k/train.parquet --input-key messages --label-key label --apply-chat-template --rollout-shuffle "
    "--rm-type math --num-rollout 100 --rollout-batch-size 32 --n-samples-per-prompt 8 --rollout-max-response-len 1024 "
    "--rollout-temperature 1 --over-sampling-batch-size 64 --global-batch-size 256 "
    "--dynamic-sampling-filter-path slime.rollout.filter_hub.dynamic_sampling_filters.check_reward_nonzero_std"
)
SFT = (
    "--rollout-function-path slime.rollout.sft_rollout.generate_rollout --prompt-data ROOT/openhermes2_5.parquet --input-key messages "
    "--rollout-shuffle --num-epoch 3 --rollout-batch-size 128 --global-batch-size 128 --loss-type sft_loss "
    "--calculate-per-token-loss --disable-compute-advantages-and-returns --debug-train-only"
)
COSINE = (
    "--optimizer adam --lr 1e-5 --lr-decay-style cosine --min-lr 1e-6 --lr-warmup-fraction 0.1 --weight-decay 0.1 "
    "--adam-beta1 0.9 --adam-beta2 0.95"
)
YAML = """\
SGLANG_CONFIG=/root/configs/pd.yaml
mkdir -p "$(dirname "$SGLANG_CONFIG")"
cat > "$SGLANG_CONFIG" <<EOF
sglang:
  - name: default
    server_groups:
      - worker_type: prefill
        num_gpus: 2
        num_gpus_per_engine: 2
      - worker_type: decode
        num_gpus: 6
        num_gpus_per_engine: 2
EOF
"""

FOREIGN: dict[str, Foreign] = {
    "qwen3-4B": Foreign(
        "qwen3-4B",
        recipe("qwen3-4B", "Qwen3-4B", perf(2, 1, 1, 1, tokens=9216), "--rollout-num-gpus-per-engine 2 --sglang-mem-fraction-static 0.7"),
        reads=('source "${SLIME_ROOT}/scripts/models/qwen3-4B.sh"', "SGLANG_ARGS=(\n   --rollout-num-gpus-per-engine 2\n"),
    ),
    "qwen3-4B with an instruct model's script": Foreign(
        "qwen3-4B-Instruct-2507",
        recipe("qwen3-4B", "Qwen3-4B-Instruct-2507", perf(2, 1, 1, 1, tokens=9216), "--rollout-num-gpus-per-engine 2"),
        reads=('scripts/models/qwen3-4B-2507.sh"',),
    ),
    "qwen3-8B, a prefill and three decode engines": Foreign(
        "qwen3-8B",
        recipe("qwen3-8B", "Qwen3-8B", perf(2, 1, 1, 1, tokens=9216), "--sglang-config $SGLANG_CONFIG"),
        before=("set -euo pipefail\n", BESIDE, YAML),
        reads=("--sglang-config \"${RUN_DIR}/pd.yaml\"", "worker_type: decode", "<<'END_OF_FILE'"),
    ),
    "qwen3-14B started without Ray's job": Foreign(
        "qwen3-14B",
        recipe("qwen3-14B", "Qwen3-14B", perf(4, 1, 1, 1, tokens=8192), "--rollout-num-gpus-per-engine 4"),
        around=("export NCCL_DEBUG=INFO\n", "ray start --head --num-gpus 8\n"),
        submit="nohup /opt/conda/bin/python3 PROGRAM CLUSTER \\\n   ARRAYS > /root/train.log 2>&1 &\nwait\n",
        reads=('"NCCL_DEBUG=INFO"',),
    ),
    "qwen3-32B in a shell of its own": Foreign(
        "qwen3-32B",
        recipe("qwen3-32B", "Qwen3-32B", perf(8, 1, 1, 1, tokens=8192), "--rollout-num-gpus-per-engine 8", OPTIMIZER_ARGS=OFFLOADED),
        around=(HEAD, QUOTED_JSON, "ALL=\"ARRAYS\"\n"),
        submit='ray job submit --address http://127.0.0.1:8265 --runtime-env-json "${RUNTIME_ENV_JSON}" -- '
        'bash -c "cd /root/slime && python3 PROGRAM CLUSTER $ALL"\n',
    ),
    "qwen3-30B-A3B": Foreign(
        "qwen3-30B-A3B",
        recipe(
            "qwen3-30B-A3B", "Qwen3-30B-A3B", perf(4, 1, 1, 8, tokens=20480),
            "--rollout-num-gpus-per-engine 8 --sglang-mem-fraction-static 0.7 --sglang-cuda-graph-bs 1 2 4 8 $(seq 16 8 256)",
            OPTIMIZER_ARGS=OFFLOADED,
        ),
    ),
    "qwen3-235B-A22B on 8 nodes": Foreign(
        "qwen3-235B-A22B",
        recipe(
            "qwen3-235B-A22B", "Qwen3-235B-A22B",
            perf(4, 4, 2, 16, tokens=16384, more="--decoder-last-pipeline-num-layers 22"),
            "--rollout-num-gpus-per-engine 32 --sglang-mem-fraction-static 0.7 --sglang-enable-dp-attention --sglang-dp-size 4 "
            "--sglang-ep-size 32 --sglang-enable-dp-lm-head --sglang-moe-dense-tp-size 1",
            OPTIMIZER_ARGS=OFFLOADED,
        ),
        cluster="--actor-num-nodes 8 --actor-num-gpus-per-node 8 --colocate",
        before=(CLEAN_UP, "set -ex\n", WANTS_A_FOLDER, BESIDE),
        around=("export MASTER_ADDR=${MLP_WORKER_0_HOST}\n", "ray start --head --num-gpus 8\n", WORKERS, HEREDOC_JSON),
        root="${BASE_FOLDER}",
        reads=("join_workers", 'require_env BASE_FOLDER "the launcher wants it"', '"${BASE_FOLDER}/Qwen3-235B-A22B"'),
    ),
    "glm4-9B": Foreign(
        "glm4-9B",
        recipe("glm4-9B", "GLM-Z1-9B-0414", perf(2, 1, 2, 1, tokens=4608), "--rollout-num-gpus-per-engine 2"),
        cluster="--actor-num-nodes 1 --actor-num-gpus-per-node 4 --rollout-num-gpus 4",
        reads=("NUM_GPUS:-8", "NUM_NODES:-1"),
    ),
    "glm4.5-355B-A32B on 8 nodes": Foreign(
        "glm4.5-355B-A32B",
        recipe(
            "glm4.5-355B", "GLM-4.5-355B-A32B", perf(8, 4, 2, 16, tokens=16384, more="--decoder-last-pipeline-num-layers 23"),
            f"--rollout-num-gpus-per-engine 32 --sglang-mem-fraction-static 0.7 --sglang-enable-dp-attention --sglang-dp-size 4 {EAGLE}",
            OPTIMIZER_ARGS=OFFLOADED, MISC_ARGS=f"{MISC} --moe-token-dispatcher-type flex --moe-enable-deepep",
        ),
        cluster="--actor-num-nodes 8 --actor-num-gpus-per-node 8 --colocate",
        source='source "/root/slime/scripts/models/MODEL.sh"\n',
        before=(CLEAN_UP, "set -ex\n"),
    ),
    "deepseek-r1, whose engines are switched as in 2025": Foreign(
        "deepseek-v3",
        recipe(
            "deepseek-r1", "DeepSeek-R1", perf(8, 4, 4, 32, tokens=16384, more="--decoder-last-pipeline-num-layers 13"),
            "--rollout-num-gpus-per-engine 64 --sglang-mem-fraction-static 0.7 --sglang-enable-ep-moe --sglang-enable-dp-attention "
            "--sglang-dp-size 8 --sglang-moe-dense-tp-size 1 --sglang-enable-dp-lm-head --sglang-disable-radix-cache "
            "--sglang-enable-deepep-moe --sglang-deepep-mode auto --sglang-server-concurrency 1024",
            OPTIMIZER_ARGS=OFFLOADED, MISC_ARGS=f"{MISC} --moe-enable-deepep --moe-token-dispatcher-type flex",
        ),
        cluster="--actor-num-nodes 16 --actor-num-gpus-per-node 8 --colocate",
        around=(HEAD, SINGLE_QUOTED),
        reads=("--sglang-enable-ep-moe", "--sglang-enable-deepep-moe", '"NVSHMEM_DISABLE_NCCL=1"'),
    ),
    "kimi-k2-thinking on 32 nodes": Foreign(
        "kimi-k2-thinking",
        recipe(
            "kimi-k2", "Kimi-K2-Thinking-fp8", perf(8, 8, 4, 32, tokens=16384, more="--decoder-last-pipeline-num-layers 5"),
            "--rollout-num-gpus-per-engine 16 --sglang-mem-fraction-static 0.7 --sglang-enable-dp-attention --sglang-dp-size 8 "
            "--sglang-moe-dense-tp-size 1 --sglang-enable-dp-lm-head --sglang-disable-radix-cache --sglang-ep-size 16 "
            "--sglang-server-concurrency 1024",
            OPTIMIZER_ARGS=OFFLOADED, GRPO_ARGS=f"{GRPO} --use-tis",
        ),
        cluster="--actor-num-nodes 32 --actor-num-gpus-per-node 8 --colocate",
        reads=('scripts/models/kimi-k2-thinking.sh"',),
        submit=TORN,
        gpu="h200",
    ),
    "glm4.7-30B-A3B, which trains what it drafts with": Foreign(
        "glm4.7-30B-A3B",
        recipe(
            "glm4.7-flash", "GLM-4.7-Flash", perf(2, 2, 2, 4, tokens=32768, more="--decoder-last-pipeline-num-layers 23"),
            "--rollout-num-gpus-per-engine 8 --sglang-mem-fraction-static 0.8 --sglang-enable-dp-attention --sglang-dp-size 8 "
            f"--sglang-enable-dp-lm-head --sglang-moe-dense-tp-size 1 {EAGLE} --sglang-cuda-graph-max-bs 64 --sglang-max-running-requests 512",
            OPTIMIZER_ARGS=OFFLOADED, MISC_ARGS=f"{MISC} --moe-token-dispatcher-type flex --moe-enable-deepep",
            MTP_ARGS="--mtp-num-layers 1 --enable-mtp-training --mtp-loss-scaling-factor 0.2",
        ),
        source='source "${SCRIPT_DIR}/../scripts/models/MODEL.sh"\n',
    ),
    "qwen3-4B-Base on conversations": Foreign(
        "qwen3-4B",
        {
            name: words for name, words in recipe("sft", "Qwen3-4B-Base", perf(1, 1, 1, 1, tokens=9216), "", OPTIMIZER_ARGS=COSINE, SFT_ARGS=SFT).items()
            if name not in ("ROLLOUT_ARGS", "EVAL_ARGS", "GRPO_ARGS")
        },
        cluster="--actor-num-nodes 1 --actor-num-gpus-per-node 8",
        program="train_async.py",
        around=(HEAD, HEREDOC_JSON.replace('"no_proxy"', '"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True",\n    "no_proxy"')),
    ),
    "moonlight": Foreign(
        "moonlight",
        recipe(
            "moonlight", "Moonlight-16B-A3B-Instruct", perf(4, 1, 1, 8, tokens=20480),
            "--rollout-num-gpus-per-engine 8 --sglang-mem-fraction-static 0.7", OPTIMIZER_ARGS=OFFLOADED,
        ),
    ),
    "mimo-7B, which drafts by itself": Foreign(
        "mimo-7B-rl",
        recipe(
            "mimo", "MiMo-7B-RL", perf(2, 1, 1, 1, tokens=9216), f"--rollout-num-gpus-per-engine 1 --sglang-mem-fraction-static 0.7 {EAGLE}",
            MODEL_NAME_ARGS="--model-name mimo",
        ),
    ),
    "qwen2.5-0.5B on gsm8k": Foreign(
        "qwen2.5-0.5B",
        recipe(
            "qwen2.5-0.5B", "Qwen2.5-0.5B-Instruct", "--tensor-model-parallel-size 1 --use-dynamic-batch-size --max-tokens-per-gpu 9216",
            "--rollout-num-gpus-per-engine 1 --sglang-mem-fraction-static 0.6 --sglang-enable-metrics", ROLLOUT_ARGS=GSM8K,
            MISC_ARGS=f"{MISC} --ckpt-format torch_dist --tokenizer-type HuggingFaceTokenizer --manual-gc --use-flash-attn --log-throughput",
        ),
    ),
    "qwen3-4B one step ahead": Foreign(
        "qwen3-4B",
        recipe("async", "Qwen3-4B", perf(2, 1, 1, 1, tokens=9216), "--rollout-num-gpus-per-engine 2", EVAL_ARGS=""),
        cluster="--actor-num-nodes 1 --actor-num-gpus-per-node 4 --rollout-num-gpus 4",
        program="train_async.py",
        reads=("--schedule one-step-ahead",),
    ),
    "llama3.2-3B": Foreign(
        "llama3.2-3B-Instruct",
        recipe("llama", "Llama-3.2-3B-Instruct", perf(2, 1, 1, 1, tokens=9216), "--rollout-num-gpus-per-engine 2"),
        reads=("scripts/models/llama3.2-3B.sh",),
    ),
    "qwen2.5-3B with a search plugin and TensorBoard": Foreign(
        "qwen2.5-3B",
        recipe(
            "search", "Qwen2.5-3B", perf(2, 1, 1, 1, tokens=9216), "--rollout-num-gpus-per-engine 2", WANDB_ARGS="", EVAL_ARGS="",
            CUSTOM_ARGS="--custom-generate-function-path generate_with_search.generate --custom-rm-path generate_with_search.reward_func",
            TB_ARGS="--use-tensorboard --tb-project-name search",
        ),
    ),
    "GLM-5.2 744B on 32 nodes": Foreign(
        "glm5.2-744B-A40B",
        recipe(
            "glm5.2", "GLM-5.2-FP8",
            perf(4, 8, 8, 32, tokens=8192, more="--decoder-first-pipeline-num-layers 14 --decoder-last-pipeline-num-layers 16 "
                 "--data-pad-size-multiplier 1024 --log-probs-chunk-size 16384 --allgather-cp"),
            "--rollout-num-gpus-per-engine 64 --sglang-mem-fraction-static 0.7 --sglang-enable-dp-attention --sglang-dp-size 64 "
            "--sglang-ep-size 64 --sglang-enable-dp-lm-head --sglang-moe-dense-tp-size 1 "
            "--sglang-moe-a2a-backend deepep --sglang-deepep-mode auto",
            OPTIMIZER_ARGS=OFFLOADED,
        ),
        cluster="--actor-num-nodes 32 --actor-num-gpus-per-node 8 --colocate",
        around=("export MASTER_ADDR=${MLP_WORKER_0_HOST}\n", "ray start --head --num-gpus 8\n", WORKERS, GLM_JSON),
        root="${BASE_DIR}",
    ),
}  # fmt: skip
"""Of families that are here."""

NO_COUNTERPART: dict[str, tuple[Foreign, str]] = {
    "a family that is not here": (
        Foreign("qwen3-next-80B-A3B", recipe("next", "Qwen3-Next-80B-A3B-Thinking", perf(2, 4, 1, 8, tokens=2048), "--rollout-num-gpus-per-engine 8")),
        "qwen3-next-80B-A3B is a qwen3_next model, which needs gated delta attention",
    ),
    "a script that is nowhere": (
        Foreign("unheard-7B", recipe("unheard", "Unheard", perf(1, 1, 1, 1, tokens=2048), "--rollout-num-gpus-per-engine 1")),
        "scripts/models has no unheard-7B.sh, and there is none beside the launcher",
    ),
    "FP8 training": (
        Foreign("qwen3-4B", recipe("fp8", "Qwen3-4B", perf(2, 1, 1, 1, tokens=9216), "", PRECISION_ARGS="--transformer-impl transformer_engine --bf16 --fp8-format e4m3 --fp8-recipe blockwise --fp8-param-gather")),
        "--fp8-format: this version does not have FP8 or FP4 training",
    ),
    "a draft layer that is trained": (
        Foreign("mimo-7B-rl", recipe("mimo", "MiMo-7B-RL", perf(2, 1, 1, 1, tokens=9216), EAGLE, SPEC_ARGS="--mtp-num-layers 1 --enable-mtp-training")),
        "MiMo's multi-token-prediction layer is built otherwise than the one that can be trained here",
    ),
    "images": (
        Foreign("qwen2.5-3B", recipe("vlm", "Qwen2.5-3B", perf(1, 1, 1, 1, tokens=4096), "", VLM_ARGS="--multimodal-keys {\"image\":\"images\"}")),
        "--multimodal-keys: this version does not have images, audio and video",
    ),
    "a rollout that waits for ever": (
        Foreign("qwen3-4B", recipe("sleep", "Qwen3-4B", perf(2, 1, 1, 1, tokens=9216), "", SLEEP_ARGS="--rollout-function-path slime.rollout.sleep_rollout.sleep")),
        "--rollout-function-path: slime.rollout.sleep_rollout.sleep is not here: a rollout that waits for ever",
    ),
    "a flag of an older slime": (
        Foreign("qwen3-4B", recipe("old", "Qwen3-4B", perf(2, 1, 1, 1, tokens=9216), "--use-slime-router")),
        "--use-slime-router: a router that newer versions of slime dropped too",
    ),
}  # fmt: skip
"""What ends in one line, and which."""

IN_ITS_SCRIPTS = {
    "run-deepseek-r1.sh": "deepseek-r1, whose engines are switched as in 2025",
    "run-glm4-9B.sh": "glm4-9B",
    "run-glm4.5-355B-A32B.sh": "glm4.5-355B-A32B on 8 nodes",
    "run-glm4.7-30B-A3B.sh": "glm4.7-30B-A3B, which trains what it drafts with",
    "run-glm5.2-744B-A40B.sh": "GLM-5.2 744B on 32 nodes",
    "run-kimi-k2-Instruct.sh": "kimi-k2-thinking on 32 nodes",
    "run-kimi-k2-Thinking.sh": "kimi-k2-thinking on 32 nodes",
    "run-mimo-7B-rl-eagle.sh": "mimo-7B, which drafts by itself",
    "run-mimo-7B-rl-mtp.sh": "a draft layer that is trained",
    "run-moonlight-16B-A3B.sh": "moonlight",
    "run-qwen3-235B-A22B.sh": "qwen3-235B-A22B on 8 nodes",
    "run-qwen3-30B-A3B.sh": "qwen3-30B-A3B",
    "run-qwen3-32B.sh": "qwen3-32B in a shell of its own",
    "run-qwen3-4B.sh": "qwen3-4B",
    "run-qwen3-4B-base-sft.sh": "qwen3-4B-Base on conversations",
    "low_precision/run-qwen3-4b-fp8.sh": "FP8 training",
}
"""Launcher of the public project's scripts/ for NVIDIA GPUs, of a family that is here -> the one above that passes the same flags."""
