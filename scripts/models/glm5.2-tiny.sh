# shellcheck shell=bash disable=SC2034
# The GLM-5.2 that tools/make_tiny_checkpoint.py writes: every mechanism of the 744B model with small numbers.
# GLM52_TINY=cpu (default) or h200 chooses the preset of that tool; h200 has the head sizes that the CUDA kernels accept.

case "${GLM52_TINY:-cpu}" in
   cpu)  TINY=(hidden=128 ffn=256 heads=4 q_lora=64 kv_lora=32 nope=32 rope=16 v=32 experts=8 topk=2 moe_ffn=64) ;;
   h200) TINY=(hidden=1024 ffn=2048 heads=64 q_lora=512 kv_lora=512 nope=192 rope=64 v=256 experts=16 topk=4 moe_ffn=256) ;;
   *) echo "GLM52_TINY=${GLM52_TINY}: choose cpu or h200" >&2; exit 1 ;;
esac
declare -A TINY_SIZE=()
for pair in "${TINY[@]}"; do TINY_SIZE["${pair%%=*}"]="${pair#*=}"; done

N_DENSE_LAYERS=3
N_MOE_LAYERS=5

MODEL_ARGS=(
   --spec slime_plugins.models.glm5.glm5 get_glm5_spec
   --enable-experimental

   --num-layers $((N_DENSE_LAYERS + N_MOE_LAYERS))
   --hidden-size "${TINY_SIZE[hidden]}"
   --ffn-hidden-size "${TINY_SIZE[ffn]}"
   --num-attention-heads "${TINY_SIZE[heads]}"
   --vocab-size 320
   --make-vocab-size-divisible-by 16
   --normalization RMSNorm
   --qk-layernorm
   --swiglu
   --disable-bias-linear
   --untie-embeddings-and-output-weights

   --position-embedding-type rope
   --no-position-embedding
   --rotary-base 8000000

   --multi-latent-attention
   --q-lora-rank "${TINY_SIZE[q_lora]}"
   --kv-lora-rank "${TINY_SIZE[kv_lora]}"
   --qk-head-dim "${TINY_SIZE[nope]}"
   --qk-pos-emb-head-dim "${TINY_SIZE[rope]}"
   --v-head-dim "${TINY_SIZE[v]}"
   --kv-channels "${TINY_SIZE[nope]}"

   --num-experts "${TINY_SIZE[experts]}"
   --moe-layer-freq "[0]*${N_DENSE_LAYERS}+[1]*${N_MOE_LAYERS}"
   --moe-ffn-hidden-size "${TINY_SIZE[moe_ffn]}"
   --moe-shared-expert-intermediate-size "${TINY_SIZE[moe_ffn]}"
   --moe-router-topk "${TINY_SIZE[topk]}"
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

   --allgather-cp
)
