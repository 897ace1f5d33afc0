"""The critic of PPO: a model of the policy's shape with a value head, on the same ranks, with an optimizer of its own.

Its learning rate, weight decay, folders ... are those of the role's configuration (slime.config.roles).
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import Module

from slime.algorithms.policy_loss import clipped_value_loss
from slime.device import Device
from slime.model.head import HeadInput
from slime.model.local import VALUE_HEAD, local_tensors
from slime.parallel import Ranks
from slime.training import checkpoint, state
from slime.training.columns import Column, Columns, split_column
from slime.training.forward import Output, response_values
from slime.training.loss import reported, total
from slime.training.trainer import Trainer
from slime.types import RolloutBatch, StepPlan
from slime.types.micro_batch import MicroBatch

if TYPE_CHECKING:
    from slime.config import Config

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class ValueObjective:
    """PPO's value loss of a micro-batch, weighted and masked like every token value."""

    ranks: Ranks
    value_clip: float

    def values(self, micro: MicroBatch, output: Output) -> Tensor:
        """[r]: what is expected before each response token. The sampling temperature has no part in it."""
        return response_values(micro, output, self.ranks)

    def __call__(self, micro: MicroBatch, output: Output, draft: HeadInput | None = None) -> tuple[Tensor, dict[str, Tensor]]:
        assert micro.values is not None and micro.returns is not None, "values and returns are made before a step"
        loss, clipped = clipped_value_loss(self.values(micro, output), micro.values, micro.returns, value_clip=self.value_clip)
        value_loss = total(micro, loss)
        return value_loss, reported({"loss": value_loss, "value_loss": value_loss, "value_clipfrac": total(micro, clipped)})


class Critic:
    """All methods are called by all ranks together, as the trainer's."""

    def __init__(self, config: Config, device: Device, ranks: Ranks, model: Sequence[Module]) -> None:
        """config: of the role. model: chunks with a value head, as built."""
        objective = ValueObjective(ranks, config.algorithm.value_clip)
        self.trainer = Trainer(config, device, ranks, model, objective=objective)

    def values(self, batch: RolloutBatch, steps: Sequence[StepPlan]) -> Column:
        """Per response token of this data-parallel rank's samples; {} before the last stage."""

        def read(micro: MicroBatch, output: Output) -> Column:
            return split_column(micro, self.trainer.objective.values(micro, output))

        found: Column = {}
        for values in self.trainer.evaluate(batch, steps, read):
            found |= values
        return found

    def learn(self, batch: RolloutBatch, steps: Sequence[StepPlan], columns: Columns) -> list[dict[str, float]]:
        """Every step of the rollout: train/critic-* of each."""
        carried = columns.for_critic() if self.trainer.ranks.is_last_stage else {}
        told = []
        for plan in steps:
            metrics = self.trainer.step(batch, plan, self.trainer.pack(batch, plan, carried))
            told.append({f"train/critic-{name}": metrics[name] for name in sorted(metrics.keys() - {"loss", "step"})})
        return told

    # --- state ---

    def load(self, actor: Trainer, continued: int | None) -> None:
        """continued: the rollout after which the actor's checkpoint was saved that this run goes on from; the critic's is of
        the same. Otherwise weights from --critic-load, or the actor's own with a head that expects nothing."""
        trainer, paths = self.trainer, self.trainer.config.checkpoint
        if continued is not None:
            state.resume(trainer, self._of_rollout(continued))
        elif paths.load and (found := checkpoint.find_weights(Path(paths.load), paths.ckpt_step, checkpoint.CRITIC)):
            state.load_weights(trainer, *found)
        else:
            copy_body(actor.model, trainer.model, trainer.ranks)
        if continued is None and trainer.optimizer is not None:
            trainer.optimizer.reload_model_params()

    def _of_rollout(self, continued: int) -> Path:
        paths = self.trainer.config.checkpoint
        for place in dict.fromkeys(place for place in (paths.load, paths.save) if place):
            folder = checkpoint.checkpoint_folder(place, str(continued))
            if folder.is_dir():
                checkpoint.verify(folder, self.trainer.ranks, checkpoint.CRITIC)
                return folder
        raise ValueError(
            f"the run continues after rollout {continued + 1}, but no critic of that rollout is in --critic-load {paths.load} "
            f"or --critic-save {paths.save}; name its folder, or begin with a new critic by --finetune"
        )

    def save(self, rollout_id: int) -> None:
        state.save(self.trainer, rollout_id, None)

    def finish_save(self, *, wait: bool = True) -> None:
        state.finish_save(self.trainer, wait=wait)


@torch.no_grad()
def copy_body(policy: Sequence[Module], critic: Sequence[Module], ranks: Ranks) -> None:
    """Everything but the heads, bit for bit: both models lie on the ranks alike."""
    source = {local.name: local.tensor for local in local_tensors(list(policy), ranks, experts=False)}
    for local in local_tensors(list(critic), ranks, experts=False):
        if local.name != VALUE_HEAD:
            local.tensor.copy_(source[local.name])
