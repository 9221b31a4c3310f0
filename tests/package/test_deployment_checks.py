"""Each field of a ``Deployment`` that is out of range, or contradicts another one, is one error: the field, its value, what is
accepted. Fields of shared-expert ranks: test_shared_ranks.py; process groups: test_rank_placement.py."""

from __future__ import annotations

import re
from typing import Any

import pytest

from moe_lowering import Deployment
from moe_lowering.vocabulary import SOCS

EP: dict[str, Any] = {"ep_size": 4, "ep_group": "a"}


@pytest.mark.parametrize(("fields", "message"), [
    ({"providers": (("vllm-ascend", "0.23.0"),)}, "providers names 'vllm-ascend'; accepted: pairs"),
    ({"providers": "vllm_ascend"}, "providers is 'vllm_ascend'; accepted: pairs"),
    ({"providers": (("vllm_ascend", "new"),)}, "'new'; accepted: a version such as"),
    ({"cann": "latest"}, "cann is 'latest'; accepted: a version such as"),
    ({"cann": "9.x"}, "cann is '9.x'; accepted: a version such as"),
    ({"cann": "8.2.RC"}, "cann is '8.2.RC'; accepted: a version such as"),
    ({"torch_npu": "2.x"}, "torch_npu is '2.x'; accepted: a version such as"),
    ({"providers": (("vllm_ascend", "0.x"),)}, "'0.x'; accepted: a version such as"),
    ({"torch_npu": "latest"}, "torch_npu is 'latest'; accepted: a version such as"),
    ({"max_tokens": 2.5}, "max_tokens is 2.5; accepted: an int"),
    ({"capture": 1}, "capture is 1; accepted: True or False"),
    ({"soc": "H100"}, "soc is 'H100'; accepted: A2, A3, A5, 310P"),
    ({"weight_format": "nhwc"}, "weight_format is 'nhwc'; accepted: nd, nz"),
    ({"guards": "some"}, "guards is 'some'; accepted: allow, forbid"),
    ({"mode": "eager"}, "mode is 'eager'; accepted: npugraph_ex, ge"),
    ({"fused_mode": 3}, "fused_mode is 3; accepted: 0"),
    ({"ep_size": 0}, "ep_size is 0; accepted: 1 or more"),
    ({"ep_size": 4}, "ep_size is 4 but ep_group is ''"),
    ({**EP, "ep_rank": 4}, "ep_rank is 4; accepted: 0 to ep_size - 1 = 3"),
    ({**EP, "tp_size": 3, "tp_group": "t"}, "ep_size is 4, not a multiple of tp_size 3"),
    ({"tp_size": 2, "tp_group": "t"}, "tp_size is 2 with ep_size 1: give the EP group"),
    ({**EP, "mc2_group": "a"}, "mc2_group is 'a', the EP group itself"),
    ({**EP, "mc2_group": "c", "ep_communicator": "c"}, "mc2_group is 'c', the EP group itself"),
    ({"max_rows": -1}, "max_rows is -1; accepted: 0 or more"),
    ({"hccl_buffer_mb": 0}, "hccl_buffer_mb is 0; accepted: 1 or more"),
    ({"equal_tokens": False}, "max_tokens must give a bound"),
    ({"equal_tokens": False, "max_tokens": 8, "min_tokens": 9}, "min_tokens is 9; accepted: 0 to max_tokens = 8"),
])  # fmt: skip
def test_a_wrong_deployment_is_one_clear_error(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        Deployment(**fields)


@pytest.mark.parametrize(("name", "alias"), [(soc.name, alias) for soc in SOCS.values() for alias in soc.aliases])
def test_another_name_of_a_soc_says_which_it_is(name: str, alias: str) -> None:
    with pytest.raises(ValueError, match=f"soc is '{alias}', another name of {name}; accepted: A2, A3"):
        Deployment(soc=alias)


def test_what_is_at_the_bound_is_accepted() -> None:
    Deployment(
        **EP, ep_rank=3, tp_size=2, tp_rank=1, tp_group="t", mc2_group="b", ep_communicator="c", hccl_buffer_mb=1
    )
    Deployment(equal_tokens=False, max_tokens=8, min_tokens=8)
    Deployment(min_tokens=9, max_tokens=8)  # read only where T may differ


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("max_token", r"\(did you mean max_tokens\?\)$"),
        ("zzz", "; accepted: cann, capture, "),
        ("places", "; accepted: "),
    ],
)
def test_from_groups_names_a_field_that_there_is_not(name: str, says: str) -> None:
    with pytest.raises(TypeError, match=rf"^Deployment.from_groups: {name} is no field of Deployment.*{says}"):
        Deployment.from_groups(ep=None, soc="A3", **{name: 1})
