#!/usr/bin/env bash
# A tiny GLM-5.2 with every mechanism on, trained by GRPO on 2 CPU cores (or one GPU): the launcher, flags, actors, engines and weight
# stream of the 744B recipe with small numbers. It makes its own checkpoint and data, so it needs nothing but the environment.
#
#   bash scripts/run-glm5.2-tiny.sh [FLAGS...]      FLAGS win over the launcher's, e.g. --num-rollout 4
#
# BASE_DIR   where everything goes                                    (default: outputs/glm5.2-tiny of this project)
# INDEX_TOPK keys that sparse attention keeps on a CPU                (default 8, a third of a sequence here)
# SFT_DATA   conversations of the warm start, .jsonl with "messages"  (default: arithmetic, made here)
# SEED       of the checkpoint, the data and the run                  (default 1234)
# EAGLE      1: the next-token layer is trained along, and engines on a GPU draft from it as the recipe's do   (default 0)
# NUM_NODES  2: a pipeline stage and an engine on each; 4: two copies of the two stages, one prefill and three decode engines. BASE_DIR
#            is then on a shared disk, and MASTER_ADDR, HOSTFILE and SOCKET_IFNAME (default eth0) are given as for the 744B recipe.
#            tools/cluster_box.py makes nodes of one machine   (default 1)
# Steps that are done already are skipped, and training continues from its last checkpoint: delete BASE_DIR to start anew.
set -euo pipefail

SCRIPT_DIR="$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")" && pwd)"
source "${SCRIPT_DIR}/lib/launch.sh"

# Without a GPU two device slots are declared, and the CPU answers for both. With GPUs the head sizes are those that the kernels accept
# and prompts are longer than the 2048 keys that sparse attention keeps; layers eight times as wide learn at a tenth of the rates. The rest
# is the same.
TRANSFER=mooncake # a CPU engine takes its TCP half, and says so
NUM_DEVICES=$(visible_gpus)
export NUM_NODES="${NUM_NODES:-1}"
[[ $NUM_NODES == [124] ]] || die "NUM_NODES=${NUM_NODES}: choose 1, 2 or 4"
if ((NUM_DEVICES == 0)); then
   export GLM52_TINY=cpu NUM_GPUS=$((NUM_NODES > 1 ? 1 : 2)) LOGICAL_GPUS=1
   # Sequences have about 24 tokens, three times the keys that sparse attention keeps.
   TINY_MODEL=(--index-topk "${INDEX_TOPK:-8}") DATA_ARGS=() MAX_TOKENS="${MAX_TOKENS:-512}" PROMPTS=32 SFT_BATCH="${SFT_BATCH:-64}" SFT_LR=3e-3 RL_LR=5e-4
else
   export GLM52_TINY=h200 NUM_GPUS="${NUM_GPUS:-$((NUM_DEVICES > 1 && NUM_NODES == 1 ? 2 : 1))}"
   TINY_MODEL=() DATA_ARGS=(--examples 120) MAX_TOKENS=16384 PROMPTS=16 SFT_BATCH=32 SFT_LR=3e-4 RL_LR=5e-5
   compgen -G '/sys/class/infiniband/*' >/dev/null || TRANSFER=mooncake_tcp # no RDMA device
fi
NUM_SLOTS=$((NUM_GPUS * NUM_NODES))
NUM_STAGES=$((NUM_SLOTS > 1 ? 2 : 1))
source "${SCRIPT_DIR}/models/glm5.2-tiny.sh"
((!${EAGLE:-0})) || MODEL_ARGS+=(--mtp-num-layers 1 --enable-mtp-training)

export PYTHONUNBUFFERED=1 OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}" TOKENIZERS_PARALLELISM=false
SEED="${SEED:-1234}"
BASE_DIR="${BASE_DIR:-${PROJECT_ROOT}/outputs/glm5.2-tiny}"
# As many CPUs as the actors name, whatever the machine has.
export MASTER_ADDR="${MASTER_ADDR:-127.0.0.1}" NUM_CPUS=8
RUN_DIR="${RUN_DIR:-${BASE_DIR}/run}"
mkdir -p "${BASE_DIR}" "${RUN_DIR}" || die "BASE_DIR=${BASE_DIR} and RUN_DIR=${RUN_DIR} cannot be made: name folders of your own"

# Two pipeline stages on two slots, and again on two more. Each starts on a layer that computes its own indices: layers 1, 2, 3 and 7 of
# 8 do.
PIPELINE_ARGS=(--pipeline-model-parallel-size "${NUM_STAGES}")
((NUM_SLOTS == 1)) || PIPELINE_ARGS+=(--decoder-first-pipeline-num-layers 6 --decoder-last-pipeline-num-layers 2)

PERF_ARGS=(
   --tensor-model-parallel-size 1
   "${PIPELINE_ARGS[@]}"
   --context-parallel-size 1
   --expert-model-parallel-size 1
   --expert-tensor-parallel-size 1

   --use-dynamic-batch-size
   --max-tokens-per-gpu "${MAX_TOKENS}"
   --data-pad-size-multiplier 16
   --log-probs-chunk-size 1024
)

# As in the 744B recipe. The warm start does without on a CPU, where its samples are short: that is quicker.
RECOMPUTE_ARGS=(
   --recompute-granularity full
   --recompute-method uniform
   --recompute-num-layers 1
)

CLUSTER_ARGS=(
   --actor-num-nodes "${NUM_NODES}"
   --actor-num-gpus-per-node "${NUM_GPUS}"
   --num-gpus-per-node "${NUM_GPUS}"
   --seed "${SEED}"
)

MISC_ARGS=(
   --attention-dropout 0.0
   --hidden-dropout 0.0
   --accumulate-allreduce-grads-in-fp32
   --attention-softmax-in-fp32
   --use-tensorboard
   --tb-project-name glm5.2-tiny
)

ENVIRONMENT=(
   "PYTHONPATH=${PROJECT_ROOT}${PYTHONPATH:+:${PYTHONPATH}}"
   "PYTHONUNBUFFERED=1"
   "OMP_NUM_THREADS=${OMP_NUM_THREADS}"
   "TOKENIZERS_PARALLELISM=false"
)
((NUM_NODES == 1)) || ENVIRONMENT+=("GLOO_SOCKET_IFNAME=${SOCKET_IFNAME:-eth0}" "NCCL_SOCKET_IFNAME=${SOCKET_IFNAME:-eth0}")

# The warm start: supervised training, no engines. Half of its answers are not in the box that the grader reads and some are wrong,
# on purpose: the model learns to answer at all, and always boxing the right answer is left to reinforcement learning.
WARM_START="${BASE_DIR}/GLM-5.2-tiny_warm_start"
SFT_ARGS=(
   --hf-checkpoint "${BASE_DIR}/GLM-5.2-tiny-FP8"
   --ref-load "${BASE_DIR}/GLM-5.2-tiny_torch_dist"
   --load "${WARM_START}"
   --save "${WARM_START}"
   --save-interval 1000000

   --debug-train-only
   --loss-type sft_loss
   --disable-compute-advantages-and-returns
   --rollout-function-path slime.rollout.sft_rollout.generate_rollout
   --prompt-data "${SFT_DATA:-${BASE_DIR}/arithmetic/sft.jsonl}"
   --input-key messages
   --loss-mask-type qwen
   --num-rollout "${SFT_STEPS:-160}"
   --rollout-batch-size "${SFT_BATCH}"
   --global-batch-size "${SFT_BATCH}"

   --optimizer adam
   --lr "${SFT_LR}"
   --lr-decay-style cosine
   --lr-warmup-fraction 0.05
   --weight-decay 0.01
   --adam-beta1 0.9
   --adam-beta2 0.98
)

# Reinforcement learning.
CKPT_ARGS=(
   --hf-checkpoint "${BASE_DIR}/GLM-5.2-tiny-FP8"
   --ref-load "${WARM_START}"
   --load "${BASE_DIR}/GLM-5.2-tiny_slime"
   --save "${BASE_DIR}/GLM-5.2-tiny_slime"
   --save-interval 12
)

ROLLOUT_ARGS=(
   --prompt-data "${BASE_DIR}/arithmetic/train.jsonl"
   --input-key prompt
   --label-key label
   --apply-chat-template
   --rollout-shuffle
   --rm-type math

   --num-rollout 12
   --rollout-batch-size "${PROMPTS}"
   --n-samples-per-prompt 8
   --rollout-max-response-len 8
   --rollout-temperature 1.0

   --num-steps-per-rollout 2
   --balance-data
)

EVAL_ARGS=(
   --eval-interval 12
   --eval-prompt-data arithmetic "${BASE_DIR}/arithmetic/eval.jsonl"
   --n-samples-per-eval-prompt 4
   --eval-max-response-len 8
)

GRPO_ARGS=(
   --advantage-estimator grpo
   --kl-loss-coef 0.00
   --entropy-coef 0.00
   --eps-clip 0.2
   --eps-clip-high 0.28
   --use-tis
   --tis-clip-low 0.5
   --tis-clip 2.0
)

OPTIMIZER_ARGS=(
   --optimizer adam
   --lr "${RL_LR}"
   --lr-decay-style constant
   --weight-decay 0.01
   --adam-beta1 0.9
   --adam-beta2 0.98
)

# One prefill engine, and one for decoding on each further slot: four make one and three, as in the 744B recipe. A single GPU holds one
# engine that does both.
SGLANG_CONFIG="${RUN_DIR}/sglang.yaml"
if ((NUM_SLOTS == 1)); then
   cat >"${SGLANG_CONFIG}" <<'YAML'
sglang:
  - name: default
    server_groups:
      - worker_type: regular
        num_gpus: 1
        num_gpus_per_engine: 1
YAML
else
   cat >"${SGLANG_CONFIG}" <<YAML
sglang:
  - name: default
    server_groups:
      - worker_type: prefill
        num_gpus: 1
        num_gpus_per_engine: 1
      - worker_type: decode
        num_gpus: $((NUM_SLOTS - 1))
        num_gpus_per_engine: 1
YAML
fi

# The attention and cache settings of the 744B recipe. A CPU engine prints that it does not use them.
SGLANG_ARGS=(
   --sglang-config "${SGLANG_CONFIG}"
   --sglang-server-concurrency 32
   --sglang-disaggregation-transfer-backend "${TRANSFER}"
   --sglang-kv-cache-dtype fp8_e4m3
   --sglang-page-size 64
   --sglang-attention-backend nsa
   --sglang-nsa-decode-backend flashmla_kv
   --sglang-nsa-prefill-backend flashmla_sparse
   --sglang-mem-fraction-static 0.3
   --sglang-disable-cuda-graph
   --update-weight-buffer-size $((64 * 1024 * 1024))
)
((!${EAGLE:-0})) || SGLANG_ARGS+=(
   --sglang-disable-overlap-schedule
   --sglang-speculative-algorithm EAGLE
   --sglang-speculative-num-steps 4
   --sglang-speculative-eagle-topk 1
   --sglang-speculative-num-draft-tokens 5
   --sglang-speculative-draft-attention-backend nsa
)

((NUM_DEVICES == 0)) || SFT_ARGS+=("${RECOMPUTE_ARGS[@]}")
SFT_FLAGS=("${CLUSTER_ARGS[@]}" "${MODEL_ARGS[@]}" "${SFT_ARGS[@]}" "${PERF_ARGS[@]}" "${MISC_ARGS[@]}")
FLAGS=(
   "${CLUSTER_ARGS[@]}"
   --colocate
   "${MODEL_ARGS[@]}"
   "${CKPT_ARGS[@]}"
   "${ROLLOUT_ARGS[@]}"
   "${EVAL_ARGS[@]}"
   "${PERF_ARGS[@]}"
   "${RECOMPUTE_ARGS[@]}"
   "${GRPO_ARGS[@]}"
   "${OPTIMIZER_ARGS[@]}"
   "${SGLANG_ARGS[@]}"
   "${MISC_ARGS[@]}"
   "$@"
)
# A typo is answered before anything is made; the checkpoint that the flags must agree with is there after step 1.
check_flags_alone "${FLAGS[@]}"
((NUM_NODES == 1)) || check_hostfile "${NUM_NODES}"
own BASE_DIR

# 1. A random checkpoint pair in the Hugging Face format of zai-org/GLM-5.2 and GLM-5.2-FP8, and arithmetic prompts.
if [[ ! -f ${BASE_DIR}/GLM-5.2-tiny-FP8/config.json ]]; then
   say "1/4 writing a tiny GLM-5.2 checkpoint pair and its data"
   run_python "${PROJECT_ROOT}/tools/make_tiny_checkpoint.py" --preset "${GLM52_TINY}" --seed "${SEED}" \
      "${TINY_MODEL[@]}" --output-bf16 "${BASE_DIR}/GLM-5.2-tiny" --output-fp8 "${BASE_DIR}/GLM-5.2-tiny-FP8"
   run_python "${PROJECT_ROOT}/tools/make_arithmetic_data.py" --output "${BASE_DIR}/arithmetic" --seed "${SEED}" \
      --task add --max-operand 3 --train 4096 --eval 8 --sft 16384 --label-noise 0.2 --plain-share 0.5 "${DATA_ARGS[@]}"
fi

# 2. BF16 Hugging Face -> Megatron torch_dist, the command of the 744B recipe with smaller numbers.
if runs && [[ ! -f ${BASE_DIR}/GLM-5.2-tiny_torch_dist/latest_checkpointed_iteration.txt ]]; then
   say "2/4 converting it to torch_dist on ${NUM_STAGES} ranks"
   run_ranks "${NUM_STAGES}" "${PROJECT_ROOT}/tools/convert_hf_to_torch_dist.py" "${MODEL_ARGS[@]}" \
      --tensor-model-parallel-size 1 \
      "${PIPELINE_ARGS[@]}" \
      --expert-model-parallel-size 1 \
      --expert-tensor-parallel-size 1 \
      --hf-checkpoint "${BASE_DIR}/GLM-5.2-tiny/" \
      --save "${BASE_DIR}/GLM-5.2-tiny_torch_dist/"
fi

check_flags "${FLAGS[@]}"
start_ray_head
((NUM_NODES == 1)) || join_workers

# 3. The warm start, and 4. reinforcement learning: two jobs of one Ray cluster.
if runs && [[ ! -f ${WARM_START}/latest_checkpointed_iteration.txt ]]; then
   say "3/4 warm start: supervised training (sft_loss) on answers of which half lack the box and a fifth is wrong"
   submit_job "$(runtime_env_json "${ENVIRONMENT[@]}" "SLIME_RUN_DIR=${RUN_DIR}/warm_start" "TENSORBOARD_DIR=${RUN_DIR}/tensorboard/warm_start")" \
      "${SFT_FLAGS[@]}"
fi
! runs || say "4/4 reinforcement learning (GRPO)"
submit_job "$(runtime_env_json "${ENVIRONMENT[@]}" "SLIME_RUN_DIR=${RUN_DIR}" "TENSORBOARD_DIR=${RUN_DIR}/tensorboard/grpo")" "${FLAGS[@]}"
print_resume
