#!/usr/bin/env bash
# The 744B recipe with other numbers, on 1, 2, 4 or 8 Hopper GPUs of one machine: GLM-5.2's widths in 8 layers, every mechanism of
# its training and of its engines. It draws its own checkpoint on the GPU, so it needs nothing but the environment. The weights are
# random and so are the rewards (--rm-type random): it shows that a machine runs the recipe, and how fast, not that a model learns.
#
#   bash scripts/run-glm5.2-mini.sh [FLAGS...]      FLAGS win over the launcher's, e.g. --num-rollout 4
#
# BASE_DIR       where everything goes, 46 GB             (default: outputs/glm5.2-mini of this project)
#                (kernels once compiled stay in its folder kernels)
# NUM_GPUS       1, 2, 4 or 8                             (default: the most of these that are visible)
# DEEPEP         0: experts' exchange without DeepEP      (default 1; one GPU exchanges nothing)
# EAGLE          0: no speculative decoding               (default 1)
# MINI_EXPERTS   routed experts of a layer                (default 32; 16 on one GPU)
# SAVE           folder of checkpoints, 107 GB each       (default: none is written; SAVE_INTERVAL counts rollouts between two)
# SEED           of the checkpoint, the data and the run  (default 1234)
# Steps that are done already are skipped: delete BASE_DIR to start anew.
set -euo pipefail

SCRIPT_DIR="$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")" && pwd)"
source "${SCRIPT_DIR}/lib/launch.sh"

NUM_VISIBLE=$(visible_gpus)
if [[ -z ${NUM_GPUS:-} ]]; then
   for count in 8 4 2 1; do
      ((NUM_VISIBLE < count)) || break
   done
   NUM_GPUS=${count}
fi
export NUM_GPUS

# Layers that compute their own sparse indices are 1, 2, 3 and 7 of 8: a second stage starts on 7.
case ${NUM_GPUS} in
   1) TP=1 CP=1 EP=1 STAGES=(1) ENGINE_GPUS=1 ;;
   2) TP=2 CP=1 EP=2 STAGES=(1) ENGINE_GPUS=2 ;;
   4) TP=2 CP=2 EP=4 STAGES=(1) ENGINE_GPUS=2 ;;
   8) TP=2 CP=2 EP=4 STAGES=(6 2) ENGINE_GPUS=4 ;;
   *) die "NUM_GPUS=${NUM_GPUS}: choose 1, 2, 4 or 8" ;;
esac
((NUM_GPUS > 1)) || MINI_EXPERTS="${MINI_EXPERTS:-16}"
((NUM_GPUS > 1)) || DEEPEP=0
export MINI_EXPERTS="${MINI_EXPERTS:-32}"
source "${SCRIPT_DIR}/models/glm5.2-mini.sh"

export PYTHONUNBUFFERED=1 OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}" TOKENIZERS_PARALLELISM=false
SEED="${SEED:-1234}"
BASE_DIR="${BASE_DIR:-${PROJECT_ROOT}/outputs/glm5.2-mini}"
export MASTER_ADDR="${MASTER_ADDR:-127.0.0.1}"
RUN_DIR="${RUN_DIR:-${BASE_DIR}/run}"
mkdir -p "${RUN_DIR}"

# A rehearsal reads the config of the checkpoint that a run would draw.
HF_CHECKPOINT="${BASE_DIR}/GLM-5.2-mini-FP8"
if [[ $REHEARSE == 1 && ! -f ${HF_CHECKPOINT}/config.json ]]; then
   HF_CHECKPOINT="${RUN_DIR}/GLM-5.2-mini-FP8"
   run_python "${PROJECT_ROOT}/tools/make_tiny_checkpoint.py" --preset mini --experts "${MINI_EXPERTS}" --without-weights \
      --output-fp8 "${HF_CHECKPOINT}" >/dev/null
fi

# ---------------------------------------------------------------------------------------------- flags

LAYOUT_ARGS=(
   --tensor-model-parallel-size "${TP}"
   --pipeline-model-parallel-size "${#STAGES[@]}"
   --context-parallel-size "${CP}"
   --expert-model-parallel-size "${EP}"
   --expert-tensor-parallel-size 1
)
((TP == 1)) || LAYOUT_ARGS+=(--sequence-parallel)
((${#STAGES[@]} == 1)) || LAYOUT_ARGS+=(--decoder-first-pipeline-num-layers "${STAGES[0]}" --decoder-last-pipeline-num-layers "${STAGES[1]}")

CKPT_ARGS=(
   --hf-checkpoint "${HF_CHECKPOINT}"
   --ref-load "${BASE_DIR}/GLM-5.2-mini_torch_dist"
)
if [[ -n ${SAVE:-} ]]; then CKPT_ARGS+=(--load "${SAVE}" --save "${SAVE}" --save-interval "${SAVE_INTERVAL:-20}"); fi

ROLLOUT_ARGS=(
   --prompt-data "${BASE_DIR}/arithmetic/train.jsonl"
   --input-key prompt
   --label-key label
   --apply-chat-template
   --rollout-shuffle

   --rm-type random

   --num-rollout 3
   --rollout-batch-size 8
   --n-samples-per-prompt 8
   --rollout-max-response-len 512
   --rollout-temperature 1.0

   --global-batch-size 64
)

PERF_ARGS=(
   "${LAYOUT_ARGS[@]}"

   --recompute-granularity full
   --recompute-method uniform
   --recompute-num-layers 1

   --use-dynamic-batch-size
   --max-tokens-per-gpu 16384
   --data-pad-size-multiplier 128
   --log-probs-chunk-size 16384
)

GRPO_ARGS=(
   --advantage-estimator grpo
   --kl-loss-coef 0.00
   --kl-loss-type low_var_kl
   --kl-coef 0.00
   --entropy-coef 0.00
   --eps-clip 0.2
   --eps-clip-high 0.28
   --use-tis
   --tis-clip-low 0.5
   --tis-clip 2.0
)

OPTIMIZER_ARGS=(
   --optimizer adam
   --lr 1e-6
   --lr-decay-style constant
   --weight-decay 0.1
   --adam-beta1 0.9
   --adam-beta2 0.98
   --optimizer-cpu-offload
   --overlap-cpu-optimizer-d2h-h2d
   --use-precision-aware-optimizer
)

DECODE_CUDA_GRAPH_MAX_BS=12
DRAFT_TOKENS=5
DISPATCH_TOKENS=64
TRANSFER=mooncake
compgen -G '/sys/class/infiniband/*' >/dev/null || TRANSFER=mooncake_tcp # no RDMA device

# One group of the YAML: what every engine of the recipe has, then what its role adds.
engine_group() { # ROLE GPUS LINES...
   printf '      - worker_type: %s\n        num_gpus: %s\n        num_gpus_per_engine: %s\n        overrides:\n' "$1" "$2" "${ENGINE_GPUS}"
   printf '          %s\n' "dp_size: ${ENGINE_GPUS}" "ep_size: ${ENGINE_GPUS}"
   ((ENGINE_GPUS == 1)) || printf '          %s\n' 'enable_dp_attention: true' 'enable_dp_lm_head: true' 'moe_dense_tp_size: 1'
   printf '          %s\n' "${@:3}"
}
PREFILL_LINES=("chunked_prefill_size: $((8192 * ENGINE_GPUS))" "max_running_requests: 64")
DECODE_LINES=("max_running_requests: $((DECODE_CUDA_GRAPH_MAX_BS * ENGINE_GPUS))" "cuda_graph_max_bs: ${DECODE_CUDA_GRAPH_MAX_BS}" "disable_overlap_schedule: true")
REGULAR_LINES=("chunked_prefill_size: $((8192 * ENGINE_GPUS))" "${DECODE_LINES[@]}")
if ((${DEEPEP:-1})); then
   PREFILL_LINES+=("deepep_mode: auto")
   DECODE_LINES+=("deepep_mode: low_latency" "moe_runner_backend: deep_gemm")
   REGULAR_LINES+=("deepep_mode: auto" "moe_runner_backend: deep_gemm")
fi
SGLANG_CONFIG="${RUN_DIR}/sglang.yaml"
{
   printf 'sglang:\n  - name: default\n    server_groups:\n'
   if ((NUM_GPUS < 4)); then
      engine_group regular "${NUM_GPUS}" "${REGULAR_LINES[@]}"
   else
      engine_group prefill $((NUM_GPUS / 2)) "load_balance_method: follow_bootstrap_room" "${PREFILL_LINES[@]}"
      engine_group decode $((NUM_GPUS / 2)) "load_balance_method: round_robin" "${DECODE_LINES[@]}"
   fi
} >"${SGLANG_CONFIG}"

SGLANG_ARGS=(
   --sglang-config "${SGLANG_CONFIG}"
   --rollout-num-gpus-per-engine "${ENGINE_GPUS}"
   --sglang-mem-fraction-static 0.70
   --sglang-server-concurrency 64
   --sglang-page-size 64
   --sglang-kv-cache-dtype fp8_e4m3
   --sglang-attention-backend nsa
   --sglang-nsa-prefill-backend flashmla_sparse
   --sglang-nsa-decode-backend flashmla_kv
   --sglang-cuda-graph-max-bs 8
   --sglang-disable-overlap-schedule
   --sglang-max-running-requests 64
   --sglang-watchdog-timeout 3600
   --sglang-disaggregation-transfer-backend "${TRANSFER}"
)
if ((${DEEPEP:-1})); then SGLANG_ARGS+=(--sglang-moe-a2a-backend deepep --sglang-deepep-mode auto); fi
if ((${EAGLE:-1})); then
   SGLANG_ARGS+=(
      --sglang-speculative-algorithm EAGLE
      --sglang-speculative-num-steps 4
      --sglang-speculative-eagle-topk 1
      --sglang-speculative-num-draft-tokens "${DRAFT_TOKENS}"
      --sglang-speculative-draft-attention-backend nsa
   )
fi

MISC_ARGS=(
   --seed "${SEED}"
   --attention-dropout 0.0
   --hidden-dropout 0.0
   --accumulate-allreduce-grads-in-fp32
   --attention-softmax-in-fp32
   --moe-token-dispatcher-type alltoall
   --kernel-cache "${BASE_DIR}/kernels"
   --no-check-for-nan-in-loss-and-grad
   --update-weight-buffer-size $((2 * 1024 * 1024 * 1024))
   --use-tensorboard
   --tb-project-name glm5.2-mini
)

FLAGS=(
   --actor-num-nodes 1
   --actor-num-gpus-per-node "${NUM_GPUS}"
   --num-gpus-per-node "${NUM_GPUS}"
   --colocate
   "${MODEL_ARGS[@]}"
   "${CKPT_ARGS[@]}"
   "${ROLLOUT_ARGS[@]}"
   "${PERF_ARGS[@]}"
   "${GRPO_ARGS[@]}"
   "${OPTIMIZER_ARGS[@]}"
   "${SGLANG_ARGS[@]}"
   "${MISC_ARGS[@]}"
   "$@"
)
check_flags_alone "${FLAGS[@]}"
[[ $REHEARSE == 1 ]] || ((NUM_VISIBLE >= NUM_GPUS)) ||
   die "NUM_GPUS=${NUM_GPUS}, and ${NUM_VISIBLE} are visible here; scripts/run-glm5.2-tiny.sh runs without a GPU"

own BASE_DIR

# ---------------------------------------------------------------------------------------------- checkpoint and data

if runs && [[ ! -f ${BASE_DIR}/GLM-5.2-mini-FP8/config.json ]]; then
   say "1/3 drawing the checkpoint pair (29 GB) and its data"
   run_python "${PROJECT_ROOT}/tools/make_tiny_checkpoint.py" --preset mini --experts "${MINI_EXPERTS}" --seed "${SEED}" --device cuda \
      --output-bf16 "${BASE_DIR}/GLM-5.2-mini" --output-fp8 "${BASE_DIR}/GLM-5.2-mini-FP8"
   # 120 solved examples stand before each question: prompts of about 2,400 tokens, more than sparse attention keeps.
   run_python "${PROJECT_ROOT}/tools/make_arithmetic_data.py" --output "${BASE_DIR}/arithmetic" --seed "${SEED}" \
      --task add --max-operand 3 --train 4096 --eval 8 --sft 64 --examples 120
fi
if runs && [[ ! -f ${BASE_DIR}/GLM-5.2-mini_torch_dist/latest_checkpointed_iteration.txt ]]; then
   say "2/3 converting it to torch_dist on ${NUM_GPUS} ranks"
   run_ranks "${NUM_GPUS}" "${PROJECT_ROOT}/tools/convert_hf_to_torch_dist.py" "${MODEL_ARGS[@]}" "${LAYOUT_ARGS[@]}" \
      --hf-checkpoint "${BASE_DIR}/GLM-5.2-mini/" --save "${BASE_DIR}/GLM-5.2-mini_torch_dist/"
fi
check_flags "${FLAGS[@]}"

# ---------------------------------------------------------------------------------------------- environment and launch

ENVIRONMENT=(
   "PYTHONPATH=${PROJECT_ROOT}${PYTHONPATH:+:${PYTHONPATH}}"
   "PYTHONUNBUFFERED=1"
   "OMP_NUM_THREADS=${OMP_NUM_THREADS}"
   "TOKENIZERS_PARALLELISM=false"
   "CUDA_DEVICE_MAX_CONNECTIONS=1"
   "NCCL_NVLS_ENABLE=0"
   "NCCL_CUMEM_ENABLE=0"
   "NVSHMEM_DISABLE_NCCL=1"
   "SGLANG_DEEPEP_NUM_MAX_DISPATCH_TOKENS_PER_RANK=${DISPATCH_TOKENS}"
   "SGLANG_JIT_DEEPGEMM_PRECOMPILE=${SGLANG_JIT_DEEPGEMM_PRECOMPILE:-true}"
   "INDEXER_ROPE_NEOX_STYLE=0"
)

start_ray_head
! runs || say "3/3 reinforcement learning (GRPO) on random rewards"
submit_job "$(runtime_env_json "${ENVIRONMENT[@]}")" "${FLAGS[@]}"
[[ -z ${SAVE:-} ]] || print_resume
