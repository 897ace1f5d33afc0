# shellcheck shell=bash disable=SC2034
# Qwen3-4B-Instruct-2507 and -Thinking-2507: Qwen3-4B with a longer context and RoPE's base to it.

MODEL_ARGS_ROTARY_BASE=5000000
source "$(dirname -- "${BASH_SOURCE[0]}")/qwen3-4B.sh"
