"""How often tensor-parallel ranks exchange something in one training pass: the declared table.

| what | forward | backward |
|---|---|---|
| a sublayer | 1 all-reduce | 1 all-reduce |
| ... with split rows | 1 all-gather, 1 reduce-scatter | the same |
| a stack of layers with split rows | 1 all-gather | 1 all-gather |
| word embeddings, once a stack | 1 all-reduce | |
| logits and their loss | 2 all-reduces of [N] and [2, N] | 1 all-reduce |
| a T5's encoder states | | 1 all-reduce |
| a part | what its `collectives` says | what its `collectives` says |

Backward, a sublayer into which nothing flows that has a gradient sends nothing. Gradients of
parameters whose ranks have summands take one more all-reduce a step, all of them together
(`shares.sum_partial_gradients`).
"""

from collections import Counter
from dataclasses import dataclass, field

from graftwerk.adapters.composition import names
from graftwerk.adapters.part import Collectives
from graftwerk.models import BERT, GPT, T5
from graftwerk.models.attention import Attention, CrossAttention
from graftwerk.models.layers import MLP
from graftwerk.parallel.tensor import GroupRanks


@dataclass
class Traffic:
    """Numbers of `all_reduce`, `all_gather` and `reduce_scatter`, of a pass each way."""

    forward: Counter[str] = field(default_factory=Counter)
    backward: Counter[str] = field(default_factory=Counter)


def of_part(model: GPT | T5 | BERT, name: str) -> dict[str, Collectives]:
    """What each part of an adapter sends, by the path of its slot; those that send nothing too."""
    sequence = isinstance(model.ranks, GroupRanks) and model.ranks.sequence
    return {path: part.collectives(slot.site, sequence) for path, slot, part in model.parts(name)}


def of_base(model: GPT | T5 | BERT) -> Traffic:
    """What a split model sends without adapters, its logits split and gradients everywhere."""
    traffic = Traffic()
    if not isinstance(model.ranks, GroupRanks):
        return traffic
    kinds = (Attention, CrossAttention, MLP)
    sublayers = sum(isinstance(module, kinds) for module in model.modules())
    stacks = 2 if isinstance(model, T5) else 1
    for way in (traffic.forward, traffic.backward):
        if model.ranks.sequence:
            way.update(all_gather=sublayers + stacks, reduce_scatter=sublayers)
        else:
            way.update(all_reduce=sublayers)
    if not isinstance(model, BERT):  # whose words are whole
        traffic.forward.update(all_reduce=stacks + 2)
        traffic.backward.update(all_reduce=1)
    if isinstance(model, T5):
        traffic.backward.update(all_reduce=1)
    return traffic


def of_pass(model: GPT | T5 | BERT) -> Traffic:
    """What the model sends with its active adapters, of which each part is called once."""
    traffic = of_base(model)
    for name in names(model.active):
        for sent in of_part(model, name).values():
            traffic.forward.update(all_reduce=len(sent.forward))
            traffic.backward.update(all_reduce=len(sent.backward))
    return traffic
