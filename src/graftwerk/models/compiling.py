"""Whether torch's compiler can make kernels here."""

from functools import cache

import torch

GRAPHS = 64


def allow_graphs() -> None:
    """Lets torch make `GRAPHS` graphs of one function; beyond its 8 it silently compiles no more.

    With gradients and without, for layers with a window, for each composition there is one.
    """
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, GRAPHS)


@cache
def why_not_compiled(kind: str) -> str | None:
    """Why `torch.compile` makes no kernels for a kind of device (`cpu`, `cuda`); None: it does.

    It is tried: Triton, a C compiler, Python's headers and a driver have to fit together.
    """

    @torch.compile
    def tried(x: torch.Tensor) -> torch.Tensor:
        return x.exp() + 1

    try:
        tried(torch.ones(64, device=kind))
    except Exception as error:  # whatever it is, the same is done without kernels
        return f"torch.compile fails here ({' '.join(str(error).split())[:200]})"
    return None
