#!/usr/bin/env bash
# What must be clean before any test runs: ruff (rules and format) and shellcheck, as pinned in scripts/constraints/dev.txt. Seconds.
#
#   bash scripts/lint.sh             says what is wrong, changes nothing
#   bash scripts/lint.sh --fix       formats, and mends what ruff can mend
#
# SLIME_VENV     where the environment lives (default: .venv beside this project); scripts/setup.sh --dev makes it
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
cd "$root"
bin=${SLIME_VENV:-$root/.venv}/bin
for program in ruff shellcheck; do
    [[ -x $bin/$program ]] || { echo "[lint] error: no $bin/$program; run: bash scripts/setup.sh --dev" >&2; exit 1; }
done

failed=0
if [[ ${1:-} == --fix ]]; then
    "$bin/ruff" check --fix --quiet . || failed=1
    "$bin/ruff" format --quiet .
else
    "$bin/ruff" check --quiet . || failed=1
    "$bin/ruff" format --check --quiet . || { failed=1; echo "[lint] to format: bash scripts/lint.sh --fix" >&2; }
fi
mapfile -t shell_files < <(find scripts .ci -type f \( -name '*.sh' -o -path '.ci/*' \) | sort)
"$bin/shellcheck" "${shell_files[@]}" || failed=1
if ((failed == 0)); then echo "[lint] clean: ruff, format, shellcheck (${#shell_files[@]} scripts)" >&2; fi
exit "$failed"
