# shellcheck shell=bash disable=SC2034
# Llama-3.2-3B and -Instruct: dense, tied embeddings, positions stretched by 32.

MODEL_ARGS=(
   --num-layers 28
   --hidden-size 3072
   --ffn-hidden-size 8192
   --num-attention-heads 24
   --group-query-attention
   --num-query-groups 8
   --kv-channels 128
   --vocab-size 128256
   --normalization RMSNorm
   --norm-epsilon 1e-5
   --swiglu
   --disable-bias-linear
   --use-rotary-position-embeddings
   --rotary-base "${MODEL_ARGS_ROTARY_BASE:-500000}"
   --use-rope-scaling
   --rope-scaling-factor 32.0
)
