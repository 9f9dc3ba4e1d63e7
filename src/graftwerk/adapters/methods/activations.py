"""Non-linearities by the names that AdapterHub's configurations give them."""

from collections.abc import Callable
from functools import partial

from torch import Tensor, nn
from torch.nn import functional as F

from graftwerk.errors import UserError

_tanh_gelu = partial(F.gelu, approximate="tanh")

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "gelu_new": _tanh_gelu,
    "gelu_fast": _tanh_gelu,
    "gelu_accurate": _tanh_gelu,
    "gelu_pytorch_tanh": _tanh_gelu,
    "leakyrelu": F.leaky_relu,
    "leaky_relu": F.leaky_relu,
    "linear": lambda x: x,
    "mish": F.mish,
    "quick_gelu": lambda x: x * (1.702 * x).sigmoid(),
    "relu": F.relu,
    "relu2": lambda x: F.relu(x).square(),
    "relu6": F.relu6,
    "sigmoid": lambda x: x.sigmoid(),
    "silu": F.silu,
    "swish": F.silu,
    "tanh": lambda x: x.tanh(),
}


def check_activation(name: str, key: str) -> None:
    """Raises a UserError that names `key` where no non-linearity is called so."""
    if str(name).lower() not in ACTIVATIONS:
        raise UserError(f"{key}={name!r} is not known: use one of {', '.join(ACTIVATIONS)}")


class Activation(nn.Module):
    """A non-linearity as a member of a `Sequential`."""

    def __init__(self, name: str):
        super().__init__()
        self.name = name.lower()

    def forward(self, x: Tensor) -> Tensor:
        return ACTIVATIONS[self.name](x)

    def extra_repr(self) -> str:
        return self.name
