"""What eigenwatch costs a training step, in one run: python benchmarks/overhead.py

Alternating blocks on one rank with the embedded aggregator, medians with their quartiles. Before a step is timed the
aggregator is idle, so that the stall is what the training thread pays and not the noise of a solver on the same cores.
What is done beside the training, forming the scatter, is timed by itself: on a CPU it takes the cores' time later.
"""

import math
import os
import platform
import statistics
import tempfile
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from eigenwatch.agent import Agent, attach
from eigenwatch.schemas import packed_length
from eigenwatch.spectrum import Moments
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

TOKENS, MODEL_DIM, WIDTH, LAYERS = 4096, 512, 2048, 2
ROUNDS = 7
STALL_ROUNDS, EVERY = 13, 6
QUIET_BLOCKS, QUIET_STEPS = 20, 30


class FeedForward(nn.Module):
    def __init__(self, model_dim: int, width: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(model_dim, width, bias=False)
        self.up_proj = nn.Linear(model_dim, width, bias=False)
        self.down_proj = nn.Linear(width, model_dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Model(nn.Module):
    def __init__(self, model_dim: int, width: int, layers: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.ModuleDict({"mlp": FeedForward(model_dim, width)}) for _ in range(layers))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = x + layer["mlp"](F.rms_norm(x, x.shape[-1:]))
        return x


def main() -> None:
    torch.manual_seed(0)
    console = Console()
    table = Table(title=f"{platform.machine()}, {os.cpu_count()} cores, torch {torch.__version__}, float32")
    for heading in ("", "median", "quartiles"):
        table.add_column(heading)
    with tempfile.TemporaryDirectory() as store:
        for name, ratios in (*quiet(store), *sampled(store), *memory(store)):
            low, _, high = statistics.quantiles(ratios, n=4)
            table.add_row(name, f"{statistics.median(ratios):.4f}", f"{low:.4f} … {high:.4f}")
    console.print(table)


def quiet(store: str) -> list[tuple[str, list[float]]]:
    """A step between samples over a step without an agent; the model is small, so that a fixed cost would show.

    Two equal models differ by a percent for no reason but where they lie in memory. So each is observed in turn, and a
    block of the one and a block of the other make one geometric mean, in which that is gone.
    """
    models = Model(128, 512, 4), Model(128, 512, 4)
    whole, calls = zip(*(quiet_of(store, *pair) for pair in (models, models[::-1])), strict=True)
    crossed = [math.sqrt(first * second) for first, second in zip(*whole, strict=True)]
    return [
        ("step between samples / step without an agent", crossed),
        ("hooks and agent.step by themselves / step without an agent", [*calls[0], *calls[1]]),
    ]


def quiet_of(store: str, bare: Model, observed: Model) -> tuple[list[float], list[float]]:
    x, one_token = torch.randn(512, 128), torch.randn(1, 128)
    bare_step, observed_step = stepper(bare, x), stepper(observed, x)
    whole, calls = [], []
    with attach(observed, run_id="quiet", every=1_000_000, store=store) as agent:
        observed_step()
        agent.step(0)
        wait_for_record(agent, 0)
        step = 0

        def end_step() -> None:
            nonlocal step
            step += 1
            agent.step(step)

        def step_with_agent() -> None:
            observed_step()
            end_step()

        for _ in range(QUIET_BLOCKS):
            bare_seconds, with_agent_seconds = medians(QUIET_STEPS, bare_step, step_with_agent)
            whole.append(with_agent_seconds / bare_seconds)
            # Of one token almost nothing is left but the calls.
            without_hooks, with_hooks = medians(10 * QUIET_STEPS, lambda: bare(one_token), lambda: observed(one_token))
            (ending,) = medians(10 * QUIET_STEPS, end_step)
            calls.append((with_hooks - without_hooks + ending) / bare_seconds)
    return whole, calls


def medians(rounds: int, *works: Callable[[], object]) -> list[float]:
    """Median time of each work, done in turn."""
    seconds: list[list[float]] = [[] for _ in works]
    for _ in range(rounds):
        for one, work in zip(seconds, works, strict=True):
            one.append(timed(work))
    return [statistics.median(one) for one in seconds]


def sampled(store: str) -> list[tuple[str, list[float]]]:
    """The stall of a sampled step over one plain product, and over the usual inline way, summed over the layers."""
    x = torch.randn(TOKENS, MODEL_DIM)
    model = Model(MODEL_DIM, WIDTH, LAYERS)
    one_step = stepper(model, x)
    kept: list[Tensor] = []
    activations = F.silu(torch.randn(TOKENS, WIDTH))
    over_product, over_inline, beside = [], [], []
    with attach(model, run_id="sampled", every=EVERY, store=store) as agent:
        for round_ in range(STALL_ROUNDS):
            times = []
            for step in range(EVERY * round_, EVERY * round_ + EVERY):
                started = time.perf_counter()
                one_step()
                agent.step(step)
                times.append(time.perf_counter() - started)
                if step % EVERY == 0:
                    wait_for_record(agent, step)
            stall = times[0] - statistics.median(times[1:])
            product = timed(lambda: kept.append(activations.T @ activations)) * LAYERS
            kept.clear()
            inline = timed(lambda: kept.append(torch.linalg.eigvalsh(torch.cov(activations.T)))) * LAYERS
            kept.clear()
            folded = timed(lambda: Moments(WIDTH).add(activations)) * LAYERS
            if round_ > 0:  # the first warms up
                over_product.append(stall / product)
                over_inline.append(stall / inline)
                beside.append(folded / product)
    shape = f"N={TOKENS}, D={WIDTH}, {LAYERS} layers"
    return [
        (f"stall of a sampled step / plain X.T @ X ({shape})", over_product),
        (f"stall of a sampled step / torch.cov and eigvalsh in the step ({shape})", over_inline),
        (f"forming the scatter, beside the training / plain X.T @ X ({shape})", beside),
    ]


def memory(store: str) -> list[tuple[str, list[float]]]:
    """Peak memory that a sample adds, over its formula.

    The rows of every layer in their dtype, and, for the layer whose scatter is being formed, the packed triangle and a
    float32 copy of its rows.
    """
    x = torch.randn(TOKENS, MODEL_DIM)
    model = Model(MODEL_DIM, WIDTH, LAYERS)
    one_step = stepper(model, x)
    rows_bytes = 4 * TOKENS * WIDTH
    formula = LAYERS * rows_bytes + rows_bytes + 4 * packed_length(WIDTH)
    ratios = []
    with attach(model, run_id="memory", every=2, store=store) as agent:
        for round_ in range(ROUNDS):
            peaks = []
            for step in (2 * round_, 2 * round_ + 1):
                reset_peak()
                one_step()
                agent.step(step)
                if step % 2 == 0:
                    one_step_beside = time.monotonic() + 2.0
                    while time.monotonic() < one_step_beside:
                        time.sleep(0.05)  # the outbox forms the scatters
                peaks.append(peak_bytes())
                if step % 2 == 0:
                    wait_for_record(agent, step)
            if round_ > 1:
                ratios.append((peaks[0] - peaks[1]) / formula)
    return [(f"peak memory added by a sample / formula, {formula / 2**20:.0f} MiB", ratios)]


def reset_peak() -> None:
    """Lets the kernel count this process's peak of resident memory anew."""
    Path("/proc/self/clear_refs").write_text("5")


def peak_bytes() -> int:
    (line,) = (one for one in Path("/proc/self/status").read_text().splitlines() if one.startswith("VmHWM"))
    return int(line.split()[1]) * 1024


def stepper(model: nn.Module, x: Tensor) -> Callable[[], None]:
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-4)

    def one_step() -> None:
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()

    return one_step


def timed(work: Callable[[], object]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def wait_for_record(agent: Agent, step: int, seconds: float = 120.0) -> None:
    """Returns when every layer's record of `step` is on the endpoint."""
    assert agent.metrics_url is not None
    name = "eigenwatch_last_record_step{"
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        with urllib.request.urlopen(agent.metrics_url) as response:
            lines = [line for line in response.read().decode().splitlines() if line.startswith(name)]
        mine = [line for line in lines if f'run="{agent.run.run_id}"' in line]
        if len(mine) == len(agent.run.layers) and all(float(line.split()[-1]) == step for line in mine):
            return
        time.sleep(0.2)
    raise TimeoutError(f"no record of step {step} within {seconds:g} s")


if __name__ == "__main__":
    main()
