"""How many rollouts, and how long prompts and responses may be."""

from __future__ import annotations

from typing import TYPE_CHECKING

from slime.config.facts import MOST_LINES
from slime.config.prompt_files import split_slice

if TYPE_CHECKING:
    from slime.config.rules.book import Values


def what_is_left(v: Values) -> None:
    """A checkpoint that is beyond what is asked for, and epochs that hold no batch: said before anything starts."""
    step = v.facts.load_step if v["ckpt_step"] is None else v["ckpt_step"]
    continues = v.facts.load == "megatron" and not v["finetune"] and v["start_rollout_id"] is None
    if continues and step is not None and not v["debug_rollout_only"]:
        v.derive("rollouts_done", step + 1, f"the checkpoint in --load {v['load']} was saved after so many")
    first, wanted = v["start_rollout_id"] or v["rollouts_done"], v["num_rollout"]
    said = f"--num-rollout {wanted}"
    prompts, batch = v.facts.num_prompts, v["rollout_batch_size"]
    if wanted is None and v["num_epoch"] and v["rollout_global_dataset"] and prompts is not None and prompts < MOST_LINES:
        wanted, said = (
            v["num_epoch"] * (prompts // batch),
            f"--num-epoch {v['num_epoch']}, at most {prompts // batch} rollouts each,",
        )
        v.require(
            wanted,
            f"--num-epoch {v['num_epoch']} is no rollout: --prompt-data {v['prompt_data']} has {prompts} prompts and "
            f"--rollout-batch-size takes {batch} at once; lower it, or give --num-rollout",
        )
    v.require(
        not wanted or wanted >= first,
        f"{said} is below the {first} rollouts that are done"
        + (f" (the checkpoint in --load {v['load']})" if v["rollouts_done"] else " (--start-rollout-id)")
        + f"; give --num-rollout {2 * first} or so for more, another --load and --save, or --num-rollout 0 to evaluate alone",
    )


def lengths(v: Values) -> None:
    """How many rollouts, and how long prompts may be."""
    if v["num_rollout"] is None:
        v.require(v["num_epoch"] is not None, "give --num-rollout or --num-epoch")
        v.require(
            v["num_epoch"] is None or v["rollout_global_dataset"],
            "--num-epoch needs a data set to count; with --disable-rollout-global-dataset give --num-rollout",
        )
        if v["num_epoch"] is not None:
            v.notes.append(
                f"num_rollout is known once the prompts are read: {v['num_epoch']} epochs x "
                f"(prompts // {v['rollout_batch_size']})"
            )
    elif v["num_epoch"] is not None:
        v.notes.append(f"--num-epoch {v['num_epoch']} is not used, because --num-rollout is given")
    needs_prompts = v["rollout_global_dataset"] and v["num_rollout"] != 0 and v["load_debug_rollout_data"] is None
    v.require(
        not needs_prompts or v["prompt_data"],
        "--prompt-data is needed (or --disable-rollout-global-dataset with a rollout function of your own)",
    )
    takes_rows(v, "--prompt-data", v["prompt_data"])
    _prompt_file(v)
    context = v["rollout_max_context_len"]
    if context is not None:
        if v["rollout_max_prompt_len"] is None:
            v.derive("rollout_max_prompt_len", context - 1, "--rollout-max-context-len leaves one token for the response")
        v.require(
            v["rollout_max_prompt_len"] <= context - 1,
            f"--rollout-max-prompt-len {v['rollout_max_prompt_len']} must be below --rollout-max-context-len {context}",
        )
        if v["eval_max_context_len"] is None:
            v.derive("eval_max_context_len", context, "it defaults to --rollout-max-context-len")


def takes_rows(v: Values, where: str, path: str | None) -> None:
    """A slice that is empty whatever the file holds."""
    part = split_slice(path)[1] if path else slice(None)
    same_end = None not in (part.start, part.stop) and (part.start < 0) == (part.stop < 0)
    v.require(
        part.stop != 0 and not (same_end and part.start >= part.stop),
        f"{where} {path}: the slice takes no row; write @[start:end] with start below end",
    )


def _prompt_file(v: Values) -> None:
    """The file can be read, where the project's own data source reads it."""
    own = v["data_source_path"].startswith("slime.rollout.data_source.")
    if v.door != "train" or not v["prompt_data"] or not own:
        return
    if not v["rollout_global_dataset"] or v["load_debug_rollout_data"] is not None:
        return
    problem = v.facts.prompt_file_problem(v["prompt_data"])
    v.require(not problem, f"--prompt-data {problem}")
