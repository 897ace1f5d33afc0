# shellcheck shell=bash disable=SC2034
# Qwen3-1.7B: dense, tied embeddings.

MODEL_ARGS=(
   --num-layers 28
   --hidden-size 2048
   --ffn-hidden-size 6144
   --num-attention-heads 16
   --group-query-attention
   --num-query-groups 8
   --kv-channels 128
   --vocab-size 151936
   --normalization RMSNorm
   --norm-epsilon 1e-6
   --qk-layernorm
   --swiglu
   --disable-bias-linear

   --use-rotary-position-embeddings
   # The base models have 1000000; an instruct model with a longer context may have another: see its config.json.
   --rotary-base "${MODEL_ARGS_ROTARY_BASE:-1000000}"
)
