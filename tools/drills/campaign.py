"""One drill after another on one folder: whoever survives is drilled again, whoever ended is resumed by the next launch."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from tools.drills import exact
from tools.drills.draw import Drill
from tools.drills.faults import inflict
from tools.drills.judge import ENDS_WITHIN, Observed, judge
from tools.drills.launch import NUM_ROLLOUT, ROOT, Launch, newest
from tools.drills.scene import Seen, forks_of, label_of
from tools.drills.table import Row, read

_READY_SECONDS = 600.0
"""For a whole start on a busy machine; a survivor of a fault in it has all of it still before it."""
_PHASE_SECONDS = 60.0
_CLEAN_SECONDS = 60.0
"""From the end of a launcher to the end of what it had started: one that was killed leaves that to its keeper."""
_ROLLOUTS_FOR_A_DRILL = 8
_SURVIVED_ROLLOUTS = 2
_SURVIVED_SECONDS = 40.0
"""Two small rollouts may be over before the loss of Ray's control process is missed (slime.ray.cluster_watch)."""
_TRIES = 5
_WRITER_SECONDS = 10.0
"""From the beginning of a save, which is over earlier unless the machine is very busy."""


@dataclass(frozen=True)
class Placed:
    """Faults that have been inflicted."""

    victims: Sequence[tuple[str, int, str]]
    """Process, pid and label of an engine ("" for none) of each, the drill's first."""
    at: float
    hit: str
    """The phase of that moment."""
    mends: Sequence[Callable[[], None]]
    """What undoes each."""


class Campaign:
    """Keeps at most one launch alive between drills."""

    def __init__(self, base: Path, results: Path, *, stop_seconds: float, engines: bool = True, flags: Sequence[str] = ()):
        """engines: False for runs on recorded rollouts alone, which start none. flags: of every launch besides."""
        self._flags = flags
        self._base, self._results, self._stop_seconds, self._engines = base, results, stop_seconds, engines
        self._launch: Launch | None = None
        self._tolerant = False
        self._folder = base / ("drilled" if engines else "replayed")
        self._disturbed = False
        """A fault was inflicted on the launch that runs."""
        self._revision = subprocess.run(
            ["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True
        ).stdout.strip()

    def drill(self, drill: Drill) -> Row | None:
        """None where the fault could not be placed: the process was never there in that phase."""
        launch = self._launch_for(drill)
        placed = self._place(launch, drill)
        if placed is None:
            self.leave()
            return None
        deaf = self._stop_seconds if "stop" in (drill.fault, *(drill.beside or ())) else 0.0
        at, (victim, *others) = placed.at, placed.victims
        self._observe(launch, at + deaf, seconds=_READY_SECONDS if drill.phase == "start" else ENDS_WITHIN)
        for mend in placed.mends:
            mend()
        went_on = self._went_on(launch, at + deaf)
        ended = launch.process.poll() is not None
        ended_at = time.monotonic() if ended else None
        left = launch.left(seconds=_CLEAN_SECONDS) if ended else []
        seen = Observed(
            *victim, at, list(launch.lines), ended_at, launch.process.poll(), went_on, left, others[0] if others else None
        )
        verdict = judge(seen)
        row = Row(
            drill.seed, drill.number, drill.process, drill.fault, drill.phase, drill.tolerant, verdict.outcome, verdict.cause,
            verdict.seconds_to_cause, verdict.seconds_to_end, verdict.left, verdict.faults, None, None,
            self._revision, placed.hit, self._engines, shlex.join(self._flags), drill.second,
        )  # fmt: skip
        self._keep_transcript(launch, drill, at)
        if ended or verdict.outcome == "hung":
            self._close()
        self._write(row)  # after the others, which this launch resumed
        return row

    def _launch_for(self, drill: Drill) -> Launch:
        launch = self._launch
        if launch is not None and (drill.phase == "start" or drill.tolerant != self._tolerant or not self._has_room(launch)):
            self.leave()
        if self._launch is None:
            done = newest(self._folder)
            if done is not None and done + 1 > NUM_ROLLOUT - _ROLLOUTS_FOR_A_DRILL:
                self._finish(drill.tolerant)
            self._start(drill.tolerant)
        return self._launch

    @staticmethod
    def _has_room(launch: Launch) -> bool:
        done = launch.rollouts[-1][1] if launch.rollouts else 0
        return launch.process.poll() is None and done <= NUM_ROLLOUT - _ROLLOUTS_FOR_A_DRILL

    def _start(self, tolerant: bool) -> None:
        flags = ["--num-rollout", str(NUM_ROLLOUT), "--eval-interval", "1"]
        dumps = str(self._base / "dumps" / "{rollout_id}.pt")
        recorded = ["--rollout-function-path", "tools.drills.recorded.generate_rollout"]
        flags += recorded if self._engines else ["--load-debug-rollout-data", dumps]
        tolerance = ["--use-fault-tolerance"] if tolerant else []
        self._launch = Launch(self._base, self._folder, [*flags, *tolerance, *self._flags])
        self._tolerant, self._disturbed = tolerant, False

    def _finish(self, tolerant: bool) -> None:
        """Let the folder's run come to its end, and begin again."""
        self._start(tolerant)
        self._launch.until(lambda: False, seconds=_READY_SECONDS)
        if self._launch.process.poll() != 0:
            print("the undisturbed end of the folder's run did not come", file=sys.stderr)
        self.leave()
        shutil.rmtree(self._folder)

    def _place(self, launch: Launch, drill: Drill) -> Placed | None:
        if drill.phase == "start":
            if not launch.until(lambda: bool(launch.scene.of(drill.process)), seconds=_READY_SECONDS, every=0.3):
                return None
        else:
            before = len(launch.rollouts)
            if not launch.until(lambda: len(launch.rollouts) > before, seconds=_READY_SECONDS):
                return None
        # Found before the phase begins: a look at all processes of a busy machine lasts longer than a writer.
        ranks = launch.scene.of("trainer") if drill.process == "writer" else []
        for _ in range(1 if drill.phase == "start" else _TRIES):
            if drill.phase != "start" and not launch.wait_for_phase(drill.phase, seconds=_PHASE_SECONDS):
                return None
            if drill.process != "writer":  # it lives for some hundredths of a second
                time.sleep(drill.delay)
            wanted = [(drill.process, drill.fault), *([] if drill.beside is None else [drill.beside])]
            # Of two schedulers, ranks or actors of engines another one.
            found = [self._victim(launch, one, drill.which + place, ranks) for place, (one, _) in enumerate(wanted)]
            if None in found:
                continue
            victims = [
                (process, seen.pid, label_of(seen) if process in ("scheduler", "engine-actor") else "")
                for (process, _), seen in zip(wanted, found, strict=True)
            ]
            at, hit, mends = time.monotonic(), launch.phase, []
            try:
                for (_, fault), seen in zip(wanted[::-1], found[::-1], strict=True):  # the second must not go with the first
                    mends.append(inflict(fault, seen.pid, stop_seconds=self._stop_seconds))
                    self._disturbed = True
            except ProcessLookupError:
                for mend in mends:
                    mend()
                continue
            return Placed(victims, at, hit, mends)
        return None

    @staticmethod
    def _victim(launch: Launch, process: str, which: int, ranks: Sequence[Seen]) -> Seen | None:
        """ranks: the trainer's, where their writers are looked for."""
        if process != "writer":
            found = launch.scene.of(process)
        else:
            deadline = time.monotonic() + _WRITER_SECONDS
            while not (found := forks_of(ranks)) and launch.phase == "save" and time.monotonic() < deadline:
                pass
        return found[which % len(found)] if found else None

    def _observe(self, launch: Launch, since: float, *, seconds: float) -> None:
        """Until the launch has ended, or has gone on for two rollouts after the fault was over."""
        left = max(0.0, since + seconds - time.monotonic())
        last = since + _SURVIVED_SECONDS
        launch.until(lambda: time.monotonic() > last and launch.reported_since(since) >= _SURVIVED_ROLLOUTS, seconds=left)

    @staticmethod
    def _went_on(launch: Launch, since: float) -> bool:
        done = bool(launch.rollouts) and launch.rollouts[-1][1] == NUM_ROLLOUT
        return launch.reported_since(since) >= _SURVIVED_ROLLOUTS or (done and launch.process.poll() == 0)

    def leave(self) -> None:
        """End the launch that runs, if one does."""
        if self._launch is not None:
            self._launch.leave()
            self._close()

    def _close(self) -> None:
        """After a launch: what it shows of those drills that wait for it."""
        launch, self._launch = self._launch, None
        launch.kill_all()
        launch.close()
        folder = launch.ray_folder()
        if folder is not None:
            shutil.rmtree(folder, ignore_errors=True)
        self._settle(launch)

    def _settle(self, launch: Launch) -> None:
        """What the launch, now over, shows of earlier drills: that it resumed them, and that they changed no bit."""
        waiting = read(self._results) if self._results.exists() else []
        same = exact.is_exact(self._base, self._folder)
        resumed = None
        if launch.rollouts:
            resumed = launch.rollouts[0][1] == (0 if launch.before is None else launch.before + 1) + 1
        elif not self._disturbed and launch.process.poll() not in (0, -15, 143):
            resumed = False
        for row in waiting:
            if row.engines != self._engines:
                continue
            if row.outcome == "survived" and row.exact is None:
                self._write(replace(row, exact=same))
            elif row.outcome != "survived" and row.resumed is None and resumed is not None:
                self._write(replace(row, resumed=resumed, exact=same))

    def _write(self, row: Row) -> None:
        with self._results.open("a") as file:
            file.write(json.dumps(asdict(row)) + "\n")

    def _keep_transcript(self, launch: Launch, drill: Drill, at: float) -> None:
        folder = self._results.with_suffix("")
        folder.mkdir(exist_ok=True)
        kind = "-".join(["", *([] if self._engines else ["replayed"]), *re.findall(r"\w+", shlex.join(self._flags))])
        text = [f"{line.at - at:8.1f} {line.text}\n" for line in launch.lines]
        second = f"-{'-'.join(drill.beside)}" if drill.beside else ""
        (folder / f"{drill.seed}-{drill.number}{second}{kind}.log").write_text("".join(text))
