# shellcheck shell=bash disable=SC2034
# Kimi-K2-Thinking: Kimi-K2 with a longer context and another epsilon.

MODEL_ARGS_NORM_EPSILON=1e-5
MODEL_ARGS_ROTARY_SCALING_FACTOR=64
source "$(dirname -- "${BASH_SOURCE[0]}")/kimi-k2.sh"
