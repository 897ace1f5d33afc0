# shellcheck shell=bash disable=SC2034
# The Qwen3 that tools/make_tiny_checkpoint.py --preset qwen3 writes: dense, grouped-query attention, norms on q and k.

MODEL_ARGS=(
   --num-layers 4
   --hidden-size 128
   --ffn-hidden-size 384
   --num-attention-heads 4
   --group-query-attention
   --num-query-groups 2
   --kv-channels 32
   --vocab-size 320
   --make-vocab-size-divisible-by 16
   --normalization RMSNorm
   --norm-epsilon 1e-6
   --qk-layernorm
   --swiglu
   --disable-bias-linear
   --untie-embeddings-and-output-weights
   --use-rotary-position-embeddings
   --rotary-base 1000000
)
