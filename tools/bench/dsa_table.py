"""The table of dsa_ops.py: times beside their floors, goals, JSON. Plain Python, so that a recorded file prints on any machine.

python3 tools/bench/dsa_table.py FILE.json
"""

from __future__ import annotations

import argparse
import json
import pathlib
from collections.abc import Callable
from dataclasses import asdict, dataclass, field

ASSUMED_COPY_TB_S, ASSUMED_BF16_TFLOPS = 4.25, 784.0
"""One H200's, for floors where the limits were not measured in the run."""
COPY, PRODUCT = ("limit", "device copy, 4.3 GB"), ("limit", "bf16 product 8192^3")


@dataclass
class Row:
    operator: str
    version: str
    milliseconds: float | None
    """None: it could not be run, `note` says why."""
    flops: float = 0.0
    bytes: float = 0.0
    """The fewest bytes that must pass through device memory: every input read once, every output written once."""
    fp8: bool = False
    """Its products take FP8 operands, at twice the rate of bf16."""
    extra_bytes: float | None = None
    """Peak memory beyond inputs and outputs."""
    note: str = ""


@dataclass
class Table:
    rows: list[Row] = field(default_factory=list)
    machine: str = ""

    def row(self, operator: str, version: str) -> Row | None:
        """The row, if it was timed."""
        found = [r for r in self.rows if (r.operator, r.version) == (operator, version) and r.milliseconds is not None]
        return found[0] if found else None

    @property
    def copy_tb_s(self) -> float:
        row = self.row(*COPY)
        return row.bytes / row.milliseconds / 1e9 if row else ASSUMED_COPY_TB_S

    @property
    def bf16_tflops(self) -> float:
        row = self.row(*PRODUCT)
        return row.flops / row.milliseconds / 1e9 if row else ASSUMED_BF16_TFLOPS

    def floors(self, row: Row) -> tuple[float, float]:
        """Milliseconds: FLOPs over the product's rate, bytes over the copy's."""
        rate = self.bf16_tflops * (2 if row.fp8 else 1)
        return row.flops / rate / 1e9, row.bytes / self.copy_tb_s / 1e9

    def to_json(self) -> str:
        goals = [goal.result(self) for goal in GOALS]
        limits = {"copy_tb_s": self.copy_tb_s, "bf16_tflops": self.bf16_tflops, "measured": self.row(*PRODUCT) is not None}
        rows = [asdict(r) | dict(zip(("floor_flops_ms", "floor_bytes_ms"), self.floors(r), strict=True)) for r in self.rows]
        return json.dumps({"machine": self.machine, "limits": limits, "rows": rows, "goals": goals}, indent=1) + "\n"

    @staticmethod
    def from_json(text: str) -> Table:
        stored = json.loads(text)
        known = Row.__dataclass_fields__
        return Table([Row(**{k: v for k, v in r.items() if k in known}) for r in stored["rows"]], stored["machine"])

    def lines(self) -> list[str]:
        found = "measured in this run" if self.row(*PRODUCT) and self.row(*COPY) else "in part those of another H200"
        lines = [
            self.machine,
            f"limits ({found}): copy {self.copy_tb_s:.2f} TB/s, bf16 product {self.bf16_tflops:.0f} TFLOP/s, FP8 twice that",
            f"{'operator':28} {'version':28} {'ms':>9} {'TFLOP/s':>8} {'TB/s':>6} {'floor ms':>9} {'of floor':>8}  note",
        ]
        for r in self.rows:
            ms, floor = r.milliseconds, max(self.floors(r))
            time = "-" if ms is None else f"{ms:.3f}"
            rate = f"{r.flops / ms / 1e9:.0f}" if ms and r.flops else ""
            moved = f"{r.bytes / ms / 1e9:.2f}" if ms and r.bytes else ""
            low = f"{floor:.3f}" if floor else ""
            share = f"{floor / ms:.0%}" if ms and floor else ""
            lines.append(
                f"{r.operator:28} {r.version:28} {time:>9} {rate:>8} {moved:>6} {low:>9} {share:>8}  {r.note}".rstrip()
            )
        lines += ["", f"{'operator':28} {'goal':46} {'allowed':>9} {'measured':>9}  reached"]
        for goal in GOALS:
            result = goal.result(self)
            allowed, measured = (f"{v:.2f}" if v is not None else "-" for v in (result["allowed"], result["measured"]))
            reached = {True: "yes", False: "no", None: "not measured"}[result["reached"]]
            lines.append(f"{goal.operator:28} {goal.text:46} {allowed:>9} {measured:>9}  {reached}")
        return lines


@dataclass(frozen=True)
class Goal:
    operator: str
    version: str
    text: str
    allowed: Callable[[Table, Row], float | None]
    """Milliseconds (or GB where `memory`); None where what it is compared with was not run."""
    memory: bool = False

    def result(self, table: Table) -> dict:
        row = table.row(self.operator, self.version)
        measured = None
        if row is not None:
            measured = row.milliseconds if not self.memory else None if row.extra_bytes is None else row.extra_bytes / 1e9
        allowed = self.allowed(table, row) if row is not None else None
        reached = None if measured is None or allowed is None else measured <= allowed
        return {"operator": self.operator, "goal": self.text, "allowed": allowed, "measured": measured, "reached": reached}


def _milliseconds(limit: float) -> Callable[[Table, Row], float]:
    return lambda table, row: limit


def _of_row(operator: str, version: str, factor: float) -> Callable[[Table, Row], float | None]:
    def allowed(table: Table, row: Row) -> float | None:
        other = table.row(operator, version)
        return other.milliseconds * factor if other else None

    return allowed


def _share_of_product(share: float) -> Callable[[Table, Row], float]:
    return lambda table, row: row.flops / (share * table.bf16_tflops) / 1e9


def _share_of_copy(share: float) -> Callable[[Table, Row], float]:
    return lambda table, row: row.bytes / (share * table.copy_tb_s) / 1e9


FORWARD, BACKWARD, INDEXER, MILLION = (
    "sparse MLA forward",
    "sparse MLA backward",
    "indexer, 65536 keys",
    "indexer, 1048576 keys",
)
LOG_PROB = "linear log-prob"
GOALS = (
    Goal(FORWARD, "as chosen", "<= FlashMLA's kernel", _of_row(FORWARD, "FlashMLA kernel", 1.0)),
    Goal(
        FORWARD,
        "as chosen, ascending lists",
        "ascending lists: <= FlashMLA's kernel",
        _of_row(FORWARD, "FlashMLA kernel, ascending lists", 1.0),
    ),
    Goal(BACKWARD, "ours, staged (default)", "<= 5 ms", _milliseconds(5.0)),
    Goal(INDEXER, "ours FP8", "FP8 scores and top-k <= 1.5 ms", _milliseconds(1.5)),
    Goal(INDEXER, "ours bf16", "bf16 scores and top-k <= 3 ms", _milliseconds(3.0)),
    Goal(MILLION, "ours FP8", "FP8, >= 60 % of the rate per key at 65,536", _of_row(INDEXER, "ours FP8", 16 / 0.6)),
    Goal(MILLION, "ours bf16", "bf16, >= 60 % of the rate per key at 65,536", _of_row(INDEXER, "ours bf16", 16 / 0.6)),
    Goal(MILLION, "ours bf16", "memory: 1/16 of all scores, in GB", lambda table, row: 2048 * 2**20 * 4 / 16e9, memory=True),
    Goal("block FP8, 2.1 GB", "ours", ">= 70 % of the copy", _share_of_copy(0.7)),
    Goal("experts", "ours, forward + backward", ">= 75 % of the dense product", _share_of_product(0.75)),
    Goal(LOG_PROB, "ours, forward + backward", ">= 60 % of the dense product", _share_of_product(0.6)),
    Goal(LOG_PROB, "ours, forward + backward", "memory: < 1 GB beyond the gradients", lambda table, row: 1.0, memory=True),
)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=pathlib.Path)
    print("\n".join(Table.from_json(parser.parse_args(argv).file.read_text()).lines()))


if __name__ == "__main__":
    main()
