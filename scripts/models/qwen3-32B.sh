# shellcheck shell=bash disable=SC2034
# Qwen3-32B: dense.

MODEL_ARGS=(
   --num-layers 64
   --hidden-size 5120
   --ffn-hidden-size 25600
   --num-attention-heads 64
   --group-query-attention
   --num-query-groups 8
   --kv-channels 128
   --vocab-size 151936
   --normalization RMSNorm
   --norm-epsilon 1e-6
   --qk-layernorm
   --swiglu
   --disable-bias-linear
   --untie-embeddings-and-output-weights
   --use-rotary-position-embeddings
   # The base models have 1000000; an instruct model with a longer context may have another: see its config.json.
   --rotary-base "${MODEL_ARGS_ROTARY_BASE:-1000000}"
)
