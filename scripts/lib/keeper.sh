#!/usr/bin/env bash
# Waits for a launcher to end. A launcher ends its keeper first: one that is still there ends what the launcher started, says so
# where the launcher spoke, and takes away what the launcher would have. Meanwhile it tells when launcher or driver are stopped. On another
# node of the run it waits for that node's Ray to end, or for the head (HEAD_OF_RUN, address:port) to be out of reach, does the same, and
# says in the run's logs (LOGS_OF_RUN) that the head is gone, where nobody is left there who could.
#
#   bash scripts/lib/keeper.sh PID LAUNCH RAY-TEMP-DIR RUN-DIR [OWNED-FOLDER...]        (started by launch.sh, not by hand)
set -uo pipefail
trap '' PIPE HUP # the terminal may have gone with the launcher
launcher=$1 launch=$2 ray_folder=$3 run_folder=$4
shift 4
# shellcheck source=job.sh
source "$(dirname -- "${BASH_SOURCE[0]}")/job.sh" # driver_pid

state_of() { # PID -> state and birth, in the kernel's clock; nothing for a process that is gone
    local fields
    read -r fields 2>/dev/null <"/proc/$1/stat" || return 0
    fields=${fields##*) }
    read -ra fields <<<"$fields"
    [[ ${fields[0]} == Z ]] || printf '%s %s' "${fields[0]}" "${fields[19]}"
}
started() { local state; state=$(state_of "$1"); printf '%s' "${state#* }"; }

# Ray's agents wipe their environment, and may live for minutes without their raylet: on another node they are of Ray's own session.
launch_members() {
    {
        grep -lsxzF "SLIME_LAUNCH=$launch" /proc/[0-9]*/environ | cut -d/ -f3
        [[ -z ${HEAD_OF_RUN:-} ]] || ps -e -o pid=,sid=,stat= | awk -v sid="$launcher" '$2 == sid && $3 !~ /Z/ { print $1 }'
    } | sort -u
}

# The driver tells of every process that is stopped, but for itself and whoever waits for it.
declare -A since=()
tell_stopped() { # PID NAME WHAT-FOLLOWS
    if [[ $(state_of "$1") == [tT]\ * ]]; then
        [[ -z ${since[$1]:-} ]] || return 0
        since[$1]=$SECONDS
        printf '[launch] %s (pid %s) is stopped (SIGSTOP, or a debugger; kill -CONT %s there lets it go on): %s\n' "$2" "$1" "$1" "$3" >&2
    elif [[ -n ${since[$1]:-} ]]; then
        [[ -z $(started "$1") ]] || printf '[launch] %s (pid %s) goes on, after %s s\n' "$2" "$1" $((SECONDS - since[$1])) >&2
        unset "since[$1]"
    fi
}

is_ours() { grep -qsF "\"launch\": \"$launch\"" "$1/.slime-owner"; }

# What engines list of their shared memory (ChildProcess of slime/engine/process.py), for all nodes: names that are not this node's do no
# harm. The lists of a launch that ends in order go with it, perhaps before a node that it cannot reach has noticed.
listed() { cat -- "${run_folder:-${LOGS_OF_RUN:-/nowhere}}"/*.shared 2>/dev/null | grep -E '^/dev/shm/(sglang|sgl_shm)_'; }

# Ray counts on a head whose packets are lost for minutes, and by then the head has long given this node up.
patience=${HEAD_SECONDS:-90} seen=0
# shellcheck disable=SC2016
head_answers() { timeout 3 bash -c 'exec 3<>"/dev/tcp/$0/$1"' "${HEAD_OF_RUN%:*}" "${HEAD_OF_RUN##*:}" 2>/dev/null; }
head_is_lost() {
    [[ -n ${HEAD_OF_RUN:-} ]] || return 1
    ! head_answers || seen=$SECONDS
    ((SECONDS - seen > patience))
}

when=$(started "$launcher") lists="" driver=""
while [[ -n $when && $(started "$launcher") == "$when" ]]; do
    if [[ -z ${HEAD_OF_RUN:-} ]]; then
        tell_stopped "$launcher" "the launcher" "the run goes on, and signals to the launcher wait"
        [[ -z $driver ]] || tell_stopped "$driver" "the job's driver" "the run waits for it"
        [[ -n $driver && -n $(started "$driver") ]] || ((SECONDS % 10 > 1)) || driver=$(driver_pid)
    fi
    sleep 2 2>/dev/null # it outlives this keeper, and whoever reads the launcher's output waits for its end
    ((SECONDS % 4 > 1)) || ! head_is_lost || break
    ((SECONDS % 30 > 1)) || lists=$(listed)
    # From another machine a run counts as alive while its records are touched (slime/observability/owner.py).
    ((SECONDS % 30 > 1)) || for folder in "$@"; do ! is_ours "$folder" || touch -c -- "$folder/.slime-owner" 2>/dev/null; done
done

[[ -z $run_folder ]] || rm -f -- "$run_folder/.launched"
printf '[launch] the launcher (pid %s) was killed without a word: what it started is being ended; %s\n' "$launcher" \
    "the same command goes on from the newest checkpoint" >&2
mapfile -t shared < <(for pid in $(launch_members); do grep -hsoE '/dev/shm/(sglang|sgl_shm)_[^ ]*$' "/proc/$pid/maps"; done | sort -u)
for signal in TERM KILL; do
    for ((second = 0; second < 15; second++)); do
        mapfile -t left < <(launch_members)
        ((${#left[@]} > 0)) || break 2
        ((second > 0)) || kill "-$signal" "${left[@]}" 2>/dev/null
        sleep 1
    done
done
mapfile -t -O "${#shared[@]}" shared < <(listed; printf '%s\n' "$lists")
rm -f -- "${shared[@]}"
[[ -z $run_folder ]] || rm -f -- "$run_folder"/*.shared
if [[ -n $ray_folder ]]; then
    rm -rf -- "$ray_folder/tmp" "$ray_folder/token"
    find "$ray_folder" -type s -delete
fi
for folder in "$@"; do
    ! is_ours "$folder" || rm -f -- "$folder/.slime-owner"
done
if [[ -n ${LOGS_OF_RUN:-} ]] && grep -qsxF "$launch" "$LOGS_OF_RUN/.launched" && ! head_answers; then
    root=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/../.." && pwd)
    PYTHONPATH=$root "$PYTHON" -m slime.ray.head_lost "${HEAD_OF_RUN%:*}" "$LOGS_OF_RUN"
fi
