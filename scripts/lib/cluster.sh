# shellcheck shell=bash
# The Ray cluster of one launch: a head here, the other nodes over ssh or by hand, and a clean-up that stops these and nothing else.
# Sourced by launch.sh.

RAY_HEAD_PID=""
RAY_WATCH_PID=""
RAY_WORKERS=()   # "address pid", one per worker that we started

free_ports() { # COUNT -> that many ports which nobody listens on
    "$PYTHON" -I -S - "$1" <<'PY'
import socket, sys
held = [socket.socket() for _ in range(int(sys.argv[1]))]
for one in held:
    one.bind(("", 0))
print(*(one.getsockname()[1] for one in held))
PY
}

require_free_port() { # VARIABLE PORT
    "$PYTHON" -I -S - "$2" <<'PY' || die "port $2 is in use on this node (another Ray?): set $1 to a free one"
import socket, sys
with socket.socket() as one:
    one.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        one.bind(("", int(sys.argv[1])))
    except OSError:
        sys.exit(1)
PY
}

# The run's folder under /tmp, for its owner alone: Ray makes its own below it, which everybody may write to, and every process puts
# its temporary files there (TMPDIR), so that all goes at once.
make_temp_folder() {
    RAY_TEMP_IS_OURS=""
    if [[ -z ${RAY_TEMP_DIR:-} ]]; then
        RAY_TEMP_DIR="$(mktemp -d /tmp/slime-ray-XXXXXX)" RAY_TEMP_IS_OURS=1
    fi
    # A socket's path may have 107 characters, of which Ray takes 70 for ray/session_<time>_<pid>/sockets/plasma_store.
    ((${#RAY_TEMP_DIR} <= 37)) || die "RAY_TEMP_DIR=$RAY_TEMP_DIR has ${#RAY_TEMP_DIR} characters: Ray's sockets below it leave room for 37"
    mkdir -p -- "$RAY_TEMP_DIR" || die "cannot make RAY_TEMP_DIR=$RAY_TEMP_DIR: name another folder"
    [[ -O $RAY_TEMP_DIR ]] || die "RAY_TEMP_DIR=$RAY_TEMP_DIR belongs to somebody else: name another folder"
    chmod 700 -- "$RAY_TEMP_DIR"
    mkdir -p -- "$RAY_TEMP_DIR/ray" "$RAY_TEMP_DIR/tmp"
    export TMPDIR="$RAY_TEMP_DIR/tmp"
}

# Ray's token is in a file of the run's folder: an environment is printed by much that runs in it, and handed to every child.
keep_token() {
    export RAY_AUTH_MODE=token RAY_AUTH_TOKEN_PATH="$RAY_TEMP_DIR/token"
    rm -f -- "$RAY_AUTH_TOKEN_PATH"
    (umask 077 && printf '%s' "${RAY_AUTH_TOKEN:-$("$PYTHON" -I -c 'import secrets; print(secrets.token_hex(32))')}" >"$RAY_AUTH_TOKEN_PATH")
    unset RAY_AUTH_TOKEN
}

# Ray writes its interpreter and its own library into command lines without quotes, so a path with a space breaks it: it is run through a
# link whose path has none. The entry point that pip made names the real path, so there is one of ours beside the link.
hide_spaces_from_ray() {
    # shellcheck disable=SC2034  # job.sh hands it to the job
    JOB_PYTHON=$PYTHON
    [[ $PYTHON == *[[:space:]]* ]] || return 0
    ln -s -- "$(dirname -- "$(dirname -- "$PYTHON")")" "$RAY_TEMP_DIR/env"
    local link=$RAY_TEMP_DIR/env entry
    entry=$(command -v ray)
    if head -n 3 -- "$entry" | grep -qF -- "$PYTHON"; then
        mkdir -- "$RAY_TEMP_DIR/bin"
        printf '#!/bin/sh\nexec %q -m ray.scripts.scripts "$@"\n' "$link/bin/python" >"$RAY_TEMP_DIR/bin/ray"
        chmod 700 -- "$RAY_TEMP_DIR/bin/ray"
        PATH="$RAY_TEMP_DIR/bin:$PATH"
    fi
    # shellcheck disable=SC2034
    JOB_PYTHON=$link/bin/python
}

# Starts Ray's head in a session of its own and remembers its process id; from here on any exit stops it again.
start_ray_head() {
    [[ $REHEARSE != 1 ]] || return 0
    require_command ray "run: bash $(printf %q "$PROJECT_ROOT/scripts/setup.sh")"
    export MASTER_ADDR="${MASTER_ADDR:-127.0.0.1}" NUM_GPUS="${NUM_GPUS:-8}"
    find_nodes
    forget_ranks_of_this_node
    spare_nodes_from_proxy
    local free
    read -ra free <<<"$(free_ports 6)"
    [[ -z ${RAY_PORT:-} ]] || require_free_port RAY_PORT "$RAY_PORT"
    [[ -z ${RAY_DASHBOARD_PORT:-} ]] || require_free_port RAY_DASHBOARD_PORT "$RAY_DASHBOARD_PORT"
    RAY_PORT="${RAY_PORT:-${free[0]}}" RAY_DASHBOARD_PORT="${RAY_DASHBOARD_PORT:-${free[1]}}"
    make_temp_folder
    hide_spaces_from_ray
    keep_token
    export RAY_USAGE_STATS_ENABLED=0
    # Ray's three metrics ports ask for no secret and listen on every interface: the agents' is not opened, and by a number that is no
    # port neither are those of the autoscaler and the dashboard.
    export RAY_enable_metrics_collection=0 AUTOSCALER_METRIC_PORT=-1 DASHBOARD_METRIC_PORT=-1
    # Of finished calls Ray's control process remembers 100,000, at 3.5 kB each: a run makes 20 and more in a rollout.
    export RAY_task_events_max_num_task_in_gcs="${RAY_task_events_max_num_task_in_gcs:-2000}"
    # A driver that is told to stop ends its engines first; Ray would kill it after 3 s.
    export RAY_JOB_STOP_WAIT_TIME_S=25
    # Ray holds back a line that it has seen before, for seconds, and prints it among later ones.
    export RAY_DEDUP_LOGS="${RAY_DEDUP_LOGS:-0}"
    RAY_ADDRESS_OF_HEAD="${MASTER_ADDR}:${RAY_PORT}"
    RAY_JOBS_URL="http://${RAY_DASHBOARD_HOST:-127.0.0.1}:${RAY_DASHBOARD_PORT}"
    trap cleanup EXIT
    trap_signals
    start_keeper
    say "starting Ray on ${RAY_ADDRESS_OF_HEAD} with ${NUM_GPUS} slots, dashboard ${RAY_JOBS_URL}, logs ${RAY_TEMP_DIR}"
    local attempt
    for attempt in 1 2 3; do
        launch_ray_head "${free[@]:2}"
        wait_for_jobs_api && return 0
        # Ray allows its parts 30 s to find each other, which a busy machine can miss.
        say "Ray ended while starting (attempt $attempt of 3)"
        stop_ray_head
    done
    tail -n 20 "$RAY_TEMP_DIR/head.log" >&2
    die "Ray ended while starting; its last lines are above, all of them in $RAY_TEMP_DIR/head.log"
}

trap_signals() {
    trap 'exit 129' HUP
    trap 'exit 130' INT
    trap 'exit 143' TERM
    trap 'exit 138' USR1
}

launch_ray_head() { # CLIENT-PORT AGENT-PORT METRICS-PORT ENVIRONMENT-PORT
    exec 9>"$RAY_TEMP_DIR/joined-$(hostname)"
    flock -n 9 || true # JOIN_ONCE asks for it
    : >"$RAY_TEMP_DIR/head.log" # two write to it, so both append
    # With a port of its choice Ray's client server asks for it, and ends Ray when a busy machine does not answer within 30 s.
    setsid ray start --head --block --runtime-env-agent-port "$4" \
        --node-ip-address "$MASTER_ADDR" --port "$RAY_PORT" --num-gpus "$NUM_GPUS" ${NUM_CPUS:+--num-cpus "$NUM_CPUS"} \
        --dashboard-host "${RAY_DASHBOARD_HOST:-127.0.0.1}" --dashboard-port "$RAY_DASHBOARD_PORT" \
        --ray-client-server-port "$1" --dashboard-agent-listen-port "$2" --metrics-export-port "$3" \
        --min-worker-port 0 --max-worker-port 0 \
        --temp-dir "$RAY_TEMP_DIR/ray" --disable-usage-stats >>"$RAY_TEMP_DIR/head.log" 2>&1 </dev/null &
    RAY_HEAD_PID=$!
    watch_head "$RAY_HEAD_PID" "$RAY_TEMP_DIR/head.log" </dev/null >/dev/null 2>&1 &
    RAY_WATCH_PID=$!
}

# A raylet or control process that leaves with 0 or by SIGTERM counts with Ray as its own `ray stop`: the head blocks on without it.
# Here it ends then, and its log says why, as it does by itself after a crash.
watch_head() { # HEAD-PID LOG
    local pid part
    local -A parts=()
    unset SLIME_LAUNCH # what sleeps below is no member that the end waits for
    while kill -0 "$1"; do
        ((${#parts[@]} == 2)) || while read -r pid part; do
            [[ $part != raylet && $part != gcs_server ]] || parts[$part]=$pid
        done < <(ps -o pid=,comm= --ppid "$1")
        for part in "${!parts[@]}"; do
            ! kill -0 "${parts[$part]}" || continue
            sleep 3 # after a crash the head ends first
            ! kill -0 "$1" || printf '%s [exit code=0 or SIGTERM]\n' "$part" >>"$2"
            kill "$1"
            sleep 5 # without its control process it drains for half a minute; the session's others are ended with the launch
            kill -KILL "$1"
            return
        done
        sleep $((${#parts[@]} == 2 ? 2 : 1))
    done
}

wait_for_jobs_api() { # status 1 when the head ends before it answers
    local deadline=$((SECONDS + ${RAY_START_TIMEOUT:-300})) dashboard="$RAY_TEMP_DIR/ray/session_latest/logs/dashboard.log" lacking
    while ((SECONDS < deadline)); do
        kill -0 "$RAY_HEAD_PID" 2>/dev/null || return 1
        # The job server answers before this node has joined, and a head whose node does not join ends itself.
        if grep -qs 'runtime started' "$RAY_TEMP_DIR/head.log" &&
            ray job list --address "$RAY_JOBS_URL" >/dev/null 2>"$RAY_TEMP_DIR/jobs-api.log"; then return 0; fi
        if grep -qs 'http server disabled' "$dashboard"; then
            lacking=$(grep -o 'No module named .*' "$dashboard" | sort -u | head -n 3 | paste -sd ';')
            die "Ray runs without its job server, because packages of ray[default] are missing (${lacking:-see $dashboard}): run scripts/setup.sh, or install ray[default]"
        fi
        sleep 1
    done
    tail -n 5 "$RAY_TEMP_DIR/head.log" "$RAY_TEMP_DIR/jobs-api.log" >&2 || true
    die "Ray's job server at $RAY_JOBS_URL did not answer within ${RAY_START_TIMEOUT:-300} s; see $RAY_TEMP_DIR/head.log"
}

# ------------------------------------------------------------------------------------------------- the other nodes

# What a node runs before it joins: this node's environment, nothing of another cluster, and the folder of the run for its owner alone.
node_preamble() {
    # shellcheck disable=SC2016  # expanded on the node
    printf '%s\n' 'for name in ${!RAY_@}; do unset "$name"; done'
    printf 'export %s=%q\n' PATH "$PATH" LD_LIBRARY_PATH "${LD_LIBRARY_PATH:-}" no_proxy "$NO_PROXY" NO_PROXY "$NO_PROXY" \
        SLIME_LAUNCH "$SLIME_LAUNCH" RAY_AUTH_MODE token RAY_AUTH_TOKEN_PATH "$RAY_AUTH_TOKEN_PATH" RAY_DEDUP_LOGS "$RAY_DEDUP_LOGS" \
        RAY_enable_metrics_collection 0 TMPDIR "$TMPDIR"
    local word
    for word in "${PASSED[@]}"; do
        ! goes_by_environment "${word%%=*}" || printf 'export %q\n' "$word"
    done
    # shellcheck disable=SC2016
    printf 'folder=%q\n%s\n' "$RAY_TEMP_DIR" \
        'mkdir -p -m 700 "$folder" && mkdir -p "$folder/tmp" && [[ -O $folder ]] && chmod 700 "$folder" || { echo "no folder $folder can be made for this user alone" >&2; exit 1; }'
    printf '%s\n' "$JOIN_ONCE"
    # Whole at once: a folder on a shared disk is the head's own.
    # shellcheck disable=SC2016
    printf '(umask 077 && printf %%s %q >"$folder/token.$$" && mv -f "$folder/token.$$" "$folder/token")\n' "$(<"$RAY_AUTH_TOKEN_PATH")"
}

# A machine has one Ray of a launch: with two its devices would be counted twice. The lock is the Ray process's own, and goes with it.
# shellcheck disable=SC2016
JOIN_ONCE='exec 9>"$folder/joined-$(hostname)"; ! command -v flock >/dev/null || flock -n 9 || { echo "this machine has joined this cluster already, maybe by another address: leave it out" >&2; exit 1; }'

# The node's own keeper, of what a head that is gone, or out of reach, cannot end there. $pid is that of Ray on the node.
node_keeper() {
    local keeper
    keeper=$(printf %q "$PROJECT_ROOT/scripts/lib/keeper.sh")
    # Nothing of it may hold the login's output open: ssh waits for that.
    # shellcheck disable=SC2016
    printf 'if [[ -f %s ]]; then HEAD_OF_RUN=%q LOGS_OF_RUN=%q PYTHON=%q env -u SLIME_LAUNCH setsid bash %s "$pid" %q "$folder" "" </dev/null >/dev/null 2>&1 9>&- & fi\n' \
        "$keeper" "$RAY_ADDRESS_OF_HEAD" "${RUN_DIR:-}" "$PYTHON" "$keeper" "$SLIME_LAUNCH"
}

# On the disk that the nodes share, as long as nobody has ended the launch: a head that is gone without a word leaves it, and a node says
# so then (keeper.sh).
note_launch() { [[ -z ${RUN_DIR:-} ]] || printf '%s\n' "$SLIME_LAUNCH" >"$RUN_DIR/.launched"; }
forget_launch() { [[ -z ${RUN_DIR:-} ]] || ! grep -qsxF "$SLIME_LAUNCH" "$RUN_DIR/.launched" || rm -f -- "$RUN_DIR/.launched"; }

join_command() { # OPTIONS... -> what joins a node to this cluster
    printf 'ray start --block --address %q --num-gpus %q --disable-usage-stats' "$RAY_ADDRESS_OF_HEAD" "$NUM_GPUS"
    (($# == 0)) || printf ' %q' "$@"
}

on_node() { # ADDRESS   a script on standard input, which the node runs: a command line can be read by everybody there
    # shellcheck disable=SC2086  # SSH is a command with options
    ${SSH:-ssh -o BatchMode=yes -o ConnectTimeout=10 -o ServerAliveInterval=5 -o ServerAliveCountMax=3} "$1" bash -s
}

# On the node: its Ray is up, or why it is not, in a line. Ray tells a mismatch in five. Its parts have 30 s to find each other, as on the
# head, which a busy machine can miss. join, guard: functions with what the two above print; the keeper cleans up after a Ray that ended.
# shellcheck disable=SC2016
JOINED_OR_WHY='for attempt in 1 2 3; do
    join
    for ((second = 0; second < most; second++)); do
        kill -0 $pid 2>/dev/null || break
        ! grep -qs "runtime started" "$log" || { guard; echo $pid; exit 0; }
        sleep 1
    done
    ! kill -0 $pid 2>/dev/null && grep -qs "timed out during startup" "$log" || break
    left=$(session_members $pid)
    [[ -z $left ]] || kill -KILL $left 2>/dev/null
done
guard
if kill -0 $pid 2>/dev/null; then
    kill $pid
    echo "Ray has not come up there within $most s; its last line: $(tail -n 1 "$log")" >&2
else
    { tail -n 5 "$log"; sed -n "/Version mismatch/,\$p" "$log" | tr -s " \n" " "; echo; } | grep . >&2
fi
exit 1'

# Every node of HOSTFILE joins, all at once; one that cannot ends the launch. --preflight names it and asks the others.
join_workers() {
    [[ $REHEARSE != 1 ]] || return 0
    if [[ -z ${HOSTFILE:-} ]]; then
        ((${NUM_NODES:-1} <= 1)) || print_join_line
        return 0
    fi
    note_launch
    local address pids=() answers="$RAY_TEMP_DIR/workers"
    mkdir -p "$answers"
    for address in "${WORKER_ADDRESSES[@]}"; do
        on_node "$address" >"$answers/$address" 2>"$answers/$address.err" <<NODE &
$(node_preamble)
log="\$folder/head.log" most=${RAY_START_TIMEOUT:-300}
$(declare -f session_members)
join() {
    setsid $(join_command --node-ip-address "$address") >"\$log" 2>&1 </dev/null &
    pid=\$!
}
guard() {
    $(node_keeper)
}
$JOINED_OR_WHY
NODE
        pids+=("$! $address")
    done
    local pair failed=()
    for pair in "${pids[@]}"; do
        address=${pair#* }
        if wait "${pair%% *}" && [[ $(<"$answers/$address") =~ ^[0-9]+$ ]]; then
            RAY_WORKERS+=("$address $(<"$answers/$address")")
        else
            failed+=("$address ($(tail -n 1 "$answers/$address.err" 2>/dev/null))")
        fi
    done
    if ((${#failed[@]})); then
        [[ $PREFLIGHT == 1 ]] || die "${#failed[@]} of ${#pids[@]} nodes did not join: ${failed[*]}"
        say "${#failed[@]} of ${#pids[@]} nodes did not join: ${failed[*]}; the others are asked"
    fi
    say "${#RAY_WORKERS[@]} other nodes joined"
}

# The line for a node that is joined by hand. The token is in a file that only its owner reads, not in the line.
print_join_line() {
    JOIN_SCRIPT="${RUN_DIR:-$RAY_TEMP_DIR}/join.sh"
    mkdir -p -- "$(dirname -- "$JOIN_SCRIPT")"
    note_launch
    # No --node-ip-address: Ray takes the address from which the node reaches the head.
    # shellcheck disable=SC2016
    (umask 077 && printf '%s\npid=$$\n%s\nexec %s\n' "$(node_preamble)" "$(node_keeper)" "$(join_command)" >"$JOIN_SCRIPT")
    say "on each of the other $((NUM_NODES - 1)) nodes: bash $(printf %q "$JOIN_SCRIPT")"
}

# ------------------------------------------------------------------------------------------------- clean-up

session_members() { # SESSION-LEADER -> process ids of its session
    ps -e -o pid=,sid= | awk -v sid="$1" '$2 == sid { print $1 }'
}

stop_ray_head() {
    [[ -z $RAY_WATCH_PID ]] || kill "$RAY_WATCH_PID" 2>/dev/null || true
    kill -TERM "$RAY_HEAD_PID" 2>/dev/null || true
    local second rest
    for ((second = 0; second < 20; second++)); do
        kill -0 "$RAY_HEAD_PID" 2>/dev/null || break
        sleep 0.5
    done
    # Members of the session that we made are ours by construction, also when their leader is gone.
    rest=$(session_members "$RAY_HEAD_PID")
    # shellcheck disable=SC2086
    [[ -z $rest ]] || kill -KILL $rest 2>/dev/null || true
}

# The job's driver, engines and trainers have sessions of their own, and may outlive a cluster that was killed.
stop_members() {
    local attempt left
    for ((attempt = 0; attempt < 20; attempt++)); do
        left=$(launch_members)
        [[ -n $left ]] || return 0
        # shellcheck disable=SC2086
        ((attempt < 6)) || kill -KILL $left 2>/dev/null || true
        sleep 0.5
    done
}

stop_worker() { # ADDRESS PID STATUS-OF-THE-LAUNCH
    on_node "$1" >/dev/null 2>&1 <<NODE
kill -TERM $2 2>/dev/null
for second in {1..15}; do
    left=\$(grep -lsxzF SLIME_LAUNCH=$SLIME_LAUNCH /proc/[0-9]*/environ | cut -d/ -f3)
    [[ -n \$left ]] || break
    ((second < 10)) || kill -KILL \$left 2>/dev/null
    sleep 1
done
rm -f $(printf %q "$RAY_TEMP_DIR/token")
[[ -z '${RAY_TEMP_IS_OURS}' || $3 != 0 ]] || rm -rf $(printf %q "$RAY_TEMP_DIR")
NODE
}

# Stops what this launcher started, by process id: the job's cluster here and the Ray processes on the workers. Nothing else.
cleanup() {
    local status=$? entry
    trap - EXIT INT TERM HUP
    set +e
    forget_launch
    for entry in "${RAY_WORKERS[@]}"; do
        stop_worker "${entry%% *}" "${entry##* }" "$status" &
    done
    [[ -z $RAY_HEAD_PID ]] || stop_cluster "$status"
    ((status == 0)) || [[ $RAN_A_JOB != 1 ]] || print_again
    disown_folders
    [[ -z $KEEPER_PID ]] || kill "$KEEPER_PID" 2>/dev/null
    wait
    exit "$status"
}

stop_cluster() { # STATUS-OF-THE-LAUNCH
    local shared
    shared=$(shared_files)
    # A job that still runs gets its time to stop engines; it would outlive the cluster otherwise.
    [[ -z $RAY_JOB_ID ]] || timeout 30 ray job stop --address "$RAY_JOBS_URL" "$RAY_JOB_ID" >/dev/null 2>&1
    [[ -z $RAY_SUBMIT_PID ]] || kill -TERM "$RAY_SUBMIT_PID" 2>/dev/null
    stop_ray_head
    stop_members
    # shellcheck disable=SC2086
    [[ -z $shared ]] || rm -f -- $shared
    [[ -z ${RUN_DIR:-} ]] || rm -f -- "$RUN_DIR"/*.shared
    [[ -z ${JOIN_SCRIPT:-} ]] || rm -f -- "$JOIN_SCRIPT"
    rm -rf -- "${RAY_TEMP_DIR:?}/tmp" "$RAY_TEMP_DIR/token"
    find "$RAY_TEMP_DIR" -type s -delete # what listened there is gone; the logs stay
    if [[ -n $RAY_TEMP_IS_OURS && $1 == 0 ]]; then
        rm -rf -- "$RAY_TEMP_DIR"
        say "the Ray cluster of this run is stopped"
    else
        say "the Ray cluster of this run is stopped; its logs: $RAY_TEMP_DIR"
    fi
}
