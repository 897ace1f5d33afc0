"""Importance weights between trainer and engine, by token or by sequence, with a veto: settings come from mismatch.yaml."""

import torch

from slime.backends.megatron_utils.cp_utils import all_gather_with_cp, slice_log_prob_with_cp

BOUND = 20.0


def weights_of_sample(args, gap, mask):
    if args.mis_level == "sequence":
        gap = (gap * mask).sum().expand_as(gap)
    elif args.mis_level != "token":
        raise ValueError(args.mis_level)
    weight = gap.clamp(-BOUND, BOUND).exp()
    kept = mask.clone()
    if args.mis_mode == "truncate":
        weight = weight.clamp(0, args.mis_upper)
    else:
        kept = kept * ((weight >= args.mis_lower) & (weight <= args.mis_upper)).float()
    if args.mis_veto is not None and ((gap.exp() < args.mis_veto) & mask.bool()).any():
        kept = torch.zeros_like(kept)
    return weight, kept


def importance(args, *, pg_loss, train_log_probs, rollout_log_probs, loss_masks, total_lengths, response_lengths, **kwargs):
    lengths = list(zip(total_lengths, response_lengths, strict=True))
    train = [all_gather_with_cp(x, *two) for x, two in zip(train_log_probs, lengths, strict=True)]
    engine = [all_gather_with_cp(x, *two) for x, two in zip(rollout_log_probs, lengths, strict=True)]
    pairs = [weights_of_sample(args, a - b, m.float()) for a, b, m in zip(train, engine, loss_masks, strict=True)]
    weights = [slice_log_prob_with_cp(weight, *two) for (weight, _), two in zip(pairs, lengths, strict=True)]
    masks = [slice_log_prob_with_cp(kept, *two) for (_, kept), two in zip(pairs, lengths, strict=True)]
    weight = torch.cat(weights).detach()
    return pg_loss * weight, masks, {"mis_weight": weight, "mis_dropped": 1 - torch.cat(masks)}
