# shellcheck shell=bash
# One launcher works in a folder at a time, and what it started does not outlive it. Sourced by launch.sh.

OWNED=()        # folders that this launcher has
KEEPER_PID=""

# Takes the folder that the variable names, or ends with who has it. The keeper sees to it that nothing outlives this launcher.
own() { # NAME-OF-A-VARIABLE
    runs || return 0
    # Half a minute for the processes of a launcher that was killed, which its keeper ends. A machine of this name that was started anew
    # has another run's record until that counts as stale (slime/observability/owner.py).
    local attempt most refusal
    for attempt in {1..100}; do
        if refusal=$(run_python -m slime.observability.owner take "${!1}" --what "$1" --pid $$ 2>&1); then
            OWNED+=("${!1}")
            trap cleanup EXIT
            start_keeper
            return
        fi
        case $refusal in
        *"processes of it live"*) most=15 ;;
        *" on $(hostname) since "*"it said so"*) most=100 ;;
        *) break ;;
        esac
        ((attempt < most)) || break
        ((attempt > 1)) || say "waiting for what an earlier launch left: ${refusal%%;*}"
        sleep 2
    done
    die "$refusal"
}

disown_folders() {
    local folder
    for folder in "${OWNED[@]}"; do
        run_python -m slime.observability.owner release "$folder" --pid $$
    done
    OWNED=()
    # A driver that was killed could not give back its --save.
    job_folders
    for folder in "${JOB_FOLDERS[@]}"; do
        ! grep -qsF "\"launch\": \"$SLIME_LAUNCH\"" "$folder/.slime-owner" || rm -f -- "$folder/.slime-owner"
    done
}

# What the job's driver owns, or will: its --save, into JOB_FOLDERS.
job_folders() {
    local word last=""
    JOB_FOLDERS=()
    for word in "${JOB_FLAGS[@]}"; do
        [[ $last != --save ]] || JOB_FOLDERS+=("$word")
        [[ $word != --save=* ]] || JOB_FOLDERS+=("${word#--save=}")
        last=$word
    done
}

# A process in a session of its own that waits for this one to disappear without a word (kill -9, a lost machine's shell).
start_keeper() {
    job_folders
    [[ -z $KEEPER_PID ]] || { kill "$KEEPER_PID" 2>/dev/null; wait "$KEEPER_PID" 2>/dev/null || true; }
    env -u SLIME_LAUNCH setsid bash "$PROJECT_ROOT/scripts/lib/keeper.sh" $$ "$SLIME_LAUNCH" "${RAY_TEMP_DIR:-}" "${RUN_DIR:-}" \
        "${OWNED[@]}" "${JOB_FOLDERS[@]}" </dev/null >/dev/null &
    KEEPER_PID=$!
}

# What SGLang leaves in shared memory when it is killed, of the engines that live now.
shared_files() {
    local pid
    for pid in $(launch_members); do
        grep -hsoE '/dev/shm/(sglang|sgl_shm)_[^ ]*$' "/proc/$pid/maps" || true
    done | sort -u
    listed_files "${RUN_DIR:-}"
}

# The same of engines that are gone, and with them whoever would have removed it (ChildProcess of slime/engine/process.py).
listed_files() { # RUN-DIR
    cat -- "$1"/*.shared 2>/dev/null | grep -E '^/dev/shm/(sglang|sgl_shm)_' || true
}

# Processes of this machine that carry the launch's name. Those of this shell itself do not.
launch_members() {
    { env -u SLIME_LAUNCH grep -lsxzF "SLIME_LAUNCH=$SLIME_LAUNCH" /proc/[0-9]*/environ || true; } | cut -d/ -f3
}
