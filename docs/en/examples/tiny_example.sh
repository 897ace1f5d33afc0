# shellcheck shell=bash
# What the examples of this folder share: a folder for their data, and scripts/run-glm5.2-tiny.sh, which makes a tiny model,
# trains it on the example's conversations (the warm start) and then runs reinforcement learning with the example's flags.

PROJECT_ROOT="$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/../../.." && pwd)"

example() { # NAME
    export BASE_DIR="${BASE_DIR:-${PROJECT_ROOT}/outputs/$1}"
    DATA="${BASE_DIR}/data"
    # The plugin of the example, and the project whose functions it uses.
    export PYTHONPATH="${HERE}:${PROJECT_ROOT}${PYTHONPATH:+:${PYTHONPATH}}"
}

make_data() { # PROGRAM   which writes its files into a folder
    [[ ! " $* " =~ " --rehearse " && ! -f ${DATA}/sft.jsonl && ${REHEARSE:-0} != 1 ]] || return 0
    "${PYTHON:-${SLIME_VENV:-${PROJECT_ROOT}/.venv}/bin/python}" "${HERE}/$1" "${DATA}"
}

run_tiny() { # FLAGS...
    export SFT_DATA="${SFT_DATA:-${DATA}/sft.jsonl}"
    exec bash "${PROJECT_ROOT}/scripts/run-glm5.2-tiny.sh" "$@"
}
