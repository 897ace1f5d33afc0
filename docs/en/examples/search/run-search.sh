#!/usr/bin/env bash
# The tiny GLM-5.2 learns to look things up instead of guessing: <search> in its answer, a local BM25 index behind it.
#
#   bash docs/en/examples/search/run-search.sh [FLAGS...]        FLAGS win over the launcher's, e.g. --num-rollout 20
#
# BASE_DIR   where everything goes      (default: outputs/search of this project); delete it to start anew
# The other settings are those of scripts/run-glm5.2-tiny.sh, which does the work.
set -euo pipefail

HERE="$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")" && pwd)"
source "${HERE}/../tiny_example.sh"

example search
make_data search.py
write_settings <<YAML
custom:
  search_corpus: ${DATA}/corpus.jsonl
YAML
run_tiny \
   --custom-config-path "${SETTINGS_FILE}" \
   --custom-generate-function-path search.generate \
   --prompt-data "${DATA}/train.jsonl" \
   --eval-prompt-data search "${DATA}/eval.jsonl" \
   --eval-max-response-len 80 \
   --rollout-max-response-len 80 \
   --rollout-batch-size 16 \
   --num-rollout 12 \
   "$@"
