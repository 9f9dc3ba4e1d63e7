"""A tree of tokens in one row against its branches in rows of their own."""

import pytest
import torch

from graftwerk.adapters import BottleneckConfig, LoRAConfig, Stack
from graftwerk.training.loss import label_losses
from tests.graftwerk.tiny import SHAPES, shake, tiny_gpt


@pytest.mark.parametrize("shape", SHAPES)
def test_two_branches_of_a_tree_give_the_loss_and_gradients_of_plain_rows(shape: str):
    # trunk 1 2 3, branches (4 5) and (4 6 7); label 4 follows token 3 in both, so it occurs twice,
    # and the token 4 at the second branch has another child than at the first.
    row = torch.tensor([[1, 2, 3, 4, 5, 4, 6, 7]])
    positions = torch.tensor([[0, 1, 2, 3, 4, 3, 4, 5]])
    end = torch.tensor([[8, 8, 8, 5, 5, 8, 8, 8]])
    at, labels = torch.tensor([2, 2, 3, 5, 6]), torch.tensor([4, 4, 5, 6, 7])
    tree = adapted(shape)
    loss = label_losses(tree(row, positions, end, select=at), labels, torch.ones(5)).sum()
    loss.backward()

    plain = adapted(shape)
    for branch in ([1, 2, 3, 4, 5], [1, 2, 3, 4, 6, 7]):
        tokens = torch.tensor([branch])
        logits = plain(tokens[:, :-1])[0, 2:]
        branch_loss = torch.nn.functional.cross_entropy(logits, tokens[0, 3:], reduction="sum")
        branch_loss.backward()
        loss = loss - branch_loss.detach()

    torch.testing.assert_close(loss.detach(), torch.zeros(()), rtol=0, atol=1e-5)
    for name, parameter in plain.named_parameters():
        if parameter.requires_grad:
            other = tree.get_parameter(name).grad
            torch.testing.assert_close(other, parameter.grad, rtol=1e-4, atol=1e-5)


def adapted(shape: str):
    model = tiny_gpt(SHAPES[shape])
    model.add_adapter("a", BottleneckConfig(dim=4))
    model.add_adapter("b", LoRAConfig(dim=4))
    for name in ("a", "b"):
        for _, _, part in model.parts(name):
            shake(part)
    model.freeze_base()
    model.set_active(Stack("a", "b"))
    return model
