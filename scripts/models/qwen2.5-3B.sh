# shellcheck shell=bash disable=SC2034
# Qwen2.5-3B: dense, biases on query, key and value, tied embeddings.

MODEL_ARGS=(
   --num-layers 36
   --hidden-size 2048
   --ffn-hidden-size 11008
   --num-attention-heads 16
   --group-query-attention
   --num-query-groups 2
   --vocab-size 151936
   --normalization RMSNorm
   --norm-epsilon 1e-6
   --swiglu
   --disable-bias-linear
   --add-qkv-bias

   --use-rotary-position-embeddings
   # Math models and the distilled DeepSeek-R1 have 10000: see config.json.
   --rotary-base "${MODEL_ARGS_ROTARY_BASE:-1000000}"
)
