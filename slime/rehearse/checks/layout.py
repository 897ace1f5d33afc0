"""Does the training layout fit the ranks and the model? Stage starts, divisibility along each cut, padding, batches."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from slime.config import Config
from slime.config.stages import Cut, computing_layers, cut_layers, layout_string, wrong_starts
from slime.model.names import Entry
from slime.model.placement import Grid, fp8_block_is_local
from slime.rehearse.findings import Findings
from slime.rehearse.model.flops import ModelWork, model_work
from slime.rehearse.model.stages import Split, balance, best_list, legal_first_last, rank_costs
from slime.rehearse.reading import Reading


@dataclass(frozen=True)
class Balance:
    """How even the pipeline is, and what else would be legal."""

    length: int
    """Tokens of the sequence that costs are for."""
    sizes: tuple[int, ...]
    costs: tuple[float, ...]
    """Training FLOPs per token of each stage."""
    first_last: tuple[Split, ...]
    best: Split | None
    computing: tuple[int, ...]

    @property
    def value(self) -> float:
        return balance(self.costs) if self.sizes else 0.0


def check_layout(
    reading: Reading,
    findings: Findings,
    *,
    length: int,
    longest: int | None,
    accepts: Callable[[str], bool] = lambda words: True,
) -> Balance | None:
    """length: tokens of the sequence that FLOPs are for. longest: of the longest sample that the flags allow. accepts: whether
    the run passes with so many words behind its flags; splits that it does not pass with are not recommended.
    """
    grid = reading.grid
    if grid is not None:
        findings.ok(
            "layout",
            f"{grid.world} ranks = TP {grid.tp} x PP {grid.pp} x CP {grid.cp} x DP {grid.dp}",
            f"experts: TP {grid.etp} x EP {grid.ep} x PP {grid.pp} x DP {grid.edp}",
        )
    if reading.hf is None or reading.table is None:
        findings.unchecked("layout", "stage starts, cuts and balance: the model's config.json is not known here")
        return None
    if grid is not None:
        _check_cuts(reading, grid, findings)
        _check_batch(reading, grid, findings, longest)
    return _check_stages(reading, findings, length, accepts)


def _check_cuts(reading: Reading, grid: Grid, findings: Findings) -> None:
    """Every tensor that a cut goes through, once per kind."""
    hf, padded = reading.hf, reading.config.model.padded_vocab_size
    seen: dict[tuple, Entry] = {}
    for entry in reading.table.entries:
        if not entry.name.startswith("mtp."):
            seen.setdefault(
                (
                    entry.name.rpartition("layers.")[2].partition(".")[2] if "layers." in entry.name else entry.name,
                    entry.expert is not None,
                    entry.shape,
                ),
                entry,
            )
    broken, gathered, inside = [], set(), set()
    for entry in seen.values():
        size = grid.etp if entry.expert is not None else grid.tp
        problem = uneven(entry, size, padded_vocab=padded)
        if problem:
            broken.append(problem)
        elif is_fp8(entry) and reading.hf.get("quantization_config"):
            kind = short_name(entry)
            (inside if fp8_block_is_local(entry, size, _block(hf)) else gathered).add(kind)
    if broken:
        findings.violation(
            "layout",
            f"{len(broken)} kinds of tensors do not divide over {grid.tp} tensor-parallel ranks",
            "; ".join(sorted(set(broken))[:6]),
            "choose a --tensor-model-parallel-size that divides the named counts",
        )
    else:
        findings.ok("layout", f"heads, rows and vocabulary divide over TP {grid.tp}", f"{len(seen)} kinds of tensors")
    if hf.num_experts and hf.num_experts % grid.ep == 0:
        findings.ok(
            "layout", f"{hf.num_experts} experts divide over EP {grid.ep}", f"{hf.num_experts // grid.ep} per rank and layer"
        )
    if gathered:
        findings.ok(
            "layout",
            "FP8 blocks cross tensor-parallel shards of some tensors; these are gathered before they are quantised",
            ", ".join(sorted(gathered)),
        )
    elif inside:
        findings.ok(
            "layout", f"every FP8 block of {_block(hf)} x {_block(hf)} lies inside one shard", f"{len(inside)} kinds of tensors"
        )


def _block(hf) -> int:
    return int((hf.get("quantization_config") or {}).get("weight_block_size", [128])[0])


def short_name(entry: Entry) -> str:
    name = entry.name.rpartition("layers.")[2].partition(".")[2] or entry.name
    return name.rstrip("0123456789")


def is_fp8(entry: Entry) -> bool:
    return any(tensor.fp8 for tensor in entry.hf)


def uneven(entry: Entry, size: int, *, padded_vocab: int | None) -> str:
    """Why `size` ranks cannot share the entry; empty when they can."""
    if entry.split == "none":
        return ""
    whole = entry.shape[1 if entry.split == "columns" else 0]
    if entry.split == "vocab":
        whole = padded_vocab or whole
    units = entry.groups[0] if entry.groups else whole // 2 if entry.split == "gated_rows" else whole
    return (
        f"{short_name(entry)}: {units} {'query groups' if entry.groups else 'rows' if entry.split != 'columns' else 'columns'}"
        if units % size
        else ""
    )


def _check_batch(reading: Reading, grid: Grid, findings: Findings, longest: int | None) -> None:
    config, batch = reading.config, reading.config.batch
    prompts, samples = config.data.rollout_batch_size, config.data.n_samples_per_prompt
    if prompts and batch.global_batch_size and batch.global_batch_size > 0 and prompts * samples % batch.global_batch_size == 0:
        steps = prompts * samples // batch.global_batch_size
        findings.ok("batch", f"{prompts} prompts x {samples} samples = {batch.global_batch_size} x {steps} steps")
    if batch.max_tokens_per_gpu:
        capacity = batch.max_tokens_per_gpu * grid.cp
        if longest and longest > capacity:
            padded = padded_sample(config, grid, longest)
            findings.ok(
                "batch",
                f"a sample of {longest:,} tokens, prompt included, is longer than a micro-batch of {capacity:,}: it is trained "
                f"alone, padded to {padded:,} tokens",
                "its memory is phase 'longest sample'",
            )


def longest_sample(config, *, prompt: int) -> int | None:
    """Tokens of the longest sample that the flags allow, with its prompt; None when they set no bound.

    prompt: tokens of one where no flag bounds it.
    """
    rollout = config.rollout
    bounded = None
    if rollout.rollout_max_response_len:
        bounded = rollout.rollout_max_response_len + (rollout.rollout_max_prompt_len or prompt)
    limits = [limit for limit in (rollout.rollout_max_context_len, bounded) if limit]
    return min(limits) if limits else None


def padded_sample(config, grid: Grid, tokens: int) -> int:
    """Tokens of the stream that a sample trained alone becomes."""
    unit = config.batch.data_pad_size_multiplier * grid.tp * grid.cp
    return -(-tokens // unit) * unit


def _check_stages(reading: Reading, findings: Findings, length: int, accepts: Callable[[str], bool]) -> Balance | None:
    hf, pp = reading.hf, reading.config.parallel.pipeline_model_parallel_size
    work = model_work(reading.table, hf, length, mtp=reading.trains_mtp)
    recompute = reading.config.model.megatron.get("recompute_granularity") == "full"
    costs, head = layer_costs(work, recompute=recompute)
    options, best, sends = (), None, reading.config.parallel.dsa_send_indices
    vpp = reading.config.parallel.virtual_pipeline_model_parallel_size or 1
    if 1 < pp <= hf.num_layers:
        interleaved = 1 if reading.config.parallel.pipeline_model_parallel_layout else vpp  # a pair takes the layout's place
        pairs = legal_first_last(hf, pp, costs, head, any_start=sends, vpp=interleaved)[:TRIED_PAIRS]
        options = tuple(split for split in pairs if accepts(paste(reading.config, split, as_list=False)))[:MOST_PAIRS]
        best = _best(reading, costs, head, pp, vpp)
        best = best if best is not None and accepts(paste(reading.config, best, as_list=True)) else None
    if reading.chunks is None:
        if pp > 1:
            findings.unchecked(
                "layout", "stage starts: the layers do not divide over the stages", "", _advice(reading, options, best)
            )
        return Balance(length, (), (), options, best, tuple(computing_layers(hf)))
    shared_starts = wrong_starts(hf, reading.chunks)
    if sends and shared_starts:
        rows = reading.config.batch.max_tokens_per_gpu
        row_bytes = 4 * hf["index_topk"] // (1 if reading.grid is None else reading.grid.tp)
        findings.ok(
            "layout",
            "indices travel with the hidden states into stages on layers "
            + ", ".join(str(chunk.layers.start + 1) for chunk in shared_starts),
            f"{row_bytes * rows / 2**20:.1f} MiB per rank and micro-batch at each border"
            if rows
            else f"{row_bytes:,} bytes per row and rank at each border",
        )
    if shared_starts and not sends:
        findings.ok("layout", "legal splits of the layers are known", _advice(reading, options, best))
    per_rank = [0.0] * pp
    sizes = [0] * pp
    for chunk in reading.chunks:
        sizes[chunk.pp_rank] += len(chunk.layers)
        per_rank[chunk.pp_rank] += sum(costs[layer] for layer in chunk.layers)
    per_rank[reading.chunks[-1].pp_rank] += head
    result = Balance(length, tuple(sizes), tuple(per_rank), options, best, tuple(computing_layers(hf)))
    if (sends or not shared_starts) and pp > 1:
        starts = ", ".join(str(chunk.layers.start + 1) for chunk in reading.chunks)
        findings.ok(
            "layout",
            f"stages start on layers {starts}"
            + (", all of them computing layers" if hf.has_indexer and not shared_starts else ""),
            f"stage balance {result.value:.1%} by training FLOPs at {length:,} tokens",
        )
    return result


def layer_costs(work: ModelWork, *, recompute: bool) -> tuple[list[float], float]:
    """Training FLOPs per token of each layer, and of what follows them."""
    return [layer.training(recompute=recompute) for layer in work.layers], work.tail(recompute=recompute)


def _best(reading: Reading, costs: list[float], head: float, pp: int, vpp: int) -> Split | None:
    """The per-chunk list whose chunks are most even; with virtual stages its balance is that of the ranks."""
    best = best_list(reading.hf, pp * vpp, costs, head, any_start=reading.config.parallel.dsa_send_indices)
    if best is None or vpp == 1:
        return best
    chunks = cut_layers(Cut(reading.hf.num_layers, pp, layout=layout_string(best.sizes)))
    return Split(best.sizes, tuple(rank_costs(chunks, costs, head)))


PAIR = ("--decoder-first-pipeline-num-layers", "--decoder-last-pipeline-num-layers")
TRIED_PAIRS, MOST_PAIRS = 12, 5
VIRTUAL = ("--num-layers-per-virtual-pipeline-stage", "--num-virtual-stages-per-pipeline-rank")
LAYOUT = "--pipeline-model-parallel-layout"


def paste(config: Config, split: Split, *, as_list: bool) -> str:
    """Flags that make the split, to be put behind those of the launcher: what excludes them is taken back with `none`."""
    given = [flag for flag in (*PAIR, *VIRTUAL, LAYOUT) if getattr(config.parallel, flag[2:].replace("-", "_")) is not None]
    if not as_list:
        first, last = split.first_last
        return " ".join([*(f"{LAYOUT} none" for flag in given if flag == LAYOUT), f"{PAIR[0]} {first} {PAIR[1]} {last}"])
    unset = [f"{flag} none" for flag in given if flag != LAYOUT]
    return " ".join([*unset, f"{LAYOUT} {','.join(map(str, split.sizes))}"])


def _advice(reading: Reading, options: tuple[Split, ...], best: Split | None) -> str:
    if not options and best is None:
        return "no split over so many stages passes; change --pipeline-model-parallel-size"
    said = [f"{paste(reading.config, split, as_list=False)} ({split.balance:.0%})" for split in options[:4]]
    if best is not None:
        said.append(f"{paste(reading.config, best, as_list=True)} ({best.balance:.0%})")
    return "append, best balanced first: " + "; or ".join(said)
