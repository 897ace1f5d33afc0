# shellcheck shell=bash disable=SC2034
# Qwen3-235B-A22B: 94 layers, all with 128 experts of which 8 are active.

MODEL_ARGS=(
   --num-layers 94
   --hidden-size 4096
   --ffn-hidden-size 12288
   --num-attention-heads 64
   --group-query-attention
   --num-query-groups 4
   --kv-channels 128
   --vocab-size 151936
   --normalization RMSNorm
   --norm-epsilon 1e-6
   --qk-layernorm
   --swiglu
   --disable-bias-linear
   --untie-embeddings-and-output-weights

   --position-embedding-type rope
   --rotary-percent 1.0
   --rotary-base "${MODEL_ARGS_ROTARY_BASE:-1000000}"

   --num-experts 128
   --moe-layer-freq "[1]*94"
   --moe-ffn-hidden-size 1536
   --moe-router-topk 8
   --moe-router-score-function softmax
   --moe-router-dtype fp32
   --moe-aux-loss-coeff 0
   --moe-token-dispatcher-type alltoall
   --moe-token-drop-policy probs
   --moe-grouped-gemm
   --moe-permute-fusion
)
