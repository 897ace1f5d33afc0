# shellcheck shell=bash disable=SC2034
# MiMo-7B: Qwen2's layer with other sizes. Its multi-token-prediction layer is built otherwise and is left out.

MODEL_ARGS=(
   --num-layers 36
   --hidden-size 4096
   --ffn-hidden-size 11008
   --num-attention-heads 32
   --group-query-attention
   --num-query-groups 8
   --vocab-size 151680
   --normalization RMSNorm
   --norm-epsilon 1e-5
   --swiglu
   --disable-bias-linear
   --add-qkv-bias
   --untie-embeddings-and-output-weights

   --use-rotary-position-embeddings
   --rotary-base 640000
)
