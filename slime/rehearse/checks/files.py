"""Files that the flags name: read where they exist, unchecked where they do not, never assumed."""

from __future__ import annotations

import json
import os
import shutil
from collections import Counter
from pathlib import Path

from slime.config.prompt_files import KINDS, file_problem, split_slice
from slime.config.rules.environment import is_host
from slime.rehearse.checks.index import check_index
from slime.rehearse.checks.plugins import check_plugins
from slime.rehearse.findings import Findings
from slime.rehearse.reading import Reading
from slime.rollout.rows import read_rows

TAIL_BYTES = 1 << 20


def check_files(
    reading: Reading,
    findings: Findings,
    *,
    checkpoint_index: str | None,
    hostfile: str | None,
    head: str | None = None,
    on_its_disks: bool = True,
) -> None:
    """head: address of the node that launches."""
    config = reading.config
    _check_prompts(reading, findings)
    folders = {
        "--hf-checkpoint": config.checkpoint.hf_checkpoint,
        "--ref-load": config.checkpoint.ref_load,
        "--opd-teacher-load": config.algorithm.opd_teacher_load,
    }
    for name, folder in folders.items():
        if folder and not Path(folder).is_dir():
            findings.unchecked("files", f"{name} {folder} is not on this machine")
    check_index(reading, findings, checkpoint_index)
    _check_save(reading, findings, on_its_disks=on_its_disks)
    _check_hosts(reading, findings, hostfile, head)
    check_plugins(config, findings)


def _check_prompts(reading: Reading, findings: Findings) -> None:
    data, evaluation = reading.config.data, reading.config.evaluation
    sources = [("--prompt-data", data.prompt_data, data.input_key, data.label_key)]
    sources += [
        (f"evaluation {one.name}", one.path, one.input_key or data.input_key, one.label_key) for one in evaluation.datasets
    ]
    for flag, path, input_key, label_key in sources:
        if not path:
            continue
        file = Path(split_slice(path)[0])
        if file.suffix not in KINDS:
            findings.violation("files", f"{flag} {file} is neither .jsonl nor .parquet", "", "convert it, or correct the name")
        elif not file.exists():
            findings.unchecked("files", f"{flag} {file} is not on this machine")
        elif problem := file_problem(path):
            findings.violation("files", f"{flag} {problem.rpartition('; ')[0] or problem}", "", problem.rpartition("; ")[2])
        elif str(file) != path:
            _check_rows(
                f"{flag} {path}",
                _sliced_rows(flag, path, data.on_broken_prompt_line, findings),
                input_key,
                label_key,
                file,
                findings,
            )
        elif file.suffix == ".jsonl":
            _check_rows(f"{flag} {file}", _jsonl_rows(flag, file, findings), input_key, label_key, file, findings)
        else:
            _check_rows(f"{flag} {file}", _parquet_rows(flag, file, findings), input_key, label_key, file, findings)


Rows = list[tuple[str, dict]]


def _sliced_rows(flag: str, path: str, on_broken: str, findings: Findings) -> Rows | None:
    """First and last row of the slice, whatever lies outside it; None after a violation."""
    try:
        rows = read_rows(path, on_broken=on_broken)
    except ImportError:
        findings.unchecked("files", f"{flag} {path}: pyarrow is not installed here")
        return None
    except ValueError as error:
        findings.violation("files", f"{flag} {error}", "", "repair what the slice takes")
        return None
    if not rows:
        findings.violation("files", f"{flag} {path} takes no row", "", "name a slice that the file has")
        return None
    return [("the first row", rows[0].values), ("the last row", rows[-1].values)]


def _jsonl_rows(flag: str, file: Path, findings: Findings) -> Rows | None:
    """First and last row; None after a violation."""
    lines, rows = _first_and_last(file), []
    if not lines:
        findings.violation("files", f"{flag} {file} is empty", "", "write the prompts, one JSON object per line")
        return None
    for where, line in lines:
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            findings.violation(
                "files",
                f"{flag} {file}: the {where} line is not JSON ({error.msg} at column {error.colno})",
                line[:80],
                "repair the line (a torn download?)",
            )
            return None
        if not isinstance(row, dict):
            findings.violation(
                "files",
                f"{flag} {file}: the {where} line is a {type(row).__name__}, not a JSON object",
                line[:80],
                "write one object per line, with the prompt under --input-key",
            )
            return None
        rows.append((f"the {where} line", row))
    return rows


def _parquet_rows(flag: str, file: Path, findings: Findings) -> Rows | None:
    try:
        from pyarrow import ArrowException, parquet
    except ImportError:
        findings.unchecked("files", f"{flag} {file}: pyarrow is not installed here")
        return None
    try:
        table = parquet.ParquetFile(file)
        last = table.num_row_groups - 1
        ends = [table.read_row_group(group).to_pylist() for group in (0, last)] if last >= 0 else []
    except (ArrowException, OSError) as error:
        findings.violation("files", f"{flag} {file} is no parquet file", str(error)[:120], "download or convert it again")
        return None
    rows = [("the first row", ends[0][0]), ("the last row", ends[-1][-1])] if ends and ends[0] and ends[-1] else []
    if not rows:
        findings.violation("files", f"{flag} {file} is empty", "", "write the prompts, one per row")
        return None
    return rows


def _check_rows(where: str, rows: Rows | None, input_key: str, label_key: str | None, file: Path, findings: Findings) -> None:
    """Columns that are asked for, and a prompt of a kind that can be used."""
    sound = rows is not None
    for place, row in rows or ():
        for name, key in (("--input-key", input_key), ("--label-key", label_key)):
            if key is not None and key not in row:
                sound = False
                findings.violation(
                    "files",
                    f"{where}: {place} has no {key!r}",
                    f"columns: {', '.join(sorted(row))}",
                    f"pass {name} with one of those columns",
                )
        if input_key in row and (problem := _prompt_problem(row[input_key])):
            sound = False
            findings.violation(
                "files",
                f"{where}: {place} has {problem} under {input_key!r}",
                repr(row[input_key])[:80],
                "a prompt is a text, or a list of messages with role and content",
            )
    if sound:
        findings.ok(
            "files",
            f"{where}: first and last row have the columns asked for, and prompts",
            f"{file.stat().st_size / 1e6:.1f} MB",
        )


_SAYS = {"content", "tool_calls", "reasoning_content"}


def _prompt_problem(prompt: object) -> str:
    """Why the value is no prompt; empty when it is one."""
    if isinstance(prompt, str):
        return "" if prompt.strip() else "an empty text"
    if isinstance(prompt, list) and prompt:
        odd = [one for one in prompt if not isinstance(one, dict) or "role" not in one or not _SAYS & set(one)]
        return "a message without role and content" if odd else ""
    return "an empty list" if prompt == [] else f"a {type(prompt).__name__}"


def _first_and_last(file: Path) -> list[tuple[str, str]]:
    """Text of the first and last non-empty line, without reading the rest."""
    with open(file, "rb") as stream:
        first = next((line for line in stream if line.strip()), b"")
        size = file.stat().st_size
        stream.seek(max(0, size - TAIL_BYTES))
        rest = [line for line in stream.read().split(b"\n") if line.strip()]
    if not first:
        return []
    return [("first", first.decode("utf-8", "replace")), ("last", (rest[-1] if rest else first).decode("utf-8", "replace"))]


def _check_save(reading: Reading, findings: Findings, *, on_its_disks: bool) -> None:
    """Write access and room for a checkpoint where --save is on this machine."""
    folder = reading.config.checkpoint.save
    if not folder:
        return
    existing = next((parent for parent in (Path(folder), *Path(folder).parents) if parent.exists()), None)
    if existing is None or (existing != Path(folder) and existing != Path(folder).parent):
        findings.unchecked("files", f"--save {folder}: neither it nor its parent is on this machine")
        return
    if not os.access(existing, os.W_OK):
        findings.violation(
            "files",
            f"--save {folder} cannot be written by this user",
            str(existing),
            "change the owner, or name another folder",
        )
        return
    if not on_its_disks:
        findings.unchecked("files", f"--save {folder}: whether there is room is asked where the run is")
        return
    free = shutil.disk_usage(existing).free
    need = 0
    if reading.table is not None:
        # bf16 (or float32) weights, and with the optimizer master weights and two moments, as they are kept
        fp32, optimizer = reading.config.model.params_dtype == "fp32", reading.config.optimizer
        moments = 8
        if optimizer.use_precision_aware_optimizer:
            moments = sum({"fp32": 4, "bf16": 2}[kind] for kind in (optimizer.exp_avg_dtype, optimizer.exp_avg_sq_dtype))
        state = 0 if reading.config.checkpoint.no_save_optim else moments + (0 if fp32 else 4)
        need = reading.num_parameters * ((4 if fp32 else 2) + state)
    findings.check(
        free >= need,
        "files",
        f"--save {folder} is writable and has room for a checkpoint",
        values=f"free {free / 1e9:.1f} GB, one checkpoint {need / 1e9:.1f} GB",
        wrong=f"--save {folder} has no room for one checkpoint",
        fix="free space, name another folder, or pass --no-save-optim",
    )


def _check_hosts(reading: Reading, findings: Findings, hostfile: str | None, head: str | None) -> None:
    """HOSTFILE as the launcher reads it: the first column names the other nodes; `head` may be among them."""
    nodes = reading.num_nodes
    if hostfile is None:
        if nodes > 1:
            findings.unchecked(
                "files",
                f"the addresses of {nodes} nodes: no hostfile is given",
                "",
                "set HOSTFILE (one worker address per line)",
            )
        return
    if not Path(hostfile).exists():
        findings.unchecked("files", f"HOSTFILE {hostfile} is not on this machine")
        return
    try:
        hosts = Counter(host_lines(Path(hostfile).read_text(encoding="utf-8-sig")))
    except (OSError, UnicodeDecodeError) as error:
        findings.violation("files", f"HOSTFILE {hostfile} cannot be read ({error})", "", "give a text file, one address a line")
        return
    if odd := [host for host in hosts if not is_host(host)]:
        findings.violation(
            "files",
            f"HOSTFILE {hostfile} has lines that are no address",
            ", ".join(odd[:4]),
            "an address in the first column of each line",
        )
    known_head = head is not None and is_host(head)
    found = {len(hosts.keys() | {head})} if known_head else {len(hosts), len(hosts) + 1}
    twice = sorted(host for host, count in hosts.items() if count > 1)
    findings.check(
        nodes in found,
        "files",
        f"HOSTFILE names the {nodes} nodes" + (f", {head} is the first" if known_head else ", with the first one or without"),
        wrong=f"HOSTFILE {hostfile} and the first node{f' {head}' if known_head else ''} are {max(found)} nodes, "
        f"the run wants {nodes}",
        values=f"twice: {', '.join(twice[:4])}" if twice else "",
        fix="add or remove lines, or change --actor-num-nodes",
    )


def host_lines(text: str) -> list[str]:
    """The first column of each line, without comments; line ends of either kind."""
    lines = [line.split("#")[0].split() for line in text.splitlines()]
    return [words[0] for words in lines if words]
