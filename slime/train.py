"""The loop: read this first. One iteration:

    generate -> hand the devices to the trainer -> train -> save -> sync weights -> hand them back -> next

With a --schedule that runs ahead `generate` hands over what was generated beside the training before (slime.ray.in_flight, or
slime.rollout.stock where generation goes on all the time), and begins what comes next.

Command line:

    python3 -m slime.train FLAGS          the flags of scripts/run-*.sh; `python3 -m slime.config --help` lists them
"""

from __future__ import annotations

import logging
import os
import sys
import time

from slime.config import Config, load
from slime.engine.plan import plan_engines
from slime.observability.log import run_folder, setup_logging
from slime.observability.owner import owned

logger = logging.getLogger("slime.train")


def main(argv: list[str]) -> int:
    config = load(argv, env=os.environ)
    try:
        plan_engines(config)  # the engines' options have the names and types of the SGLang that is installed
    except ValueError as error:
        sys.stderr.write(f"slime: {error}\n")
        return 2
    log_file = setup_logging("driver", folder=run_folder(config.checkpoint.save))
    for note in config.notes:
        logger.debug("config: %s", note)
    if log_file is not None:
        logger.info("%d values follow from the flags; each with its reason in %s", len(config.notes), log_file)
    if nothing_to_train := config.nothing_to_train():
        logger.info("%s", nothing_to_train)
        return 0
    from slime.ray.environment import prepare
    from slime.ray.leaving import Leaving

    prepare()
    leaving = Leaving(config.upkeep)
    leaving.listen()
    try:
        # Only now the heavy imports: a mistyped flag is answered in a fraction of a second, and a signal of now is heard.
        from slime.ray.machines import lost_machines_named
        from slime.ray.run import Run

        with owned(config.checkpoint.save if config.trains else None, what="--save"), Run(config, leaving) as run:
            leaving.listen()  # Ray has put a handler of its own there, which prints a stack and ends the process at once
            try:
                with lost_machines_named(run.where):
                    train(run, config)
            except KeyboardInterrupt:
                if leaving.signal is None:
                    raise
                run.save_trained()
            run.finish_save()
            run.farewell()
    except KeyboardInterrupt:
        if leaving.signal is None:
            raise
        logger.info("left before there was anything to save")
    except (RuntimeError, ValueError, OSError) as error:
        logger.error("the run stopped: %s", error)
        return 1
    return 0


def train(run, config: Config) -> None:
    """All rollouts from where the checkpoint left off; evaluates, saves, reports and leaves as the flags say."""
    run.start()
    run.evaluate_if_due(run.start_rollout_id - 1, when="before training" if run.num_rollout else "alone")
    for rollout_id in range(run.start_rollout_id, run.num_rollout):
        started = time.monotonic()
        rollout = run.generate(rollout_id)
        if config.debug.debug_rollout_only:
            run.report(rollout, seconds=time.monotonic() - started)
            if run.leaves_after(rollout_id):
                break
            continue
        with run.lease.training():
            training = run.train(rollout)
            run.save_if_due(rollout_id)
        if run.leaves:
            run.report(rollout, training, seconds=time.monotonic() - started)
            break
        sync = run.sync_if_due(rollout_id)
        run.report(rollout, training, sync, seconds=time.monotonic() - started)
        run.evaluate_if_due(rollout_id, when="after training" if rollout_id + 1 == run.num_rollout else "during training")
    run.finish_evaluation()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
