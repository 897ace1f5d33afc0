# shellcheck shell=bash disable=SC2034
# DeepSeek-V3 / R1 671B-A37B: 61 layers (3 dense, 58 with 256 experts in 8 groups), latent attention, YaRN.

N_DENSE_LAYERS=3
N_MOE_LAYERS=58

MODEL_ARGS=(
   --num-layers $((N_DENSE_LAYERS + N_MOE_LAYERS))
   --hidden-size 7168
   --ffn-hidden-size 18432
   --num-attention-heads 128
   --kv-channels 128
   --vocab-size 129280
   --normalization RMSNorm
   --norm-epsilon 1e-6
   --qk-layernorm
   --swiglu
   --disable-bias-linear
   --untie-embeddings-and-output-weights
   --attention-softmax-in-fp32

   --position-embedding-type rope
   --rotary-base 10000
   --rotary-scaling-factor 40
   --mscale 1.0
   --mscale-all-dim 1.0

   --multi-latent-attention
   --q-lora-rank 1536
   --kv-lora-rank 512
   --qk-head-dim 128
   --qk-pos-emb-head-dim 64
   --v-head-dim 128

   --num-experts 256
   --moe-layer-freq "[0]*${N_DENSE_LAYERS}+[1]*${N_MOE_LAYERS}"
   --moe-ffn-hidden-size 2048
   --moe-shared-expert-intermediate-size 2048
   --moe-router-topk 8
   --moe-router-num-groups 8
   --moe-router-group-topk 4
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
