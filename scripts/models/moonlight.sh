# shellcheck shell=bash disable=SC2034
# Moonlight-16B-A3B: 27 layers (1 dense, 26 with 64 experts), latent attention whose queries have no latent.

N_DENSE_LAYERS=1
N_MOE_LAYERS=26

MODEL_ARGS=(
   --num-layers $((N_DENSE_LAYERS + N_MOE_LAYERS))
   --hidden-size 2048
   --ffn-hidden-size 11264
   --num-attention-heads 16
   --vocab-size 163840
   --normalization RMSNorm
   --norm-epsilon 1e-5
   --qk-layernorm
   --swiglu
   --disable-bias-linear
   --untie-embeddings-and-output-weights

   --position-embedding-type rope
   --no-position-embedding
   --rotary-base 50000

   --multi-latent-attention
   --kv-lora-rank 512
   --qk-head-dim 128
   --qk-pos-emb-head-dim 64
   --v-head-dim 128

   --num-experts 64
   --moe-layer-freq "[0]*${N_DENSE_LAYERS}+[1]*${N_MOE_LAYERS}"
   --moe-ffn-hidden-size 1408
   --moe-shared-expert-intermediate-size 2816
   --moe-router-topk 6
   --moe-router-score-function sigmoid
   --moe-router-pre-softmax
   --moe-router-topk-scaling-factor 2.446
   --moe-router-dtype fp32
   --moe-router-enable-expert-bias
   --moe-router-bias-update-rate 0
   --moe-router-load-balancing-type seq_aux_loss
   --moe-aux-loss-coeff 0
   --moe-token-dispatcher-type alltoall
   --moe-grouped-gemm
   --moe-permute-fusion
)
