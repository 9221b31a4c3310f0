"""The classes of transformers whose modules ``replaced_experts`` gives the experts interface, and how; one section each."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from moe_lowering.integrations.expert_gates import gate_fingerprint
from moe_lowering.integrations.experts_interface import Interface, Renamed, become, frozen

__all__ = ["REPLACED", "Replacement"]


class Replacement:
    """How modules of a class are replaced: ``take`` is called with the module and its config.

    ``check`` raises ValueError for a module that cannot be; ``code``: the hash of the forward of each class that was read to
    write it, by name.
    """

    def __init__(
        self, take: Callable[[Any, Any], None], check: Callable[[Any], None] = lambda module: None, **code: str
    ) -> None:
        self.take, self.check, self.code = take, check, code

    def knows(self, module: nn.Module) -> bool:
        """Whether a module and those within it are of the code that was read."""
        classes = {type(each).__name__: type(each) for each in module.modules() if type(each).__name__ in self.code}
        same = all(gate_fingerprint(member.forward) == self.code[name] for name, member in classes.items())
        return same and classes.keys() == self.code.keys()


# --- step3p7: the interface's own form -------------------------------------------------------------------------------


def _take_step(module: Any, config: Any) -> None:
    become(module, Interface)
    module.config = config


# --- llama4: every expert on every token, of which all but one are scaled by zero ------------------------------------


class _Llama4(nn.Module):
    """Tokens are multiplied by the weight of their expert before they are sent to it, and its result is not."""

    experts: Any
    router: Any
    shared_expert: Any
    hidden_dim: int

    def forward(self, hidden_states: Tensor) -> tuple[Tensor, Tensor]:
        hidden_states = hidden_states.reshape(-1, self.hidden_dim)
        scores, logits = self.router(hidden_states)
        ids = logits.topk(1, dim=-1).indices  # as its router does
        weights = scores.gather(1, ids)
        routed = self.experts(hidden_states * weights, ids, torch.ones_like(weights))
        return self.shared_expert(hidden_states) + routed, logits


class _Llama4Experts(Interface):
    is_transposed = True


def _check_llama4(module: Any) -> None:
    if module.top_k != 1:
        raise ValueError(
            f"replace_experts: num_experts_per_tok is {module.top_k} for {type(module).__name__}; accepted: 1, as it "
            "multiplies tokens by their weight before they are sent, once each"
        )


def _take_llama4(module: Any, config: Any) -> None:
    become(module, _Llama4)
    become(module.experts, _Llama4Experts)
    module.experts.config = config


# --- longcat_flash: experts that return their token ------------------------------------------------------------------


class _ZeroExperts(Interface):
    """Ids from ``num_experts`` on are experts that return their token. Its weights are summed and the token is added with
    that; in the routing each of these choices becomes another expert that the token has not chosen, with weight 0, since
    ids of a token must differ. Those rows are computed for nothing: k wide, not by capacity."""

    num_experts: int
    gate_up_proj: nn.Parameter

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        experts = getattr(self, "moe_lowering_num_experts", self.num_experts)
        returned = top_k_index >= experts
        kept = top_k_weights.masked_fill(returned, 0.0)
        share = (top_k_weights - kept).sum(dim=-1, keepdim=True)
        chosen = torch.zeros((top_k_index.shape[0], experts + 1), dtype=torch.int32, device=top_k_index.device).scatter(
            1, top_k_index.clamp(max=experts), 1
        )
        others = chosen[:, :experts].topk(top_k_index.shape[1], dim=-1, largest=False).indices
        routed = self.compute(hidden_states, torch.where(returned, others, top_k_index), kept)
        return routed + (hidden_states * share).to(hidden_states.dtype)

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *others: Any) -> None:
        name = f"{prefix}gate_up_proj"
        if name in state_dict:  # what nothing reads of a whole checkpoint's
            state_dict = {**state_dict, name: state_dict[name][: self.gate_up_proj.shape[0]]}
        super()._load_from_state_dict(state_dict, prefix, *others)


def _take_longcat(module: Any, config: Any) -> None:
    if module.num_routed_experts < 2 * config.moe_topk:  # alike in all layers, so that the first one says it
        raise ValueError(
            f"replace_experts: {module.num_routed_experts} routed experts for {config.moe_topk} choices; accepted: "
            "twice as many or more, since a zero expert's place in the routing is taken by one that is not chosen"
        )
    whole = module.gate_up_proj
    become(module, _ZeroExperts)
    module.num_experts, module.config = module.num_routed_experts, config
    module.gate_up_proj = frozen(whole[: module.num_experts].detach(), whole)


# --- dbrx: gate and up apart -----------------------------------------------------------------------------------------


class _Dbrx(Renamed):
    is_transposed = True  # K before N, as Ascend's grouped matmul wants it
    num_experts: int
    ffn_hidden_size: int
    hidden_size: int
    gate_up_proj: nn.Parameter
    down_proj: nn.Parameter

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        y = self.compute(hidden_states.reshape(-1, self.hidden_size), top_k_index, top_k_weights)
        return y.view(hidden_states.shape[0], -1, self.hidden_size)

    def old_weights(self) -> dict[str, Tensor]:
        gate, up = (half.transpose(1, 2).reshape(-1, self.hidden_size) for half in self.gate_up_proj.chunk(2, dim=-1))
        return {"mlp.w1": gate, "mlp.v1": up, "mlp.w2": self.down_proj.reshape(-1, self.hidden_size)}

    def take_weights(self, old: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        gate, up, down = (
            old[f"mlp.{name}"].view(self.num_experts, self.ffn_hidden_size, self.hidden_size)
            for name in ("w1", "v1", "w2")
        )
        return torch.cat((gate, up), dim=1).transpose(1, 2).contiguous(), down


def _take_dbrx(module: Any, config: Any) -> None:
    old = module.mlp
    become(module, _Dbrx)
    module.config, module.act_fn = config, old.activation_fn
    with torch.no_grad():
        first, second = module.take_weights({f"mlp.{name}": getattr(old, name) for name in ("w1", "v1", "w2")})
    module.gate_up_proj, module.down_proj = frozen(first, old.w1), frozen(second, old.w2)
    del module.mlp


# --- switch_transformers: a module for each expert, without a gate ---------------------------------------------------


class _Switch(nn.Module):
    """The router's mask of one expert per token, empty for those that its capacity drops, as ids and weights."""

    experts: Any
    router: Any

    def forward(self, hidden_states: Tensor) -> Tensor:
        selected, weights, _ = self.router(hidden_states)
        tokens = hidden_states.reshape(-1, hidden_states.shape[-1])
        ids = selected.argmax(dim=-1).view(-1, 1)
        weights = (weights * selected.amax(dim=-1, keepdim=True)).view(-1, 1)
        return self.experts(tokens, ids, weights).view(hidden_states.shape)


class _SwitchExperts(Renamed):
    has_gate = False
    is_transposed = True
    num_experts: int
    up_proj: nn.Parameter
    down_proj: nn.Parameter
    _OLD: ClassVar = ("wi", "wo")

    def old_weights(self) -> dict[str, Tensor]:
        return {
            f"expert_{expert}.{name}.weight": weight[expert].transpose(0, 1)
            for expert in range(self.num_experts)
            for name, weight in zip(self._OLD, self._weights(), strict=True)
        }

    def take_weights(self, old: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        first, second = (
            torch.stack([old[f"expert_{expert}.{name}.weight"].transpose(0, 1) for expert in range(self.num_experts)])
            for name in self._OLD
        )
        return first, second


def _take_switch(module: Any, config: Any) -> None:
    experts = module.experts
    act = experts["expert_0"].act
    old = dict(experts.named_parameters())
    become(module, _Switch)
    become(experts, _SwitchExperts)
    with torch.no_grad():
        first, second = experts.take_weights(old)
    like = next(iter(old.values()))
    experts.clear()
    experts.act_fn, experts.config = act, config
    experts.up_proj, experts.down_proj = frozen(first, like), frozen(second, like)
    # As its first forward does; dynamo cannot trace a cast of a module
    module.router.classifier.to(module.router.dtype)


# --- jetmoe: two modules of stacked weights, and a router that sorts on the host -------------------------------------


class _JetMoe(nn.Module):
    """Its ``experts`` hold the weights of ``input_linear`` and ``output_linear``, which stay where they are."""

    experts: Any
    router: Any
    bias: Tensor

    def forward(self, layer_input: Tensor) -> Tensor:
        tokens = layer_input.reshape(-1, layer_input.shape[-1])
        logits = self.router.layer(tokens).float()
        top, ids = logits.topk(self.router.top_k, dim=1)
        weights = torch.softmax(top, dim=1).type_as(tokens)
        return self.experts(tokens, ids, weights).view(layer_input.shape) + self.bias


class _JetMoeExperts(Interface):
    """Shares its parameters with the module that it is part of, which saves and loads them."""

    def __init__(self, config: Any, first: nn.Parameter, second: nn.Parameter, act_fn: nn.Module) -> None:
        super().__init__()
        self.config, self.act_fn, self.num_experts = config, act_fn, first.shape[0]
        self.gate_up_proj, self.down_proj = first, second

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        pass

    def _load_from_state_dict(self, *arguments: Any) -> None:
        pass


def _take_jetmoe(module: Any, config: Any) -> None:
    experts = _JetMoeExperts(config, module.input_linear.weight, module.output_linear.weight, module.activation)
    become(experts)
    become(module, _JetMoe)
    module.experts = experts


REPLACED = {
    "Step3p7Experts": Replacement(_take_step, Step3p7Experts="a35da7d62505dd31"),
    "Llama4TextMoe": Replacement(
        _take_llama4,
        _check_llama4,
        Llama4TextMoe="ee8c74103a9b7a89",
        Llama4TextExperts="0946c5fe920467d2",
        Llama4Router="6242f55b4598081f",
    ),
    "LongcatFlashExperts": Replacement(_take_longcat, LongcatFlashExperts="efe6c2621ad36c18"),
    "DbrxExperts": Replacement(_take_dbrx, DbrxExperts="566d64911075bc6e", DbrxExpertGLU="76eb066682687b8c"),
    "SwitchTransformersSparseMLP": Replacement(
        _take_switch,
        SwitchTransformersSparseMLP="bff929c83dff7e09",
        SwitchTransformersExperts="1746d5f99352dced",
        SwitchTransformersDenseActDense="23f62776ca1b4a78",
        SwitchTransformersTop1Router="bae0c704746ec478",
    ),
    "JetMoeMoE": Replacement(
        _take_jetmoe,
        JetMoeMoE="40d0eb12c76d83c8",
        JetMoeTopKGating="46ca3b8001df9a35",
        JetMoeParallelExperts="3a30067b337b1e2f",
    ),
}
