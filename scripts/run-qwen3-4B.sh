#!/usr/bin/env bash
# Qwen3-4B: GRPO on one node with 8 GPUs, training and rollout colocated. The recipe for dense models.
#
#   BASE_DIR=/path bash scripts/run-qwen3-4B.sh [FLAGS...]        FLAGS win over the launcher's, e.g. --num-rollout 10
#
# BASE_DIR   folder with Qwen3-4B, Qwen3-4B_torch_dist, dapo-math-17k and aime-2024; see docs/en/examples/qwen3-4B.md
# NUM_GPUS   GPUs of this node                                                                          (default 8)
# Paths: HF_CHECKPOINT REF_LOAD LOAD SAVE PROMPT_DATA EVAL_DATA RUN_DIR.   Ray: what lib/launch.sh lists.
set -euo pipefail

SCRIPT_DIR="$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")" && pwd)"
source "${SCRIPT_DIR}/lib/launch.sh"
source "${SCRIPT_DIR}/models/qwen3-4B.sh"

export PYTHONUNBUFFERED=1

require_env BASE_DIR "give the folder with the checkpoint and the data"
export MASTER_ADDR="${MASTER_ADDR:-127.0.0.1}"
NUM_GPUS="${NUM_GPUS:-8}"
HF_CHECKPOINT="${HF_CHECKPOINT:-${BASE_DIR}/Qwen3-4B}"
REF_LOAD="${REF_LOAD:-${BASE_DIR}/Qwen3-4B_torch_dist}"
LOAD="${LOAD:-${BASE_DIR}/Qwen3-4B_slime}"
SAVE="${SAVE:-${LOAD}}"
PROMPT_DATA="${PROMPT_DATA:-${BASE_DIR}/dapo-math-17k/dapo-math-17k.jsonl}"
EVAL_DATA="${EVAL_DATA-${BASE_DIR}/aime-2024/aime-2024.jsonl}"   # EVAL_DATA= (empty) trains without evaluation
RUN_DIR="${RUN_DIR:-${BASE_DIR}/runs/qwen3-4B-$(date +%Y%m%d-%H%M%S)}"

require_dir "${HF_CHECKPOINT}" "the model ($(program hf) download Qwen/Qwen3-4B --local-dir $(printf %q "${HF_CHECKPOINT}"))"
require_dir "${REF_LOAD}" "the converted checkpoint (tools/convert_hf_to_torch_dist.py; see docs/en/examples/qwen3-4B.md)"
require_file "${PROMPT_DATA}" "the prompts ($(program hf) download --repo-type dataset zhuzilin/dapo-math-17k --local-dir $(printf %q "${BASE_DIR}/dapo-math-17k"))"

CKPT_ARGS=(
   --hf-checkpoint "${HF_CHECKPOINT}"
   --ref-load "${REF_LOAD}"
   --load "${LOAD}"
   --save "${SAVE}"
   --save-interval 20
)

ROLLOUT_ARGS=(
   --prompt-data "${PROMPT_DATA}"
   --input-key prompt
   --label-key label
   --apply-chat-template
   --rollout-shuffle

   --rm-type deepscaler

   --num-rollout 3000
   --rollout-batch-size 32
   --n-samples-per-prompt 8
   --rollout-max-response-len 8192
   --rollout-temperature 0.8

   --global-batch-size 256
   --balance-data
)

EVAL_ARGS=()
if [[ -n ${EVAL_DATA} ]]; then
   require_file "${EVAL_DATA}" "the evaluation set ($(program hf) download --repo-type dataset zhuzilin/aime-2024 --local-dir $(printf %q "${BASE_DIR}/aime-2024")), or set EVAL_DATA= to train without"
   EVAL_ARGS=(
      --eval-interval 20
      --eval-prompt-data aime "${EVAL_DATA}"
      --n-samples-per-eval-prompt 16
      --eval-max-response-len 16384
      --eval-top-p 0.7
   )
fi

PERF_ARGS=(
   --tensor-model-parallel-size 2
   --sequence-parallel
   --pipeline-model-parallel-size 1
   --context-parallel-size 1
   --expert-model-parallel-size 1
   --expert-tensor-parallel-size 1

   --recompute-granularity full
   --recompute-method uniform
   --recompute-num-layers 1

   --use-dynamic-batch-size
   --max-tokens-per-gpu 9216
)

GRPO_ARGS=(
   --advantage-estimator grpo
   --use-kl-loss
   --kl-loss-coef 0.00
   --kl-loss-type low_var_kl
   --entropy-coef 0.00
   --eps-clip 0.2
   --eps-clip-high 0.28
)

OPTIMIZER_ARGS=(
   --optimizer adam
   --lr 1e-6
   --lr-decay-style constant
   --weight-decay 0.1
   --adam-beta1 0.9
   --adam-beta2 0.98
)

SGLANG_ARGS=(
   --rollout-num-gpus-per-engine 2
   --sglang-mem-fraction-static 0.7
)

MISC_ARGS=(
   --attention-dropout 0.0
   --hidden-dropout 0.0
   --accumulate-allreduce-grads-in-fp32
   --attention-softmax-in-fp32
   --attention-backend flash
   --use-tensorboard
   --tb-project-name qwen3-4B
)

FLAGS=(
   --actor-num-nodes 1
   --actor-num-gpus-per-node "${NUM_GPUS}"
   --num-gpus-per-node "${NUM_GPUS}"
   --colocate
   "${MODEL_ARGS[@]}"
   "${CKPT_ARGS[@]}"
   "${ROLLOUT_ARGS[@]}"
   "${EVAL_ARGS[@]}"
   "${PERF_ARGS[@]}"
   "${GRPO_ARGS[@]}"
   "${OPTIMIZER_ARGS[@]}"
   "${SGLANG_ARGS[@]}"
   "${MISC_ARGS[@]}"
   "$@"
)
check_flags "${FLAGS[@]}"
own SAVE
mkdir -p "${RUN_DIR}" || die "cannot make the run folder ${RUN_DIR}"

HAS_NVLINK=$(($(count_nvlinks) > 0))
ENVIRONMENT=(
   "PYTHONPATH=${PROJECT_ROOT}${PYTHONPATH:+:${PYTHONPATH}}"
   "PYTHONUNBUFFERED=1"
   "CUDA_DEVICE_MAX_CONNECTIONS=1"
   "NCCL_NVLS_ENABLE=${HAS_NVLINK}"
)

start_ray_head
submit_job "$(runtime_env_json "${ENVIRONMENT[@]}")" "${FLAGS[@]}"
print_resume
