#!/usr/bin/env bash
# A tiny GLM-5.2 with random weights learns from one that was trained: on-policy distillation, the teacher in the trainer's memory.
#
#   bash docs/en/examples/distillation/run-distillation.sh [FLAGS...]        FLAGS win over the launcher's, e.g. --num-rollout 60
#
# BASE_DIR   where everything goes      (default: outputs/distillation of this project); delete it to start anew
# The other settings are those of scripts/run-glm5.2-tiny.sh, which does the work.
set -euo pipefail

HERE="$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")" && pwd)"
source "${HERE}/../tiny_example.sh"

example distillation
SFT_DATA="${BASE_DIR}/arithmetic/sft.jsonl" # the launcher's own
TEACHER="${BASE_DIR}/GLM-5.2-tiny_warm_start"
# The teacher is the model after the warm start: a first run makes it, and evaluates it on the held-out prompts.
is_proven "$@" || [[ -f ${TEACHER}/latest_checkpointed_iteration.txt ]] || (run_tiny --num-rollout 0)
run_tiny \
   --custom-config-path "${HERE}/settings.yaml" \
   --ref-load "${BASE_DIR}/GLM-5.2-tiny_torch_dist" \
   --use-opd \
   --opd-type megatron \
   --opd-teacher-load "${TEACHER}" \
   --opd-kl-coef 1.0 \
   --lr 2e-3 \
   --num-rollout 30 \
   "$@"
