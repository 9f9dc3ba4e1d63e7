"""Tiny random models for tests."""

import torch

from graftwerk.models import GPT, TransformerConfig

GPT2 = TransformerConfig(
    vocab_size=61,
    num_layers=3,
    hidden_size=32,
    num_attention_heads=4,
    ffn_hidden_size=48,
    max_position_embeddings=64,
)
LLAMA = TransformerConfig(
    vocab_size=61,
    num_layers=3,
    hidden_size=32,
    num_attention_heads=4,
    num_query_groups=2,
    ffn_hidden_size=48,
    max_position_embeddings=64,
    normalization="rmsnorm",
    position_embedding_type="rope",
    activation="swiglu",
    bias=False,
    qkv_bias=False,
    share_embeddings_and_output_weights=False,
)
SHAPES = {"gpt2": GPT2, "llama": LLAMA}


def tiny_gpt(shape: TransformerConfig = LLAMA, seed: int = 0) -> GPT:
    """A random model in eval mode, every weight and bias away from its birth value.

    Seeds torch, so that parts which are added next are the same in every process too.
    """
    torch.manual_seed(seed)
    model = GPT(shape)
    shake(model, seed)
    return model.eval()


def shake(module: torch.nn.Module, seed: int = 0) -> None:
    """Adds noise to every parameter, so that none is zero or one."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.add_(0.1 * noise)


def tokens(rows: int = 2, length: int = 12, vocabulary: int = 61, seed: int = 0) -> torch.Tensor:
    """Random ids [rows, length]."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, vocabulary, (rows, length), generator=generator)
