"""``Deployment``: everything about the machine and the process groups that a decision of the pass may depend on.

It is frozen, and every field is checked when it is made: a ValueError names the field, its value and what is accepted. Only
this rank's place (``RANK_FIELDS``) differs between ranks; no decision reads it, and ``digest``, which compile caches hash,
leaves it out. Users make one by hand, with ``from_groups`` or with ``from_mesh``; docs/deployment.md has the fields.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from typing import TYPE_CHECKING, Any

from moe_lowering.deployment_checks import (
    check_group_sizes,
    check_groups_agree,
    check_kinds,
    check_shared_ranks,
    check_sizes,
    check_token_bounds,
    check_words,
    require_fields,
)
from moe_lowering.deployment_detection import Detected, detect, groups_of_mesh, own_communicator, second_communicator
from moe_lowering.groups import Claim, find_group, own_ranks
from moe_lowering.prices.rows import Row, digest_of, require_rows
from moe_lowering.providers import check_installed, check_providers, check_version, installed_providers
from moe_lowering.vocabulary import SOCS, TOKEN_UNPERMUTE, Soc

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup
    from torch.distributed.device_mesh import DeviceMesh

# Fields that differ between ranks of one deployment. They never take part in a decision, nor in the digest.
RANK_FIELDS = frozenset({"ep_rank", "tp_rank", "tp_group"})
# Fields that repeat others, or say where they came from.
_ORIGINS = frozenset({"detected", "places"})


@dataclasses.dataclass(frozen=True, kw_only=True)
class Deployment:
    """One deployment of a model: everything that a lowering decision may depend on.

    All fields but ``ep_rank``, ``tp_rank`` and ``tp_group`` must be equal on every rank: the pass decides from them alone,
    and two ranks that decide differently hang. ``from_groups`` and ``from_mesh`` make one from process groups.

    Where ``torch.distributed`` has the groups that are named, their sizes and this process's ranks are read from them, or
    compared where they are given; and again at every use (``placed``), as a deployment may be older than its groups, or
    come from another process. Without such groups (another machine's deployment, a fake process group) a rank that is not
    given is not known, and what needs it is refused.

    Args:
        soc: ``A2`` (910B), ``A3`` (910C), ``A5`` (950) or ``310P``.
        ep_size: number of ranks in the expert-parallel (EP) group; 1 means no expert parallelism.
        ep_rank: this rank's index in the EP group; None to read it from the group.
        ep_group: name of the EP process group (``group.group_name``); "" when ``ep_size`` is 1.
        mc2_group: communicator that MC2 and fused operators take. It is never the EP group, because no other
            collective may use it (facts: MC2's communicator is its own). On an NPU this is the HCCL communicator
            name; without one it is the name of a process group. "" means that MC2 is not available.
        ep_communicator: the communicator of the EP group itself, which code that calls torch_npu's MC2 operators passes to
            them: HCCL's name on an NPU, else the group's. "" when it is not known.
        tp_size, tp_rank, tp_group: the tensor-parallel (TP) group whose ranks hold the same tokens, likewise. Its ranks are
            ranks of the EP group.
        max_tokens: upper bound on the token count T of one rank, for every call; 0 when none is declared.
        min_tokens: lower bound on T on every rank, for every call; read only when ``equal_tokens`` is False.
        equal_tokens: whether T is the same on all ranks of the EP group at every call. When it is not, ``max_tokens``
            must be given, and decisions depend on ``min_tokens`` and ``max_tokens`` instead of T.
        guards: ``allow`` or ``forbid``: whether the pass may ask dynamo to recompile outside of a range of T.
        max_rows: cap on the rows one rank receives; 0 for the bound that shapes alone imply.
        max_output_size: rows that the fused operators may process on one rank; 0 for the proven receive bound.
        hccl_buffer_mb: ``HCCL_BUFFSIZE`` in MB (CANN's default is 200).
        capture: whether the compiled graph is captured (npugraph_ex without ``force_eager``): then nothing may need a
            size on the host. False allows the exact-split AllToAll.
        mode: which compiler runs the graph: ``npugraph_ex``, or ``ge`` (torchair's GE mode), for which only operators with
            a GE converter are emitted.
        unpermute_operator: which operator brings rows back to tokens in graphs of AllGather and AllToAll: ``token_unpermute``,
            or ``finalize_routing``, which needs four kernels less and is doubted (docs/costs.md).
        fused_mode: which fused operators FusedMC2 may use: 0 (none), 1 (``dispatch_ffn_combine`` or ``mega_moe``) or 2
            (``dispatch_gmm_combine_decode``), as vllm-ascend's VLLM_ASCEND_ENABLE_FUSED_MC2.
        mask_is_prefix: promise that every token mask is True for the first n tokens and False after them, as padding is.
        mc2_capacity: up to how many tokens of a TP group a serving stack uses MC2, for the policies that choose as vllm-ascend
            does; 0 for what that derives from ``max_tokens``.
        mc2_hierarchy: MC2 in two levels, within and between nodes (``comm_alg="hierarchy"``).
        shared_expert_ranks: the first ranks of the EP group that hold shared experts, one each, and no routed ones; the
            routed experts are spread over the others. 0 for none: shared experts are then no matter of this package.
        shared_experts: how many shared experts these ranks hold: each is held by ``shared_expert_ranks / shared_experts``
            ranks, and each token goes to one rank of each. 1 when there are no such ranks.
        ranks_per_node: how many ranks of a group share the links of a node, for prices; 0 for the SoC's server (8 on A2, 16 on
            A3). Ranks of a node are neighbours in the group.
        measured: measured rows in place of constants of prices, or the path of a CSV file with them (``prices.rows``).
        weight_format: memory format of the expert weights on the device, ``nd`` or ``nz`` (FRACTAL_NZ).
        cann: CANN version, e.g. ``9.1.0`` or ``8.2.RC1``; "" when unknown: rules for certain versions then apply.
        torch_npu: version of torch_npu, with the same meaning.
        providers: (name, version) of installed libraries that bring fused operators, e.g. ``(("vllm_ascend", "0.23.0"),)``.
        installed: (name, version, SoC that it was built for, "unknown", or "" where builds do not differ) of the providers
            that this Python has: an operator of another version or build than is declared is not legal. None to look; ()
            for a deployment on another machine, where what is installed here says nothing.
        detected: which fields were found and not given, and where; takes no part in decisions, equality or digests.

    Raises:
        ValueError: when a field is out of range or contradicts a process group, with the field, the value and what is
            accepted.
    """

    soc: str = "A3"
    ep_size: int = 1
    ep_rank: int | None = None
    ep_group: str = ""
    mc2_group: str = ""
    ep_communicator: str = ""
    tp_size: int = 1
    tp_rank: int | None = None
    tp_group: str = ""
    max_tokens: int = 0
    min_tokens: int = 1
    equal_tokens: bool = True
    guards: str = "allow"
    max_rows: int = 0
    max_output_size: int = 0
    hccl_buffer_mb: int = 200
    capture: bool = True
    mode: str = "npugraph_ex"
    unpermute_operator: str = TOKEN_UNPERMUTE
    fused_mode: int = 1
    mask_is_prefix: bool = False
    mc2_capacity: int = 0
    mc2_hierarchy: bool = False
    shared_expert_ranks: int = 0
    shared_experts: int = 1
    ranks_per_node: int = 0
    measured: tuple[Row, ...] | str | os.PathLike[str] = ()
    weight_format: str = "nd"
    cann: str = ""
    torch_npu: str = ""
    providers: tuple[tuple[str, str], ...] = ()
    installed: tuple[tuple[str, str, str], ...] | None = None
    detected: tuple[Detected, ...] = dataclasses.field(default=(), compare=False, repr=False)
    places: str = dataclasses.field(init=False, compare=False, repr=False)  # see _fill

    def __post_init__(self) -> None:
        check_kinds(self)
        check_words(self)
        object.__setattr__(self, "measured", require_rows("Deployment: measured", self.measured, self.soc))
        check_providers(self.providers)
        for name in ("cann", "torch_npu"):
            check_version(name, getattr(self, name), optional=True)
        check_group_sizes(self)
        check_sizes(self)
        check_groups_agree(self)
        check_shared_ranks(self.ep_size, self.shared_expert_ranks, self.shared_experts)
        check_token_bounds(self)
        self._fill()

    def _fill(self) -> None:
        """Fill the fields that the caller left out, from the groups and from the machine."""
        detected = list(self.detected)
        for kind, rank in self._ranks().items():
            if getattr(self, f"{kind}_rank") is None and rank is not None:
                object.__setattr__(self, f"{kind}_rank", rank)
                group = getattr(self, f"{kind}_group")
                detected += [Detected(f"{kind}_rank", str(rank), f"{kind}_group {group!r}")] if group else []
        if self.installed is None:
            packages = installed_providers()
            object.__setattr__(self, "installed", tuple(package.record for package in packages))
            detected += [Detected("installed", package.version_text, package.where) for package in packages]
        check_installed(self.installed, SOCS)
        object.__setattr__(self, "detected", tuple(detected))
        # one string, so that under torch.compile a guard on it is one comparison, and equal deployments are as one
        claims = [dataclasses.astuple(claim) for claim in self._claims()]
        object.__setattr__(self, "places", json.dumps([*claims, self.mc2_group]))

    def _claims(self) -> tuple[Claim, Claim]:
        return (
            Claim("ep", self.ep_group, self.ep_size, self.ep_rank),
            Claim("tp", self.tp_group, self.tp_size, self.tp_rank),
        )

    def _ranks(self) -> dict[str, int | None]:
        ep, tp = own_ranks(*self._claims(), self.mc2_group)
        return {"ep": 0 if self.ep_size == 1 else ep, "tp": 0 if self.tp_size == 1 else tp}

    @classmethod
    def from_groups(
        cls, *, ep: ProcessGroup | None, tp: ProcessGroup | None = None, mc2: ProcessGroup | None = None, **rest: Any
    ) -> Deployment:
        """A deployment of this process's groups on this machine. **A collective** when ``mc2`` is None: see below.

        Args:
            ep: the expert-parallel group; None for one rank.
            tp: the tensor-parallel group, whose ranks are ranks of ``ep``; None for none.
            mc2: a second group over the ranks of ``ep``, for MC2 and fused operators alone. When it is None, and ``mc2_group``
                is not given, one is made with the backends of ``ep``: all ranks of the default group must then call this
                with their EP groups, as they must ``torch.distributed.new_group``. ``mc2_group=""`` makes none.
            rest: further fields. Of those that are not given, ``soc``, ``cann``, ``torch_npu``, ``hccl_buffer_mb``
                (HCCL_BUFFSIZE) and ``providers`` are detected.

        Raises:
            ValueError: a field that a group gives was given otherwise; ``soc`` is not given and no NPU says it, or is not the
                NPU's; the NPU's SoC or HCCL_BUFFSIZE is not known; ``ep`` is None under ``torchrun`` before there is a
                process group; and as ``Deployment`` does.
            TypeError: a group that is none, or does not have this process in it.
        """
        known = {field.name for field in dataclasses.fields(cls) if field.init}
        require_fields("Deployment.from_groups", rest, known - {"detected"})
        fields, detected = detect(ep, tp, mc2, rest)
        cls(**{**fields, "mc2_group": ""})  # checked before a group is made, so that an error leaves no group behind
        if "mc2_group" not in rest and (communicator := second_communicator(ep, mc2)) is not None:
            fields["mc2_group"] = communicator.value
            detected.append(communicator)
        if "ep_communicator" not in rest and (own := own_communicator(ep, fields["ep_size"])) is not None:
            fields["ep_communicator"] = own.value
            detected.append(own)
        return cls(**fields, detected=tuple(detected))

    @classmethod
    def from_mesh(
        cls, device_mesh: DeviceMesh, ep: str | tuple[str, ...] = "ep", tp: str | None = "tp", **rest: Any
    ) -> Deployment:
        """``from_groups`` of the dimensions of a device mesh, and a collective as that is.

        Args:
            ep: the dimension whose ranks form an EP group. The ranks of a TP group are ranks of one EP group: where ``tp`` is
                another dimension, give both, e.g. ``ep=("dp", "tp")``; they are flattened.
            tp: the TP dimension; None for none. A mesh that has no dimension "tp" has no TP group.
            rest: as for ``from_groups``.

        Raises:
            TypeError: ``device_mesh`` is none. ValueError: it has no such dimension; and as ``from_groups`` does.
        """
        return cls.from_groups(**groups_of_mesh(device_mesh, ep, tp), **rest)

    def placed(self) -> Deployment:
        """This deployment, compared with the process groups as they are now; ranks that were not known are read from them.

        Raises:
            ValueError: it contradicts a group.
        """
        ranks = self._ranks()
        return self if ranks == {"ep": self.ep_rank, "tp": self.tp_rank} else self.replace()

    @property
    def chip(self) -> Soc:
        """What belongs to the deployment's SoC."""
        return SOCS[self.soc]

    @property
    def weighs_before_sending(self) -> bool:
        """Whether MC2's dispatch takes the routing weights, and combine what dispatch makes of them."""
        return self.chip.weighs_before_sending or self.mc2_hierarchy

    @property
    def misplaced(self) -> str:
        """How this deployment contradicts the process groups as they are now; "" when it does not."""
        try:
            self._ranks()
        except ValueError as error:
            return str(error)
        return ""

    def own_rank(self, kind: str) -> int:
        """This rank's index in the EP or TP group; ``kind`` is ``ep`` or ``tp``.

        Raises:
            ValueError: it is not known.
        """
        rank = {"ep": self.ep_rank, "tp": self.tp_rank}[kind]
        if rank is None:
            raise ValueError(self.unknown_rank)
        return rank

    @property
    def unknown_rank(self) -> str:
        """Why a rank of this deployment is not known; "" when all are."""
        for claim in self._claims():
            if claim.rank is None:
                return (
                    f"Deployment: {claim.kind}_rank is not known: it was not given, and {claim.kind}_group {claim.group!r} is "
                    "no process group that communicates in this process; accepted: a deployment that is used after the "
                    f"group was made, or {claim.kind}_rank from 0 to {claim.size - 1}"
                )
        return ""

    @property
    def token_bound(self) -> int:
        """The ``max_tokens`` argument of the generic operators: 0 says that T is equal on all ranks."""
        return 0 if self.equal_tokens else self.max_tokens

    @property
    def routed_ranks(self) -> int:
        """The ranks of the EP group that hold routed experts: the last ones."""
        return self.ep_size - self.shared_expert_ranks

    @property
    def communicators(self) -> frozenset[str]:
        """Names that MC2 operators may be given for the ranks of the EP group."""
        return frozenset({self.mc2_group, self.ep_communicator} - {""})

    @property
    def on_shared_rank(self) -> bool:
        """Whether this rank holds a shared expert, and no routed one. A rank's own: no decision may depend on it."""
        return self.shared_expert_ranks > 0 and self.own_rank("ep") < self.shared_expert_ranks

    @property
    def shared_expert(self) -> int | None:
        """The shared expert that this rank holds; None on the others."""
        if not self.on_shared_rank:
            return None
        return self.own_rank("ep") * self.shared_experts // self.shared_expert_ranks

    def own_experts(self, num_experts: int) -> slice:
        """The routed experts of ``num_experts`` that this rank holds; none on a shared-expert rank."""
        return experts_of_rank(num_experts, self.own_rank("ep"), self.ep_size, self.shared_expert_ranks)

    @property
    def hccl_buffer_bytes(self) -> int:
        """Size of the HCCL window in bytes (CANN counts ``HCCL_BUFFSIZE`` in MiB)."""
        return self.hccl_buffer_mb * 2**20

    @property
    def versions(self) -> dict[str, str]:
        """Version by name of CANN, torch_npu and the providers, as far as they are declared: what limit rows ask for."""
        declared = {"cann": self.cann, "torch_npu": self.torch_npu, **dict(self.providers)}
        return {name: version for name, version in declared.items() if version}

    def provider(self, name: str) -> str | None:
        """Version of a provider of fused operators, or None when it is not installed."""
        return dict(self.providers).get(name)

    def replace(self, **changes: Any) -> Deployment:
        """A copy with some fields changed. A rank is read anew from a group that is changed, where this process has it."""
        for kind in ("ep", "tp"):
            if find_group(changes.get(f"{kind}_group", "")) is not None:
                changes.setdefault(f"{kind}_rank", None)
        changes.setdefault("detected", tuple(d for d in self.detected if d.field not in changes))
        return dataclasses.replace(self, **changes)

    def invariant_fields(self) -> dict[str, Any]:
        """The fields that must agree on every rank, by name."""
        return {name: value for name, value in self.all_fields().items() if name not in RANK_FIELDS}

    def all_fields(self) -> dict[str, Any]:
        """Every field that says something of the deployment by name, a rank's own among them."""
        fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name not in _ORIGINS}
        return {**fields, "measured": digest_of(fields["measured"])}  # by content, and short

    def digest(self) -> str:
        """SHA-256 (hex) of the rank-invariant fields."""
        return hashlib.sha256(json.dumps(self.invariant_fields(), sort_keys=True).encode()).hexdigest()


def experts_of_rank(num_experts: int, ep_rank: int, ep_size: int, shared_expert_ranks: int) -> slice:
    """The routed experts that an EP rank holds: an equal part of them on each but the first ``shared_expert_ranks``."""
    local = num_experts // (ep_size - shared_expert_ranks)
    first = (ep_rank - shared_expert_ranks) * local
    return slice(0, 0) if ep_rank < shared_expert_ranks else slice(first, first + local)
