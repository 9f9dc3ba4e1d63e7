"""Methods in their slots on every kind of model, and one training step of each in float64."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor
from torch.nn import functional as F

from graftwerk.adapters import (
    Average,
    BatchSplit,
    BottleneckConfig,
    Composition,
    Fuse,
    IA3Config,
    LoRAConfig,
    Parallel,
    PrefixTuningConfig,
    PromptTuningConfig,
    PTuningConfig,
    SelectiveConfig,
    Split,
    Stack,
)
from graftwerk.adapters.configs import (
    BnConfig,
    HubLoRAConfig,
    HubMTLLoRAConfig,
    MethodConfig,
    ReftConfig,
    UnionConfig,
)
from graftwerk.models import BERT, GPT, T5, TransformerConfig, build_model
from graftwerk.parallel.vocabulary import split_logits
from tests.graftwerk.models.test_encoders import BERT_SHAPE, CONFIGS
from tests.graftwerk.tiny import GPT2, LLAMA, shake, tokens

SHAPES: dict[str, TransformerConfig] = {
    "gpt2": replace(GPT2, num_layers=2),
    "llama": replace(LLAMA, num_layers=2, qk_layernorm=True),
    "t5": replace(CONFIGS["t5"], num_layers=1, decoder_num_layers=1),
    "native_t5": replace(CONFIGS["native_t5"], num_layers=1, decoder_num_layers=2),
    "bert": BERT_SHAPE,
}
BN = BnConfig(mh_adapter=True, cross_adapter=True, reduction_factor=8)
GATED = replace(BN, is_parallel=True, use_gating=True)
PREFIX = PrefixTuningConfig(prefix_length=2, bottleneck_dim=6)
HUB_PLACES = ("query", "value", "output", "cross_query", "cross_output", "fc1", "fc2")


@dataclass
class Case:
    """Adapters by name, what is active (None: all of them, one after the other), and fusions.

    `packed`: rows hold several texts.
    """

    adapters: dict[str, MethodConfig]
    active: Composition | str | None = None
    fusions: tuple[str, ...] = field(default=())
    packed: bool = False


def hub(**settings) -> HubLoRAConfig:
    return HubLoRAConfig(**{"r": 3, "places": HUB_PLACES, **settings})


ONE_ADAPTER: dict[str, MethodConfig] = {
    "lora_fused": LoRAConfig(dim=3, alpha=6, target_modules=("all",)),
    "lora_apart": LoRAConfig(dim=3, target_modules=("all",), variant="canonical"),
    "lora_tied": LoRAConfig(
        dim=3, weight_tying=True, position_embedding_strategy="concat", rank_stabilised=True
    ),
    "dora": LoRAConfig(dim=3, target_modules=("all",), dora=True),
    "hub_lora": hub(use_gating=True),
    "hub_dora": hub(use_dora=True),
    "vera": hub(vera_d=0.5, vera_b=0.5, init_weights="vera"),
    "vera_dora": hub(vera_d=0.5, vera_b=0.5, init_weights="vera", use_dora=True, use_gating=True),
    "mtl_lora": HubMTLLoRAConfig(r=3, places=HUB_PLACES, n_up_projection=2),
    "ia3": IA3Config(),
    "ia3_everywhere": IA3Config(places=("query", "key", "output", "cross_output", "fc1", "fc2")),
    "hub_ia3": hub(r=1, composition_mode="scale", init_weights="ia3"),
    "hub_ia3_gated": hub(r=1, composition_mode="scale", init_weights="ia3", use_gating=True),
    "bottleneck": BottleneckConfig(dim=5),
    "bn": replace(BN, original_ln_before=True, scaling="channel", ln_before=True),
    "bn_parallel": GATED,
    "compacter": replace(BN, phm_layer=True, phm_init_range=1.0),
    "invertible": replace(BN, inv_adapter="nice"),
    "prompt": PromptTuningConfig(virtual_tokens=3),
    "ptuning": PTuningConfig(virtual_tokens=3, embedding_dim=8, encoder="lstm"),
    "prefix": PREFIX,
    "prefix_flat": replace(PREFIX, reparametrise=False, use_gating=True, shared_gating=False),
    "unipelt": UnionConfig(
        configs=(
            hub(use_gating=True),
            replace(PREFIX, use_gating=True),
            replace(BN, use_gating=True),
        )
    ),
    "reft": ReftConfig(r=2, prefix_positions=2, suffix_positions=2, dropout=0.0),
    "selective": SelectiveConfig(parameters=("*linear_*", "*layernorm*", "*embedding*", "*weight")),
}
TWO: dict[str, MethodConfig] = {"a": BN, "b": replace(BN, original_ln_before=True)}
LORAS: dict[str, MethodConfig] = {
    "a": LoRAConfig(dim=2, target_modules=("all",)),
    "b": UnionConfig(configs=(BottleneckConfig(dim=4), IA3Config())),
}
CASES = {name: Case({"a": config}) for name, config in ONE_ADAPTER.items()} | {
    "fuse": Case(TWO, Fuse("a", "b"), ("a,b",)),
    "stack": Case({**LORAS, "c": PREFIX, "d": PromptTuningConfig(virtual_tokens=2)}),
    "parallel": Case(LORAS, Stack(Parallel("a", "b"))),
    "split": Case(LORAS, Split("a", "b", splits=[4, 5])),
    "batch_split": Case(LORAS, BatchSplit("a", "b", batch_sizes=[1, 1])),
    "average": Case(TWO, Average("a", "b", weights=[0.3, 0.7])),
    "packed_gates": Case({"a": GATED, "b": hub(use_gating=True)}, packed=True),
    "packed_split": Case(LORAS, Split("a", "b", splits=[2, 2]), packed=True),
}
SOURCE, TARGET = tokens(2, 9), tokens(2, 7, seed=1)
DOCUMENTS = torch.tensor([[0] * 9, [0] * 6 + [-1] * 3])
SOURCES = torch.tensor([[0] * 5 + [1] * 4, [0] * 3 + [1] * 4 + [-1] * 2])
TARGETS = torch.tensor([[0] * 3 + [1] * 4, [0] * 2 + [1] * 3 + [-1] * 2])
Model = GPT | T5 | BERT


def make(shape: str, case: Case) -> Model:
    """A model with a case's adapters, all away from their birth values and trained."""
    torch.manual_seed(0)
    model = build_model(SHAPES[shape]).double()
    shake(model)
    for seed, (name, config) in enumerate(case.adapters.items()):
        model.add_adapter(name, config, head=False)  # which would compute in float32
        for _, _, part in model.parts(name):
            shake(part.double(), seed + 1)
    for key in case.fusions:
        model.add_fusion(key)
        for _, _, layer in model.fusion_layers(key):
            shake(layer.double(), 7)
    model.train_only(case.adapters, case.fusions)
    active = case.active or Stack(*case.adapters)
    model.set_active(active)
    return model.eval()


def run(model: Model, packed: bool = False) -> Tensor:
    """The answer to two rows, of an encoder's the second padded; or to two texts in each."""
    if packed and isinstance(model, T5):
        targets = placed(TARGETS)
        return model(TARGET, *targets, source=SOURCE, source_documents=SOURCES, documents=TARGETS)
    if packed and isinstance(model, GPT):
        return model(SOURCE, *placed(SOURCES), documents=SOURCES)
    if isinstance(model, T5):
        return model(TARGET, source=SOURCE, source_documents=DOCUMENTS)
    return model(SOURCE, documents=DOCUMENTS) if isinstance(model, BERT) else model(SOURCE)


def placed(documents: Tensor) -> tuple[Tensor, Tensor]:
    """The positions and ends of texts that lie side by side."""
    same = (documents[:, :, None] == documents[:, None, :]) & (documents >= 0)[:, None]
    index = torch.arange(documents.shape[1])
    end = torch.where(documents >= 0, (same * (index + 1)).amax(-1), index + 1)
    return same.tril(-1).sum(-1), end


def loss(model: Model, packed: bool = False) -> Tensor:
    """A scalar that all of a model's answer takes part in."""
    with split_logits(model) as vocabulary:
        answer = run(model, packed)
    extra = model.fusion_loss()
    if isinstance(model, BERT):
        return answer[answer.isfinite()].square().mean() + extra
    labels = (TARGET if isinstance(model, T5) else SOURCE).roll(-1, 1).repeat(model.width, 1)
    answer, labels = answer.flatten(0, 1), labels.flatten()
    if vocabulary is not None:
        return vocabulary.losses(answer, labels).mean() + extra
    return F.cross_entropy(answer, labels) + extra


def trained(model: Model) -> dict[str, torch.nn.Parameter]:
    """What is trained, by name."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def step(
    model: Model,
    reduce: Callable[[Iterable[torch.nn.Parameter]], None],
    packed: bool = False,
) -> Tensor:
    """One backward pass and one plain SGD step; returns the loss."""
    value = loss(model, packed)
    value.backward()
    reduce(trained(model).values())
    torch.optim.SGD(trained(model).values(), lr=0.1).step()
    return value.detach()
