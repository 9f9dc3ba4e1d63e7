"""Gradients of every method against formulas written here, from what flows through its slots.

Hooks catch each slot's input x, output y, bias and result, and the gradient G of the result. All in
double precision, to 1e-8.
"""

import pytest
import torch
from torch import Tensor

from graftwerk.adapters import (
    BottleneckConfig,
    IA3Config,
    LoRAConfig,
    PrefixTuningConfig,
    PromptTuningConfig,
    PTuningConfig,
    SelectiveConfig,
)
from tests.graftwerk.adapters.test_prompts import make, run

SHAPES = ("gpt2", "llama", "t5", "bert")


def caught(config, shape: str):
    """Backward through a model with the adapter: what each of its parts saw."""
    model = make(shape, a=config).double()
    if model.head_of("a") is not None:
        model.head = model.head.own  # a head in float32 has no double precision
    model.freeze_base()
    model.set_active("a")
    seen = []

    def watch(part, args, result):
        if not result.requires_grad:  # the embeddings of a T5's decoder have no prompt
            return
        result.retain_grad()
        call = args[0]
        detached = {"input": call.input, "bias": call.bias}
        seen.append((part, call.output.detach(), detached, result))

    for _, _, part in model.parts("a"):
        part.register_forward_hook(watch)
    scores = run(model)
    weights = torch.randn(scores.shape, generator=torch.Generator().manual_seed(3)).double()
    (scores * weights)[scores.isfinite()].sum().backward()
    assert seen
    return [(part, part.site, y, given, result.grad) for part, y, given, result in seen], model


def check(part, expected: dict[str, Tensor]) -> None:
    """All parameters of a part have the gradients of the formula."""
    own = dict(part.named_parameters())
    assert own.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(own[name].grad, value, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("variant", ["nemo", "canonical"])
@pytest.mark.parametrize("stabilised", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_lora(shape, stabilised, variant):
    config = LoRAConfig(
        dim=3, alpha=7, target_modules=("all",), variant=variant, rank_stabilised=stabilised
    )
    scale = 7 / (3**0.5 if stabilised else 3)
    calls, _ = caught(config, shape)
    for part, _, _, kwargs, grad in calls:
        a, b, x = part.linear_in.weight, part.linear_out.weight, kwargs["input"]
        inner = torch.einsum("bsi,ri->bsr", x, a)
        expected = {
            "linear_in.weight": scale * torch.einsum("bso,or,bsi->ri", grad, b, x),
            "linear_out.weight": scale * torch.einsum("bso,bsr->or", grad, inner),
        }
        check(part, expected)


def rows_of(site, config, linear) -> tuple[Tensor, Tensor | None]:
    """Weight and bias of a slot's projection, picked row by row out of the fused one."""
    d, heads = config.kv_channels, config.num_attention_heads // config.num_query_groups

    def place(row: int) -> str:
        """The slot that a row belongs to, where slots share a projection."""
        if site.name in ("query", "key", "value"):
            block = row // d % (heads + 2)
            return "query" if block < heads else ("key", "value")[block - heads]
        if site.name in ("cross_key", "cross_value"):
            return ("cross_key", "cross_value")[row // d % 2]
        if site.name in ("gate", "up"):
            return "up" if row >= config.ffn_hidden_size else "gate"
        return site.name

    index = [row for row in range(len(linear.weight)) if place(row) == site.name]
    return linear.weight[index], None if linear.bias is None else linear.bias[index]


LINEAR = {
    "qkv": "linear_qkv",
    "query": "linear_qkv",
    "key": "linear_qkv",
    "value": "linear_qkv",
    "output": "linear_proj",
    "cross_query": "linear_q",
    "cross_key": "linear_kv",
    "cross_value": "linear_kv",
    "cross_output": "linear_proj",
    "fc1": "linear_fc1",
    "gate": "linear_fc1",
    "up": "linear_fc1",
    "fc2": "linear_fc2",
}


@pytest.mark.parametrize("variant", ["nemo", "canonical"])
@pytest.mark.parametrize("shape", SHAPES)
def test_dora_whose_row_lengths_are_constants(shape, variant):
    config = LoRAConfig(dim=3, alpha=6, target_modules=("all",), variant=variant, dora=True)
    calls, model = caught(config, shape)
    owners = {id(part): path.rpartition(".")[0] for path, _, part in model.parts("a")}
    for part, site, y, kwargs, grad in calls:
        a, b, x = part.linear_in.weight, part.linear_out.weight, kwargs["input"]
        linear = getattr(model.get_submodule(owners[id(part)]), LINEAR[site.name])
        weight, bias = rows_of(site, model.config, linear)
        made = torch.einsum("bsi,oi->bso", x, weight)
        torch.testing.assert_close(y, made if bias is None else made + bias)
        moved = weight + 2 * b @ a
        length = moved.square().sum(1).sqrt()
        gain = part.magnitude / length
        inner = torch.einsum("bsi,ri->bsr", x, a)
        expected = {
            "magnitude": torch.einsum("bso,oi,bsi->o", grad, moved, x) / length,
            "linear_in.weight": 2 * torch.einsum("bso,o,or,bsi->ri", grad, gain, b, x),
            "linear_out.weight": 2 * torch.einsum("bso,o,bsr->or", grad, gain, inner),
        }
        check(part, expected)


@pytest.mark.parametrize("shape", SHAPES)
def test_ia3(shape):
    calls, _ = caught(IA3Config(), shape)
    for part, _, y, _, grad in calls:
        check(part, {"scalers": torch.einsum("bsf,bsf->f", grad, y)})


@pytest.mark.parametrize("position", ["pre", "post"])
@pytest.mark.parametrize("shape", SHAPES)
def test_bottlenecks(shape, position):
    calls, _ = caught(BottleneckConfig(dim=4, norm_position=position), shape)
    for part, _, y, kwargs, grad in calls:
        down, up = part.linear_in.weight, part.linear_out.weight
        scale, shift = part.layer_norm.weight, part.layer_norm.bias
        x = y if kwargs["bias"] is None else y - kwargs["bias"]
        entering = normalised(x)[0] * scale + shift if position == "pre" else x
        z = torch.einsum("bsh,dh->bsd", entering, down)
        gate = 1 / (1 + torch.exp(-z))
        leaving = torch.einsum("bsd,hd->bsh", z * gate, up)
        d_leaving = grad
        norm = {}
        if position == "post":
            unit, deviation = normalised(leaving)
            norm = {"weight": (grad * unit).sum((0, 1)), "bias": grad.sum((0, 1))}
            g = grad * scale
            mean, along = g.mean(-1, keepdim=True), (g * unit).mean(-1, keepdim=True)
            d_leaving = (g - mean - unit * along) / deviation
        d_z = torch.einsum("bsh,hd->bsd", d_leaving, up) * gate * (1 + z * (1 - gate))
        if position == "pre":
            d_entering = torch.einsum("bsd,dh->bsh", d_z, down)
            norm["weight"] = (d_entering * normalised(x)[0]).sum((0, 1))
            norm["bias"] = d_entering.sum((0, 1))
        expected = {
            "linear_in.weight": torch.einsum("bsd,bsh->dh", d_z, entering),
            "linear_out.weight": torch.einsum("bsh,bsd->hd", d_leaving, z * gate),
            "layer_norm.weight": norm["weight"],
            "layer_norm.bias": norm["bias"],
        }
        check(part, expected)


def normalised(x: Tensor) -> tuple[Tensor, Tensor]:
    """Rows with mean 0 and variance 1, and the deviations that they were divided by."""
    centred = x - x.sum(-1, keepdim=True) / x.shape[-1]
    deviation = ((centred**2).sum(-1, keepdim=True) / x.shape[-1] + 1e-5) ** 0.5
    return centred / deviation, deviation


@pytest.mark.parametrize("shape", ["llama", "t5", "bert"])
def test_prompt_tuning(shape):
    calls, _ = caught(PromptTuningConfig(virtual_tokens=3), shape)
    part, _, _, _, grad = calls[0]
    check(part, {"embedding": grad[:, :3].sum(0)})


@pytest.mark.parametrize("shape", ["llama", "t5", "bert"])
def test_p_tuning_with_an_mlp(shape):
    calls, _ = caught(PTuningConfig(virtual_tokens=3, embedding_dim=8, bottleneck_dim=6), shape)
    part, _, _, _, grad = calls[0]
    d_vectors = grad[:, :3].sum(0)
    z = torch.einsum("ve,be->vb", part.embedding, part.first.weight) + part.first.bias
    c, k = (2 / torch.pi) ** 0.5, 0.044715  # gelu by tanh: Hendrycks and Gimpel 2016
    t = torch.tanh(c * (z + k * z**3))
    inner = 0.5 * z * (1 + t)
    slope = 0.5 * (1 + t) + 0.5 * z * (1 - t**2) * c * (1 + 3 * k * z**2)
    d_z = torch.einsum("vh,hb->vb", d_vectors, part.second.weight) * slope
    expected = {
        "embedding": torch.einsum("vb,be->ve", d_z, part.first.weight),
        "first.weight": torch.einsum("vb,ve->be", d_z, part.embedding),
        "first.bias": d_z.sum(0),
        "second.weight": torch.einsum("vh,vb->hb", d_vectors, inner),
        "second.bias": d_vectors.sum(0),
    }
    check(part, expected)


def test_p_tuning_with_an_lstm():
    """The forward pass again, gate by gate; its gradients by autograd."""
    config = PTuningConfig(virtual_tokens=3, embedding_dim=8, encoder="lstm")
    calls, _ = caught(config, "llama")
    part, _, _, _, grad = calls[0]
    w = {name: p.detach().clone().requires_grad_() for name, p in part.named_parameters()}

    def one_way(x: Tensor, suffix: str) -> Tensor:
        h = c = x.new_zeros(4)
        states = []
        for row in x:
            gates = row @ w[f"lstm.weight_ih_{suffix}"].T + w[f"lstm.bias_ih_{suffix}"]
            gates = gates + h @ w[f"lstm.weight_hh_{suffix}"].T + w[f"lstm.bias_hh_{suffix}"]
            enter, forget, new, leave = gates.chunk(4)
            c = forget.sigmoid() * c + enter.sigmoid() * new.tanh()
            h = leave.sigmoid() * c.tanh()
            states.append(h)
        return torch.stack(states)

    x = w["embedding"]
    for layer in ("l0", "l1"):
        back = one_way(x.flip(0), f"{layer}_reverse").flip(0)
        x = torch.cat([one_way(x, layer), back], 1)
    inner = (x @ w["first.weight"].T + w["first.bias"]).clamp(min=0)
    vectors = inner @ w["second.weight"].T + w["second.bias"]
    vectors.backward(grad[:, :3].sum(0))
    check(part, {name: value.grad for name, value in w.items()})


@pytest.mark.parametrize("shape", ["llama", "t5"])
def test_plain_prefixes(shape):
    calls, _ = caught(PrefixTuningConfig(prefix_length=3, reparametrise=False), shape)
    for part, _, _, _, grad in calls:
        check(part, {"rows": grad.sum(0)})


@pytest.mark.parametrize("shape", ["llama", "t5"])
def test_prefixes_of_a_network_that_layers_share(shape):
    calls, _ = caught(PrefixTuningConfig(prefix_length=3, bottleneck_dim=6), shape)
    shared: dict[int, dict[str, Tensor]] = {}
    for part, _, _, _, grad in calls:
        encoder, last = part.encoder, part.linear_out
        hidden = torch.tanh(encoder.embedding @ encoder.linear_in.weight.T + encoder.linear_in.bias)
        d_rows = grad.sum(0)
        torch.testing.assert_close(last.weight.grad, d_rows.T @ hidden, rtol=1e-8, atol=1e-8)
        torch.testing.assert_close(last.bias.grad, d_rows.sum(0), rtol=1e-8, atol=1e-8)
        d_z = (d_rows @ last.weight) * (1 - hidden**2)
        each = {
            "embedding": d_z @ encoder.linear_in.weight,
            "linear_in.weight": d_z.T @ encoder.embedding,
            "linear_in.bias": d_z.sum(0),
        }
        total = shared.setdefault(id(encoder.embedding), {})
        for name, value in each.items():
            total[name] = total.get(name, 0) + value
    for part, *_ in calls:
        check(part.encoder, shared[id(part.encoder.embedding)])


def test_selective_tuning_of_a_projection():
    model = make("llama", a=SelectiveConfig(parameters=("*.1.mlp.linear_fc2.weight",))).double()
    model.freeze_base()
    model.set_active("a")
    seen = []

    def watch(module, args, result):
        result.retain_grad()
        seen.append((args[0].detach(), result))

    model.get_submodule("decoder.layers.1.mlp.linear_fc2").register_forward_hook(watch)
    run(model).sin().sum().backward()
    ((x, result),) = seen
    (copy,) = model.replacements.of("a").values()
    expected = torch.einsum("bso,bsi->oi", result.grad, x)
    torch.testing.assert_close(copy.grad, expected, rtol=1e-8, atol=1e-8)
