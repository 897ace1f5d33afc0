#!/usr/bin/env bash
# The tiny GLM-5.2 learns to compute with Python instead of guessing: tool calls in the chat template, run in a sandbox.
#
#   bash docs/en/examples/calculator/run-calculator.sh [FLAGS...]        FLAGS win over the launcher's, e.g. --num-rollout 20
#
# BASE_DIR   where everything goes      (default: outputs/calculator of this project); delete it to start anew
# The other settings are those of scripts/run-glm5.2-tiny.sh, which does the work.
set -euo pipefail

HERE="$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")" && pwd)"
source "${HERE}/../tiny_example.sh"

example calculator
make_data calculator.py
run_tiny \
   --custom-config-path "${HERE}/settings.yaml" \
   --custom-generate-function-path calculator.generate \
   --sglang-tool-call-parser glm47 \
   --prompt-data "${DATA}/train.jsonl" \
   --eval-prompt-data calculator "${DATA}/eval.jsonl" \
   --eval-max-response-len 48 \
   --rollout-max-response-len 48 \
   --rollout-batch-size 16 \
   --num-rollout 12 \
   "$@"
