# shellcheck shell=bash disable=SC2034
# Qwen2.5-7B: dense, biases on query, key and value.

MODEL_ARGS=(
   --num-layers 28
   --hidden-size 3584
   --ffn-hidden-size 18944
   --num-attention-heads 28
   --group-query-attention
   --num-query-groups 4
   --vocab-size 152064
   --normalization RMSNorm
   --norm-epsilon 1e-6
   --swiglu
   --disable-bias-linear
   --add-qkv-bias
   --untie-embeddings-and-output-weights

   --use-rotary-position-embeddings
   # Math models and the distilled DeepSeek-R1 have 10000: see config.json.
   --rotary-base "${MODEL_ARGS_ROTARY_BASE:-1000000}"
)
