# shellcheck shell=bash disable=SC2034
# Kimi-K2 1T-A32B: 61 layers (1 dense, 60 with 384 experts), latent attention, YaRN (32; 64 since September 2025).

N_DENSE_LAYERS=1
N_MOE_LAYERS=60

MODEL_ARGS=(
   --num-layers $((N_DENSE_LAYERS + N_MOE_LAYERS))
   --hidden-size 7168
   --ffn-hidden-size 18432
   --num-attention-heads 64
   --vocab-size 163840
   --normalization RMSNorm
   --norm-epsilon "${MODEL_ARGS_NORM_EPSILON:-1e-6}"
   --qk-layernorm
   --swiglu
   --disable-bias-linear
   --untie-embeddings-and-output-weights

   --position-embedding-type rope
   --no-position-embedding
   --rotary-base 50000
   --rotary-scaling-factor "${MODEL_ARGS_ROTARY_SCALING_FACTOR:-32}"
   --beta-fast 1
   --beta-slow 1
   --mscale 1.0
   --mscale-all-dim 1.0

   --multi-latent-attention
   --q-lora-rank 1536
   --kv-lora-rank 512
   --qk-head-dim 128
   --qk-pos-emb-head-dim 64
   --v-head-dim 128

   --num-experts 384
   --moe-layer-freq "[0]*${N_DENSE_LAYERS}+[1]*${N_MOE_LAYERS}"
   --moe-ffn-hidden-size 2048
   --moe-shared-expert-intermediate-size 2048
   --moe-router-topk 8
   --moe-router-score-function sigmoid
   --moe-router-pre-softmax
   --moe-router-topk-scaling-factor 2.827
   --moe-router-dtype fp32
   --moe-router-enable-expert-bias
   --moe-router-bias-update-rate 0
   --moe-router-load-balancing-type seq_aux_loss
   --moe-aux-loss-coeff 0
   --moe-token-dispatcher-type alltoall
   --moe-grouped-gemm
   --moe-permute-fusion
)
