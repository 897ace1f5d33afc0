# shellcheck shell=bash
# What every launcher shares: checks, a Ray cluster of its own, the job, and a clean-up that touches nothing else.
#
#   source "${SCRIPT_DIR}/lib/launch.sh"                                  # finds the environment; a plain shell will do
#   require_env BASE_DIR "..."; require_dir "$HF_CHECKPOINT" "..."        # one clear line each, before anything starts
#   own BASE_DIR                                                          # nobody else works in that folder
#   check_flags "${FLAGS[@]}"                                             # parsed in a fraction of a second, without torch
#   check_flags_alone "${FLAGS[@]}"                                       # the same where the launcher makes the checkpoint first
#   start_ray_head; join_workers                                          # stopped again on any exit, by process id
#   submit_job "$(runtime_env_json NAME=VALUE ...)" "${FLAGS[@]}"
#   print_resume                                                          # $0, what was given, and more rollouts
#
# Settings (environment variables; the launcher gives defaults where it needs others; relative paths are meant from the caller's
# working directory):
#   RUN_DIR             logs, metrics, memory.json of the run           (the launcher's default is below BASE_DIR)
#   PASS_ENV            "NAME NAME=VALUE ...": variables for every rank of every node, e.g. PASS_ENV="NCCL_DEBUG=INFO NCCL_IB_HCA";
#                       they win over the launcher's own. An exported NCCL_DEBUG, NCCL_DEBUG_SUBSYS, TORCH_DISTRIBUTED_DEBUG or the
#                       like (DIAGNOSTICS in environment.sh) needs no mention. No RAY_* that the shell inherited is used otherwise.
#                       A name that says key, token, secret or password goes by environment alone: in no argument, no job's description
#   MASTER_ADDR         address of this node in the cluster network     (default 127.0.0.1)
#   HOSTFILE            one worker per line, first column, by address or name   (default: no other node is started)
#   NUM_GPUS            slots that each node offers to Ray; on a machine without GPUs they are logical   (default 8)
#   RAY_PORT, RAY_DASHBOARD_PORT     (default: free ports)              RAY_DASHBOARD_HOST  (default 127.0.0.1)
#   RAY_TEMP_DIR        folder of the run's sockets and of Ray's logs on every node, for its owner alone   (default: a new one under
#                       /tmp, removed after a run that ended well)
#   RAY_AUTH_TOKEN      every Ray endpoint asks for it                  (default: drawn anew; kept in RAY_TEMP_DIR/token)
#   SSH                 command that reaches a worker                   (default: ssh -o BatchMode=yes, within bounds for a node that is out of reach)
#   SLIME_VENV          environment that scripts/setup.sh made          (default: .venv of this project)
#   PYTHON              interpreter of the job, where SLIME_VENV is not used   (default: that of the environment)
#   REHEARSE            1, or --rehearse as an argument of the launcher: nothing is started and nothing needs to be there; the flags
#                       are proven on this machine instead (python3 -m slime.rehearse, whose own flags may follow, e.g. --html FILE)
#   PREFLIGHT           1, or --preflight as an argument: the Ray cluster is started and every node is asked what it has and whom it
#                       reaches; the bad ones are named, the cluster is stopped, and no job is run. No checkpoint needs to be there
#   LOGICAL_GPUS        1: the slots stand for no GPUs, so that PREFLIGHT asks for none   (default: each slot is a GPU)

PROJECT_ROOT="$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/../.." && pwd)"
LAUNCHER="$(cd -- "$(dirname -- "$0")" 2>/dev/null && pwd)/$(basename -- "$0")"
LAUNCHER_FLAGS=("$@") # of the launcher that sources this file

REHEARSE="${REHEARSE:-0}" PREFLIGHT="${PREFLIGHT:-0}"
for argument in "$@"; do
    [[ $argument != --rehearse ]] || REHEARSE=1
    [[ $argument != --preflight ]] || PREFLIGHT=1
done

say() { printf '[launch] %s\n' "$*" >&2; }
die() { printf '[launch] error: %s\n' "$*" >&2; exit 1; }

# shellcheck source=environment.sh
source "${PROJECT_ROOT}/scripts/lib/environment.sh"
# shellcheck source=owner.sh
source "${PROJECT_ROOT}/scripts/lib/owner.sh"
# shellcheck source=nodes.sh
source "${PROJECT_ROOT}/scripts/lib/nodes.sh"
# shellcheck source=cluster.sh
source "${PROJECT_ROOT}/scripts/lib/cluster.sh"
# shellcheck source=job.sh
source "${PROJECT_ROOT}/scripts/lib/job.sh"

# Launchers write generated files into RUN_DIR, and the cluster's folder may not exist here.
if [[ $REHEARSE == 1 && -z ${RUN_DIR:-} ]]; then
    REHEARSAL_DIR="$(mktemp -d /tmp/slime-rehearsal-XXXXXX)" RUN_DIR="$REHEARSAL_DIR"
    trap 'rm -rf -- "$REHEARSAL_DIR"' EXIT # by a name of its own: a launcher may set RUN_DIR to a folder that is to stay
fi

note_settings
read_passed
forget_other_clusters
check_tmpdir
find_environment
if is_in --help "$@" || is_in -h "$@"; then # the launcher's own heading, and where the flags are listed
    sed -n '2,/^[^#]/ { /^#/ s/^# \{0,1\}//p }' "$LAUNCHER"
    printf '\nFLAGS: %q -m slime.config --help\n' "$PYTHON"
    exit 0
fi
# The launch's name in the environment of everything that it starts: how its processes are told from all others.
SLIME_LAUNCH="$("$PYTHON" -I -S -c 'import uuid; print(uuid.uuid4().hex)')"
export SLIME_LAUNCH

# ------------------------------------------------------------------------------------------------- checks

# Nothing but a run needs the checkpoints and the data.
runs() { [[ $REHEARSE != 1 && $PREFLIGHT != 1 ]]; }

require_env() { # NAME MEANING
    [[ -z ${!1:-} && $REHEARSE == 1 ]] && export "$1=/$1"
    [[ -n ${!1:-} ]] || die "$1 is not set: $2"
}

require_dir() { # PATH WHAT-TO-DO
    [[ -d $1 ]] || ! runs || die "no folder $1: $2"
}

require_file() { # PATH WHAT-TO-DO
    [[ -f $1 && -r $1 ]] || ! runs || die "no readable file $1: $2"
}

require_command() { # NAME WHAT-TO-DO
    command -v "$1" >/dev/null || die "no command $1: $2"
}

# How many GPUs this shell may use: those of the machine, or as many of them as CUDA_VISIBLE_DEVICES names.
visible_gpus() {
    local listed
    listed=$({ nvidia-smi -L 2>/dev/null || true; } | { grep -c '^GPU ' || true; })
    if ((listed == 0)) || [[ ! -v CUDA_VISIBLE_DEVICES ]]; then
        echo "$listed"
    else
        awk -F, '{ print NF }' <<<"$CUDA_VISIBLE_DEVICES"
    fi
}

# Programs of this project, from any working directory.
run_python() { PYTHONPATH="${PROJECT_ROOT}${PYTHONPATH:+:${PYTHONPATH}}" "$PYTHON" "$@"; }

# A program over several ranks of this node, which meet on loopback. When one fails, torchrun's own traceback would follow what the
# program said.
run_ranks() { # RANKS PROGRAM ARGUMENTS...
    local ranks=$1 said status=0
    shift
    said=$(mktemp)
    PYTHONWARNINGS=ignore GLOO_SOCKET_IFNAME="${GLOO_SOCKET_IFNAME:-lo}" run_python -m slime.compat.torchrun --nproc-per-node "$ranks" --standalone "$@" 2>"$said" || status=$?
    awk '/^Traceback \(most recent call last\):$/ { last = NR }
        /\.ChildFailedError:/ { cut = last }
        { line[NR] = $0 }
        END { for (i = 1; i <= NR && (!cut || i < cut); i++) if (line[i] !~ /^[WE][0-9]+ .*torch\/distributed/) print line[i] }' "$said" >&2
    rm -f -- "$said"
    ((status == 0)) || die "${1##*/} failed, as said above; nothing else was started"
}

check_flags() { # FLAGS...
    runs || return 0 # the rehearsal lists them together with everything else
    parse_flags --check "$@"
    check_engines "$@"
}

check_flags_alone() { # FLAGS...   before the files that they name are there
    runs || return 0
    parse_flags --door rehearse --check "$@"
    check_engines --door rehearse "$@"
}

check_engines() { # their options have names and types of the SGLang that will run them
    run_python -m slime.engine.plan "$@" || die "the engines' flags above are wrong; nothing was started"
}

parse_flags() {
    local status=0
    run_python -m slime.config "$@" || status=$?
    ((status != 3)) || exit 0 # a run that is finished, which was said
    ((status == 0)) || die "the flags above are wrong; nothing was started"
}

count_nvlinks() {
    { nvidia-smi topo -m 2>/dev/null || true; } | { grep -o 'NV[0-9][0-9]*' || true; } | wc -l
}
