"""From log-probabilities to the one number of a micro-batch, and the values reported beside it.

Every value is sum(loss_weight * loss_mask * token value) over the micro-batch's response tokens: weights come from the
StepPlan, so adding over micro-batches and ranks gives the step's value with no division anywhere.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from slime.algorithms import policy_loss
from slime.algorithms.advantages import reverse_kl
from slime.algorithms.importance import bounded_log_ratio
from slime.algorithms.kl import approx_kl
from slime.algorithms.sft import nll
from slime.model.build import own_vocabulary, padded_vocab_size
from slime.model.head import HeadInput
from slime.model.hf_config import read_hf_config
from slime.parallel import Ranks
from slime.training.forward import Output, draft_log_probs, response_log_probs
from slime.training.hooks import load_hook
from slime.training.importance_functions import importance_function
from slime.types.micro_batch import MicroBatch

if TYPE_CHECKING:
    from slime.config import Config


@dataclass(frozen=True)
class Objective:
    """What a step minimises; call it with a micro-batch and the last chunk's output."""

    config: Config
    ranks: Ranks
    vocabulary: range
    """Global token ids of this rank's rows of the output layer, padding excluded."""
    temperature: float
    custom_loss: Callable[..., Any] | None
    custom_tis: Callable[..., Any] | None
    """In the place of importance_function."""
    custom_reducer: Callable[..., Any] | None

    @staticmethod
    def from_config(config: Config, ranks: Ranks) -> Objective:
        """Loads the user's functions now, so that a wrong path ends the run at its start."""
        rules = config.algorithm
        custom = load_hook("--custom-loss-function-path", rules.custom_loss_function_path)
        if rules.loss_type == "custom_loss" and custom is None:
            raise ValueError("--loss-type custom_loss needs --custom-loss-function-path")
        hf = read_hf_config(config.checkpoint.hf_checkpoint)
        return Objective(
            config=config,
            ranks=ranks,
            vocabulary=own_vocabulary(padded_vocab_size(config, hf), hf, ranks),
            # Supervised data was not sampled, so there is no sampling temperature to undo.
            temperature=1.0 if rules.loss_type == "sft_loss" else config.rollout.rollout_temperature,
            custom_loss=custom,
            custom_tis=load_hook("--custom-tis-function-path", rules.custom_tis_function_path),
            custom_reducer=load_hook("--custom-pg-loss-reducer-function-path", rules.custom_pg_loss_reducer_function_path),
        )

    def __call__(self, micro: MicroBatch, output: Output, draft: HeadInput | None = None) -> tuple[Tensor, dict[str, Tensor]]:
        """draft: of a multi-token-prediction layer in training; its loss is added, and reported as mtp_loss."""
        if self.config.batch.recompute_loss_function:
            return torch.utils.checkpoint.checkpoint(self._with_draft, micro, output, draft, use_reentrant=False)
        return self._with_draft(micro, output, draft)

    def _with_draft(self, micro: MicroBatch, output: Output, draft: HeadInput | None) -> tuple[Tensor, dict[str, Tensor]]:
        """Plain cross entropy of the response tokens two rows on, weighted and masked like the policy's own."""
        loss, values = self._value(micro, output)
        if draft is None:
            return loss, values
        chunk_size = self.config.batch.log_probs_chunk_size
        mtp_loss = total(
            micro, nll(draft_log_probs(micro, draft, self.ranks, vocabulary=self.vocabulary, chunk_size=chunk_size))
        )
        return loss + self.config.model.mtp_loss_scaling_factor * mtp_loss, values | reported({"mtp_loss": mtp_loss})

    def log_probs(self, micro: MicroBatch, output: Output) -> tuple[Tensor, Tensor]:
        """(log-probs [r], entropy [r]) of the response tokens at the objective's temperature."""
        return response_log_probs(
            micro,
            output,
            self.ranks,
            vocabulary=self.vocabulary,
            temperature=self.temperature,
            chunk_size=self.config.batch.log_probs_chunk_size,
        )

    def _value(self, micro: MicroBatch, output: Output) -> tuple[Tensor, dict[str, Tensor]]:
        if self.config.algorithm.loss_type == "custom_loss":
            logits = output.logits() if isinstance(output, HeadInput) else output
            loss, values = self.custom_loss(self.config.args, micro, logits, lambda token_values: total(micro, token_values))
            # A loss that does not touch the logits would leave this rank out of the backward collectives.
            loss = loss + 0.0 * logits.float().sum()
            return loss, reported({"loss": loss, **{name: torch.as_tensor(value) for name, value in values.items()}})
        log_probs, entropy = self.log_probs(micro, output)
        if self.config.algorithm.loss_type == "sft_loss":
            loss = total(micro, nll(log_probs))
            return loss, reported({"loss": loss, "entropy_loss": total(micro, entropy.detach())})
        return self._policy(micro, log_probs, entropy)

    def _policy(self, micro: MicroBatch, log_probs: Tensor, entropy: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        rules = self.config.algorithm
        assert micro.advantages is not None, "advantages are made before a policy step"
        trainers = log_probs.detach() if micro.old_log_probs is None else micro.old_log_probs
        old = trainers
        if rules.use_rollout_logprobs:
            if micro.rollout_log_probs is None:
                raise ValueError("--use-rollout-logprobs needs the engine's log-probs, but this rollout has none")
            # An engine may say -inf of a token that is not trained; its ratio, inf, would make every gradient nan.
            old = torch.where(micro.loss_mask > 0, micro.rollout_log_probs, trainers)
        token_loss, clipped, divergence = self._policy_gradient(micro, log_probs, old)
        values: dict[str, Tensor] = {}
        if rules.use_opsm:
            keep = policy_loss.off_policy_sequence_mask(
                bounded_log_ratio(log_probs - old),
                micro.advantages,
                micro.loss_mask,
                micro.segments,
                micro.num_samples,
                delta=rules.opsm_delta,
            )
            token_loss = token_loss * keep
            values["opsm_clipfrac"] = total(micro, 1 - keep)
        if rules.use_tis or rules.use_rs or rules.get_mismatch_metrics:
            weighted, narrowed, shown = self._importance(micro, token_loss, trainers)
            # Over all trained tokens: a share of dropped tokens among those that were kept would be 0.
            values |= {name: total(micro, value) for name, value in shown.items()}
            values["ois"] = total(micro, bounded_log_ratio(log_probs.detach() - old).exp())
            if rules.use_tis or rules.use_rs:
                # A token that the function drops is dropped from every term; the denominators stay the plan's.
                token_loss, micro = weighted, narrowed
        if micro.rollout_log_probs is not None:
            # With the engine's log-probs as the old ones the gap is between them and what the trainer computes now.
            mine = log_probs.detach() if rules.use_rollout_logprobs else old
            values["train_rollout_logprob_abs_diff"] = total(micro, (mine - micro.rollout_log_probs).abs())
        if rules.use_opd and micro.teacher_log_probs is not None:
            values["opd_reverse_kl"] = total(micro, reverse_kl(log_probs.detach(), micro.teacher_log_probs))
        values |= {"ppo_kl": total(micro, divergence), "pg_clipfrac": total(micro, clipped)}
        pg_loss = self._reduced(micro, token_loss)
        entropy_loss = total(micro, entropy)
        loss = pg_loss
        if rules.entropy_coef:
            loss = loss - rules.entropy_coef * entropy_loss
        values |= {"pg_loss": pg_loss, "entropy_loss": entropy_loss}
        if rules.use_kl_loss:
            assert micro.ref_log_probs is not None, "reference log-probs are computed before a step with --use-kl-loss"
            ratio = bounded_log_ratio(log_probs - old) if rules.use_unbiased_kl else None
            kl_loss = total(micro, approx_kl(log_probs, micro.ref_log_probs, rules.kl_loss_type, importance_log_ratio=ratio))
            loss = loss + rules.kl_loss_coef * kl_loss
            values["kl_loss"] = kl_loss
        return loss, reported({"loss": loss, **values})

    def _policy_gradient(self, micro: MicroBatch, log_probs: Tensor, old: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """-> (token loss, clipped 0/1, old - new), each [r]."""
        rules = self.config.algorithm
        log_ratio = bounded_log_ratio(log_probs - old)
        high = rules.eps_clip if rules.eps_clip_high is None else rules.eps_clip_high
        if rules.advantage_estimator == "gspo":
            log_ratio = policy_loss.sequence_log_ratio(log_ratio, micro.loss_mask, micro.segments, micro.num_samples)
        if rules.advantage_estimator == "cispo":
            loss, clipped = policy_loss.cispo_loss(
                log_ratio, log_probs, micro.advantages, eps_clip=rules.eps_clip, eps_clip_high=high
            )
        else:
            loss, clipped = policy_loss.clipped_loss(
                log_ratio, micro.advantages, eps_clip=rules.eps_clip, eps_clip_high=high, eps_clip_c=rules.eps_clip_c
            )
        return loss, clipped, -log_ratio.detach()

    def _importance(
        self, micro: MicroBatch, token_loss: Tensor, trainers: Tensor
    ) -> tuple[Tensor, MicroBatch, dict[str, Tensor]]:
        """(the weighted token loss, the micro-batch with the narrowed mask, per-token values to report).

        trainers: the trainer's log-probs at rollout time.
        """
        engines = micro.rollout_log_probs
        if engines is None:
            raise ValueError(
                "--use-tis and --use-rs need the engine's log-probs, but this rollout has none; keep return_logprob on"
            )
        # An engine may say -inf of a token that is not trained: its weight, inf, would make every gradient nan.
        engines = torch.where((micro.loss_mask > 0) | engines.isfinite(), engines, trainers)
        # A rank without a sample asks of an empty one: functions join their lists, and its values need the others' names.
        lengths = torch.bincount(micro.segments, minlength=micro.num_samples).tolist() or [0]
        function = self.custom_tis or partial(importance_function, mean_weight=micro.mean_importance_weight)
        weighted, masks, shown = function(
            args=self.config.args,
            pg_loss=token_loss,
            train_log_probs=list(trainers.split(lengths)),
            rollout_log_probs=list(engines.split(lengths)),
            loss_masks=list(micro.loss_mask.split(lengths)),
            total_lengths=list(micro.layout.lengths) or [0],
            response_lengths=lengths,
        )
        kept = torch.cat(list(masks))
        if kept.shape != micro.loss_mask.shape or weighted.shape != token_loss.shape:
            raise ValueError(
                f"--custom-tis-function-path {self.config.algorithm.custom_tis_function_path} gave a loss of "
                f"{tuple(weighted.shape)} and masks of {tuple(kept.shape)} tokens, the micro-batch has "
                f"{tuple(token_loss.shape)}; it returns the loss of all tokens and one mask per sample"
            )
        # It may drop trained tokens, never train others.
        kept = torch.where(micro.loss_mask > 0, kept.to(micro.loss_mask), torch.zeros_like(micro.loss_mask))
        return weighted, replace(micro, loss_mask=kept), shown

    def _reduced(self, micro: MicroBatch, token_loss: Tensor) -> Tensor:
        """The policy loss of a micro-batch: weighted as every value, or as Dr. GRPO or the user's reducer say."""
        if self.custom_reducer is not None:
            return self._custom_reduction(micro, token_loss)
        if (length := self.config.algorithm.pg_loss_length) is not None:
            # Of the mean over trajectories the trajectories stay, their lengths go (arXiv 2503.20783).
            return (_kept(micro, token_loss) * micro.loss_mask).sum() / (micro.denominator * length)
        return total(micro, token_loss)

    def _custom_reduction(self, micro: MicroBatch, token_loss: Tensor) -> Tensor:
        """slime's signature: the user's reducer sums over the samples it is given; the step's denominator is ours."""
        lengths = torch.bincount(micro.segments, minlength=micro.num_samples).tolist()
        if not lengths:
            return total(micro, token_loss)
        masks = list(micro.loss_mask.split(lengths))
        reduce = self.custom_reducer(list(micro.layout.lengths), lengths, masks, self.config.algorithm.calculate_per_token_loss)
        return reduce(_kept(micro, token_loss)) / micro.denominator


def total(micro: MicroBatch, token_values: Tensor) -> Tensor:
    """sum(loss_weight * loss_mask * token_values [r]); 0, still connected to the graph, where there is no token."""
    return (_kept(micro, token_values) * (micro.loss_weight * micro.loss_mask)).sum()


def _kept(micro: MicroBatch, token_values: Tensor) -> Tensor:
    """0 in the place of masked tokens: they may hold inf or nan (an engine log-prob of -inf, say), and 0 * nan is nan."""
    return torch.where(micro.loss_mask > 0, token_values, torch.zeros_like(token_values))


def reported(values: dict[str, Tensor]) -> dict[str, Tensor]:
    """Constants in float64, to be added up over micro-batches and ranks."""
    return {name: value.detach().double() for name, value in values.items()}
