#!/usr/bin/env bash
# From a bare Linux machine to reinforcement learning in one command: set up the environment, then run the tiny GLM-5.2 job.
#
#   bash scripts/quickstart.sh [FLAGS...]      FLAGS go to the training command and win over the launcher's, e.g. --num-rollout 4
#
# Needs Python 3.11 or 3.12, about 5 GB of disk and 8 GB of free memory. No GPU. Everything it makes is under .venv and outputs/.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
bash "$root/scripts/setup.sh"
venv=${SLIME_VENV:-$root/.venv}
export PATH="$venv/bin:$PATH" LD_LIBRARY_PATH="$venv/syslib${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}"
exec bash "$root/scripts/run-glm5.2-tiny.sh" "$@"
