"""The stacks: each builds this rank's part of the model in its own way and trains one step on its part of the batch."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.nn.functional as dist_nn
import torch.nn.functional as F
from eigenwatch.agent import Parallelism
from eigenwatch.cli.demo.decoder import Decoder
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.pipelining import PipelineStage, Schedule1F1B, ScheduleInterleaved1F1B
from torch.distributed.tensor import Replicate, Shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    PrepareModuleInput,
    PrepareModuleInputOutput,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)
from torch.nn.parallel import DistributedDataParallel

from .plain import LEARNING_RATE, SEQUENCES, TIME, batch, build, loss_of, sgd


@dataclass
class Stack:
    """What a rank attaches to, and how it takes one step; `options` go to `attach`."""

    models: nn.Module | list[nn.Module]
    train: Callable[[int], float]
    options: dict[str, Any] = field(default_factory=dict)


def part(step: int, index: int, parts: int) -> tuple[Tensor, Tensor]:
    """One rank's sequences of a step."""
    inputs, targets = batch(step)
    size = SEQUENCES // parts
    rows = slice(index * size, (index + 1) * size)
    return inputs[rows], targets[rows]


def data_parallel(rank: int, world: int) -> Stack:
    """DDP with gradient accumulation, and evaluation of the model in the middle of every step."""
    plain = build()
    model = DistributedDataParallel(plain)
    optimizer = sgd(model)

    def train(step: int) -> float:
        optimizer.zero_grad()
        inputs, targets = part(step, rank, world)
        total = 0.0
        for micro in range(2):
            rows = slice(micro, None, 2)
            with model.no_sync() if micro == 0 else torch.enable_grad():
                loss = loss_of(model(inputs[rows]), targets[rows]) / 2
                loss.backward()
            total += loss.item()
            model.eval()
            with torch.no_grad():
                model(inputs)
            model.train()
        optimizer.step()
        return total

    return Stack(model, train, {"sites": ("post", "pre")})


def _sharded(rank: int, world: int, mesh: Any) -> Stack:
    model = build()
    for layer in model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    optimizer = sgd(model)

    def train(step: int) -> float:
        inputs, targets = part(step, rank, world)
        optimizer.zero_grad()
        loss = loss_of(model(inputs), targets)
        loss.backward()
        optimizer.step()
        return loss.item()

    return Stack(model, train, {"samples": False})


def fully_sharded(rank: int, world: int) -> Stack:
    """FSDP2 over all ranks."""
    return _sharded(rank, world, init_device_mesh("cpu", (world,)))


def hybrid_sharded(rank: int, world: int) -> Stack:
    """FSDP2, replicated over one mesh dimension and sharded over the other."""
    return _sharded(rank, world, init_device_mesh("cpu", (2, world // 2), mesh_dim_names=("replicate", "shard")))


def _tensor_parallel(model: Decoder, mesh: Any, sequence: bool) -> None:
    """As torchtitan does it, but for the attention, which stays whole."""
    if sequence:  # tokens are split between the layers, and gathered before attention and projections
        ends = {
            "embedding": RowwiseParallel(input_layouts=Replicate(), output_layouts=Shard(1)),
            "norm": SequenceParallel(),
            "head": ColwiseParallel(input_layouts=Shard(1), output_layouts=Replicate()),
        }
        parallelize_module(model, mesh, ends)
    for layer in model.layers:
        if sequence:
            plan: dict[str, Any] = {
                "attention_norm": SequenceParallel(),
                "attention": PrepareModuleInputOutput(
                    input_layouts=Shard(1),
                    desired_input_layouts=Replicate(),
                    use_local_input=True,
                    output_layouts=Replicate(),
                    desired_output_layouts=Shard(1),
                ),
                "mlp_norm": SequenceParallel(),
                "mlp": PrepareModuleInput(input_layouts=Shard(1), desired_input_layouts=Replicate()),
                "mlp.gate_proj": ColwiseParallel(use_local_output=False),
                "mlp.up_proj": ColwiseParallel(use_local_output=False),
                "mlp.down_proj": RowwiseParallel(output_layouts=Shard(1)),
            }
        else:
            plan = {"mlp.gate_proj": ColwiseParallel(), "mlp.up_proj": ColwiseParallel()}
            plan["mlp.down_proj"] = RowwiseParallel()
        parallelize_module(layer, mesh, plan)


def _fsdp_and_tensor_parallel(rank: int, world: int, *, sequence: bool, compiled: bool = False) -> Stack:
    mesh = init_device_mesh("cpu", (world // 2, 2), mesh_dim_names=("dp", "tp"))
    model = build()
    _tensor_parallel(model, mesh["tp"], sequence)
    if not sequence:
        for layer in model.layers:
            if compiled:
                layer.compile(backend="aot_eager", fullgraph=True)
            fully_shard(layer, mesh=mesh["dp"])
        fully_shard(model, mesh=mesh["dp"])
    optimizer = torch.optim.SGD(model.parameters(), lr=LEARNING_RATE, foreach=False)

    def train(step: int) -> float:
        inputs, targets = part(step, mesh["dp"].get_local_rank(), world // 2)
        optimizer.zero_grad()
        loss = loss_of(model(inputs), targets)
        loss.backward()
        if sequence:  # plain data parallelism beside it
            for parameter in model.parameters():
                gradient = parameter.grad
                local = gradient.to_local() if hasattr(gradient, "to_local") else gradient
                dist.all_reduce(local, group=mesh["dp"].get_group())
                local /= world // 2
        optimizer.step()
        return loss.item()

    return Stack(model, train, {"sites": ("post", "pre"), "samples": False})


def tensor_parallel_fsdp(rank: int, world: int) -> Stack:
    """dp×tp: FSDP2 over one dimension, `parallelize_module` over the other; local shards as activations."""
    return _fsdp_and_tensor_parallel(rank, world, sequence=False)


def tensor_parallel_compiled(rank: int, world: int) -> Stack:
    """The same with every block compiled whole."""
    return _fsdp_and_tensor_parallel(rank, world, sequence=False, compiled=True)


def sequence_parallel(rank: int, world: int) -> Stack:
    """dp×tp with sequence parallelism around the feed-forward layer; DTensors as activations."""
    return _fsdp_and_tensor_parallel(rank, world, sequence=True)


class _RowParallel(nn.Module):
    """Megatron's RowParallelLinear in small: this rank's input features, outputs summed; [s, b, h/p] in."""

    def __init__(self, whole: nn.Linear, index: int, parts: int, group: Any) -> None:
        super().__init__()
        self.input_size, self.output_size = whole.in_features, whole.out_features
        self.input_size_per_partition = whole.in_features // parts
        self.tp_group = group
        self.weight = nn.Parameter(whole.weight.detach().chunk(parts, dim=1)[index].clone())

    def forward(self, x: Tensor) -> tuple[Tensor, None]:
        return dist_nn.all_reduce(F.linear(x, self.weight), group=self.tp_group), None


class _MegatronMLP(nn.Module):
    def __init__(self, whole: nn.Module, index: int, parts: int, group: Any) -> None:
        super().__init__()
        self.gate = nn.Parameter(whole.gate_proj.weight.detach().chunk(parts)[index].clone())
        self.up = nn.Parameter(whole.up_proj.weight.detach().chunk(parts)[index].clone())
        self.linear_fc2 = _RowParallel(whole.down_proj, index, parts, group)

    def forward(self, x_BTd: Tensor) -> Tensor:
        x = x_BTd.transpose(0, 1)  # [s, b, h]
        out, _ = self.linear_fc2(F.silu(F.linear(x, self.gate)) * F.linear(x, self.up))
        return out.transpose(0, 1)


def megatron(rank: int, world: int) -> Stack:
    """Tensor parallelism with Megatron's module names and local shards, over two of the ranks; no training, so that no
    gradient has to be reduced as Megatron does it."""
    mesh = init_device_mesh("cpu", (world // 2, 2), mesh_dim_names=("dp", "tp"))
    model = build()
    decoder = nn.ModuleDict({"decoder": nn.ModuleDict({"layers": model.layers})})
    for layer in model.layers:
        layer.mlp = _MegatronMLP(layer.mlp, mesh["tp"].get_local_rank(), 2, mesh["tp"].get_group())
    trained = build()
    optimizer = sgd(trained)

    def train(step: int) -> float:
        with torch.no_grad():
            inputs, _ = part(step, mesh["dp"].get_local_rank(), world // 2)
            model(inputs)
        # The plain model takes the step, and hands its weights over.
        optimizer.zero_grad()
        inputs, targets = batch(step)
        loss = loss_of(trained(inputs), targets)
        loss.backward()
        optimizer.step()
        _copy_weights(trained, model, mesh["tp"].get_local_rank())
        return loss.item()

    return Stack(decoder, train)


def _copy_weights(source: Decoder, target: Decoder, index: int) -> None:
    with torch.no_grad():
        for layer, mine in zip(source.layers, target.layers, strict=True):
            mine.mlp.gate.copy_(layer.mlp.gate_proj.weight.chunk(2)[index])
            mine.mlp.up.copy_(layer.mlp.up_proj.weight.chunk(2)[index])
            mine.mlp.linear_fc2.weight.copy_(layer.mlp.down_proj.weight.chunk(2, dim=1)[index])
            mine.attention.load_state_dict(layer.attention.state_dict())
            mine.attention_norm.load_state_dict(layer.attention_norm.state_dict())
            mine.mlp_norm.load_state_dict(layer.mlp_norm.state_dict())
        target.embedding.load_state_dict(source.embedding.state_dict())


class _ContextAttention(nn.Module):
    """The decoder's attention over tokens that lie on several ranks: keys and values are gathered."""

    def __init__(self, inner: nn.Module, rank: int, world: int) -> None:
        super().__init__()
        self.inner, self.rank, self.world = inner, rank, world

    def forward(self, x_BTd: Tensor) -> Tensor:
        whole = torch.cat(dist_nn.all_gather(x_BTd), dim=1)
        return self.inner(whole).chunk(self.world, dim=1)[self.rank]


def context_parallel(rank: int, world: int) -> Stack:
    """Every rank has its part of every sequence."""
    model = build()
    for layer in model.layers:
        layer.attention = _ContextAttention(layer.attention, rank, world)
    optimizer = sgd(model)
    times = slice(rank * TIME // world, (rank + 1) * TIME // world)

    def train(step: int) -> float:
        inputs, targets = batch(step)
        optimizer.zero_grad()
        loss = loss_of(model(inputs[:, times]), targets[:, times])
        loss.backward()
        for parameter in model.parameters():
            dist.all_reduce(parameter.grad)
            parameter.grad /= world
        optimizer.step()
        return loss.item()

    return Stack(model, train)


class _Stage(nn.Module):
    """Some layers of the decoder, numbered from 0; the first has the embedding, the last the head."""

    def __init__(self, whole: Decoder, first: int, stop: int) -> None:
        super().__init__()
        self.embedding = whole.embedding if first == 0 else None
        self.layers = nn.ModuleList(whole.layers[first:stop])
        self.norm, self.head = (whole.norm, whole.head) if stop == len(whole.layers) else (None, None)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embedding(x) if self.embedding is not None else x
        for layer in self.layers:
            x = layer(x)
        return self.head(self.norm(x)) if self.head is not None else x


def _pipeline(rank: int, stages: int, group: Any, index: int, parts: int, interleaved: bool) -> Stack:
    """This rank's stages of a pipeline over `group`, on one of `parts` parts of the batch."""
    whole = build()
    place, ranks = dist.get_rank(group), dist.get_world_size(group)
    mine = range(place, stages, ranks)
    per_stage = len(whole.layers) // stages
    chunks = [_Stage(whole, one * per_stage, (one + 1) * per_stage) for one in mine]
    pipeline = [
        PipelineStage(chunk, one, stages, torch.device("cpu"), group=group) for chunk, one in zip(chunks, mine, strict=True)
    ]
    optimizer = torch.optim.SGD([p for chunk in chunks for p in chunk.parameters()], lr=LEARNING_RATE)
    if interleaved:
        schedule: Any = ScheduleInterleaved1F1B(pipeline, n_microbatches=4, loss_fn=loss_of)
    else:
        schedule = Schedule1F1B(pipeline[0], n_microbatches=4, loss_fn=loss_of)

    def train(step: int) -> float:
        inputs, targets = part(step, index, parts)
        losses: list[Tensor] = []
        optimizer.zero_grad()
        schedule.step(*([inputs] if 0 in mine else []), target=targets, losses=losses)
        for chunk in chunks:
            for parameter in chunk.parameters():
                if parts > 1:
                    dist.all_reduce(parameter.grad, group=replicas)
                    parameter.grad /= parts
        optimizer.step()
        return sum((loss.item() for loss in losses), 0.0)

    replicas = _replicas[0] if parts > 1 else None
    offsets = [one * per_stage for one in mine]
    return Stack(list(chunks), train, {"parallelism": Parallelism(layer_offset=offsets)})


_replicas: list[Any] = []


def pipeline(rank: int, world: int) -> Stack:
    """A stage a rank, 1F1B."""
    return _pipeline(rank, world, dist.group.WORLD, 0, 1, interleaved=False)


def pipeline_interleaved(rank: int, world: int) -> Stack:
    """dp×pp: two pipelines of two ranks, each rank with two chunks that lie apart."""
    mesh = init_device_mesh("cpu", (world // 2, 2), mesh_dim_names=("dp", "pp"))
    _replicas[:] = [mesh["dp"].get_group()]
    index = mesh["dp"].get_local_rank()
    return _pipeline(rank, 4, mesh["pp"].get_group(), index, world // 2, interleaved=True)


STACKS = {
    one.__name__: one
    for one in (
        data_parallel,
        fully_sharded,
        hybrid_sharded,
        tensor_parallel_fsdp,
        tensor_parallel_compiled,
        sequence_parallel,
        megatron,
        context_parallel,
        pipeline,
        pipeline_interleaved,
    )
}
