"""What a process measures of itself: operations, products of matrices, operators, memory.

It knows torch alone, so that the processes of every side of a comparison can import it.
"""

import contextlib
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.utils import flop_counter
from torch.utils._python_dispatch import TorchDispatchMode

PRODUCTS = ("mm", "addmm", "bmm", "baddbmm")
# What an operator is for, by words in its name; the first that fits.
GROUPS = {
    "attention": ("attention",),
    "norms": ("layer_norm", "rms_norm"),
    "loss": ("log_softmax", "nll_loss", "cross_entropy", "logsumexp"),
    "copies": ("copy", "cat", "clone", "fill", "zero", "index", "gather", "embedding", "repeat"),
    "activations, elementwise": (
        *("gelu", "silu", "tanh", "sigmoid", "relu", "add", "mul", "sub", "div", "pow", "sum"),
        *("mean", "where", "neg", "rsqrt", "exp", "sqrt", "lerp", "adam"),
    ),
}


@dataclass(frozen=True)
class Operand:
    """A tensor but for its numbers."""

    shape: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: torch.dtype

    @property
    def extent(self) -> int:
        """How many numbers its memory holds."""
        steps = zip(self.shape, self.strides, strict=True)
        return 1 + sum((size - 1) * stride for size, stride in steps)


@dataclass(frozen=True)
class Call:
    """An operator, what it is given (`Operand`s for tensors), and the operations that it takes."""

    operator: Any
    args: tuple[Any, ...]
    kwargs: tuple[tuple[str, Any], ...]
    flops: int

    @property
    def name(self) -> str:
        return self.operator._schema.name.removeprefix("aten::")

    @property
    def product(self) -> str:
        """The two matrices of a product, `T` for one that lies by columns; else what it is."""
        if self.name not in PRODUCTS:
            return "attention"
        return " ".join(
            str(list(x.shape)) + ("T" if min(x.strides[-1], x.shape[-1]) > 1 else "")
            for x in [x for x in self.args if isinstance(x, Operand)][-2:]
        )


class Operations(TorchDispatchMode):
    """Counts the floating-point operations of products and attention, and keeps their calls."""

    def __init__(self) -> None:
        super().__init__()
        self.flops = 0
        self.calls: Counter[Call] = Counter()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        made = func(*args, **(kwargs or {}))
        flops = _flops(func, args, kwargs or {}, made)
        if flops:
            self.flops += flops
            named = tuple((key, _shape(value)) for key, value in (kwargs or {}).items())
            self.calls[Call(func, tuple(map(_shape, args)), named, flops)] += 1
        return made


def _flops(func: Any, args: tuple, kwargs: dict[str, Any], made: Any) -> int:
    packet = getattr(func, "_overloadpacket", None)
    name = str(packet)
    if "attention_for_cpu_backward" in name:
        return flop_counter.sdpa_backward_flop_count(*(tensor.shape for tensor in args[:4]))
    if "attention_for_cpu" in name:
        return flop_counter.sdpa_flop_count(*(tensor.shape for tensor in args[:3]))
    if packet in flop_counter.flop_registry:
        return flop_counter.flop_registry[packet](*args, **kwargs, out_val=made)
    return 0


def _shape(value: Any) -> Any:
    """Tensors as what they are like, lists as what can be counted."""
    if isinstance(value, torch.Tensor):
        return Operand(tuple(value.shape), value.stride(), value.dtype)
    return tuple(map(_shape, value)) if isinstance(value, list | tuple) else value


def alone(calls: Counter[Call], device: str) -> list[dict[str, Any]]:
    """Each call once by itself, on random numbers: seconds of one, and how many there are.

    A call's results are memory of its own, as they are within a step; what it is given lies where
    that of other calls did, most of it out of the caches.
    """
    pools: dict[torch.dtype, torch.Tensor] = {}
    found = []
    with torch.no_grad():
        for call, count in calls.items():
            run = _prepared(call, pools, device)
            synchronise(device)
            start = time.perf_counter()
            run()
            synchronise(device)
            seconds = time.perf_counter() - start
            found.append(
                {"product": call.product, "calls": count, "flops": call.flops, "seconds": seconds}
            )
    return found


def _prepared(call: Call, pools: dict[torch.dtype, torch.Tensor], device: str) -> Callable[[], Any]:
    used: Counter[torch.dtype] = Counter()

    def tensor(like: Operand) -> torch.Tensor:
        if not like.dtype.is_floating_point:  # masks, in which all is seen, and random states
            size = (like.extent,)
            flat = torch.ones(size, dtype=torch.uint8, device=device).to(like.dtype)
            return flat.as_strided(like.shape, like.strides)
        first = used[like.dtype]
        used[like.dtype] += like.extent
        pool = pools.get(like.dtype)
        if pool is None or len(pool) < used[like.dtype]:
            generator = torch.Generator(device).manual_seed(0)
            size = used[like.dtype]
            pool = torch.randn(size, generator=generator, device=device, dtype=like.dtype)
            pools[like.dtype] = pool
        return pool.as_strided(like.shape, like.strides, first)

    def value(of: Any) -> Any:
        if isinstance(of, Operand):
            return tensor(of)
        return [*map(value, of)] if isinstance(of, tuple) else of

    args = [value(arg) for arg in call.args]
    kwargs = {key: value(given) for key, given in call.kwargs}
    return lambda: call.operator(*args, **kwargs)


def matrices(seconds: float = 0.5, device: str = "cpu", dtype: str = "float32") -> float:
    """Operations a second of large matrix products, the best of some: what can be had right now."""
    sizes = (8192,) if device == "cuda" else (1024, 2048)
    generator = torch.Generator(device).manual_seed(0)
    made = torch.randn(2, sizes[-1], sizes[-1], generator=generator, device=device)
    pairs = [made.to(getattr(torch, dtype))[:, :size, :size].contiguous() for size in sizes]
    best, began = 0.0, time.perf_counter()
    with torch.no_grad():
        while time.perf_counter() - began < seconds or not best:
            for size, (one, other) in zip(sizes, pairs, strict=True):
                synchronise(device)
                start = time.perf_counter()
                torch.mm(one, other)
                synchronise(device)
                best = max(best, 2 * size**3 / (time.perf_counter() - start))
    return best


@contextlib.contextmanager
def traced(found: dict[str, float], device: str) -> Iterator[None]:
    """Puts into `found` the seconds of each group of operators, and those between them."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    if device == "cuda":
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    start = time.perf_counter()
    with torch.profiler.profile(activities=activities) as profile:
        yield
        synchronise(device)
        seconds = time.perf_counter() - start
    for event in profile.key_averages():
        if event.key.startswith("aten::"):
            own = event.self_device_time_total if device == "cuda" else event.self_cpu_time_total
            group = group_of(event.key)
            found[group] = found.get(group, 0.0) + own / 1e6
    found["between operators"] = seconds - sum(found.values())


def group_of(operator: str) -> str:
    """What an operator of the profiler's is for."""
    name = operator.removeprefix("aten::")
    if name in PRODUCTS:
        return "matrix products"
    fitting = (group for group, words in GROUPS.items() if any(word in name for word in words))
    return next(fitting, "other operators")


def synchronise(device: str) -> None:
    """Waits for the device, which may be behind."""
    if device == "cuda":
        torch.cuda.synchronize()


def forget_peak(device: str = "cpu") -> None:
    """The highest memory is counted anew from here, where the kernel lets us."""
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def peak(device: str = "cpu") -> int:
    """The highest memory in bytes: resident, mapped files included, or allocated on the device."""
    if device == "cuda":
        return torch.cuda.max_memory_allocated()
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))
