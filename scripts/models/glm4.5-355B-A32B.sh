# shellcheck shell=bash disable=SC2034
# GLM-4.5, 4.6 and 4.7 355B-A32B: 92 layers (3 dense, 89 with 160 experts), norms on q and k, RoPE on half of each head.

N_DENSE_LAYERS=3
N_MOE_LAYERS=89

MODEL_ARGS=(
   --num-layers $((N_DENSE_LAYERS + N_MOE_LAYERS))
   --hidden-size 5120
   --ffn-hidden-size 12288
   --num-attention-heads 96
   --group-query-attention
   --num-query-groups 8
   --kv-channels 128
   --vocab-size 151552
   --normalization RMSNorm
   --norm-epsilon 1e-5
   --qk-layernorm
   --swiglu
   --disable-bias-linear
   --add-qkv-bias
   --untie-embeddings-and-output-weights

   --position-embedding-type rope
   --rotary-percent 0.5
   --rotary-base 1000000

   --num-experts 160
   --moe-layer-freq "[0]*${N_DENSE_LAYERS}+[1]*${N_MOE_LAYERS}"
   --moe-ffn-hidden-size 1536
   --moe-shared-expert-intermediate-size 1536
   --moe-router-topk 8
   --moe-router-score-function sigmoid
   --moe-router-pre-softmax
   --moe-router-topk-scaling-factor 2.5
   --moe-router-dtype fp32
   --moe-router-enable-expert-bias
   --moe-router-bias-update-rate 0
   --moe-router-load-balancing-type seq_aux_loss
   --moe-aux-loss-coeff 0
   --moe-token-dispatcher-type alltoall
   --moe-grouped-gemm
   --moe-permute-fusion
)
