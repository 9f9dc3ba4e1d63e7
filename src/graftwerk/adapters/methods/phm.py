"""Compacter's linear layers: sums of Kronecker products (Mahabadi et al. 2021, arXiv:2106.04647).

`H = sum_i kron(A_i, B_i)` (after Zhang et al. 2021, arXiv:2102.08597). The n rules A_i, each n x n,
can be one set for all layers; B_i can be of low rank.
"""

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from graftwerk.errors import UserError

if TYPE_CHECKING:
    from graftwerk.adapters.methods.bn import BnConfig

W_INITS = ("glorot-uniform", "glorot-normal", "normal", "phm")
RULE_INITS = ("normal", "uniform")


class PHMLinear(nn.Module):
    """`x H + b`, [..., in] -> [..., out], with n = `phm_dim`, r = `phm_rank`.

    Parameters (AdapterHub's names): `phm_rule` [n, n, n], or `phm_rule_left` [n, n, 1] and
    `phm_rule_right` [n, 1, n] (`factorized_phm_rule`); `W_left` [n, in / n, r] and `W_right`
    [n, r, out / n], or `W` [n, in / n, out / n] (not `factorized_phm_W`); `b` [out].

    Raises:
        UserError: where n does not divide a size.
    """

    phm_rule: nn.Parameter
    phm_rule_left: nn.Parameter
    phm_rule_right: nn.Parameter
    W: nn.Parameter
    W_left: nn.Parameter
    W_right: nn.Parameter

    def __init__(self, in_features: int, out_features: int, config: "BnConfig"):
        super().__init__()
        n, rank = config.phm_dim, config.phm_rank
        for size in (in_features, out_features):
            if size % n:
                raise UserError(
                    f"phm_dim={n} does not divide {size}: the hidden size and the hidden size "
                    f"divided by reduction_factor must be multiples of it"
                )
        self.features = in_features, out_features
        self.rules = ("phm_rule_left", "phm_rule_right")
        shapes = {"phm_rule_left": (n, n, 1), "phm_rule_right": (n, 1, n)}
        if not config.factorized_phm_rule:
            self.rules, shapes = ("phm_rule",), {"phm_rule": (n, n, n)}
        self.weights = ("W_left", "W_right") if config.factorized_phm_W else ("W",)
        if config.factorized_phm_W:
            shapes["W_left"] = (n, in_features // n, rank)
            shapes["W_right"] = (n, rank, out_features // n)
        else:
            shapes["W"] = (n, in_features // n, out_features // n)
        for name, shape in shapes.items():
            self.register_parameter(name, nn.Parameter(torch.empty(shape)))
        self.b = nn.Parameter(torch.zeros(out_features)) if config.phm_bias else None
        self.learns_rule = config.learn_phm
        self._initialise(config)

    @torch.no_grad()
    def _initialise(self, config: "BnConfig") -> None:
        own = not config.shared_phm_rule  # the two kinds of rules are born differently
        spread = 0.01 if own else config.phm_init_range
        bound = 0.01 if own else 1.0
        for name in self.rules:
            rule = self.get_parameter(name).requires_grad_(self.learns_rule)
            if config.phm_c_init == "normal":
                nn.init.normal_(rule, std=spread)
            else:
                nn.init.uniform_(rule, -bound, bound)
        for name in self.weights:
            for matrix in self.get_parameter(name):
                if config.hypercomplex_nonlinearity == "normal":
                    nn.init.normal_(matrix, std=config.phm_init_range)
                elif config.hypercomplex_nonlinearity == "glorot-uniform":
                    nn.init.xavier_uniform_(matrix)
                else:
                    nn.init.xavier_normal_(matrix)

    def share(self, owner: "PHMLinear", names: tuple[str, ...]) -> None:
        """Uses these parameters of `owner` instead of its own.

        Raises:
            UserError: where they are of another size.
        """
        for name in names:
            given = owner.get_parameter(name)
            if given.shape != self.get_parameter(name).shape:
                raise UserError(
                    "shared_W_phm=True needs layers of one size: give reduction_factor one number"
                )
            setattr(self, name, given)

    def matrix(self) -> Tensor:
        """H [in, out]."""
        rule, weight = (
            self.get_parameter(names[0])
            if len(names) == 1
            else self.get_parameter(names[0]) @ self.get_parameter(names[1])
            for names in (self.rules, self.weights)
        )
        return torch.einsum("iab,icd->acbd", rule, weight).reshape(self.features)

    def forward(self, x: Tensor) -> Tensor:
        y = x @ self.matrix().to(x.dtype)
        return y if self.b is None else y + self.b.to(x.dtype)
