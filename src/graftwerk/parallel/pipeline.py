"""Pipeline parallelism: each process holds a run of a model's layers and passes states on.

Micro-batches go through one forward, one backward (Narayanan et al. 2019, PipeDream, section 3.2;
the schedule of Megatron). Every process of a pipeline reads the same batch, so each makes positions
and masks by itself and knows the shapes of what it is sent: micro-batches may differ in length, and
there may be fewer of them than stages. (`torch.distributed.pipelining` fixes one shape when a
schedule is built, and runs the model once more to find it.)

Parameters keep their global names: those of other stages stay in the model, on the meta device.
"""

import inspect
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from graftwerk.errors import UserError
from graftwerk.models import BERT, GPT, T5, TransformerConfig
from graftwerk.models.layers import Layers
from graftwerk.models.scoring import Score
from graftwerk.parallel.mesh import Mesh

META = torch.device("meta")
# A model's forward pass of a micro-batch, up to its `score`.
Answer = Callable[..., Tensor]


@dataclass(frozen=True)
class Run:
    """The layers of one stage: those from `first` to `stop` of a stack.

    `number` is the first one's among all layers of the model.
    """

    stack: str
    first: int
    stop: int
    number: int
    enters: bool  # the stack begins here
    leaves: bool  # it ends here


@dataclass(frozen=True)
class Cut:
    """Which stage holds what of a model; the same on every process."""

    config: TransformerConfig
    runs: tuple[Run, ...]

    @classmethod
    def of(cls, config: TransformerConfig, stages: int, split: int | None = None) -> "Cut":
        """Runs of layers as equal as can be; a T5's decoder begins on stage `split`.

        Raises:
            UserError: where there are more stages than layers, or a T5 cannot be cut there.
        """
        key = f"model.pipeline_model_parallel_size={stages}"
        if config.architecture != "t5":
            stack = "decoder" if config.architecture == "gpt" else "encoder"
            return cls(config, tuple(_runs(key, stack, config.num_layers, stages, 0)))
        if stages == 1:
            raise UserError(f"{key}: a T5 on one stage is not cut")
        split = stages // 2 if split is None else split
        if not 0 < split < stages:
            raise UserError(
                f"model.pipeline_model_parallel_split_rank={split}: the first stage of the decoder "
                f"is from 1 to {stages - 1} with {key}"
            )
        encoder = _runs(key, "encoder", config.num_layers, split, 0)
        decoder = _runs(
            key, "decoder", config.decoder_num_layers, stages - split, config.num_layers
        )
        return cls(config, (*encoder, *decoder))

    def stages_of(self, name: str) -> tuple[int, ...]:
        """The stages that use a parameter, by its name."""
        top, _, rest = name.partition(".")
        last = len(self.runs) - 1
        if top in ("encoder", "decoder"):
            own = [n for n, run in enumerate(self.runs) if run.stack == top]
            if rest.startswith("layers."):
                layer = int(rest.split(".")[1])
                return tuple(n for n in own if self.runs[n].first <= layer < self.runs[n].stop)
            return tuple(own) if rest.startswith("relative_position.") else (own[-1],)
        if top == "embedding":
            enters = {n for n, run in enumerate(self.runs) if run.enters}
            if name == "embedding.word_embeddings.weight" and self._tied:
                return tuple(sorted({*enters, last}))
            slots = rest.startswith(("words.", "output."))  # a T5's are its encoder's
            return (0,) if slots else tuple(sorted(enters))
        return (last,)

    @property
    def _tied(self) -> bool:
        words = self.config.architecture != "bert" or self.config.head == "masked_lm"
        return words and self.config.share_embeddings_and_output_weights


def _runs(key: str, stack: str, layers: int, stages: int, number: int) -> Iterable[Run]:
    if stages > layers:
        raise UserError(
            f"{key}: {stages} stages for the {layers} layers of the {stack}: use at most {layers}"
        )
    edges = [layers * n // stages for n in range(stages + 1)]
    for n, (first, stop) in enumerate(pairwise(edges)):
        yield Run(stack, first, stop, number + first, n == 0, n == stages - 1)


def sharers(model: nn.Module, cut: Cut) -> dict[str, tuple[int, ...]]:
    """The stages that use each parameter, by the name that `named_parameters` gives it.

    One that several modules share is used wherever one of them is.
    """
    first: dict[int, str] = {}
    stages: dict[str, set[int]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        owner = first.setdefault(id(parameter), name)
        stages.setdefault(owner, set()).update(cut.stages_of(_place(name)))
    return {name: tuple(sorted(found)) for name, found in stages.items()}


def _place(name: str) -> str:
    """Where a parameter is used: an adapter's copy of one of the base's, where that is."""
    if not name.startswith("replacements.copies."):
        return name
    return name.split(".", 3)[3].replace("/", ".")


class Pipeline:
    """This process's stage of a model, which it changes: `model(...)` goes through all stages then.

    Every stage calls it with the same arguments and gets the same result.

    Args:
        model: with its adapters. What other stages use of it moves to the meta device.
        mesh: of more than one stage.
    """

    def __init__(self, model: GPT | T5 | BERT, mesh: Mesh):
        assert mesh.pipeline.group is not None
        self.model, self.mesh = model, mesh
        self.cut = Cut.of(model.config, mesh.pipeline.size, mesh.split)
        self.stages = sharers(model, self.cut)
        self.rank, self.last = mesh.pipeline.rank, mesh.pipeline.last
        self.run = self.cut.runs[self.rank]
        _keep(model, {name for name, stages in self.stages.items() if self.rank in stages})
        self.device = model.device
        self._signature = inspect.signature(model.forward)
        self._sent: list[tuple[dist.Work, Tensor]] = []
        model.forward = self._forward_all

    def owner(self, name: str) -> int:
        """The first stage that uses a parameter; it stands for all of them."""
        return self.stages[name][0]

    # ---- training

    def step(
        self,
        micros: Sequence[Any],
        loss_of: Callable[[Answer, Any], Tensor],
        mark: Callable[[str], None] = lambda phase: None,
    ) -> None:
        """Forward and backward passes of all micro-batches; gradients add up in `.grad`.

        `loss_of(answer, micro)` gives the scalar to go back from; the last stage calls it, and
        `answer` is the model's forward pass there, up to its `score`. `mark` is told when a pass
        `forward` or `backward` begins.
        """
        self._carries = self._with_gradients()
        ahead = self.mesh.pipeline.size - self.rank  # forward passes before the first backward
        waiting: deque[tuple[Sequence[Tensor], Sequence[Tensor]]] = deque()
        for number, micro in enumerate(micros, start=1):
            mark("forward")
            inputs = micro.inputs()
            received = self._receive(inputs)
            for tensor in received:
                tensor.requires_grad_(self._carries[self.rank])
            if self.last:
                made = [loss_of(partial(self._answer, inputs, received), micro)]
            else:
                made = self._through(inputs, received)
                self._send([tensor.detach() for tensor in made], self.rank + 1, "forward")
            waiting.append((received, made))
            mark("backward")
            if number >= ahead:
                self._backward(*waiting.popleft())
        while waiting:
            self._backward(*waiting.popleft())
        self._finish()

    def _answer(
        self, inputs: Mapping[str, Any], received: Sequence[Tensor], score: Score | None = None
    ) -> Tensor:
        return self._through({**inputs, "score": score}, received)[0]

    def _with_gradients(self) -> list[bool]:
        """For each stage: whether something is trained before it."""
        trained = [self.owner(name) for name, p in self.model.named_parameters() if p.requires_grad]
        return [min(trained, default=stage) < stage for stage in range(len(self.cut.runs))]

    def _backward(self, received: Sequence[Tensor], made: Sequence[Tensor]) -> None:
        if self.last:
            if made[0].requires_grad:
                made[0].backward()
        elif self._carries[self.rank + 1]:
            gradients = [self._take(t.shape, t.dtype, self.rank + 1, "backward") for t in made]
            pairs = [(t, g) for t, g in zip(made, gradients, strict=True) if t.requires_grad]
            if pairs:
                tensors, given = zip(*pairs, strict=True)
                torch.autograd.backward(tensors, given)
        if self._carries[self.rank]:
            gradients = [torch.zeros_like(t) if t.grad is None else t.grad for t in received]
            self._send(gradients, self.rank - 1, "backward")

    # ---- a pass without gradients

    @torch.no_grad()
    def _forward_all(self, *args: Any, **kwargs: Any) -> Tensor:
        """The model's forward pass over all stages: the result, on every one of them."""
        inputs = dict(self._signature.bind(*args, **kwargs).arguments)
        result, scored = None, inputs.get("score") is not None
        dtype = torch.float32 if scored else self._logits_dtype()
        if self._takes_part(inputs):
            made = self._through(inputs, self._receive(inputs))
            if self.last:
                result = made[0].to(dtype)
            else:
                self._send(made, self.rank + 1, "forward")
        result = self._from_last(result, dtype)
        self._finish()
        return result

    def _takes_part(self, inputs: Mapping[str, Any]) -> bool:
        # Encoder states stay in the cache behind the first pass.
        t5 = isinstance(self.model, T5)
        return not t5 or self.run.stack == "decoder" or inputs.get("source") is not None

    def _from_last(self, result: Tensor | None, dtype: torch.dtype) -> Tensor:
        group = self.mesh.pipeline.group
        device = self.device
        shape = torch.zeros(4, dtype=torch.int64, device=device)
        if result is not None:
            result = result.contiguous()
            shape[: result.ndim + 1] = torch.tensor([result.ndim, *result.shape])
        last = dist.get_global_rank(group, self.mesh.pipeline.size - 1)  # pyright: ignore
        dist.broadcast(shape, last, group=group)
        dims, *sizes = shape.tolist()
        if result is None:
            result = torch.empty(sizes[:dims], dtype=dtype, device=device)
        dist.broadcast(result, last, group=group)
        return result

    def _logits_dtype(self) -> torch.dtype:
        kind = self.device.type
        if torch.is_autocast_enabled(kind):
            return torch.get_autocast_dtype(kind)
        return self.model.dtype

    # ---- this stage's share of a pass

    def _through(self, inputs: Mapping[str, Any], received: Sequence[Tensor]) -> Sequence[Tensor]:
        """What the next stage gets, or on the last one the result."""
        apart = ("select", "score", "spans")
        given = {key: value for key, value in inputs.items() if key not in apart}
        select, score = inputs.get("select"), inputs.get("score")
        if isinstance(self.model, T5):
            return self._through_t5(self.model, given, select, score, received)
        model, run = self.model, self.run
        if isinstance(model, BERT):
            given["packed"] = model.is_packed(inputs)
        start = model.begin(**given)
        x = model.embed(start) if run.enters else received[0]
        layers = model.decoder if isinstance(model, GPT) else model.encoder
        x, context = self._layers(layers, x, start.context)
        if not run.leaves:
            return [x]
        if isinstance(model, GPT):
            return [model.answer(*start.own(x, context), select, score)]
        x, flow = start.own(model.encoder.finish(x), context)
        return [model.answer(x, flow, select, given.get("documents"), inputs.get("spans"))]

    def _through_t5(
        self,
        model: T5,
        given: dict[str, Any],
        select: Tensor | None,
        score: Score | None,
        received: Sequence[Tensor],
    ) -> Sequence[Tensor]:
        source, documents = given.pop("source", None), given.get("source_documents")
        cache = given.get("cache")
        how = {key: given.get(key) for key in ("task_ids", "record", "chance")}
        if self.run.stack == "encoder":
            rows = None if cache is None else cache.rows
            packed = model.is_packed(given)
            start = model.begin_source(source, documents, rows, packed, **how)
            x = model.embed(start) if self.run.enters else received[0]
            x, _ = self._layers(model.encoder, x, start.context)
            return [model.encoder.finish(x) if self.run.leaves else x]
        states = None if source is None else received[0]
        start = model.begin(states=states, **given)
        x = model.embed(start) if self.run.enters else received[-1]
        x, context = self._layers(model.decoder, x, start.context)
        if self.run.leaves:
            return [model.answer(*start.own(x, context), select, score)]
        return [x] if states is None else [states, x]

    def _layers(self, layers: Layers, x: Tensor, context: Any) -> tuple[Tensor, Any]:
        plan, run = self.model.plan, self.run
        first_of_stack = run.number - run.first
        widened = plan.widen_at is not None and first_of_stack <= plan.widen_at < run.number
        if widened:  # on a stage before this one; its states have come widened
            context = context.widened(plan.width)
        return layers(x, context, plan.width, plan.widen_at, range(run.first, run.stop))

    # ---- what goes from stage to stage

    def _receive(self, inputs: Mapping[str, Any]) -> list[Tensor]:
        if self.rank == 0:
            return []
        shapes = self._shapes(inputs)
        return [self._take(s, self.model.dtype, self.rank - 1, "forward") for s in shapes]

    def _shapes(self, inputs: Mapping[str, Any]) -> list[tuple[int, int, int]]:
        """Of the states that come to this stage: [rows, columns, h]."""
        plan, config, run = self.model.plan, self.model.config, self.run
        batch, columns = inputs["tokens"].shape
        cache = inputs.get("cache")

        def rows(layer: int) -> int:
            """Of what goes into a layer."""
            wide = plan.widen_at is not None and plan.widen_at < layer
            return batch * plan.width if wide else batch

        ahead = self.model.columns_ahead(self.model.is_packed(inputs))
        if not isinstance(self.model, T5):
            virtual = ahead if cache is None or not cache.length else 0
            return [(rows(run.number), virtual + columns, config.hidden_size)]
        source = inputs.get("source")
        read = 0 if source is None else ahead + source.shape[1]
        if run.stack == "encoder":
            return [(rows(run.number), read, config.hidden_size)]
        states = (rows(config.num_layers), read, config.embedding_size or config.hidden_size)
        own = (rows(run.number), columns, config.hidden_size)
        return [*([] if source is None else [states]), *([] if run.enters else [own])]

    def _send(self, tensors: Iterable[Tensor], stage: int, way: str) -> None:
        self._sent = [pair for pair in self._sent if not pair[0].is_completed()]
        for tensor in tensors:
            tensor = tensor.contiguous()
            work = dist.isend(tensor, self._process(stage), group=self._group(way))
            assert work is not None
            self._sent.append((work, tensor))

    def _take(self, shape: Sequence[int], dtype: torch.dtype, stage: int, way: str) -> Tensor:
        tensor = torch.empty(shape, dtype=dtype, device=self.device)
        dist.recv(tensor, self._process(stage), group=self._group(way))
        return tensor

    def _finish(self) -> None:
        for work, _ in self._sent:
            work.wait()
        self._sent.clear()

    def _group(self, way: str) -> dist.ProcessGroup | None:
        # Each way has a group: NCCL works off what two processes send each other in one queue.
        return self.mesh.pipeline.group if way == "forward" else self.mesh.backward

    def _process(self, stage: int) -> int:
        assert self.mesh.pipeline.group is not None
        return dist.get_global_rank(self.mesh.pipeline.group, stage)


def _keep(model: nn.Module, names: set[str]) -> None:
    """Moves all other parameters to the meta device; what shares one goes on to share it."""
    wanted = {id(p) for name, p in model.named_parameters() if name in names}
    moved: dict[int, nn.Parameter] = {}
    for module in model.modules():
        for leaf, parameter in list(module._parameters.items()):
            if parameter is None or id(parameter) in wanted:
                continue
            if id(parameter) not in moved:
                absent = nn.Parameter(parameter.detach().to(META), parameter.requires_grad)
                for key, value in vars(parameter).items():  # how it lies over tensor-parallel ranks
                    setattr(absent, key, value)
                moved[id(parameter)] = absent
            module._parameters[leaf] = moved[id(parameter)]
