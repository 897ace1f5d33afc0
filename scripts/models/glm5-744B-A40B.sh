# shellcheck shell=bash disable=SC2034
# GLM-5 744B-A40B: GLM-5.2's shape with an indexer in every layer (nothing is shared) and a smaller RoPE base.

N_DENSE_LAYERS=3
N_MOE_LAYERS=75
MOE_FFN_HIDDEN=2048
MOE_SHARED_EXPERTS=1

MODEL_ARGS=(
   --spec slime_plugins.models.glm5.glm5 get_glm5_spec
   --enable-experimental

   --num-layers $((N_DENSE_LAYERS + N_MOE_LAYERS))
   --hidden-size 6144
   --ffn-hidden-size 12288
   --num-attention-heads 64
   --vocab-size 154880
   --make-vocab-size-divisible-by 16
   --normalization RMSNorm
   --qk-layernorm
   --swiglu
   --disable-bias-linear
   --untie-embeddings-and-output-weights

   --position-embedding-type rope
   --no-position-embedding
   --rotary-base 1000000

   --multi-latent-attention
   --q-lora-rank 2048
   --kv-lora-rank 512
   --qk-head-dim 192
   --qk-pos-emb-head-dim 64
   --v-head-dim 256
   --kv-channels 192

   --num-experts 256
   --moe-layer-freq "[0]*${N_DENSE_LAYERS}+[1]*${N_MOE_LAYERS}"
   --moe-ffn-hidden-size "${MOE_FFN_HIDDEN}"
   --moe-shared-expert-intermediate-size $((MOE_FFN_HIDDEN * MOE_SHARED_EXPERTS))
   --moe-router-topk 8
   --moe-router-score-function sigmoid
   --moe-router-pre-softmax
   --moe-router-topk-scaling-factor 2.5
   --moe-router-dtype fp32
   --moe-router-enable-expert-bias
   --moe-router-bias-update-rate 0
   --moe-router-load-balancing-type seq_aux_loss
   --moe-aux-loss-coeff 0
   --moe-grouped-gemm
   --moe-permute-fusion

   # Contiguous context-parallel shards with gathered keys; sparse attention needs the keys in order.
   --allgather-cp
)
