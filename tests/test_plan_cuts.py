"""Dimensions that an axis cannot cut: the arithmetic, and the values that work."""

from __future__ import annotations

import pytest
from plan_texts import check, plan_text, refusal

WRONG_SIZES = {
    "heads": (
        "{tp: 3, edp: 3}",
        {},
        {},
        "plan `p.yaml`, line 6: `model.layers.*.self_attn.{q,k,v}_proj` cuts num_attention_heads 8 "
        "over tp 3, and 8 / 3 is 2.667",
        "use tp 1, 2, 4 or 8",
    ),
    "key heads that ranks cannot share": (
        "{tp: 3, edp: 3}",
        {},
        {"num_attention_heads": 6},
        "plan `p.yaml`, line 6: `model.layers.*.self_attn.{q,k,v}_proj` cuts num_key_value_heads 2 "
        "over tp 3, and 3 is no multiple of 2",
        "use tp 1, 2 or 6",
    ),
    "key heads that ranks cannot cut": (
        "{tp: 3, edp: 3}",
        {},
        {"num_attention_heads": 12, "num_key_value_heads": 4},
        "plan `p.yaml`, line 6: `model.layers.*.self_attn.{q,k,v}_proj` cuts num_key_value_heads 4 "
        "over tp 3, and 4 / 3 is 1.333",
        "use tp 1, 2, 4 or 12",
    ),
    "more ranks than heads": (
        "{tp: 16, ep: 4, edp: 4}",
        {},
        {},
        "plan `p.yaml`, line 6: `model.layers.*.self_attn.{q,k,v}_proj` cuts num_attention_heads "
        "8 over tp 16, and 8 / 16 is 0.5",
        "use tp 1, 2, 4 or 8",
    ),
    "experts": (
        "{tp: 2, ep: 2}",
        {},
        {"num_local_experts": 7},
        "plan `p.yaml`, line 10: `model.layers.*.mlp.experts` cuts num_local_experts 7 over ep 2, "
        "and 7 / 2 is 3.5",
        "use ep 1 or 7",
    ),
    "blocks": (
        "{tp: 2, etp: 2}",
        {},
        {"intermediate_size": 224},
        "plan `p.yaml`, line 10: `model.layers.*.mlp.experts` cuts intermediate_size 224 = 7 "
        "blocks of 32 into 2 unequal parts (4, 3)",
        "this is exact and costs 14.3% padding in the kernel; say `uneven: true` to accept it, or "
        "use etp 7",
    ),
    "90 blocks": (
        "{tp: 4, etp: 4}",
        {},
        {"intermediate_size": 2880},
        "plan `p.yaml`, line 10: `model.layers.*.mlp.experts` cuts intermediate_size 2880 = 90 "
        "blocks of 32 into 4 unequal parts (23, 23, 22, 22)",
        "this is exact and costs 6.7% padding in the kernel; say `uneven: true` to accept it, or "
        "use etp 2, 3, 5, 6, 9 or 10",
    ),
    "one block": (
        "{tp: 2, etp: 2}",
        {},
        {"intermediate_size": 32},
        "plan `p.yaml`, line 10: `model.layers.*.mlp.experts` cuts intermediate_size 32 = 1 block "
        "of 32 into 2 unequal parts (1, 0)",
        "this is exact and costs 300.0% padding in the kernel; say `uneven: true` to accept it",
    ),
}


@pytest.mark.parametrize("case", WRONG_SIZES)
def test_a_dimension_that_an_axis_cannot_cut_states_the_arithmetic(tmp_path, case):
    mesh, changes, config, message, hint = WRONG_SIZES[case]
    assert refusal(plan_text(mesh, **changes), tmp_path, **config) == (message, hint)


def test_vocabulary_rows_and_accepted_blocks_need_not_divide(tmp_path):
    rule = "{style: expert, uneven: true}"
    text = plan_text("{tp: 4, etp: 4}", **{"mlp.experts": rule})
    check(text, tmp_path, vocab_size=257, intermediate_size=96)  # 3 blocks over 4 ranks
