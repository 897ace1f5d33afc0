"""The stage planner on random models: every layer in one chunk, and the best list as even as its cuts allow."""

from __future__ import annotations

from itertools import pairwise

from hypothesis import given, settings
from hypothesis import strategies as st

from slime.config.stages import Cut, cut_layers
from slime.model.hf_config import HfConfig
from slime.rehearse.model.stages import balance, best_list, legal_first_last, stage_costs


@st.composite
def cuts(draw) -> Cut:
    """One that divides, by first/last and virtual stages or by a layout string."""
    pp_size, vpp_size = draw(st.integers(1, 6)), draw(st.integers(1, 3))
    if pp_size > 1 and draw(st.booleans()):
        sizes = draw(st.lists(st.integers(0, 5), min_size=pp_size * vpp_size, max_size=pp_size * vpp_size).filter(any))
        layout = "E" + "|".join(f"t*{size}" if size > 1 else "t" * size for size in sizes) + "L"
        return Cut(sum(sizes), pp_size, vpp_size, layout=layout)
    if pp_size == 1:
        return Cut(draw(st.integers(1, 40)), 1)
    first, last = (draw(st.none() | st.integers(1, 3)) for _ in range(2))
    named = [size * vpp_size for size in (first, last) if size is not None]
    middle = draw(st.integers(1, 5)) * vpp_size
    layers = sum(named) + middle * (pp_size - len(named))
    return Cut(layers, pp_size, vpp_size, first and first * vpp_size, last and last * vpp_size)


@settings(max_examples=300, deadline=None)
@given(cuts())
def test_a_token_passes_every_layer_once_in_order_and_ranks_in_turn(cut):
    chunks = cut_layers(cut)
    assert [layer for chunk in chunks for layer in chunk.layers] == list(range(cut.num_layers))
    places = [(chunk.vp_stage, chunk.pp_rank) for chunk in chunks]
    assert places == [(vp_stage, pp_rank) for vp_stage in range(cut.vpp_size) for pp_rank in range(cut.pp_size)]
    for size, held in ((cut.first, 0), (cut.last, cut.pp_size - 1)):
        if size is not None:
            assert sum(len(chunk.layers) for chunk in chunks if chunk.pp_rank == held) == size


@st.composite
def models(draw) -> tuple[HfConfig, list[float], float, int]:
    """(a sparse-attention model, cost of each layer, cost of the head, stages)."""
    layers = draw(st.integers(2, 24))
    values = dict(index_topk=4, index_topk_freq=draw(st.integers(1, 4)), index_skip_topk_offset=draw(st.integers(1, 3)))
    hf = HfConfig(dict(model_type="glm_moe_dsa", num_hidden_layers=layers, **values))
    costs = draw(st.lists(st.integers(1, 50), min_size=layers, max_size=layers))
    return hf, costs, draw(st.integers(0, 60)), draw(st.integers(2, 6))


@settings(max_examples=300, deadline=None)
@given(models(), st.booleans())
def test_the_best_list_is_within_one_piece_of_the_mean_and_no_worse_than_any_first_and_last(model, any_start):
    hf, costs, head, stages = model
    starts = [layer for layer in range(hf.num_layers) if any_start or layer == 0 or hf.runs_indexer(layer)]
    # What no cut can part: a computing layer and those that share its indices, the last of them with the head.
    pieces = [sum(costs[a:b]) for a, b in pairwise([*starts, hf.num_layers])]
    pieces[-1] += head
    best = best_list(hf, stages, costs, head, any_start=any_start)
    if len(pieces) < stages:
        assert best is None
        return
    assert len(best.sizes) == stages and sum(best.sizes) == hf.num_layers and min(best.sizes) > 0
    assert {sum(best.sizes[:stage]) for stage in range(stages)} <= set(starts)
    found = stage_costs(best.sizes, costs, head)
    assert sum(found) == sum(costs) + head and best.balance == balance(found)
    # Cutting at the first piece that passes each multiple of the mean leaves no stage beyond this.
    assert max(found) <= sum(found) / stages + max(pieces)
    for other in legal_first_last(hf, stages, costs, head, any_start=any_start):
        assert max(found) <= max(stage_costs(other.sizes, costs, head))
