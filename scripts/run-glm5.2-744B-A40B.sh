#!/usr/bin/env bash
# GLM-5.2 744B-A40B: GRPO on 32 nodes with 8 H100 each. BF16 training and FP8 rollout take turns on the same 256 GPUs; rollout
# is split into one prefill engine of 64 GPUs and three decode engines of 64.
#
#   export BASE_DIR=/shared/path MASTER_ADDR=<this node's address> HOSTFILE=$BASE_DIR/hostfile
#   bash scripts/run-glm5.2-744B-A40B.sh [FLAGS...]        FLAGS win over the launcher's, e.g. --num-rollout 10
#
# BASE_DIR        folder that every node sees; checkpoints and data are expected below it
# MASTER_ADDR     address of this node (node0) in the cluster network
# HOSTFILE        one node address per line, all 32; without it, join the other nodes by hand as the launcher prints
# SOCKET_IFNAME   network interface of the control traffic                                             (default eth0)
# IB_DEVICES      InfiniBand devices of the KV transfer              (default mlx5_100,...,mlx5_107)
# Paths: HF_CHECKPOINT REF_LOAD LOAD SAVE PROMPT_DATA EVAL_DATA RUN_DIR.   Cluster: NUM_NODES NUM_GPUS, and what lib/launch.sh lists.
set -euo pipefail

SCRIPT_DIR="$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")" && pwd)"
source "${SCRIPT_DIR}/lib/launch.sh"
source "${SCRIPT_DIR}/models/glm5.2-744B-A40B.sh"

export PYTHONUNBUFFERED=1
unset http_proxy https_proxy HTTP_PROXY HTTPS_PROXY

# ---------------------------------------------------------------------------------------------- where things are

require_env BASE_DIR "give the shared folder that every node sees, with the checkpoints and the data"
require_env MASTER_ADDR "give the address of this node in the cluster network"
NUM_NODES="${NUM_NODES:-32}"
NUM_GPUS="${NUM_GPUS:-8}"
SOCKET_IFNAME="${SOCKET_IFNAME:-eth0}"
IB_DEVICES="${IB_DEVICES:-mlx5_100,mlx5_101,mlx5_102,mlx5_103,mlx5_104,mlx5_105,mlx5_106,mlx5_107}"
RAY_PORT="${RAY_PORT:-6379}"
RAY_DASHBOARD_PORT="${RAY_DASHBOARD_PORT:-8265}"

HF_CHECKPOINT="${HF_CHECKPOINT:-${BASE_DIR}/GLM-5.2-FP8}"
REF_LOAD="${REF_LOAD:-${BASE_DIR}/GLM-5.2_torch_dist}"
LOAD="${LOAD:-${BASE_DIR}/GLM-5.2_slime}"
SAVE="${SAVE:-${LOAD}}"
PROMPT_DATA="${PROMPT_DATA:-${BASE_DIR}/dapo-math-17k/dapo-math-17k.jsonl}"
RUN_DIR="${RUN_DIR:-${BASE_DIR}/runs/glm5.2-744B-A40B-$(date +%Y%m%d-%H%M%S)}"

check_hostfile "${NUM_NODES}"
require_dir "${HF_CHECKPOINT}" "the FP8 checkpoint ($(program hf) download zai-org/GLM-5.2-FP8 --local-dir $(printf %q "${HF_CHECKPOINT}"))"
require_dir "${REF_LOAD}" "the converted BF16 checkpoint (tools/convert_hf_to_torch_dist.py; see docs/en/examples/glm5.2-744B-A40B.md)"
require_file "${PROMPT_DATA}" "the prompts ($(program hf) download --repo-type dataset zhuzilin/dapo-math-17k --local-dir $(printf %q "${BASE_DIR}/dapo-math-17k"))"
mkdir -p "${RUN_DIR}" || die "cannot make the run folder ${RUN_DIR}"

# ---------------------------------------------------------------------------------------------- flags

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
   --rollout-batch-size 8
   --n-samples-per-prompt 8
   --rollout-max-response-len 65536
   --rollout-temperature 1.0

   --global-batch-size 64
)

# No evaluation by default: one would take the engines of a 64k-token recipe for long. EVAL_DATA=<jsonl> turns it on.
EVAL_ARGS=()
if [[ -n ${EVAL_DATA:-} ]]; then
   require_file "${EVAL_DATA}" "unset EVAL_DATA to train without evaluation"
   EVAL_ARGS=(
      --eval-interval 20
      --eval-prompt-data "${EVAL_NAME:-aime}" "${EVAL_DATA}"
      --n-samples-per-eval-prompt 8
      --eval-max-response-len 65536
   )
fi

# Other numbers of nodes than the recipe's 32: of TP, PP and CP the last follows, down to what is there; whole copies of the model
# beyond that are data-parallel. Whether training fits into the memory of fewer nodes is what --rehearse says.
[[ ${NUM_NODES}x${NUM_GPUS} =~ ^[1-9][0-9]*x[1-9][0-9]*$ ]] || die "NUM_NODES=${NUM_NODES} and NUM_GPUS=${NUM_GPUS} must be whole numbers above 0"
GPUS=$((NUM_NODES * NUM_GPUS))
largest_divisor() { # OF FIRST SECOND... -> the first of them that divides it
   local size
   for size in "${@:2}"; do (($1 % size)) || { echo "${size}"; return; }; done
}
((GPUS % 64 == 0 && GPUS >= 128)) ||
   die "NUM_NODES ${NUM_NODES} x NUM_GPUS ${NUM_GPUS} is ${GPUS} GPUs: engines take 64 each, one prefills and one decodes at least; choose a multiple of $((64 / NUM_GPUS > 0 ? 64 / NUM_GPUS : 1)) nodes, from $(((127 + NUM_GPUS) / NUM_GPUS)) on, or other engines (SGLANG_CONFIG in ${LAUNCHER})"
CONTEXT_PARALLEL=$(largest_divisor $((GPUS / 32)) 8 4 2 1)
EXPERT_PARALLEL=$(largest_divisor $((GPUS / 8)) 32 16 8)

# TP 4 x PP 8 x CP 8 = 256: one copy of the model. Experts: ETP 1 x EP 32 x PP 8 = 256.
# Layers that compute their own sparse indices are 1, 2, 3, 7, 11, ..., 75, and a stage must start on one of them. 78 layers in
# 8 equal stages do not; 14 + 6 x 8 + 16 start on 1, 15, 23, 31, 39, 47, 55 and 63, which all do.
PERF_ARGS=(
   --tensor-model-parallel-size 4
   --sequence-parallel
   --pipeline-model-parallel-size 8
   --decoder-first-pipeline-num-layers 14
   --decoder-last-pipeline-num-layers 16
   --context-parallel-size "${CONTEXT_PARALLEL}"
   --expert-model-parallel-size "${EXPERT_PARALLEL}"
   --expert-tensor-parallel-size 1

   --recompute-granularity full
   --recompute-method uniform
   --recompute-num-layers 1

   --use-dynamic-batch-size
   --max-tokens-per-gpu 8192
   --data-pad-size-multiplier 1024
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

   # The engines compute in FP8: weigh each token by the trainer's over the engine's probability, within these bounds.
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

# DeepEP's low-latency dispatch has room for this many tokens per rank; a decode step brings one batch times the draft tokens.
DECODE_CUDA_GRAPH_MAX_BS=12
DRAFT_TOKENS=5
DISPATCH_TOKENS=64
((DISPATCH_TOKENS >= DECODE_CUDA_GRAPH_MAX_BS * DRAFT_TOKENS)) ||
   die "SGLANG_DEEPEP_NUM_MAX_DISPATCH_TOKENS_PER_RANK ${DISPATCH_TOKENS} is below ${DECODE_CUDA_GRAPH_MAX_BS} x ${DRAFT_TOKENS} tokens of a decode step"

# DeepEP serves at most 160 expert ranks, so one engine cannot span 256 GPUs: 64 prefill + 3 x 64 decode. A quarter prefills with
# other numbers of nodes too.
ENGINES=$((GPUS / 64))
PREFILL_GPUS=$((64 * (ENGINES >= 8 ? ENGINES / 4 : 1)))
SGLANG_CONFIG="${RUN_DIR}/sglang.yaml"
cat >"${SGLANG_CONFIG}" <<YAML
sglang:
  - name: default
    server_groups:
      - worker_type: prefill
        num_gpus: ${PREFILL_GPUS}
        num_gpus_per_engine: 64
        overrides:
          dp_size: 64
          ep_size: 64
          enable_dp_attention: true
          enable_dp_lm_head: true
          moe_dense_tp_size: 1
          load_balance_method: follow_bootstrap_room
          chunked_prefill_size: 131072
          max_running_requests: 512
          deepep_mode: auto
      - worker_type: decode
        num_gpus: $((GPUS - PREFILL_GPUS))
        num_gpus_per_engine: 64
        overrides:
          dp_size: 64
          ep_size: 64
          enable_dp_attention: true
          enable_dp_lm_head: true
          moe_dense_tp_size: 1
          load_balance_method: round_robin
          max_running_requests: 768
          cuda_graph_max_bs: ${DECODE_CUDA_GRAPH_MAX_BS}
          deepep_mode: low_latency
          moe_runner_backend: deep_gemm
          disable_overlap_schedule: true
YAML

SGLANG_ARGS=(
   --sglang-config "${SGLANG_CONFIG}"
   --rollout-num-gpus-per-engine 64
   --sglang-mem-fraction-static 0.70

   --sglang-enable-dp-attention
   --sglang-dp-size 64
   --sglang-ep-size 64
   --sglang-moe-dense-tp-size 1
   --sglang-enable-dp-lm-head

   --sglang-moe-a2a-backend deepep
   --sglang-deepep-mode auto

   --sglang-page-size 64
   --sglang-kv-cache-dtype fp8_e4m3
   --sglang-attention-backend nsa
   --sglang-nsa-prefill-backend flashmla_sparse
   --sglang-nsa-decode-backend flashmla_kv
   --sglang-cuda-graph-max-bs 8
   --sglang-disable-overlap-schedule
   --sglang-max-running-requests 512
   --sglang-watchdog-timeout 3600

   # Prefill hands the KV cache to decode over InfiniBand.
   --sglang-disaggregation-transfer-backend mooncake
   --sglang-disaggregation-ib-device "${IB_DEVICES}"

   # The checkpoint's own next-token-prediction layer drafts; no second model is needed.
   --sglang-speculative-algorithm EAGLE
   --sglang-speculative-num-steps 4
   --sglang-speculative-eagle-topk 1
   --sglang-speculative-num-draft-tokens "${DRAFT_TOKENS}"
   --sglang-speculative-draft-attention-backend nsa
)

MISC_ARGS=(
   --attention-dropout 0.0
   --hidden-dropout 0.0
   --accumulate-allreduce-grads-in-fp32
   --attention-softmax-in-fp32
   --attention-backend flash
   --moe-token-dispatcher-type alltoall
   --no-check-for-nan-in-loss-and-grad
   --update-weight-buffer-size $((2 * 1024 * 1024 * 1024))
   --use-tensorboard
   --tb-project-name glm5.2-744B-A40B
)

# The engines count nodes of 8 unless they are told.
NODE_ARGS=()
[[ ${NUM_GPUS} == 8 ]] || NODE_ARGS=(--num-gpus-per-node "${NUM_GPUS}")

FLAGS=(
   --actor-num-nodes "${NUM_NODES}"
   --actor-num-gpus-per-node "${NUM_GPUS}"
   "${NODE_ARGS[@]}"
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

# ---------------------------------------------------------------------------------------------- environment and launch

no_proxy="localhost,127.0.0.1,${MASTER_ADDR},10.0.0.0/8,100.64.0.0/10"
export no_proxy NO_PROXY="${no_proxy}"

ENVIRONMENT=(
   "PYTHONPATH=${PROJECT_ROOT}${PYTHONPATH:+:${PYTHONPATH}}"
   "PYTHONUNBUFFERED=1"
   "CUDA_DEVICE_MAX_CONNECTIONS=1"
   "MASTER_ADDR=${MASTER_ADDR}"
   "no_proxy=${no_proxy}"
   "NO_PROXY=${no_proxy}"

   # Control traffic stays on one interface; data goes over InfiniBand.
   "GLOO_SOCKET_IFNAME=${SOCKET_IFNAME}"
   "TP_SOCKET_IFNAME=${SOCKET_IFNAME}"
   "NCCL_SOCKET_IFNAME=${SOCKET_IFNAME}"
   "NCCL_P2P_LEVEL=NVL"
   "NCCL_NVLS_ENABLE=0"
   "NCCL_CUMEM_ENABLE=0"
   "NCCL_NET_GDR_LEVEL=2"
   "NCCL_IB_QPS_PER_CONNECTION=2"
   "NCCL_IB_TC=160"
   "NCCL_IB_TIMEOUT=22"
   "NCCL_PXN_DISABLE=0"
   "NCCL_MIN_CTAS=4"

   "NVTE_FWD_LAYERNORM_SM_MARGIN=8"
   "NVTE_BWD_LAYERNORM_SM_MARGIN=8"

   # DeepEP brings NVSHMEM, which must not load an NCCL of its own; mooncake wants relaxed PCI ordering.
   "NVSHMEM_DISABLE_NCCL=1"
   "SGLANG_DEEPEP_NUM_MAX_DISPATCH_TOKENS_PER_RANK=${DISPATCH_TOKENS}"
   "SGLANG_JIT_DEEPGEMM_PRECOMPILE=true"
   "MC_IB_PCI_RELAXED_ORDERING=1"
   "MLP_SKIP_SORT_RDMA=true"
   "INDEXER_ROPE_NEOX_STYLE=0"
)

start_ray_head
join_workers
submit_job "$(runtime_env_json "${ENVIRONMENT[@]}")" "${FLAGS[@]}"
print_resume
