# shellcheck shell=bash disable=SC2034
# GLM-4-9B-0414 and GLM-Z1-9B-0414: dense, RoPE on half of each head in interleaved pairs, norms before and after each half layer.

MODEL_ARGS=(
   --num-layers 40
   --hidden-size 4096
   --ffn-hidden-size 13696
   --num-attention-heads 32
   --group-query-attention
   --num-query-groups 2
   --vocab-size 151552
   --normalization RMSNorm
   --norm-epsilon 1e-5
   --post-self-attn-layernorm
   --post-mlp-layernorm
   --swiglu
   --disable-bias-linear
   --add-qkv-bias
   --untie-embeddings-and-output-weights

   --use-rotary-position-embeddings
   --rotary-base 10000
   --rotary-percent 0.5
   --rotary-interleaved
   --no-rope-fusion
)
