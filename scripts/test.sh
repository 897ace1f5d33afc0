#!/usr/bin/env bash
# Set up the environment (once) and run the tests.
#
#   bash scripts/test.sh             everything that this machine can run
#   bash scripts/test.sh --quick     the tier without servers, Ray and several ranks, under 5 minutes
#   bash scripts/test.sh ARGS...     ARGS go to pytest, e.g. tests/model -k names
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
cd "$root"
bash scripts/setup.sh --dev
venv=${SLIME_VENV:-$root/.venv}
export PATH="$venv/bin:$PATH" OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} TOKENIZERS_PARALLELISM=false
export LD_LIBRARY_PATH="$venv/syslib${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}"

args=()
for arg in "$@"; do
    case $arg in
    --quick) args+=(-m "not slow and not gpu") ;;
    *) args+=("$arg") ;;
    esac
done
exec "$venv/bin/python" -m pytest --durations=15 "${args[@]}"
