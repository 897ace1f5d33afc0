# shellcheck shell=bash
# What the examples of this folder share: a folder for their data, and scripts/run-glm5.2-tiny.sh, which makes a tiny model,
# trains it on the example's conversations (the warm start) and then runs reinforcement learning with the example's flags.
#
#   HERE=...; source "${HERE}/../tiny_example.sh"
#   example NAME                  BASE_DIR, DATA, SETTINGS_FILE; the folder of the example is importable
#   make_data PROGRAM             once; PROGRAM writes its files into the folder that it is given
#   write_settings <<YAML         a file for --custom-config-path
#   is_proven FLAGS...            whether nothing is to be started: --rehearse or --preflight
#   run_tiny FLAGS...

PROJECT_ROOT="$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/../../.." && pwd)"

example() {
    export BASE_DIR="${BASE_DIR:-${PROJECT_ROOT}/outputs/$1}"
    [[ $BASE_DIR == /* ]] || BASE_DIR="${PWD}/${BASE_DIR}"
    DATA="${BASE_DIR}/data" SETTINGS_FILE="${BASE_DIR}/settings.yaml"
    export PYTHONPATH="${HERE}:${HERE}/..:${PROJECT_ROOT}${PYTHONPATH:+:${PYTHONPATH}}"
}

make_data() {
    [[ ! -f ${DATA}/sft.jsonl ]] || return 0
    "${PYTHON:-${SLIME_VENV:-${PROJECT_ROOT}/.venv}/bin/python}" "${HERE}/$1" "${DATA}"
}

write_settings() {
    mkdir -p "${BASE_DIR}"
    cat >"${SETTINGS_FILE}"
}

is_proven() {
    [[ ${REHEARSE:-} == 1 || ${PREFLIGHT:-} == 1 || " $* " == *" --rehearse "* || " $* " == *" --preflight "* ]]
}

run_tiny() {
    # All keys: what is copied from one end of a turn to the other must be seen.
    export INDEX_TOPK="${INDEX_TOPK:-256}" MAX_TOKENS="${MAX_TOKENS:-2048}" SFT_BATCH="${SFT_BATCH:-32}"
    export SFT_DATA="${SFT_DATA:-${DATA}/sft.jsonl}"
    exec bash "${PROJECT_ROOT}/scripts/run-glm5.2-tiny.sh" "$@"
}
