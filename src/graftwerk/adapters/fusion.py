"""AdapterFusion: a trained attention over what several adapters add in a slot.

Pfeiffer et al. 2021, arXiv:2005.00247, section 3.2. Query: what goes into the last adapter. Keys
and values: what each adapter would add.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from graftwerk.adapters.masks import Dropout
from graftwerk.adapters.part import PartLinear
from graftwerk.adapters.ranks import ALONE, Ranks
from graftwerk.adapters.slots import Action, Flow, Site, SlotCall
from graftwerk.errors import UserError

# AdapterHub's words for the slots that hold bottlenecks.
LOCATIONS = {
    "attention_output": "mh_adapter",
    "cross_attention_output": "cross_adapter",
    "mlp_output": "output_adapter",
}


class Start(NamedTuple):
    """Where a bottleneck begins, each [B, S, h].

    `inner` goes into it, `residual` is added to what comes out, `query` asks a fusion's question.
    """

    inner: Tensor
    residual: Tensor
    query: Tensor


class Fusable(Protocol):
    """A part that can be fused: its `forward` is `finish(begin().residual + update())`."""

    adapter: str

    def begin(self, call: SlotCall, query_before_norm: bool | None = None) -> Start:
        """What goes in; `query_before_norm` says which state is the query."""
        ...

    def update(self, call: SlotCall, z: Tensor) -> Tensor:
        """What is added for an input z [B, S, h], without the residual."""
        ...

    def finish(self, call: SlotCall, hidden: Tensor) -> Tensor:
        """The slot's output; sets `call.joined` where it is the layer's next state already."""
        ...


@dataclass(frozen=True, kw_only=True)
class FusionConfig:
    """AdapterHub's `AdapterFusionConfig`; as it is, "dynamic".

    `2 h (h + 1) + h h` trained parameters a slot, for hidden size h.

    Args:
        key, query, value: which of the three have a matrix.
        query_before_ln: the query is the sublayer's result, not what enters the adapter.
        regularization: `loss` holds the value matrix near the identity.
        residual_before: the residual joins keys and values, not the result.
        temperature: the softmax's falls from 50 to 1, by 0.05 with each backward pass (in a
            learning stage with each step).
        value_before_softmax: whether values pass their matrix before or after they are weighed. The
            two are the same number; it is kept for files.
        value_initialized: the value matrix is born near the identity.
        dropout_prob: of the scores, in training. None: none.

    Raises:
        UserError: for a `dropout_prob` that is no probability.
    """

    key: bool = True
    query: bool = True
    value: bool = True
    query_before_ln: bool = False
    regularization: bool = True
    residual_before: bool = False
    temperature: bool = False
    value_before_softmax: bool = True
    value_initialized: bool = True
    dropout_prob: float | None = None

    def __post_init__(self) -> None:
        if not 0 <= (self.dropout_prob or 0) <= 1:
            raise UserError(f"fusion: dropout_prob={self.dropout_prob}: must be from 0 to 1")

    @classmethod
    def named(cls, name: str) -> "FusionConfig":
        """The configuration that AdapterHub calls "dynamic" or "static" (without a value matrix).

        Raises:
            UserError: for another name.
        """
        if name not in ("dynamic", "static"):
            raise UserError(f"fusion {name!r} is not known: use 'dynamic' or 'static'")
        if name == "dynamic":
            return cls()
        return cls(value=False, regularization=False, value_initialized=False)

    def create(self, site: Site) -> "Fusion":
        """The fusion layer for a slot at this site."""
        return Fusion(site, self)


class Fusion(nn.Module):
    """`sum_n softmax(Q Wq . K_n Wk / T) V_n Wv + residual`; parameters as in AdapterHub's files.

    `name` is the fusion's, `a,b` for adapters a and b; the model sets it.
    """

    temperature: Tensor
    by_step = False  # whoever trains says when the temperature falls
    ranks: Ranks = ALONE  # those that find summands of its gradients

    def __init__(self, site: Site, config: FusionConfig):
        super().__init__()
        self.name = ""
        self.site = site
        self.config = config
        size = site.out_features
        self.query = self._matrix(size) if config.query else None
        self.key = self._matrix(size) if config.key else None
        self.value = self._matrix(size, bias=False) if config.value else None
        if self.value is not None and config.value_initialized:
            with torch.no_grad():
                self.value.weight.fill_(1e-6).fill_diagonal_(1.0)
        if config.temperature:
            self.register_buffer("temperature", torch.tensor(50.0))
        self.dropout = Dropout(config.dropout_prob or 0.0)

    @staticmethod
    def _matrix(size: int, bias: bool = True) -> PartLinear:
        linear = PartLinear(size, size, bias=bias)
        nn.init.normal_(linear.weight, std=0.02)
        if bias:
            nn.init.zeros_(linear.bias)
        return linear

    def forward(
        self, query: Tensor, updates: Tensor, residual: Tensor, flow: Flow | None = None
    ) -> tuple[Tensor, Tensor]:
        """The result [B, S, h] and the weights [B, S, N] of updates [B, S, N, h].

        The matrices act on the query and on the result, which are one for each token, rather than
        on the N updates: `q . (Wk u + b) = (Wk^T q) . u + q . b`, and the value matrix is linear.
        """
        if self.config.residual_before:
            updates = updates + residual[:, :, None]
        if self.query is not None:
            query = self.query(query)
        scores = 0.0
        if self.key is not None:
            weight, bias = self.key.weight.to(query.dtype), self.key.bias.to(query.dtype)
            query, scores = F.linear(query, weight.T), (query @ bias)[..., None]
        scores = self.dropout(torch.einsum("bsh,bsnh->bsn", query, updates) + scores, flow)
        weights = self._cooled(scores).softmax(-1)
        result = torch.einsum("bsn,bsnh->bsh", weights, updates)
        if self.value is not None:
            result = self.value(result)
        return (result if self.config.residual_before else result + residual), weights

    def _cooled(self, scores: Tensor) -> Tensor:
        """Scores over the temperature.

        It falls when their gradient comes by, or when whoever trains calls `cool` (`by_step`): not
        in the forward pass, which gradient checkpointing runs twice.
        """
        if not self.config.temperature:
            return scores
        if self.training and scores.requires_grad and not self.by_step:
            scores.register_hook(lambda gradient: self.cool())
        return scores / self.temperature.to(scores.dtype)

    def cool(self) -> None:
        """Lowers the temperature by a step."""
        self.temperature.sub_(0.05).clamp_(min=1.0)

    def loss(self) -> Tensor:
        """`0.01 ||I - Wv||^2`, or 0 without regularisation: a scalar."""
        if self.value is None or not self.config.regularization:
            return torch.zeros((), device=next(self.parameters(), torch.empty(0)).device)
        weight = self.value.weight
        identity = torch.eye(len(weight), dtype=weight.dtype, device=weight.device)
        return self.ranks.counted_once(0.01 * (identity - weight).square().sum())


def fuse(
    fusion: Fusion, members: Sequence[tuple[Action | None, Fusable]], call: SlotCall
) -> Tensor:
    """What a `Fuse` does in a slot; each member is (what a `Stack` runs before it, the part).

    The last part says what all of them see and what their sum is added to. In a `Stack` the first
    adapter takes that in the place of the sublayer's result; what the last adds is weighed.
    """
    final = members[-1][1]
    start = final.begin(call, fusion.config.query_before_ln)
    updates = []
    for before, part in members:
        inner = start.inner
        if before is not None:
            run = replace(call, output=inner, bias=None)
            run.output = before(run)
            inner = part.begin(run).inner
        updates.append(part.update(call, inner))
    hidden, weights = fusion(start.query, torch.stack(updates, -2), start.residual, call.flow)
    if call.flow.record is not None:
        site, weights = fusion.site, call.flow.row.columns(weights.detach())
        call.flow.record.note_fusion(fusion.name, site.layer, LOCATIONS[site.name], weights)
    return final.finish(call, hidden)
