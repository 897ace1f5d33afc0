import torch
from ranks import run_ranks

from slime.weights.buckets import fill_buckets, unpack_bucket
from slime.weights.stream import Source, broadcast_buckets


def _tensors(source: int, count: int) -> list[list[tuple[str, torch.Tensor]]]:
    generator = torch.Generator().manual_seed(source)
    return [[(f"s{source}.{i}", torch.randn(5 + i, generator=generator))] for i in range(count)]


def _receive(rank: int) -> dict[str, list[float]]:
    # Source 0 has three buckets and a helper rank, source 2 has none, source 1 has one.
    makers = {0: (0, 2), 2: (2,), 1: (1,)}
    counts = {0: 3, 2: 0, 1: 1}
    sources = [
        Source(source, fill_buckets(iter(_tensors(source, counts[source])), limit_bytes=8) if rank in members else None)
        for source, members in makers.items()
    ]
    seen = {}
    for bucket in broadcast_buckets(sources, rank=rank, device=torch.device("cpu")):
        seen.update((name, tensor.tolist()) for name, tensor in unpack_bucket(bucket))
    return seen


def test_every_rank_sees_every_bucket_of_every_source_in_the_same_order():
    expected = {name: tensor.tolist() for source, n in ((0, 3), (1, 1)) for [(name, tensor)] in _tensors(source, n)}
    for seen in run_ranks(3, _receive):
        assert seen == expected and list(seen) == list(expected)
