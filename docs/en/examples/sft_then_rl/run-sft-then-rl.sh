#!/usr/bin/env bash
# Supervised training, then reinforcement learning from its checkpoint: two jobs of one launcher, one trainer, one data format.
#
#   bash docs/en/examples/sft_then_rl/run-sft-then-rl.sh [FLAGS...]        FLAGS go to the second job, e.g. --num-rollout 20
#
# BASE_DIR   where everything goes      (default: outputs/sft_then_rl of this project); delete it to start anew
# The other settings are those of scripts/run-glm5.2-tiny.sh, which does the work.
set -euo pipefail

HERE="$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")" && pwd)"
source "${HERE}/../tiny_example.sh"

example sft_then_rl
make_data data.py
run_tiny \
   --prompt-data "${DATA}/train.jsonl" \
   --eval-prompt-data last_digit "${DATA}/eval.jsonl" \
   --eval-max-response-len 16 \
   --rollout-max-response-len 16 \
   --rollout-batch-size 16 \
   --num-rollout 12 \
   "$@"
