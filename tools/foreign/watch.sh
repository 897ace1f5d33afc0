# shellcheck shell=bash disable=SC1090,SC2016
# Runs a launcher for its words: watch.sh LAUNCHER ARGUMENTS...   Called by watch.py, confined; WATCH_FOLDER takes what is recorded.
#
# PATH holds a few programs that only read. Every other command is recorded and answers nothing, with status 0: `ray job submit`,
# `python3 train.py`, `pkill`, `sleep`. A hook before each command records programs that are called by their path, and turns what is
# written to a file into a file of WATCH_FOLDER.

__record() { # KIND WORDS...
    local file="$WATCH_FOLDER/call.$EPOCHREALTIME.$BASHPID.$RANDOM" name
    {
        printf '%s\0' "$1" "$#" "${@:2}"
        [[ "$*" == *train* ]] || return 0
        while read -r name; do
            [[ $name != BASH* && $name != __* && $name != FUNCNAME && $name != PIPESTATUS && $name != DIRSTACK && $name != GROUPS ]] || continue
            local -n __array=$name
            printf '%s\0' array "$name" "${#__array[@]}" "${__array[@]}"
        done < <(compgen -A arrayvar)
        while read -r name; do printf '%s\0' env "$name" "${!name}"; done < <(compgen -e)
    } >"$file"
}

command_not_found_handle() { __record command "$@"; }

__mapped() { # TARGET -> the file that stands for it
    local stands="$WATCH_FOLDER/file.${1//\//%}"
    [[ -e $stands ]] || __record file "$1" "$stands"
    printf '%s' "$stands"
}

source() {
    [[ $1 == */models/*.sh ]] || { builtin source "$@"; return; }
    local name=${1##*/} from=here file status=0
    file="$WATCH_MODELS/$name"
    [[ -f $file ]] || file="$WATCH_MODELS/${name/-Instruct/}" # one script for a model and its instruct release
    [[ -f $file ]] || from=theirs file=$1
    [[ -f $file ]] || from=nowhere
    [[ $from != here ]] || name=${file##*/}
    # A model script may source another one.
    [[ -n ${__in_model:-} ]] || __record model "${name%.sh}" "$from" "${MODEL_ARGS_ROTARY_BASE:-}"
    [[ $from != nowhere ]] || return 0
    local __in_model=1
    builtin source "$file" || status=$?
    return "$status"
}
.() { source "$@"; }
exec() { (($# == 0)) || { "$@"; exit; }; }
command() {
    [[ ${1:-} == -[vV] ]] || { builtin command "$@"; return; }
    printf '%s\n' "${2:-}"
}
which() { printf '%s\n' "$@"; }
hostname() { if [[ ${1:-} == -[iI]* ]]; then printf '127.0.0.1\n'; else printf 'localhost\n'; fi; }
date() { [[ " $*" == *" -s"* || " $*" == *" --set"* ]] || builtin command date "$@"; }
env() (
    while [[ ${1:-} == [A-Za-z_]*=* ]]; do export "${1?}" && shift; done
    (($# == 0)) || "$@"
)
tee() {
    local text target
    text=$(cat)
    for target in "$@"; do [[ $target == -* ]] || printf '%s\n' "$text" >>"$(__mapped "$target")"; done
    printf '%s\n' "$text"
}
enable -n kill suspend logout

__guard() {
    # A launcher that stops at its first failure would stop here at what only its own machine has.
    set +ex
    local said=$BASH_COMMAND word rest target bare
    [[ $said != __* && ${FUNCNAME[1]:-} != __* ]] || return 0
    local assigned='^([A-Za-z_][A-Za-z0-9_]*=("[^"]*"|[^[:space:]"(]*)[[:space:]]+)*'
    if [[ $said =~ ${assigned}((\"[^\"]*\"|[^[:space:]\"\'\`\(]+)+)(.*) ]]; then
        word=${BASH_REMATCH[3]} rest=${BASH_REMATCH[5]}
        if [[ $word == */* && $word != *=* && $word != *'$('* && $word != *'`'* ]]; then
            eval "__record command $word$rest"
            return 1
        fi
    fi
    [[ $said == *'>'* ]] || return 0
    bare=$(sed -z "s/'[^']*'//g; s/<<.*//; s/\([^> ]\) *\"[^\"]*\"/\1/g; s#[0-9]*&\?>\+ *\(&[0-9-]\|/dev/[a-z]*\)##g" <<<"$said")
    local redirect='[0-9]*(&?>[>|]?)[[:space:]]*("[^"]*"|[^][:space:];&|<>"()]+)'
    if [[ $said != '[['* && $said != '(('* && $bare == *'>'* && $bare =~ $redirect ]]; then
        local found=${BASH_REMATCH[0]} kind=${BASH_REMATCH[1]}
        target=${BASH_REMATCH[2]}
        [[ $target != *'$('* && $target != *'`'* && $said == *"$found"* ]] || return 0
        eval "target=$target"
        [[ $target != /dev/* ]] || return 0
        eval "${said/"$found"/${found%%[&>]*}$kind$(__mapped "$target")}"$'\n'
        return 1
    fi
}

WATCH_LAUNCHER=$1
shift
BASH_ARGV0=$WATCH_LAUNCHER
shopt -s extdebug
set -T
trap __guard DEBUG
builtin source "$WATCH_LAUNCHER"
