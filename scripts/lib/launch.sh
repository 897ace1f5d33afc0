# shellcheck shell=bash
# What every launcher shares: checks, a Ray cluster of its own, the job, and a clean-up that touches nothing else.
#
#   source "${SCRIPT_DIR}/lib/launch.sh"
#   require_env BASE_DIR "..."; require_dir "$HF_CHECKPOINT" "..."        # one clear line each, before anything starts
#   check_flags "${FLAGS[@]}"                                             # parsed in a fraction of a second, without torch
#   check_flags_alone "${FLAGS[@]}"                                       # the same where the launcher makes the checkpoint first
#   start_ray_head; join_workers                                          # stopped again on any exit, by process id
#   submit_job "$(runtime_env_json NAME=VALUE ...)" "${FLAGS[@]}"
#   print_resume "bash scripts/run-x.sh"
#
# Settings (environment variables; the launcher gives defaults where it needs others):
#   MASTER_ADDR         address of this node in the cluster network     (default 127.0.0.1)
#   HOSTFILE            one worker address per line, first column       (default: no other node is started)
#   NUM_GPUS            slots that each node offers to Ray; on a machine without GPUs they are logical   (default 8)
#   RAY_PORT, RAY_DASHBOARD_PORT     (default: free ports)              RAY_DASHBOARD_HOST  (default 127.0.0.1)
#   RAY_TEMP_DIR        Ray's own folder on every node                  (default: a new one under /tmp)
#   RAY_AUTH_TOKEN      every Ray endpoint asks for it                  (default: drawn anew)
#   SSH                 command that reaches a worker                   (default: ssh -o BatchMode=yes -o ConnectTimeout=10)
#   PYTHON              interpreter of the job                          (default python3)
#   REHEARSE            1, or --rehearse as an argument of the launcher: nothing is started and nothing needs to be there; the flags
#                       are proven on this machine instead (python3 -m slime.rehearse, whose own flags may follow, e.g. --html FILE)
#   PREFLIGHT           1, or --preflight as an argument: the Ray cluster is started and every node is asked what it has and whom it
#                       reaches; the bad ones are named, the cluster is stopped, and no job is run
#   LOGICAL_GPUS        1: the slots stand for no GPUs, so that PREFLIGHT asks for none   (default: each slot is a GPU)

PROJECT_ROOT="$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/../.." && pwd)"
PYTHON="${PYTHON:-python3}"
RAY_HEAD_PID=""
RAY_WORKERS=()   # "address pid", one per worker that we started
RAY_JOB_ID=""
RAY_SUBMIT_PID=""

REHEARSE="${REHEARSE:-0}" PREFLIGHT="${PREFLIGHT:-0}"
for argument in "$@"; do # those of the launcher that sources this file
    [[ $argument != --rehearse ]] || REHEARSE=1
    [[ $argument != --preflight ]] || PREFLIGHT=1
done
# Launchers write generated files into RUN_DIR, and the cluster's folder may not exist here.
if [[ $REHEARSE == 1 && -z ${RUN_DIR:-} ]]; then
    REHEARSAL_DIR="$(mktemp -d /tmp/slime-rehearsal-XXXXXX)" RUN_DIR="$REHEARSAL_DIR"
    trap 'rm -rf -- "$REHEARSAL_DIR"' EXIT # by a name of its own: a launcher may set RUN_DIR to a folder that is to stay
fi

say() { printf '[launch] %s\n' "$*" >&2; }
die() { printf '[launch] error: %s\n' "$*" >&2; exit 1; }

# ------------------------------------------------------------------------------------------------- checks

require_env() { # NAME MEANING
    [[ -z ${!1:-} && $REHEARSE == 1 ]] && export "$1=/$1"
    [[ -n ${!1:-} ]] || die "$1 is not set: $2"
}

require_dir() { # PATH WHAT-TO-DO
    [[ -d $1 || $REHEARSE == 1 ]] || die "no folder $1: $2"
}

require_file() { # PATH WHAT-TO-DO
    [[ -f $1 && -r $1 || $REHEARSE == 1 ]] || die "no readable file $1: $2"
}

require_command() { # NAME WHAT-TO-DO
    command -v "$1" >/dev/null || die "no command $1: $2"
}

# Addresses of the other nodes: first column of HOSTFILE without comments, this node and repetitions.
worker_addresses() {
    [[ -n ${HOSTFILE:-} ]] || return 0
    awk -v self="${MASTER_ADDR}" '{ sub(/#.*/, "") } NF && $1 != self && !seen[$1]++ { print $1 }' "${HOSTFILE}"
}

check_hostfile() { # NODES-WANTED
    [[ $REHEARSE != 1 ]] || return 0
    if [[ -z ${HOSTFILE:-} ]]; then
        [[ $1 -le 1 ]] || say "HOSTFILE is not set: join the other $(($1 - 1)) nodes by hand with the command printed below"
        return 0
    fi
    [[ -f $HOSTFILE && -r $HOSTFILE ]] || die "HOSTFILE=$HOSTFILE cannot be read: give a file with one node address per line"
    local found
    found=$(($(worker_addresses | wc -l) + 1))
    ((found == $1)) || die "HOSTFILE=$HOSTFILE names $found nodes (this one, ${MASTER_ADDR}, included), the recipe needs $1"
}

check_flags() { # FLAGS...
    [[ $REHEARSE != 1 && $PREFLIGHT != 1 ]] || return 0 # the rehearsal lists them together with everything else
    parse_flags --check "$@"
}

check_flags_alone() { # FLAGS...   before the files that they name are there
    [[ $REHEARSE != 1 && $PREFLIGHT != 1 ]] || return 0
    parse_flags --door rehearse --check "$@"
}

parse_flags() {
    PYTHONPATH="${PROJECT_ROOT}${PYTHONPATH:+:$PYTHONPATH}" "$PYTHON" -m slime.config "$@" || die "the flags above are wrong; nothing was started"
}

count_nvlinks() {
    { nvidia-smi topo -m 2>/dev/null || true; } | { grep -o 'NV[0-9][0-9]*' || true; } | wc -l
}

# ------------------------------------------------------------------------------------------------- the Ray cluster

free_ports() { # COUNT -> that many ports which nobody listens on
    "$PYTHON" - "$1" <<'PY'
import socket, sys
held = [socket.socket() for _ in range(int(sys.argv[1]))]
for one in held:
    one.bind(("", 0))
print(*(one.getsockname()[1] for one in held))
PY
}

require_free_port() { # VARIABLE PORT
    "$PYTHON" - "$2" <<'PY' || die "port $2 is in use on this node (another Ray?): set $1 to a free one"
import socket, sys
with socket.socket() as one:
    one.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        one.bind(("", int(sys.argv[1])))
    except OSError:
        sys.exit(1)
PY
}

# Starts Ray's head in a session of its own and remembers its process id; from here on any exit stops it again.
start_ray_head() {
    [[ $REHEARSE != 1 ]] || return 0
    require_command ray "activate the environment that scripts/setup.sh made"
    export MASTER_ADDR="${MASTER_ADDR:-127.0.0.1}" NUM_GPUS="${NUM_GPUS:-8}"
    local free
    read -ra free <<<"$(free_ports 6)"
    [[ -z ${RAY_PORT:-} ]] || require_free_port RAY_PORT "$RAY_PORT"
    [[ -z ${RAY_DASHBOARD_PORT:-} ]] || require_free_port RAY_DASHBOARD_PORT "$RAY_DASHBOARD_PORT"
    RAY_PORT="${RAY_PORT:-${free[0]}}" RAY_DASHBOARD_PORT="${RAY_DASHBOARD_PORT:-${free[1]}}"
    # Ray's sockets live here, and a socket's path may have 107 characters: keep it short.
    RAY_TEMP_DIR="${RAY_TEMP_DIR:-$(mktemp -d /tmp/slime-ray-XXXXXX)}"
    mkdir -p "$RAY_TEMP_DIR"
    export RAY_AUTH_MODE=token RAY_AUTH_TOKEN="${RAY_AUTH_TOKEN:-$("$PYTHON" -c 'import secrets; print(secrets.token_hex(32))')}"
    export RAY_USAGE_STATS_ENABLED=0
    RAY_ADDRESS_OF_HEAD="${MASTER_ADDR}:${RAY_PORT}"
    RAY_JOBS_URL="http://${RAY_DASHBOARD_HOST:-127.0.0.1}:${RAY_DASHBOARD_PORT}"
    trap cleanup EXIT
    trap 'exit 130' INT
    trap 'exit 143' TERM
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

launch_ray_head() { # CLIENT-PORT AGENT-PORT METRICS-PORT ENVIRONMENT-PORT
    # With a port of its choice Ray's client server asks for it, and ends Ray when a busy machine does not answer within 30 s.
    setsid ray start --head --block --runtime-env-agent-port "$4" \
        --node-ip-address "$MASTER_ADDR" --port "$RAY_PORT" --num-gpus "$NUM_GPUS" ${NUM_CPUS:+--num-cpus "$NUM_CPUS"} \
        --dashboard-host "${RAY_DASHBOARD_HOST:-127.0.0.1}" --dashboard-port "$RAY_DASHBOARD_PORT" \
        --ray-client-server-port "$1" --dashboard-agent-listen-port "$2" --metrics-export-port "$3" \
        --min-worker-port 0 --max-worker-port 0 \
        --temp-dir "$RAY_TEMP_DIR" --disable-usage-stats >"$RAY_TEMP_DIR/head.log" 2>&1 &
    RAY_HEAD_PID=$!
}

wait_for_jobs_api() { # status 1 when the head ends before it answers
    local deadline=$((SECONDS + ${RAY_START_TIMEOUT:-300})) dashboard="$RAY_TEMP_DIR/session_latest/logs/dashboard.log" lacking
    while ((SECONDS < deadline)); do
        kill -0 "$RAY_HEAD_PID" 2>/dev/null || return 1
        # The job server answers before this node has joined, and a head whose node does not join ends itself.
        if grep -q 'runtime started' "$RAY_TEMP_DIR/head.log" &&
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

worker_command() { # ADDRESS -> what joins a node to this cluster
    printf 'ray start --block --address %q --node-ip-address %q --num-gpus %q --disable-usage-stats' "$RAY_ADDRESS_OF_HEAD" "$1" "$NUM_GPUS"
}

# Every node of HOSTFILE joins, all at once; one that cannot ends the launch.
join_workers() {
    [[ $REHEARSE != 1 ]] || return 0
    local address pids=() answers
    if [[ -z ${HOSTFILE:-} ]]; then
        ((${NUM_NODES:-1} > 1)) && say "on each other node: RAY_AUTH_MODE=token RAY_AUTH_TOKEN=<the content of $RAY_TEMP_DIR/token> $(worker_command '<its address>')" &&
            (umask 077 && printf '%s' "$RAY_AUTH_TOKEN" >"$RAY_TEMP_DIR/token")
        return 0
    fi
    answers="$RAY_TEMP_DIR/workers"
    mkdir -p "$answers"
    while read -r address; do
        # The token goes through standard input: a command line can be read by everybody on the node.
        # shellcheck disable=SC2086  # SSH is a command with options
        ${SSH:-ssh -o BatchMode=yes -o ConnectTimeout=10} "$address" bash -s >"$answers/$address" 2>"$answers/$address.err" <<EOF &
export PATH=$(printf %q "$PATH") LD_LIBRARY_PATH=$(printf %q "${LD_LIBRARY_PATH:-}") RAY_AUTH_MODE=token RAY_AUTH_TOKEN=$(printf %q "$RAY_AUTH_TOKEN")
export no_proxy=$(printf %q "${no_proxy:-}") NO_PROXY=$(printf %q "${no_proxy:-}")
log=\$(mktemp /tmp/slime-ray-worker-XXXXXX.log)
setsid $(worker_command "$address") >"\$log" 2>&1 </dev/null &
pid=\$!
sleep ${RAY_WORKER_GRACE:-5}
kill -0 \$pid 2>/dev/null || { tail -n 5 "\$log" >&2; exit 1; }
echo \$pid
EOF
        pids+=("$! $address")
    done < <(worker_addresses)
    local pair failed=()
    for pair in "${pids[@]}"; do
        address=${pair#* }
        if wait "${pair%% *}" && [[ $(<"$answers/$address") =~ ^[0-9]+$ ]]; then
            RAY_WORKERS+=("$address $(<"$answers/$address")")
        else
            failed+=("$address ($(tail -n 1 "$answers/$address.err" 2>/dev/null))")
        fi
    done
    ((${#failed[@]} == 0)) || die "${#failed[@]} of ${#pids[@]} nodes did not join: ${failed[*]}"
    say "${#RAY_WORKERS[@]} other nodes joined"
}

# ------------------------------------------------------------------------------------------------- the job

runtime_env_json() { # NAME=VALUE... -> {"env_vars": {...}}
    "$PYTHON" -c 'import json, sys; print(json.dumps({"env_vars": dict(word.split("=", 1) for word in sys.argv[1:])}))' "$@"
}

# Runs the training command as a job of our cluster and follows its output; the status is the job's.
submit_job() { # RUNTIME-ENV-JSON FLAGS...
    local runtime_env=$1
    shift
    if [[ $REHEARSE == 1 ]]; then
        PYTHONPATH="${PROJECT_ROOT}${PYTHONPATH:+:$PYTHONPATH}" "$PYTHON" -m slime.rehearse --runtime-env "$runtime_env" "$@"
        exit
    fi
    if [[ $PREFLIGHT == 1 ]]; then
        RAY_ADDRESS="$RAY_ADDRESS_OF_HEAD" PYTHONPATH="${PROJECT_ROOT}${PYTHONPATH:+:$PYTHONPATH}" \
            "$PYTHON" -m slime.rehearse --preflight ${LOGICAL_GPUS:+--logical-gpus} --runtime-env "$runtime_env" "$@"
        exit
    fi
    RAY_JOB_ID="slime-$(date +%Y%m%d-%H%M%S)-$$"
    # In the background, because Bash handles a signal only between foreground commands: a TERM would wait for the end of training.
    ray job submit --address "$RAY_JOBS_URL" --submission-id "$RAY_JOB_ID" --runtime-env-json "$runtime_env" \
        -- "$PYTHON" -m slime.train "$@" &
    RAY_SUBMIT_PID=$!
    local status=0
    wait "$RAY_SUBMIT_PID" || status=$?
    if ((status != 0)) && ! kill -0 "$RAY_HEAD_PID" 2>/dev/null; then
        tail -n 20 "$RAY_TEMP_DIR/head.log" >&2
        die "Ray itself ended, and the job with it; its last lines are above, all of them in $RAY_TEMP_DIR/head.log"
    fi
    RAY_JOB_ID="" RAY_SUBMIT_PID=""
    return "$status"
}

print_resume() { # COMMAND
    say "to continue from the newest checkpoint, or with more rollouts: $1"
}

# ------------------------------------------------------------------------------------------------- clean-up

session_members() { # SESSION-LEADER -> process ids of its session
    ps -e -o pid=,sid= | awk -v sid="$1" '$2 == sid { print $1 }'
}

stop_ray_head() {
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

# Stops what this launcher started, by process id: the job's cluster here and the Ray processes on the workers. Nothing else.
cleanup() {
    local status=$? entry
    trap - EXIT INT TERM
    set +e
    for entry in "${RAY_WORKERS[@]}"; do
        # shellcheck disable=SC2086
        ${SSH:-ssh -o BatchMode=yes -o ConnectTimeout=10} "${entry%% *}" bash -s <<<"kill -TERM ${entry##* } 2>/dev/null" >/dev/null 2>&1 &
    done
    if [[ -n $RAY_HEAD_PID ]]; then
        # A job that still runs gets its time to stop engines; it would outlive the cluster otherwise.
        [[ -z $RAY_JOB_ID ]] || timeout 30 ray job stop --address "$RAY_JOBS_URL" "$RAY_JOB_ID" >/dev/null 2>&1
        [[ -z $RAY_SUBMIT_PID ]] || kill -TERM "$RAY_SUBMIT_PID" 2>/dev/null
        stop_ray_head
        say "the Ray cluster of this run is stopped; its logs: $RAY_TEMP_DIR"
    fi
    wait
    exit "$status"
}
