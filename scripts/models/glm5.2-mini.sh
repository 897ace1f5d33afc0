# shellcheck shell=bash disable=SC2034
# GLM-5.2 with its own widths, heads and mechanisms, but 8 layers, few experts and the small vocabulary of the checkpoint that
# tools/make_tiny_checkpoint.py --preset mini draws. MINI_EXPERTS (default 32) is that tool's --experts.

source "$(dirname -- "${BASH_SOURCE[0]}")/glm5.2-744B-A40B.sh"

N_MOE_LAYERS=5
MODEL_ARGS+=(
   --num-layers $((N_DENSE_LAYERS + N_MOE_LAYERS))
   --moe-layer-freq "[0]*${N_DENSE_LAYERS}+[1]*${N_MOE_LAYERS}"
   --num-experts "${MINI_EXPERTS:-32}"
   --vocab-size 320
)
