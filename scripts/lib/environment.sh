# shellcheck shell=bash
# What a launcher finds and what it leaves alone: the environment that scripts/setup.sh made, the caller's settings, and nothing that
# the shell inherited for another cluster. Sourced by launch.sh.

# Settings that a caller may give, in the order in which "to continue" repeats them.
SETTINGS=(
    SLIME_VENV PYTHON BASE_DIR RUN_DIR SEED MASTER_ADDR HOSTFILE NUM_NODES NUM_GPUS NUM_CPUS SOCKET_IFNAME IB_DEVICES
    HF_CHECKPOINT REF_LOAD LOAD SAVE PROMPT_DATA EVAL_DATA EVAL_NAME INDEX_TOPK MAX_TOKENS SFT_BATCH SFT_DATA SFT_STEPS DEEPEP EAGLE MINI_EXPERTS SAVE_INTERVAL PASS_ENV OMP_NUM_THREADS PYTHONPATH TENSORBOARD_DIR
    RAY_PORT RAY_DASHBOARD_PORT RAY_DASHBOARD_HOST RAY_TEMP_DIR RAY_START_TIMEOUT SSH
)
PATH_SETTINGS=(SLIME_VENV PYTHON BASE_DIR RUN_DIR HOSTFILE HF_CHECKPOINT REF_LOAD LOAD SAVE PROMPT_DATA EVAL_DATA SFT_DATA RAY_TEMP_DIR TENSORBOARD_DIR)
# The RAY_* variables that are settings of ours. All others are meant for some other cluster (RAY_ADDRESS, RAY_API_SERVER_ADDRESS, ...).
CLUSTER_SETTINGS=(RAY_PORT RAY_DASHBOARD_PORT RAY_DASHBOARD_HOST RAY_TEMP_DIR RAY_START_TIMEOUT RAY_AUTH_TOKEN)
# They change what is said and not what is computed: every rank of every node gets those that are exported.
DIAGNOSTICS=(
    NCCL_DEBUG NCCL_DEBUG_SUBSYS NCCL_DEBUG_FILE TORCH_DISTRIBUTED_DEBUG TORCH_CPP_LOG_LEVEL TORCH_SHOW_CPP_STACKTRACES TORCH_LOGS
    PYTHONFAULTHANDLER
)
# Of these, one node alone must not have a value of its own.
RANK_PREFIXES='^(NCCL|GLOO|TORCH_NCCL|NVSHMEM|UCX)_'
# Names of variables that hold a secret (HF_TOKEN, WANDB_API_KEY, AWS_SECRET_ACCESS_KEY; not TOKENIZERS_PARALLELISM).
SECRET_NAME='(^|_)[A-Z]*(KEY|TOKEN|SECRET|PASSWORD|PASSWD|CREDENTIALS?)(_|$)'
PASSED=() # NAME=VALUE of every rank, from PASS_ENV and DIAGNOSTICS
GIVEN=()  # NAME=VALUE of the settings that the caller gave

is_in() { # WORD WORDS...
    local word
    for word in "${@:2}"; do [[ $word != "$1" ]] || return 0; done
    return 1
}

# The working directory may be anywhere, also below a path with spaces; a relative setting is meant from here.
note_settings() {
    local name
    for name in "${SETTINGS[@]}"; do
        [[ -n ${!name:-} || $name == EVAL_DATA && -v EVAL_DATA ]] || continue
        if is_in "$name" "${PATH_SETTINGS[@]}" && [[ -n ${!name} && ${!name} != /* && ($name != PYTHON || ${!name} == */*) ]]; then
            printf -v "$name" '%s' "$PWD/${!name}"
        fi
        GIVEN+=("$name=${!name}")
    done
    [[ -z ${PASS_ENV:-} ]] || without_secrets
}

is_secret() { [[ ${1^^} =~ $SECRET_NAME ]]; } # NAME

# A secret goes to the ranks in the environment of Ray's own processes, which their user alone can read: arguments are everybody's, and
# a job's description is kept and shown. So do settings of Ray's, which it reads when it starts.
goes_by_environment() { [[ $1 == RAY_* ]] || is_secret "$1"; } # NAME

# "to continue" repeats PASS_ENV: a secret by its name.
without_secrets() {
    local word told=() at
    for word in $PASS_ENV; do
        ! is_secret "${word%%=*}" || word=${word%%=*}
        told+=("$word")
    done
    for at in "${!GIVEN[@]}"; do
        [[ ${GIVEN[at]} != PASS_ENV=* ]] || GIVEN[at]="PASS_ENV=${told[*]}"
    done
}

# Python puts the working directory first among its packages: a file there with the name of one hides it.
check_working_directory() {
    local hiding
    hiding=$("$1" -I -S - "$PWD" <<'PY'
import pathlib, sys
names = sys.stdlib_module_names - {"test", "this", "antigravity"} | {"ray", "torch", "sglang", "megatron", "transformers", "numpy", "yaml"}
found = {entry.name.removesuffix(".py") for entry in pathlib.Path(sys.argv[1]).iterdir() if entry.suffix == ".py" or (entry / "__init__.py").is_file()}
print(*sorted(found & names), sep=", ")
PY
    ) || return 0 # a directory that cannot be listed hides nothing
    [[ -n $hiding ]] || return 0
    if [[ $(pwd -P)/ == "$(cd -- "$PROJECT_ROOT/slime" && pwd -P)"/* ]]; then
        say "started in $PROJECT_ROOT: in $PWD, $hiding of ours would hide Python's packages of the same name"
        cd -- "$PROJECT_ROOT" || exit
    else
        die "the working directory $PWD holds $hiding, which would hide the Python packages of the same name: start from another directory"
    fi
}

# SLIME_VENV, else the environment of PYTHON, else .venv of this project, else whatever python3 is.
find_environment() {
    local venv=${SLIME_VENV:-}
    if [[ -n $venv ]]; then
        [[ -x $venv/bin/python ]] || die "SLIME_VENV=$venv is no environment: make it with SLIME_VENV=$(printf %q "$venv") bash $(printf %q "$PROJECT_ROOT/scripts/setup.sh")"
    elif [[ -z ${PYTHON:-} && -x $PROJECT_ROOT/.venv/bin/python ]]; then
        venv=$PROJECT_ROOT/.venv
    fi
    if [[ -n $venv ]]; then
        PYTHON="$venv/bin/python"
        export PATH="$venv/bin:$PATH"
    else
        PYTHON="${PYTHON:-python3}"
        PYTHON=$(command -v -- "$PYTHON") || die "no Python at ${PYTHON:-python3}: $(setup_line)"
        venv="$(dirname -- "$(dirname -- "$PYTHON")")"
    fi
    # Beside an environment may lie the system libraries that it lacks here (scripts/setup.sh).
    [[ ! -d $venv/syslib ]] || export LD_LIBRARY_PATH="$venv/syslib${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}"
    [[ $REHEARSE == 1 ]] || "$PYTHON" -I -c 'import importlib.util, sys; sys.exit(not importlib.util.find_spec("ray"))' 2>/dev/null ||
        die "$PYTHON has no ray, so it is not an environment of this project: $(setup_line)"
    check_working_directory "$PYTHON"
}

setup_line() {
    printf 'run: bash %q' "$PROJECT_ROOT/scripts/setup.sh"
}

# PASS_ENV="NAME NAME=VALUE ...": these reach every rank of every node, and win over the launcher's own.
read_passed() {
    local word name
    for name in "${DIAGNOSTICS[@]}"; do
        [[ -z ${!name:-} ]] || PASSED+=("$name=${!name}")
    done
    for word in ${PASS_ENV:-}; do
        name=${word%%=*}
        [[ $name =~ ^[A-Za-z_][A-Za-z0-9_]*$ ]] || die "PASS_ENV: $name is no name of a variable; write PASS_ENV=\"NAME NAME=VALUE\""
        [[ $word == *=* || -v $name ]] || die "PASS_ENV names $name, which is not set here; export it, or write $name=VALUE"
        [[ $word == *=* ]] || word="$word=${!name}"
        PASSED+=("$word")
    done
}

# Ray reads dozens of RAY_* variables, some of which beat its flags.
forget_other_clusters() {
    local name forgotten=()
    for name in $(compgen -e RAY_); do
        is_in "$name" "${CLUSTER_SETTINGS[@]}" && continue
        is_in "$name=${!name}" "${PASSED[@]}" || forgotten+=("$name")
        unset "$name"
    done
    ((${#forgotten[@]} == 0)) || [[ $REHEARSE == 1 ]] ||
        say "not used: ${forgotten[*]} (a launcher has a cluster of its own; PASS_ENV passes a variable on)"
    for name in "${PASSED[@]}"; do
        ! goes_by_environment "${name%%=*}" || export "${name?}"
    done
}

# Where nodes are many, what only this one inherited would make its ranks differ from the others'.
forget_ranks_of_this_node() {
    local name lone=()
    ((${NUM_NODES:-1} > 1)) || return 0
    while read -r name; do
        if [[ ! $name =~ $RANK_PREFIXES ]] || is_in "$name=${!name}" "${PASSED[@]}"; then continue; fi
        lone+=("$name")
        unset "$name"
    done < <(compgen -e)
    ((${#lone[@]} == 0)) || say "not used, because they would reach this node alone: ${lone[*]} (PASS_ENV=\"${lone[*]}\" takes them to every rank)"
}

# Sockets lie in TMPDIR, and a socket's path may have 107 characters.
check_tmpdir() {
    local longest=40
    [[ -n ${TMPDIR:-} ]] || return 0
    if ((${#TMPDIR} > longest)); then
        [[ $REHEARSE == 1 ]] || say "TMPDIR has ${#TMPDIR} characters, too many for the paths of sockets below it: /tmp is used instead"
        export TMPDIR=/tmp
    elif [[ ! -d $TMPDIR || ! -w $TMPDIR ]]; then
        die "TMPDIR=$TMPDIR is no folder that can be written to: unset it, or name another"
    fi
}

program() { # NAME -> how a plain shell calls a program of the environment
    local beside
    beside="$(dirname -- "$PYTHON")/$1"
    if [[ -x $beside ]]; then printf '%q' "$beside"; else printf '%s' "$1"; fi
}
