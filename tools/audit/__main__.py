"""Try every door of a run that is going on: `python -m tools.audit BASE_DIR`.

    python -m tools.audit FOLDER        FOLDER is what the run's launcher owns (BASE_DIR), or the process id of the launcher
        --passed NAME                   variable with a secret of the user's, given to the run with PASS_ENV
        --outside PID                   also call every listener from the network of that process (a node that is not the run's)
        --json FILE

As root, so that it sees every process and asks as another user; else it asks as this one. It sends each listener a few bytes
that the listener may not expect: not for a run that must not be disturbed. Exit status 1 and a line for whatever is open and
not on the list of docs/en/advanced/security.md.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from slime.observability import owner
from tools.audit import leaks, probes, report, sockets


def processes_of(which: str) -> list[int]:
    """Of a run, by the folder that it owns or by its launcher's process id. Raises ValueError where nothing runs."""
    if which.isdigit():
        pid, launch = int(which), leaks.environment_of(int(which)).get(owner.LAUNCH_VARIABLE, "")
    else:
        record = owner.read(Path(which) / owner.RECORD)
        if record is None:
            raise ValueError(f"{which} has no {owner.RECORD}: no run works there; give the launcher's BASE_DIR or process id")
        # In a namespace of its own it counts processes by other numbers.
        pid = record.pid if record.machine == owner.this_process().machine else 0
        launch = record.launch
    found = sockets.with_descendants([pid]) if pid and Path(f"/proc/{pid}").exists() else []
    found = sorted({*found, *(owner.members(launch) if launch else ())} - {os.getpid()})
    if not found:
        raise ValueError(f"{which}: the run has ended, or its processes are another user's")
    return found


def audit(pids: Sequence[int], folders: Sequence[Path], *, passed: dict[str, str], outside: int | None) -> report.Report:
    """folders: of the run, searched for secrets as Ray's own of each node is. passed: secrets that the user gave it."""
    not_done = []
    if os.geteuid() != 0:
        not_done.append("asking as another user, and in other networks: not root")
    found = sockets.listeners(pids)
    drawn = leaks.secrets_of(pids)
    secrets = drawn | passed
    found_leaks = leaks.in_processes(pids, drawn) + leaks.in_processes(pids, passed, environment=False)
    tokens = leaks.token_files(pids)
    kept = [*tokens, *(path for folder in folders for path in folder.rglob("join.sh"))]  # for nodes that are joined by hand
    searched = [*folders, *(token.parent for token in tokens)]
    found_leaks += leaks.in_files(searched, secrets, kept=kept)
    dashboard = next((one for one in found if one.who == "dashboard.py" and one.kind == "tcp"), None)
    if leaks.RAY in drawn and dashboard:
        network = dashboard.network if os.geteuid() == 0 else None
        found_leaks += leaks.in_jobs(drawn[leaks.RAY], f"http://{dashboard.place}", secrets, network=network)
    else:
        not_done.append("Ray's description of the job: no dashboard here")
    return report.Report(
        rows=_rows(found, outside),
        secrets=tuple(secrets),
        leaks=tuple(found_leaks),
        writable=tuple(leaks.open_to_others(searched)),
        shared=tuple(leaks.shared_memory(pids)),
        not_done=tuple(not_done),
    )


def _rows(found: Sequence[sockets.Listener], outside: int | None) -> tuple[report.Row, ...]:
    """Every listener is asked on its own node, and from outside at that node's address."""
    rows: list[report.Row] = []
    uid = probes.NOBODY if os.geteuid() == 0 else None
    for network in dict.fromkeys(one.network for one in found):
        mine = [one for one in found if one.network == network]
        here = network if uid else None
        node = probes.node_address(here)
        inside = probes.ask_all(mine, probes.Stranger(uid=uid, network=here), node=node)
        stranger = probes.Stranger(uid=uid, network=outside)
        there = None if outside is None else probes.ask_all(mine, stranger, node=node, only_reach=True)
        rows += report.judged(inside, there)
    return tuple(rows)


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tools.audit", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", help="folder that the run's launcher owns, or the launcher's process id")
    parser.add_argument("--passed", action="append", default=[], metavar="NAME")
    parser.add_argument("--outside", type=int, metavar="PID")
    parser.add_argument("--json", type=Path, metavar="FILE")
    given = parser.parse_args(argv)
    if unset := [name for name in given.passed if not os.environ.get(name)]:
        parser.error(f"--passed {unset[0]}: no such variable here; set it to what the run was given")
    try:
        pids = processes_of(given.run)
    except ValueError as error:
        sys.stderr.write(f"audit: {error}\n")
        return 2
    folders = [] if given.run.isdigit() else [Path(given.run)]
    passed = {name: os.environ[name] for name in given.passed}
    found = audit(pids, folders, passed=passed, outside=given.outside)
    if given.json:
        given.json.write_text(json.dumps(found.to_json(), indent=1) + "\n")
    sys.stdout.write(found.text() + "\n")
    return 0 if found.is_clean else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
