# shellcheck shell=bash disable=SC2034
# DeepSeek-V3.2 671B-A37B: DeepSeek-V3 with sparse attention; every layer has an indexer of its own, read from config.json.

source "$(dirname -- "${BASH_SOURCE[0]}")/deepseek-v3.sh"

MODEL_ARGS+=(
   --spec slime_plugins.models.glm5.glm5 get_glm5_spec
   --enable-experimental
   --allgather-cp
)
