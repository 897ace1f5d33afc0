# shellcheck shell=bash
# The job of a launch, what of its output a person reads, and the line that continues it. Sourced by launch.sh.

RAY_JOB_ID=""
RAY_SUBMIT_PID=""
RAN_A_JOB=0 # cluster.sh reads it
CONSOLE_PID=""
LEAVING="" # the signal that asked the job to save and leave
JOB_FLAGS=()

runtime_env_json() { # NAME=VALUE... -> {"env_vars": {...}}; a later word wins, PASS_ENV over all; without its secrets
    local ours=() shown=() word
    for word in "${PASSED[@]}"; do
        is_secret "${word%%=*}" || shown+=("$word")
    done
    [[ -z ${RUN_DIR:-} ]] || ours=("SLIME_RUN_DIR=$RUN_DIR" "TENSORBOARD_DIR=${TENSORBOARD_DIR:-$RUN_DIR/tensorboard}")
    "$PYTHON" -I -S -c 'import json, sys; print(json.dumps({"env_vars": dict(word.split("=", 1) for word in sys.argv[1:])}))' \
        "${ours[@]}" "$@" "${shown[@]}"
}

# Runs the training command as a job of our cluster and follows its output; the status is the job's.
submit_job() { # RUNTIME-ENV-JSON FLAGS...
    local runtime_env=$1
    shift
    if [[ $REHEARSE == 1 ]]; then
        run_python -m slime.rehearse --runtime-env "$runtime_env" "$@"
        exit
    fi
    if [[ $PREFLIGHT == 1 ]]; then
        RAY_ADDRESS="$RAY_ADDRESS_OF_HEAD" run_python -m slime.preflight ${LOGICAL_GPUS:+--logical-gpus} \
            ${JOIN_SCRIPT:+--join-seconds 1800} \
            --runtime-env "$runtime_env" "$@"
        exit
    fi
    # shellcheck disable=SC2034
    RAY_JOB_ID="slime-$(date +%Y%m%d-%H%M%S)-$$" RAN_A_JOB=1 JOB_FLAGS=("$@")
    start_keeper # again, for it has to know what the driver will own
    open_console
    # In the background, because Bash handles a signal only between foreground commands: a TERM would wait for the end of training.
    ray job submit --address "$RAY_JOBS_URL" --submission-id "$RAY_JOB_ID" --runtime-env-json "$runtime_env" \
        -- "$JOB_PYTHON" -m slime.train "$@" >&"$CONSOLE_IN" 2>&1 </dev/null &
    RAY_SUBMIT_PID=$!
    exec {CONSOLE_IN}>&-
    local status
    ! saves_on_signal || pass_signals_on
    while :; do
        status=0
        # Whichever ends first: a job whose cluster is gone may never be told to have ended.
        wait -n "$RAY_SUBMIT_PID" "$RAY_HEAD_PID" || status=$?
        # A signal that was passed on ends the wait, and nothing else.
        if ((status <= 128)) || [[ -z $LEAVING ]]; then break; fi
        if ! kill -0 "$RAY_SUBMIT_PID" 2>/dev/null || ! kill -0 "$RAY_HEAD_PID" 2>/dev/null; then break; fi
    done
    trap_signals
    local undone=""
    if ! kill -0 "$RAY_SUBMIT_PID" 2>/dev/null; then
        undone=$(job_undone)
        [[ -z $undone ]] || await_head # its watcher may be about to name what of it is gone
    fi
    if kill -0 "$RAY_SUBMIT_PID" 2>/dev/null || ! kill -0 "$RAY_HEAD_PID" 2>/dev/null; then
        kill "$RAY_SUBMIT_PID" 2>/dev/null || true
        local which
        for _ in {1..50}; do # what is told next is the last word
            kill -0 "$CONSOLE_PID" 2>/dev/null || break
            sleep 0.1
        done
        # Which of Ray's processes ended is one line among two hundred of its statistics.
        which=$(sed 's/\x1b\[[0-9;]*m//g' "$RAY_TEMP_DIR/head.log" | grep -o '[a-z_]* \[exit code=[^]]*\]' | paste -sd ';' || true)
        [[ $which != *=-9]* ]] || which+=$(run_python -m slime.observability.memory_kills "$SECONDS" || true)
        [[ -z $which ]] || die "Ray itself ended, and the job with it: $which; its log is $RAY_TEMP_DIR/head.log"
        tail -n 20 "$RAY_TEMP_DIR/head.log" >&2
        die "Ray itself ended, and the job with it; its last lines are above, all of them in $RAY_TEMP_DIR/head.log"
    fi
    wait "$CONSOLE_PID" || true
    [[ -z $undone ]] || die "the job has not come to its end: $undone; Ray's logs are in $RAY_TEMP_DIR/ray"
    RAY_JOB_ID="" RAY_SUBMIT_PID=""
    if [[ -n $LEAVING && $status == 0 ]]; then # whatever the launcher has for after the job is not for now
        print_again
        exit 0
    fi
    return "$status"
}

# What Ray's client says of a job that it leaves with status 0 although it runs still, or was stopped; nothing of any other.
job_undone() {
    local _
    for _ in {1..50}; do
        kill -0 "$CONSOLE_PID" 2>/dev/null || break
        sleep 0.1
    done
    { grep -oE "Status for job '$RAY_JOB_ID': [A-Z]+|Job '$RAY_JOB_ID' was stopped" "${RUN_DIR:-$RAY_TEMP_DIR}/console.log" || true; } | tail -n 1
}

await_head() { # to end, for HEAD_END_SECONDS (20) at most
    local deadline=$((SECONDS + ${HEAD_END_SECONDS:-20}))
    while ((SECONDS < deadline)) && kill -0 "$RAY_HEAD_PID" 2>/dev/null; do sleep 0.5; done
}

# A job with --save-on-signal hears of a preemption from us; the second signal is for this launcher, as without the flag.
saves_on_signal() { is_in --save-on-signal "${JOB_FLAGS[@]}" || is_in --exit-signal-handler "${JOB_FLAGS[@]}"; }

pass_signals_on() {
    local name
    for name in HUP INT TERM USR1; do
        # shellcheck disable=SC2064  # the name of now
        trap "ask_to_leave $name" "$name"
    done
}

ask_to_leave() { # SIGNAL
    local driver
    driver=$(driver_pid)
    trap_signals
    if [[ -z $driver ]]; then
        say "$1: the job has not begun"
        exit 0
    fi
    LEAVING=$1
    say "$1: the job is asked to save and leave; a second signal ends it at once"
    kill -TERM "$driver" 2>/dev/null || true
}

driver_pid() {
    local pid words
    for pid in $(launch_members); do
        mapfile -d '' -t words 2>/dev/null <"/proc/$pid/cmdline" || continue
        [[ ${words[*]:1:2} != "-m slime.train" ]] || printf '%s\n' "$pid"
    done | head -n 1
}

# All that the job and Ray's client print goes to a file, and to this terminal what a person reads.
open_console() {
    exec {CONSOLE_IN}> >(run_python -m slime.observability.console --log "${RUN_DIR:-$RAY_TEMP_DIR}/console.log")
    CONSOLE_PID=$!
}

# ------------------------------------------------------------------------------------------------- how to go on

# This launcher as it was called, ready to be pasted into any shell.
command_again() { # FLAGS...
    local word
    for word in "${GIVEN[@]}"; do
        printf '%s=%q ' "${word%%=*}" "${word#*=}"
    done
    printf 'bash %q' "$LAUNCHER"
    for word in "$@"; do printf ' %q' "$word"; done
}

# The caller's flags, with twice the rollouts that the job had.
flags_for_more() {
    local word last="" rollouts=""
    MORE_FLAGS=()
    for word in "${LAUNCHER_FLAGS[@]}"; do
        [[ $word == --num-rollout || $word == --num-rollout=* || $last == --num-rollout ]] || MORE_FLAGS+=("$word")
        last=$word
    done
    for word in "${JOB_FLAGS[@]}"; do
        [[ $last != --num-rollout ]] || rollouts=$word
        [[ $word != --num-rollout=* ]] || rollouts=${word#*=}
        last=$word
    done
    [[ ! $rollouts =~ ^[1-9][0-9]*$ ]] || MORE_FLAGS+=(--num-rollout $((2 * rollouts)))
}

print_resume() {
    if [[ -e ${RUN_DIR:-$RAY_TEMP_DIR}/left-early.txt ]]; then # slime.ray.telling.UNFINISHED
        print_again
        return
    fi
    flags_for_more
    say "to continue from the newest checkpoint, with more rollouts: $(command_again "${MORE_FLAGS[@]}")"
}

print_again() {
    say "to continue from the newest checkpoint: $(command_again "${LAUNCHER_FLAGS[@]}")"
}
