# shellcheck shell=bash disable=SC2034
# GLM-4.7-Flash 30B-A3B: 47 layers (1 dense, 46 with 64 experts), latent attention.

N_DENSE_LAYERS=1
N_MOE_LAYERS=46

MODEL_ARGS=(
   --num-layers $((N_DENSE_LAYERS + N_MOE_LAYERS))
   --hidden-size 2048
   --ffn-hidden-size 10240
   --num-attention-heads 20
   --vocab-size 154880
   --normalization RMSNorm
   --norm-epsilon 1e-5
   --qk-layernorm
   --swiglu
   --disable-bias-linear
   --untie-embeddings-and-output-weights

   --position-embedding-type rope
   --no-position-embedding
   --rotary-base 1000000

   --multi-latent-attention
   --q-lora-rank 768
   --kv-lora-rank 512
   --qk-head-dim 192
   --qk-pos-emb-head-dim 64
   --v-head-dim 256

   --num-experts 64
   --moe-layer-freq "[0]*${N_DENSE_LAYERS}+[1]*${N_MOE_LAYERS}"
   --moe-ffn-hidden-size 1536
   --moe-shared-expert-intermediate-size 1536
   --moe-router-topk 4
   --moe-router-score-function sigmoid
   --moe-router-pre-softmax
   --moe-router-topk-scaling-factor 1.8
   --moe-router-dtype fp32
   --moe-router-enable-expert-bias
   --moe-router-bias-update-rate 0
   --moe-router-load-balancing-type seq_aux_loss
   --moe-aux-loss-coeff 0
   --moe-token-dispatcher-type alltoall
   --moe-grouped-gemm
   --moe-permute-fusion
)
