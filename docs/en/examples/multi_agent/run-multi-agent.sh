#!/usr/bin/env bash
# The tiny GLM-5.2 in three parts: two that solve and one that chooses, trained by whether the choice was right.
#
#   bash docs/en/examples/multi_agent/run-multi-agent.sh [FLAGS...]        FLAGS win over the launcher's, e.g. --num-rollout 20
#
# BASE_DIR   where everything goes      (default: outputs/multi_agent of this project); delete it to start anew
# The other settings are those of scripts/run-glm5.2-tiny.sh, which does the work.
set -euo pipefail

HERE="$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")" && pwd)"
source "${HERE}/../tiny_example.sh"

example multi_agent
make_data agents.py
run_tiny \
   --custom-generate-function-path agents.generate \
   --prompt-data "${DATA}/train.jsonl" \
   --eval-prompt-data multi_agent "${DATA}/eval.jsonl" \
   --rollout-batch-size 16 \
   --num-rollout 12 \
   "$@"
