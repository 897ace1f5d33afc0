#!/usr/bin/env bash
# A tiny Qwen3 on one slot and its engine on another, both at work all the time: weights change in the middle of answers.
#
#   bash docs/en/examples/fully_async/run-fully-async.sh [FLAGS...]        FLAGS win over the launcher's, e.g. --schedule one-step-ahead
#
# BASE_DIR   where everything goes      (default: outputs/fully_async of this project); delete it to start anew
# Ray: what scripts/lib/launch.sh lists.
set -euo pipefail

HERE="$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")" && pwd)"
source "${HERE}/../../../../scripts/lib/launch.sh"
source "${PROJECT_ROOT}/scripts/models/qwen3-tiny.sh"

export PYTHONUNBUFFERED=1 OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}" TOKENIZERS_PARALLELISM=false
export PYTHONPATH="${HERE}:${PROJECT_ROOT}${PYTHONPATH:+:${PYTHONPATH}}"
export MASTER_ADDR="${MASTER_ADDR:-127.0.0.1}" NUM_GPUS=2 NUM_CPUS=8
# Without GPUs two slots are declared, and the CPU answers for both.
(($(visible_gpus) > 1)) || export LOGICAL_GPUS=1
BASE_DIR="${BASE_DIR:-${PROJECT_ROOT}/outputs/fully_async}"
RUN_DIR="${RUN_DIR:-${BASE_DIR}/run}"
mkdir -p "${BASE_DIR}" "${RUN_DIR}" || die "BASE_DIR=${BASE_DIR} and RUN_DIR=${RUN_DIR} cannot be made: name folders of your own"

FLAGS=(
   --actor-num-nodes 1
   --actor-num-gpus-per-node 1
   --num-gpus-per-node 2
   --rollout-num-gpus 1
   --rollout-num-gpus-per-engine 1
   "${MODEL_ARGS[@]}"
   --hf-checkpoint "${BASE_DIR}/model/bf16"
   --load "${BASE_DIR}/Qwen3-tiny_slime"
   --save "${BASE_DIR}/Qwen3-tiny_slime"
   --save-interval 10

   --prompt-data "${BASE_DIR}/data/train.jsonl"
   --input-key prompt
   --label-key label
   --apply-chat-template
   --rollout-shuffle
   --custom-generate-function-path long_tail.generate
   --custom-rm-path long_tail.reward
   --num-rollout 20
   --rollout-batch-size 8
   --n-samples-per-prompt 8
   --rollout-max-response-len 64
   --global-batch-size 64
   --sglang-server-concurrency 64

   --schedule fully-async
   --max-weight-staleness 1
   --advantage-estimator grpo
   --use-tis
   --use-dynamic-batch-size
   --max-tokens-per-gpu 1024
   --optimizer adam
   --lr 5e-3
   --lr-decay-style constant
   "$@"
)
check_flags_alone "${FLAGS[@]}"
own BASE_DIR

if [[ ! -f ${BASE_DIR}/model/bf16/config.json ]]; then
   run_python "${PROJECT_ROOT}/tools/make_tiny_checkpoint.py" --preset qwen3 --seed 3 --output "${BASE_DIR}/model"
   run_python "${PROJECT_ROOT}/tools/make_arithmetic_data.py" --output "${BASE_DIR}/data" --train 4096 --eval 8 --max-operand 9
fi

check_flags "${FLAGS[@]}"
ENVIRONMENT=(
   "PYTHONPATH=${PYTHONPATH}"
   "PYTHONUNBUFFERED=1"
   "OMP_NUM_THREADS=${OMP_NUM_THREADS}"
   "TOKENIZERS_PARALLELISM=false"
   "SLIME_RUN_DIR=${RUN_DIR}"
)
start_ray_head
submit_job "$(runtime_env_json "${ENVIRONMENT[@]}")" "${FLAGS[@]}"
print_resume
