"""The version table and the typing of --sglang-* options."""

from __future__ import annotations

import json

import pytest

from slime.engine.versions import (
    TABLE,
    TABLES,
    Option,
    OptionTable,
    capabilities,
    installed_options,
    installed_version,
    option_table,
    translate,
    typed_argv,
)

NEWEST = TABLE[-1]


def test_a_version_takes_the_column_at_or_below_it():
    assert capabilities("0.5.16").version == "0.5.15.post1"
    assert capabilities("0.5.17").version == "0.5.17"
    assert capabilities("0.5.23.post2").version == "0.5.23"
    with pytest.raises(ValueError, match="sglang 0.5.12.post1 is installed; .* from 0.5.15.post1 on"):
        capabilities("0.5.12.post1")


def test_every_column_has_its_option_table_and_every_successor_is_in_it():
    for column in TABLE:
        table = option_table(column.version)
        assert table.version == column.version
        for successor in column.renames.values():
            if successor is not None:
                table.find(successor)
        if column.attention_dp_option:
            table.find(column.attention_dp_option)


def test_old_names_are_translated_and_every_change_is_noted():
    old = {"nsa_prefill_backend": "flashmla_sparse", "cuda-graph-max-bs": 12, "attention_backend": "nsa", "page_size": 64}
    new = translate(old | {"prefill_round_robin_balance": True}, NEWEST)
    assert new.settings == {
        "dsa_prefill_backend": "flashmla_sparse",
        "cuda_graph_max_bs_decode": 12,
        "attention_backend": "dsa",
        "page_size": 64,
    }
    assert len(new.notes) == 4 and "prefill_round_robin_balance is dropped, it does nothing there" in " ".join(new.notes)
    with pytest.raises(ValueError, match="cuda_graph_max_bs is 12 and its successor cuda_graph_max_bs_decode is 8"):
        translate({"cuda_graph_max_bs": 12, "cuda_graph_max_bs_decode": 8}, NEWEST)


@pytest.mark.parametrize("column", TABLE, ids=lambda column: column.version)
def test_batch_sizes_of_graphs_are_taken_under_the_name_that_public_launchers_use(column):
    settings = translate({"cuda_graph_bs": "1 2 4 8"}, column).settings
    argv = typed_argv(settings, option_table(column.version))
    assert argv[1:] == ["1", "2", "4", "8"]
    # The oldest parsers know one option under both spellings.
    assert argv[0] in option_table(column.version).find("cuda_graph_bs_decode").flags


def test_attention_data_parallelism_has_its_own_name_from_0_5_23_on():
    asked = {"enable_dp_attention": True, "dp_size": 64}
    assert translate(asked, NEWEST).settings == {"attn_dp_size": 64}
    assert translate(asked, capabilities("0.5.17")).settings == asked


@pytest.mark.parametrize(
    ("settings", "argv"),
    [
        ({"disable_overlap_schedule": True, "sleep_on_idle": "true"}, ["--disable-overlap-schedule", "--sleep-on-idle"]),
        ({"disable_overlap_schedule": False, "page_size": None}, []),
        ({"mm_enable_dp_encoder": False}, ["--no-mm-enable-dp-encoder"]),
        ({"max_running_requests": "32", "ep": 2}, ["--max-running-requests=32", "--ep-size=2"]),
        ({"json_model_override_args": {"a": 1}}, ['--json-model-override-args={"a": 1}']),
        ({"cuda_graph_bs_decode": [1, 2, 4]}, ["--cuda-graph-bs-decode", "1", "2", "4"]),
    ],
)
def test_settings_become_the_words_that_the_parser_expects(settings, argv):
    assert typed_argv(settings, option_table("0.5.23")) == argv


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"nsa_decode_backend": "x"},
            "--sglang-nsa-decode-backend: sglang 0.5.23 has no such option; nearest: .*dsa-decode-backend",
        ),
        ({"max_running_requests": "many"}, "--sglang-max-running-requests .* takes a value of type int, got 'many'"),
        ({"mem_fraction_static": "half"}, "takes a value of type float, got 'half'"),
        ({"kv_cache_dtype": "fp8_e4m33"}, "is one of .*got 'fp8_e4m33'; nearest: fp8_e4m3"),
        ({"sleep_on_idle": "sometimes"}, "is on or off and takes no value, got 'sometimes'"),
        ({"max_running_requests": True}, "takes a value of type int, got True"),
    ],
)
def test_a_wrong_option_is_one_clear_error(settings, message):
    with pytest.raises(ValueError, match=message):
        typed_argv(settings, option_table("0.5.23"))


def test_an_option_is_found_by_its_field_name_and_by_each_spelling():
    table = OptionTable("9", (Option("dp_size", ("--dp-size", "--data-parallel-size"), "value", "int", None),))
    assert {table.find(name).name for name in ("dp_size", "dp-size", "data_parallel_size", "--data-parallel-size")} == {
        "dp_size"
    }


@pytest.mark.slow
def test_the_stored_table_is_what_the_installed_parser_says():
    """When this fails for a new SGLang: python -m slime.engine.describe, and a new column in the version table."""
    from slime.compat.sglang import host_environment

    stored = json.loads((TABLES / f"sglang-{installed_version()}.json").read_text())
    asked = installed_options(host_environment(cores=[0]))
    assert asked == option_table(installed_version())
    assert len(asked.options) == len(stored["options"]) > 400
