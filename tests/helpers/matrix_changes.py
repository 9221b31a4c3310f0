"""What the negative controls of test_matrix.py break, on every rank. Module-level functions: ranks import them by name."""

import dataclasses

import torch

from moe_lowering.matrix.cells import EXPERTS, INTERMEDIATE, TOKENS


def _weights(case, **changes):
    changed = {name: [change(tensor) for tensor in case.weights[name]] for name, change in changes.items()}
    return dataclasses.replace(case, weights={**case.weights, **changed})


def _deployment(case, **fields):
    return dataclasses.replace(case, deployment=case.deployment.replace(**fields))


def _inputs(case, **fields):
    return dataclasses.replace(case, inputs=dataclasses.replace(case.inputs, **fields))


def nothing(case):
    return case


def the_other_unpermute_operator(case):
    return _deployment(case, unpermute_operator="token_unpermute")


def scales_of_the_next_expert(case):
    return _weights(case, w13_scale=lambda scale: scale.roll(1, 0))


def second_scales_of_the_next_expert(case):
    return _weights(case, w2_scale=lambda scale: scale.roll(1, 0))


def no_offset(case):
    return _weights(case, w13_offset=torch.zeros_like)


def no_compensation(case):
    """8 * sum of w * scale, which npu_grouped_matmul adds for the halves of int8 rows."""
    return _weights(case, w13_scale_bias=torch.zeros_like)


def one_weight_packed_in_another_place(case):
    return _weights(case, w13=lambda weight: weight.roll(1, -1))


def gate_and_up_swapped(case):
    return _weights(case, w13=lambda weight: weight.roll(INTERMEDIATE, -1))


def x_of_the_next_token(case):
    return _inputs(case, x=case.inputs.x.roll(1, 0))


def experts_of_the_next_rank(case):
    """Every id is that of an expert on the next rank."""
    local = EXPERTS // case.deployment.ep_size
    return _inputs(case, ids=(case.inputs.ids + local) % EXPERTS)


def scales_of_the_next_token(case):
    return _inputs(case, scale=case.inputs.scale.roll(1, 0))


def weights_of_the_next_token(case):
    return _inputs(case, weights=case.inputs.weights.roll(1, 0))


def another_place_of_experts(case):
    return _inputs(case, log2phy=case.inputs.log2phy.roll(1, 0))


def weights_in_nd(case):
    return _deployment(case, weight_format="nd")


def mask_reversed(case):
    return _inputs(case, mask=~case.inputs.mask)


def no_mask(case):
    return _inputs(case, mask=None)


def no_provider(case):
    return _deployment(case, providers=())


def captured(case):
    """AllToAll then takes its static form."""
    return _deployment(case, capture=True)


def another_x_on_the_second_rank(case):
    return _inputs(case, x=case.inputs.x + case.deployment.ep_rank)


def small_error(case):
    """One column of one expert, 30 % larger."""

    def change(weight):
        weight = weight.clone()
        weight[0, :, :64] *= 1.3
        return weight

    return _weights(case, w2=change) if case.deployment.ep_rank == 0 else case


def a_wrong_id_on_the_second_rank(case):
    """Of six tokens: kernels of that rank refuse it, and the first rank waits."""
    if case.deployment.ep_rank != 1 or len(case.inputs.x) != TOKENS:
        return case
    ids = case.inputs.ids.clone()
    ids[0, 0] = EXPERTS + 5
    return _inputs(case, ids=ids)
