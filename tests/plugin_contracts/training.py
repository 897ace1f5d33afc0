"""The trainer's functions: of two samples with 3 and 2 response tokens."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file

from slime.batch.pack import pack
from slime.ray.destinations import EngineTarget
from slime.training.columns import Columns, call_with_rollout_data
from slime.training.loss import total
from slime.types import RolloutBatch
from slime.weights.published import Header, PartWriter, publish_version
from slime.weights.serving import Receiver

LENGTHS = (3, 2)


def _batch(*, advantages: bool) -> tuple[Columns, RolloutBatch]:
    log_probs = {row: torch.full((length,), -0.5) for row, length in enumerate(LENGTHS)}
    ones = {row: torch.ones(length) for row, length in enumerate(LENGTHS)}
    columns = Columns(
        positions=(0, 1), old_log_probs=log_probs, kl={row: torch.zeros(length) for row, length in enumerate(LENGTHS)},
        advantages=ones if advantages else None, returns=ones if advantages else None,
    )  # fmt: skip
    batch = RolloutBatch(
        rollout_id=0, tokens=tuple(np.arange(1, 3 + length) for length in LENGTHS), response_lengths=np.array(LENGTHS),
        loss_masks=tuple(np.ones(length, np.float32) for length in LENGTHS), rewards=np.array([1.0, -1.0], np.float32),
        raw_rewards=np.array([1.0, 0.0], np.float32), groups=np.array([0, 0]), trajectories=np.array([0, 1]),
        sample_ids=np.array([0, 1]), truncated=np.zeros(2, bool),
        rollout_log_probs=tuple(np.full(length, -0.5, np.float32) for length in LENGTHS),
    )  # fmt: skip
    return columns, batch


def _leaves_one_advantage_a_token(function, stage, flag: str, *first: Any) -> None:
    columns, batch = _batch(advantages=bool(first))
    call_with_rollout_data(function, columns, batch, stage.args(), *first, flag=flag)
    for name in ("advantages", "returns"):
        for row, values in getattr(columns, name).items():
            assert values.shape == (LENGTHS[row],), (
                f"{name} of sample {row} have shape {tuple(values.shape)}; it has {LENGTHS[row]} tokens"
            )
            assert torch.isfinite(values).all(), f"{name} of sample {row} are {values.tolist()}"


def sets_an_advantage_and_a_return_for_every_token(function, stage) -> None:
    _leaves_one_advantage_a_token(function, stage, "--custom-advantage-function-path")


def leaves_an_advantage_and_a_return_for_every_token(function, stage) -> None:
    _leaves_one_advantage_a_token(function, stage, "--rollout-data-postprocess-path", 0)


def _weighed(function, stage, gaps: list[float]) -> tuple:
    train = torch.tensor(gaps)
    return function(
        args=stage.args(), pg_loss=torch.ones(5), train_log_probs=list(train.split(LENGTHS)),
        rollout_log_probs=list(torch.zeros(5).split(LENGTHS)), loss_masks=[torch.ones(length) for length in LENGTHS],
        total_lengths=[length + 2 for length in LENGTHS], response_lengths=list(LENGTHS),
    )  # fmt: skip


def gives_a_loss_masks_and_values_by_token(function, stage) -> None:
    answer = _weighed(function, stage, [0.0, 0.1, -0.1, 0.0, 0.2])
    assert isinstance(answer, tuple) and len(answer) == 3, (
        f"it gave a {type(answer).__name__}; expected (pg_loss, masks, values)"
    )
    loss, masks, values = answer
    assert tuple(loss.shape) == (5,), f"pg_loss has shape {tuple(loss.shape)}; there are 5 tokens"
    shapes = [tuple(mask.shape) for mask in masks]
    assert shapes == [(3,), (2,)], f"masks have shapes {shapes}; expected (3,) and (2,)"
    for name, value in values.items():
        assert tuple(value.shape) == (5,), f"{name} has shape {tuple(value.shape)}; reported values are by token"


def gives_no_nan_where_a_ratio_is_infinite(function, stage) -> None:
    """A token that the engine calls impossible."""
    loss, masks, _ = _weighed(function, stage, [0.0, 100.0, -100.0, 0.0, 0.0])
    kept = torch.cat(list(masks)) > 0
    assert torch.isfinite(loss[kept]).all(), f"the loss of trained tokens is {loss[kept].tolist()} where a log-ratio is 100"


def gives_a_function_that_sums(function, stage) -> None:
    reduce = function([5, 4], list(LENGTHS), [torch.ones(length) for length in LENGTHS], False)
    assert callable(reduce), f"it gave a {type(reduce).__name__}; expected a function of the token losses"
    one, two = reduce(torch.ones(5)), reduce(2 * torch.ones(5))
    assert one.dim() == 0, f"its sum has shape {tuple(one.shape)}; expected one number"
    assert torch.isclose(two, 2 * one), f"twice the loss gives {float(two):g}, and the loss {float(one):g}: it is no sum"


VOCABULARY = 8


def _lost(function, stage, positions: tuple[int, ...]) -> tuple[torch.Tensor, Any]:
    """(logits [1, t, v] of a whole vocabulary, the answer) for the samples at `positions`, each as heavy as the other."""
    columns, batch = _batch(advantages=True)
    weight = np.array([1 / length / len(LENGTHS) for length in LENGTHS])
    micro = pack(batch, positions, loss_weight=weight, denominator=len(LENGTHS), multiple=16, columns=columns.for_packing())
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(1, micro.tokens.shape[1], VOCABULARY, generator=generator).requires_grad_()
    return logits, function(stage.args(), micro, logits, partial(total, micro))


def gives_one_finite_loss_with_a_gradient_and_its_metrics(function, stage) -> None:
    logits, answer = _lost(function, stage, (0, 1))
    assert isinstance(answer, tuple) and len(answer) == 2, f"it gave a {type(answer).__name__}; expected (loss, metrics)"
    loss, metrics = answer
    assert isinstance(loss, torch.Tensor) and loss.dim() == 0, (
        f"the loss is {f'a tensor {tuple(loss.shape)}' if isinstance(loss, torch.Tensor) else repr(loss)}; expected a tensor "
        "with one number"
    )
    assert torch.isfinite(loss), f"the loss is {float(loss)}"
    assert loss.requires_grad, "the loss has no gradient: the optimizer would train nothing"
    loss.backward()
    assert logits.grad is not None and logits.grad.any(), "the gradient of all logits is 0: nothing would be trained"
    assert torch.isfinite(logits.grad).all(), "the gradient of some logits is not finite"
    assert isinstance(metrics, Mapping), f"its metrics are a {type(metrics).__name__}; expected a mapping"
    for name, value in metrics.items():
        number = torch.as_tensor(value)
        assert number.dim() == 0 and torch.isfinite(number), f"its metric {name} is {value!r}; expected one finite number"


def gives_a_loss_of_nothing_too(function, stage) -> None:
    """Of samples that do not divide over ranks, one has none and takes part all the same, with padding alone."""
    try:
        _, (loss, _) = _lost(function, stage, ())
    except Exception as error:
        raise AssertionError(f"a micro-batch without samples makes it raise {type(error).__name__}: {error}") from error
    assert torch.isfinite(loss) and float(loss.detach()) == 0, (
        f"the loss of a micro-batch without samples is {float(loss.detach()):g}; it counts like any other"
    )


def _published(folder: Path, *, encoding: str | None) -> Path:
    """Version 1 of a checkpoint with one tensor: whole, or the difference that there is where nothing has changed."""
    origin, partial = folder / "checkpoint", folder / ".part"
    origin.mkdir()
    partial.mkdir()
    save_file({"a": torch.ones(4)}, origin / "model.safetensors", {"format": "pt"})
    (origin / "config.json").write_text("{}")
    writer = PartWriter(folder, origin=origin, part=0, encoding=encoding, checksum="xxh3-128")
    written = writer.write(partial, [("a", torch.ones(4))], max_bytes=2**20)
    header = Header("contract", 1, 0 if encoding else None, encoding or "xor", "xxh3-128", {}, {})
    return publish_version(folder, [written], partial, header, origin=origin, mtp_kept=True)


def leaves_a_version_as_it_was_written(function, stage) -> None:
    """Whole, and as a difference without a single tensor; engines are told by name, address and the run's token."""
    engines = (EngineTarget("default-regular-0", stage.router.url, "", Receiver(0, (0,), tp=1)),)
    for encoding in (None, "xor"):
        with TemporaryDirectory() as name:
            folder = _published(Path(name), encoding=encoding)
            before = {file.name: file.read_bytes() for file in sorted(folder.iterdir())}
            function(stage.args(), str(folder), engines)
            held = {file.name: file.read_bytes() for file in sorted(folder.iterdir())} if folder.is_dir() else {}
            changed = [file for file in before if held.get(file) != before[file]]
            assert not changed, f"it changed {', '.join(changed)} of {folder.name}, which the engines load after it"


PROMISES = {
    "--custom-advantage-function-path": (sets_an_advantage_and_a_return_for_every_token,),
    "--rollout-data-postprocess-path": (leaves_an_advantage_and_a_return_for_every_token,),
    "--custom-tis-function-path": (gives_a_loss_masks_and_values_by_token, gives_no_nan_where_a_ratio_is_infinite),
    "--custom-pg-loss-reducer-function-path": (gives_a_function_that_sums,),
    "--custom-loss-function-path": (gives_one_finite_loss_with_a_gradient_and_its_metrics, gives_a_loss_of_nothing_too),
    "--custom-megatron-init-path": (),
    "--custom-megatron-before-log-prob-hook-path": (),
    "--custom-megatron-before-train-step-hook-path": (),
    "--custom-model-provider-path": (),
    "--custom-update-weight-post-write-path": (leaves_a_version_as_it_was_written,),
}
