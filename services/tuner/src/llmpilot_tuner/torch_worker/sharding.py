"""Tensor parallelism: each rank holds its part of every matrix, and sums what it computes with the other ranks.

Invariant: a rank's model takes the memory that a rank's model takes; what a family cannot be cut along is refused.
Sources: Shoeybi et al., "Megatron-LM", 2019; the plans (`tp_plan`) that transformers' models carry, and for families
without one the same cuts written down here.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from llmpilot_contracts.errors import PreconditionError
from llmpilot_perfmodel.architecture import T5Architecture
from llmpilot_perfmodel.llm_config import LlmConfig

INSTEAD = "use another number of GPUs, or a probe that runs no model code (--probe analytic or server)"


class Collective(Protocol):
    """The ranks of a tensor-parallel LLM."""

    def all_reduce(self, tensor: Any) -> None:
        """Sum the tensor over all ranks, in place."""

    def barrier(self) -> None:
        """Wait until every rank is here."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Shards:
    """How an LLM is cut, and which part this is."""

    rank: int
    count: int
    collective: Collective | None = None
    """None: nobody else is there, so sums are those of this rank; memory is the same."""

    def part(self, size: int) -> slice:
        """Return this rank's part of so many rows; the first ranks have what does not divide."""
        step = -(-size // self.count)
        return slice(min(self.rank * step, size), min((self.rank + 1) * step, size))

    def all_reduce(self, tensor: Any) -> None:
        """Sum over the ranks, where there are others."""
        if self.collective is not None:
            self.collective.all_reduce(tensor)


def key_value_heads_of_rank(head_count: int, shards: Shards) -> range:
    """Return the key/value heads that a rank holds: where there are fewer than ranks, several hold the same one."""
    if head_count >= shards.count:
        size = head_count // shards.count
        return range(shards.rank * size, (shards.rank + 1) * size)
    head = shards.rank * head_count // shards.count
    return range(head, head + 1)


_T5_PLAN = {
    "shared": "embedding_rowwise",
    "encoder.embed_tokens": "embedding_rowwise",
    "decoder.embed_tokens": "embedding_rowwise",
    "*.q": "colwise",
    "*.k": "colwise",
    "*.v": "colwise",
    "*.o": "rowwise",
    "*.relative_attention_bias": "heads_last",
    "*.wi": "colwise",
    "*.wi_0": "colwise",
    "*.wi_1": "colwise",
    "*.wo": "rowwise",
    "lm_head": "colwise_gather_output",
}
_STARCODER_PLAN = {
    "transformer.wte": "embedding_rowwise",
    "transformer.h.*.attn.c_attn": "queries_first",
    "transformer.h.*.attn.c_proj": "rowwise",
    "transformer.h.*.mlp.c_fc": "colwise",
    "transformer.h.*.mlp.c_proj": "rowwise",
    "lm_head": "colwise_gather_output",
}
_OWN_PLANS = {"t5": _T5_PLAN, "mt5": _T5_PLAN, "umt5": _T5_PLAN, "gpt_bigcode": _STARCODER_PLAN}


@dataclass(frozen=True, slots=True, kw_only=True)
class _Cut:
    """A module that is to be cut."""

    name: str
    module: Any
    config: LlmConfig
    shards: Shards
    done: dict[int, Any]
    """What became of parameters that were cut, so that tied ones stay tied."""

    def keep(self, name: str, rows: Any, columns: slice = slice(None)) -> None:
        """Keep these rows and columns of a parameter; None stays None."""
        whole = self.module._parameters.get(name)
        if whole is None:
            return
        if id(whole) not in self.done and id(whole) not in {id(part) for part in self.done.values()}:
            part = whole.data[rows] if whole.dim() == 1 else whole.data[rows][:, columns]
            self.done[id(whole)] = torch.nn.Parameter(part.clone(), requires_grad=False)
            self.done[-id(whole)] = whole  # kept alive, so that no other gets its id
        self.module._parameters[name] = self.done.get(id(whole), whole)


def shard(model: Any, config: LlmConfig, shards: Shards) -> None:
    """Cut the model in place to what this rank holds; raises PreconditionError where it cannot be cut so."""
    if shards.count == 1:
        return
    _refuse_uneven(config, shards)
    plan = _plan(model)
    done: dict[int, Any] = {}
    for name, module in list(model.named_modules()):
        style = _style(plan, name)
        if style is not None:
            _CUTS[style](_Cut(name=name, module=module, config=config, shards=shards, done=done))
        for own in list(module._parameters):
            style = _style(plan, f"{name}.{own}")
            if style is not None:
                _cut_experts(module, own, style, shards)
    _tell_modules(model, config, shards)


def _plan(model: Any) -> dict[str, str]:
    model_type = model.config.model_type
    plan = _OWN_PLANS.get(model_type) or dict(getattr(model, "_tp_plan", None) or {})
    unknown = sorted(set(plan.values()) - set(_CUTS))
    if unknown or "rowwise" not in plan.values():
        why = f"its plan has {', '.join(unknown)}" if unknown else "transformers has no plan for it"
        raise PreconditionError(f"model_type {model_type!r} cannot be cut into parts ({why}): {INSTEAD}")
    return plan


def _refuse_uneven(config: LlmConfig, shards: Shards) -> None:
    a = config.architecture
    kv_heads, inner_size = a.head_count, a.inner_size
    if not isinstance(a, T5Architecture):
        kv_heads = a.key_value_head_count
        inner_size = a.experts.expert_inner_size if a.experts is not None else a.inner_size
    problems = []
    if a.head_count % shards.count:
        problems.append(f"{a.head_count} heads")
    if kv_heads % shards.count and shards.count % kv_heads:
        problems.append(f"{kv_heads} key/value heads")
    if inner_size % shards.count:
        problems.append(f"a feed-forward width of {inner_size}")
    if problems:
        raise PreconditionError(f"{' and '.join(problems)} cannot be shared by {shards.count} GPUs: {INSTEAD}")


def _style(plan: dict[str, str], name: str) -> str | None:
    for pattern, style in plan.items():
        anything = ".*" if pattern.startswith("*") else "[^.]+"
        if re.fullmatch(re.escape(pattern).replace(r"\*", anything), name):
            return style
    return None


def _leave(cut: _Cut) -> None:
    """Every rank has it whole."""
    del cut


def _by_rows(cut: _Cut) -> None:
    """Each rank computes its part of the outputs."""
    rows = cut.shards.part(cut.module.weight.shape[0])
    if cut.name.endswith(("k_proj", "v_proj")):
        kv_heads = cut.config.architecture.key_value_head_count  # type: ignore[union-attr]
        head_size = cut.module.weight.shape[0] // kv_heads
        heads = key_value_heads_of_rank(kv_heads, cut.shards)
        rows = slice(heads.start * head_size, heads.stop * head_size)
    cut.keep("weight", rows)
    cut.keep("bias", rows)


def _by_columns(cut: _Cut) -> None:
    """Each rank sums over its part of the inputs; the bias is added once, to the sum of all."""
    module, shards = cut.module, cut.shards
    cut.keep("weight", slice(None), shards.part(module.weight.shape[1]))
    bias = module._parameters.get("bias")
    module.register_parameter("bias_of_sum", bias)
    if bias is not None:
        module._parameters["bias"] = None

    def add_up(module: Any, _: Any, output: Any) -> Any:
        shards.all_reduce(output)
        return output if module.bias_of_sum is None else output.add_(module.bias_of_sum)

    module.register_forward_hook(add_up)


def _by_rows_gathered(cut: _Cut) -> None:
    """Each rank computes its part of the outputs, and all are told all of them."""
    shards, size = cut.shards, cut.module.weight.shape[0]
    own = shards.part(size)
    cut.keep("weight", own)
    cut.keep("bias", own)

    def gather(_: Any, __: Any, output: Any) -> Any:
        whole = output.new_zeros((*output.shape[:-1], size))
        whole[..., own] = output
        shards.all_reduce(whole)
        return whole

    cut.module.register_forward_hook(gather)


def _by_vocabulary(cut: _Cut) -> None:
    """Each rank looks up the tokens that it has; what others have it takes for zero."""
    module, shards = cut.module, cut.shards
    own = shards.part(module.weight.shape[0])
    cut.keep("weight", own)

    def look_up(ids: Any) -> Any:
        elsewhere = (ids < own.start) | (ids >= own.stop)
        found = torch.nn.functional.embedding((ids - own.start).masked_fill_(elsewhere, 0), module.weight)
        found.masked_fill_(elsewhere.unsqueeze(-1), 0)
        shards.all_reduce(found)
        return found

    module.forward = look_up


def _by_last_columns(cut: _Cut) -> None:
    """Each rank has the columns of its heads."""
    cut.keep("weight", slice(None), cut.shards.part(cut.module.weight.shape[1]))


def _queries_by_rows(cut: _Cut) -> None:
    """StarCoder's joint projection: queries are shared out, the one key/value head is everybody's."""
    a = cut.config.architecture
    size = a.head_count * a.head_size
    total = cut.module.weight.shape[0]
    if total == 3 * size:
        _by_rows(cut)
        return
    own = cut.shards.part(size)
    rows = torch.cat([torch.arange(own.start, own.stop), torch.arange(size, total)])
    cut.keep("weight", rows.to(cut.module.weight.device))
    cut.keep("bias", rows.to(cut.module.weight.device))


def _sum_experts(cut: _Cut) -> None:
    """Each rank has a part of every expert."""
    shards = cut.shards  # the cut itself holds the whole parameters, and the hook lives on

    def add_up(_: Any, __: Any, output: Any) -> Any:
        shards.all_reduce(output)
        return output

    cut.module.register_forward_hook(add_up)


def _cut_experts(module: Any, name: str, style: str, shards: Shards) -> None:
    """Cut a parameter of all experts, [experts, outputs, inputs]."""
    whole = module._parameters[name].data
    if style == "packed_colwise":
        part = torch.cat([half[:, shards.part(half.shape[1])] for half in whole.chunk(2, dim=1)], dim=1)
    else:
        part = whole[..., shards.part(whole.shape[-1])].clone()
    module._parameters[name] = torch.nn.Parameter(part, requires_grad=False)


_CUTS: dict[str, Callable[[_Cut], None]] = {
    "colwise": _by_rows,
    "rowwise": _by_columns,
    "colwise_gather_output": _by_rows_gathered,
    "embedding_rowwise": _by_vocabulary,
    "replicated_with_grad_allreduce": _leave,
    "packed_colwise": _leave,
    "moe_tp_experts": _sum_experts,
    "heads_last": _by_last_columns,
    "queries_first": _queries_by_rows,
}


def _tell_modules(model: Any, config: LlmConfig, shards: Shards) -> None:
    """Correct the counts of heads that attention reads from its own attributes."""
    a = config.architecture
    heads = a.head_count // shards.count
    kv_heads = a.head_count if isinstance(a, T5Architecture) else a.key_value_head_count
    own_kv_heads = len(key_value_heads_of_rank(kv_heads, shards))
    for module in model.modules():
        if hasattr(module, "num_key_value_groups"):
            module.num_key_value_groups = heads // own_kv_heads
        if hasattr(module, "n_heads"):
            module.n_heads, module.inner_dim = heads, heads * a.head_size
        if hasattr(module, "kv_dim"):
            module.num_heads, module.embed_dim = heads, heads * a.head_size
