#!/usr/bin/env bash
# Set up the environment (once) and run the tests.
#
#   bash scripts/test.sh             scripts/lint.sh, then everything that this machine can run
#   bash scripts/test.sh --quick     scripts/lint.sh, then the tier without servers, Ray and several ranks
#   bash scripts/test.sh ARGS...     ARGS go to pytest, e.g. tests/model -k names
#
# TEST_WORKERS   processes that share the tests, each taking whole files; 0: none but pytest itself, for -s and --pdb
#                (default: 2 for the first two commands on a machine with 2 cores, 10 GiB free and no GPU; else 0)
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
cd "$root"
bash scripts/setup.sh --dev
venv=${SLIME_VENV:-$root/.venv}
export PATH="$venv/bin:$PATH" OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} TOKENIZERS_PARALLELISM=false
export LD_LIBRARY_PATH="$venv/syslib${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}"

args=() selects=no
for arg in "$@"; do
    case $arg in
    --quick) args+=(-m "not slow and not gpu") ;;
    *) args+=("$arg") selects=yes ;;
    esac
done

if [[ $selects == no ]]; then SLIME_VENV=$venv bash scripts/lint.sh; fi

# Two, which need 8 GiB between them, and not one per core: one has the tests with servers, which take more than half of the
# time. None where there is a GPU: the tests that are marked so share its memory.
pick_workers() {
    local cores free_gib
    cores=$(env -u OMP_NUM_THREADS nproc) # nproc answers with that variable where it is set
    free_gib=$(awk '/^MemAvailable:/ { print int($2 / 1048576) }' /proc/meminfo)
    if [[ $selects == yes ]] || ((cores < 2 || free_gib < 10)) || nvidia-smi -L 2>/dev/null | grep '^GPU ' >/dev/null; then
        echo 0
    else
        echo 2
    fi
}

workers=${TEST_WORKERS:-$(pick_workers)}
# By whole files, whose tests share fixtures, all files with servers in one process (tests/conftest.py); in their order, because
# those are early.
if ((workers > 0)); then args=(-n "$workers" --dist loadfile --no-loadscope-reorder "${args[@]}"); fi
exec "$venv/bin/python" -m pytest --durations=15 "${args[@]}"
