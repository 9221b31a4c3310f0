"""What the nodes of a counted form do, for their price: kernels started, bytes of memory, operations, bytes on links.

``report.graph_costs`` counts what a graph shows, whole tensors, row buffers at their bound. Here is what it hides, too:

- Operators that know which rows are valid touch those alone (``_VALID_ROWS``). Tokens are taken to be spread evenly, so
  that a rank with routed experts has M * k * ep / (ranks with routed experts) rows for them.
- Matmuls read the experts that have rows, each once.
- MC2's operators and the fused ones exchange inside: each token to its k experts, and back. int8 rows travel with a head.
  The two-level algorithm sends a token once to each node.
- ``alltoall_experts`` runs many kernels: what is counted of it are those (``exact_kernels``).
"""

from __future__ import annotations

import dataclasses
import functools

import torch
from torch.fx import Node

from moe_lowering.custom_ops.sizes import ceil_div
from moe_lowering.deployment import Deployment
from moe_lowering.passes.blocks import BlockSpec
from moe_lowering.passes.costs.exact_kernels import as_kernels
from moe_lowering.passes.costs.tally import Counted, count_form, neutral
from moe_lowering.passes.graph.arguments import argument
from moe_lowering.passes.implementations import IMPLEMENTATIONS, Form
from moe_lowering.prices.machines import Sent, split_by_tier
from moe_lowering.report.graph_costs import Traffic, read_traffic
from moe_lowering.vocabulary import IMPLEMENTATION_FORMS, ONE_OPERATOR

NOTHING = Sent(0, 0)
HEAD = 512  # bytes that travel with an int8 row. Source: cloudmatrix.paper: 7.5 KiB for a token of 7,168

# Parameters, and whether results, of which only the valid rows are read and written.
_VALID_ROWS: dict[str, tuple[tuple[str, ...], bool]] = {
    "npu_moe_init_routing_v2": ((), True),
    "npu_moe_token_unpermute": (("permuted_tokens",), False),
    "npu_moe_finalize_routing": (("expanded_permuted_rows",), False),
    "npu_grouped_matmul": (("x", "per_token_scale"), True),
    "npu_grouped_matmul_swiglu_quant_v2": (("x", "x_scale"), True),
    "npu_dequant_swiglu_quant": (("x", "activation_scale"), True),
    "npu_clipped_swiglu": (("x",), True),
    "npu_swiglu_clip_quant": (("x",), True),
}
_DISPATCH, _COMBINE = "npu_moe_distribute_dispatch_v2", "npu_moe_distribute_combine_v2"
_MATMULS = frozenset({"npu_grouped_matmul", "npu_grouped_matmul_swiglu_quant_v2"})


@dataclasses.dataclass(frozen=True)
class Work:
    """Of one node. All counts are affine in the tokens of a rank, but for experts that may have no row.

    Attributes:
        what: the law of its start: a word of ``prices.laws``, or ``fused``.
        kernels: launches, copies before them among them.
        moved: bytes read and written, without experts and what is inside of an exchange.
        operations: of a matmul; of a fused operator one number for each of its two. ``rate``: their law.
        experts: bytes of experts, as many numbers. rows: valid rows; local: the experts of a rank.
        sent: bytes to others, and for MC2's and fused operators ``back`` from them. ranks: of the group that exchanges.
    """

    what: str
    kernels: int
    moved: int
    operations: tuple[int, ...] = ()
    rate: str = ""
    experts: tuple[int, ...] = ()
    rows: int = 0
    local: int = 1
    sent: Sent = NOTHING
    back: Sent = NOTHING
    ranks: int = 1

    def read_experts(self, at: int) -> int:
        """Bytes of the experts that have a row."""
        return self.experts[at] * min(self.rows, self.local) // self.local


def valid_rows(spec: BlockSpec, own: int) -> int:
    """Rows of a rank with routed experts, for ``own`` tokens of every rank, spread evenly."""
    return own * spec.top_k * spec.ep_size // (spec.ep_size - spec.shared_expert_ranks)


def work_of(counted: Counted, spec: BlockSpec, own: int, ranks_per_node: int) -> list[Work]:
    """Of each node that launches something, where a rank has ``own`` tokens."""
    reader = _Reader(spec, own, ranks_per_node)
    return [work for node in counted.nodes if (work := reader.read(node)) is not None]


def counted_nodes(name: str, form: str, spec: BlockSpec, deployment: Deployment, tokens: int) -> Counted:
    """The nodes of a form at T = ``tokens``; of one operator that is many kernels, the kernels.

    Raises:
        StopIteration, and whatever an emitter raises: of a form that is not legal for the block.
    """
    where = neutral(deployment)
    chosen = next(each for each in _all_forms(name, where) if each.name == form)
    return count_form(as_kernels(chosen), spec, where, tokens)


def _all_forms(name: str, deployment: Deployment) -> tuple[Form, ...]:
    implementation = IMPLEMENTATIONS[name]
    return (*implementation.forms(deployment), *implementation.ruled_out(deployment))


@functools.lru_cache(maxsize=256)
def counted_work(
    name: str, form: str, spec: BlockSpec, deployment: Deployment, tokens: int, ranks_per_node: int
) -> tuple[Work, ...]:
    """Of a form at T = ``tokens``, on every rank the same. ``spec`` is without T."""
    counted = counted_nodes(name, form, spec, deployment, tokens)
    return tuple(work_of(counted, spec, ceil_div(tokens, spec.tp_size), ranks_per_node))


class _Reader:
    def __init__(self, spec: BlockSpec, own: int, ranks_per_node: int) -> None:
        self.spec, self.own, self.ranks_per_node = spec, own, ranks_per_node
        self.rows = valid_rows(spec, own)

    def read(self, node: Node) -> Work | None:
        traffic = read_traffic(node)
        if traffic is None:
            return None
        kernels = 1 + len(traffic.copied)
        copied = sum(2 * _bytes(value) for value in traffic.copied)
        if traffic.collective:
            sent, ranks = self._collective(node, traffic)
            return Work("exchange", kernels, copied, sent=sent, ranks=ranks)
        if traffic.name in (_DISPATCH, _COMBINE):
            is_dispatch = traffic.name == _DISPATCH
            int8 = is_dispatch and traffic.written[0].dtype == torch.int8
            sent = self._to_experts(int8)
            return Work("dispatch" if is_dispatch else "combine", kernels, copied, sent=sent, ranks=self.spec.ep_size)
        if traffic.name in _FUSED:
            return self._fused(traffic, kernels, copied)
        moved = copied + self._moved(traffic)
        if traffic.name not in _MATMULS:
            return Work("vector", kernels, moved)
        (x,) = traffic.given["x"]
        wide = 2 if traffic.name != "npu_grouped_matmul" else 1  # SwiGLU halves what the matmul gives
        operations = 2 * self.rows * int(x.shape[1]) * int(traffic.written[0].shape[1]) * wide
        weights = sum(_bytes(value) for values in traffic.experts.values() for value in values)
        return Work(
            "matmul", kernels, moved, (operations,), _rate(x.dtype), (weights,), self.rows, self.spec.local_experts
        )

    def _moved(self, traffic: Traffic) -> int:
        parameters, results = _VALID_ROWS.get(traffic.name, ((), False))
        read_bytes = sum(
            self._part(value) if name in parameters else _bytes(value)
            for name, values in traffic.given.items()
            for value in values
        )
        large = max((int(value.shape[0]) for value in traffic.written if value.dim()), default=0)
        return read_bytes + sum(
            self._part(value) if results and value.dim() and value.shape[0] == large else _bytes(value)
            for value in traffic.written
        )

    def _part(self, value: torch.Tensor) -> int:
        """Bytes of the valid rows of a row buffer."""
        lines = int(value.shape[0])
        return _bytes(value) if lines <= self.rows else _bytes(value) // lines * self.rows

    def _collective(self, node: Node, traffic: Traffic) -> tuple[Sent, int]:
        """Bytes that a rank sends to others, and how many ranks there are."""
        read_bytes, written_bytes = sum(map(_bytes, traffic.all_given)), sum(map(_bytes, traffic.written))
        ranks = self.spec.tp_size if self.spec.tp_group in node.args else self.spec.ep_size
        if traffic.name == "all_gather_into_tensor":
            ranks, read_bytes = int(argument(node, "group_size")), written_bytes
        return split_by_tier(read_bytes, ranks, self.ranks_per_node), ranks

    def _to_experts(self, int8: bool) -> Sent:
        """Bytes of this rank's rows to the experts' ranks, or back."""
        spec = self.spec
        row = spec.hidden + HEAD if int8 else spec.hidden * int(spec.dtype.itemsize)
        copies = spec.top_k + (spec.shared_experts if spec.shared_expert_ranks else 0)
        return split_by_tier(self.own * copies * row, spec.ep_size, self.ranks_per_node)

    def _fused(self, traffic: Traffic, kernels: int, copied: int) -> Work:
        spec = self.spec
        weights = [
            sum(_bytes(v) for name, part in traffic.experts.items() if name.startswith(w) for v in part)
            for w in ("w13", "w2")
        ]
        once = 2 * self.rows * spec.hidden * spec.intermediate
        rate = "matmul_int8" if spec.format.int8_rows else _rate(spec.dtype)
        return Work(
            "fused",
            kernels,
            copied,
            (2 * once, once),
            rate,
            tuple(weights),
            self.rows,
            spec.local_experts,
            self._to_experts(spec.format.int8_rows),
            self._to_experts(False),
            spec.ep_size,
        )


_FUSED = frozenset(form for name in ONE_OPERATOR for form in IMPLEMENTATION_FORMS[name])


def _rate(dtype: torch.dtype) -> str:
    return {torch.int8: "matmul_int8", torch.float32: "matmul_float32"}.get(dtype, "matmul_16bit")


def _bytes(value: torch.Tensor) -> int:
    return int(value.numel()) * value.element_size()
