#!/usr/bin/env bash
# Make the virtual environment that every other script uses: pinned packages for this machine, installed once.
#
#   bash scripts/setup.sh [--dev]      --dev adds what the tests need
#
# SLIME_VENV     where the environment lives               (default: .venv beside this project)
# SLIME_PYTHON   interpreter to build it with (default: the first that is there of python3.11, python3.12, python3 for extra cpu; for
#                extra gpu, whose pins are for 3.12 alone, of python3.12, python3)
# SLIME_EXTRA    cpu or gpu                                (default: gpu where nvidia-smi lists a GPU, else cpu)
# A second run finds the same pins installed and returns at once. pip's own settings (PIP_INDEX_URL, PIP_EXTRA_INDEX_URL, pip.conf)
# are honoured; an index with CPU builds of torch saves a download of several GB on machines without a GPU.
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
venv=${SLIME_VENV:-$root/.venv}
dev=no
[[ ${1:-} == --dev ]] && dev=yes

say() { printf '[setup] %s\n' "$*" >&2; }
die() { printf '[setup] error: %s\n' "$*" >&2; exit 1; }

is_right() { # PYTHON -> is it one that the extra's pins are for?
    command -v "$1" >/dev/null &&
        "$1" -c "import sys; sys.exit(sys.version_info[:2] not in [(3, minor) for minor in (${minors// /,},)])" 2>/dev/null
}

pick_python() {
    local candidate minor candidates=()
    if [[ -n ${SLIME_PYTHON:-} ]]; then
        is_right "$SLIME_PYTHON" || die "SLIME_PYTHON=$SLIME_PYTHON is not a Python 3.${minors// / or 3.}, for which the pins of extra '$extra' are"
        echo "$SLIME_PYTHON"
        return
    fi
    for minor in $minors; do candidates+=("python3.$minor"); done
    for candidate in "${candidates[@]}" python3; do
        if is_right "$candidate"; then
            echo "$candidate"
            return
        fi
    done
    die "no Python 3.${minors// / or 3.} found, for which the pins of extra '$extra' are; install one or name it with SLIME_PYTHON"
}

pick_extra() {
    if [[ -n ${SLIME_EXTRA:-} ]]; then echo "$SLIME_EXTRA"
    elif nvidia-smi -L 2>/dev/null | grep -q '^GPU '; then echo gpu
    else echo cpu
    fi
}

# The engines' KV transfer library links against libibverbs even when it only speaks TCP.
provide_libibverbs() {
    if "$venv/bin/python" -c 'import ctypes; ctypes.CDLL("libibverbs.so.1")' 2>/dev/null || [[ -e $venv/syslib/libibverbs.so.1 ]]; then return; fi
    command -v apt-get >/dev/null || die "libibverbs.so.1 is missing and this is no Debian-like system; install rdma-core (libibverbs) and run again"
    say "libibverbs.so.1 is missing: unpacking Debian's libibverbs1, libnl-3-200, libnl-route-3-200 into $venv/syslib"
    local work
    work=$(mktemp -d)
    (
        cd "$work"
        if ! apt-get download -q libibverbs1 libnl-3-200 libnl-route-3-200 >/dev/null 2>&1; then
            [[ $(id -u) == 0 ]] || die "apt-get has no package lists; run 'sudo apt-get update' or 'sudo apt-get install libibverbs1' and try again"
            apt-get update -q >/dev/null
            apt-get download -q libibverbs1 libnl-3-200 libnl-route-3-200 >/dev/null
        fi
        local deb
        for deb in *.deb; do dpkg -x "$deb" unpacked; done
        mkdir -p "$venv/syslib"
        find unpacked -name '*.so*' -exec cp -a {} "$venv/syslib/" \;
    )
    rm -rf "$work"
}

install_packages() {
    local list=$root/scripts/constraints/$extra.txt pip=("$venv/bin/python" -m pip --disable-pip-version-check)
    local nodeps=(--no-deps) # SGLang's metadata asks for a CUDA torch, which a CPU does without
    if [[ $extra == cpu ]]; then
        say "1/3 torch (the CPU build where pip's index offers it)"
        "${pip[@]}" install -qq -c "$list" "$(grep -m1 '^torch==' "$list")"
        say "2/3 $(grep -vc '^#' "$list") pinned packages, about 2 GB on disk"
        grep -v '^torch==' "$list" > "$venv/install.txt"
    else
        say "1/3 torch comes with the list"
        say "2/3 $(grep -vc '^#' "$list") pinned packages, several GB"
        cp "$list" "$venv/install.txt"
        nodeps=() # the list agrees with itself, and pip may say so
    fi
    "${pip[@]}" install -qq "${nodeps[@]}" -r "$venv/install.txt"
    if [[ $dev == yes ]]; then "${pip[@]}" install -qq --no-deps -r "$root/scripts/constraints/dev.txt"; fi
    say "3/3 this project, editable"
    "${pip[@]}" install -qq --no-deps --no-build-isolation -e "$root"
}

extra=$(pick_extra)
[[ -f $root/scripts/constraints/$extra.txt ]] || die "SLIME_EXTRA=$extra: choose cpu or gpu"
case $extra in gpu) minors="12" ;; *) minors="11 12" ;; esac
python=$(pick_python)
wanted=$(cat "$root/scripts/constraints/$extra.txt" "$root/scripts/constraints/dev.txt" "$root/scripts/setup.sh" | sha256sum | cut -d' ' -f1)-$extra-$dev
stamp=$venv/slime-setup
if [[ -x $venv/bin/python && -f $stamp ]]; then
    have=$(<"$stamp")
    # An environment with the test packages also serves a call that does not ask for them.
    if [[ $have == "$wanted" || $have == "${wanted%-no}-yes" ]]; then say "ready: $venv ($extra)"; exit 0; fi
fi
say "building $venv with $("$python" --version), extra '$extra'"
if [[ -x $venv/bin/python ]] && ! is_right "$venv/bin/python"; then
    say "$venv has $("$venv/bin/python" --version 2>&1), for which these pins are not: it is made anew"
    "$python" -m venv --clear "$venv"
fi
[[ -x $venv/bin/python ]] || "$python" -m venv "$venv"
rm -f "$stamp"
install_packages
if [[ $extra == cpu ]]; then
    provide_libibverbs
else
    say "what the recipe needs of them:"
    (cd "$root" && "$venv/bin/python" -m slime.engine.imports >&2) || die "the packages above cannot be imported: nothing that needs them will start"
fi
printf '%s\n' "$wanted" > "$stamp"
say "done: $venv"
