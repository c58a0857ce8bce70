"""Compiled models: what an eager twin shows is what the records hold, and sampling compiles nothing again."""

import itertools
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from eigenwatch.agent import Agent, attach
from eigenwatch.cli.demo.decoder import Decoder, DecoderConfig, FeedForward
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from tests.agent.reference import Key, Reference, records

WIDTH, LAYERS, BATCH, TIME = 24, 2, 4, 16
CONFIG = DecoderConfig(model_dim=16, width=WIDTH, layers=LAYERS, heads=2, vocabulary=32)
RUN = "compiled"


class Checkpointed(Decoder):
    """With activation checkpointing of every block."""

    def forward(self, tokens_BT: Tensor) -> Tensor:
        x = self.embedding(tokens_BT)
        for layer in self.layers:
            x = checkpoint(layer, x, use_reentrant=False)
        return self.head(self.norm(x))


def build(kind: type[Decoder] = Decoder) -> Decoder:
    torch.manual_seed(0)
    return kind(CONFIG)


def batch(seed: int, time: int = TIME) -> Tensor:
    return torch.randint(32, (BATCH, time), generator=torch.Generator().manual_seed(seed))


def attached(model: nn.Module, store: Path, **options: object) -> Agent:
    return attach(model, run_id=RUN, store=store, aggregator="inline", **options)


def trained(model: nn.Module, tokens_BT: Tensor, optimizer: torch.optim.Optimizer, autocast: bool = False) -> str:
    """The exact loss of one step."""
    optimizer.zero_grad()
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        logits = model(tokens_BT)
    loss = F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), tokens_BT[:, 1:].flatten())
    loss.backward()
    optimizer.step()
    return loss.item().hex()


def said(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [one.getMessage() for one in caplog.records if one.name == "eigenwatch.agent"]


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.05)


@pytest.mark.parametrize(
    ("kind", "precision"),
    [(Decoder, "float32"), (Decoder, "autocast"), (Decoder, "bfloat16"), (Checkpointed, "autocast")],
)
def test_records_are_those_of_an_eager_training_and_sampling_compiles_nothing_again(tmp_path, kind, precision):
    torch.compiler.reset()
    dtype = torch.bfloat16 if precision == "bfloat16" else torch.float32
    eager, model = build().to(dtype), build(kind).to(dtype)
    reference = Reference().hook(eager, ("post", "pre"))
    optimizers = sgd(eager), sgd(model)
    with attached(model, tmp_path, every=3, sites=("post", "pre")) as agent:
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        for reference.step in range(7):
            for micro in range(2):
                tokens = batch(2 * reference.step + micro)
                loss = trained(eager, tokens, optimizers[0], precision == "autocast")
                with torch.compiler.set_stance("default" if reference.step == 0 else "fail_on_recompile"):
                    assert trained(compiled, tokens, optimizers[1], precision == "autocast") == loss
            agent.step(reference.step)
    found = reference.assert_stored(tmp_path, RUN, [0, 3, 6])
    assert {one["tokens"] for one in found.values()} == {2 * BATCH * TIME}


@pytest.mark.parametrize("how", ["dynamic", "marked", "automatic"])
def test_sequences_of_any_length_are_seen_by_code_that_was_compiled_for_all(tmp_path, how):
    torch.compiler.reset()
    eager, model = build(), build()
    reference = Reference().hook(eager)
    with torch.no_grad(), attached(model, tmp_path, every=2) as agent:
        dynamic = True if how == "dynamic" else None
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager", dynamic=dynamic)
        settled = 2 if how == "automatic" else 1
        for reference.step, time in enumerate((16, 12, 20, 9, 33, 16)):
            tokens = batch(reference.step, time)
            eager(tokens)
            if how == "marked":
                torch._dynamo.mark_dynamic(tokens, 1)
            with torch.compiler.set_stance("default" if reference.step < settled else "fail_on_recompile"):
                compiled(tokens)
            agent.step(reference.step)
    found = reference.assert_stored(tmp_path, RUN, [0, 2, 4])
    assert [found[Key(step, 0)]["tokens"] for step in (0, 2, 4)] == [BATCH * 16, BATCH * 20, BATCH * 33]


def test_an_agent_that_comes_after_the_first_compiled_forward_says_so_once(tmp_path, caplog):
    torch.compiler.reset()
    model = build()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    compiled(batch(0))
    with attached(compiled, tmp_path, every=1) as agent:
        for step in range(3):
            compiled(batch(step))
            agent.step(step)
    assert records(tmp_path, RUN) == {}
    assert said(caplog) == [
        "nothing was observed in sampled step 0: was the model in training mode, and attach() called before the first "
        "compiled forward?"
    ]


def test_a_layer_that_was_compiled_too_early_is_named_once(tmp_path, caplog):
    torch.compiler.reset()
    model = build()
    model.layers[1].compile(fullgraph=True, backend="aot_eager")
    model(batch(0))
    with attached(model, tmp_path, every=1) as agent:
        for step in range(3):
            model(batch(step))
            agent.step(step)
    assert set(records(tmp_path, RUN)) == {Key(step, 0) for step in range(3)}
    (message,) = said(caplog)
    assert message.startswith("layers.1.mlp.down_proj (site post) was not observed in sampled step 0, other layers")


class MasksItself(nn.Module):
    """Computes its padding mask inside of what is compiled, so that the compiler may use the mask's memory again."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.inner = Inner()

    def forward(self, tokens_BT: Tensor) -> Tensor:
        return self.inner(tokens_BT, attention_mask=(tokens_BT % 5 != 0).float() * 2)


class Inner(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(32, 16)
        self.layers = nn.ModuleList([nn.ModuleDict({"mlp": FeedForward(CONFIG)})])

    def forward(self, tokens_BT: Tensor, attention_mask: Tensor) -> Tensor:
        x = self.embedding(tokens_BT)
        weight = (attention_mask - attention_mask.sum(1, keepdim=True)).cos()
        return self.layers[0]["mlp"](x * weight[..., None])


def test_inductor_shows_masked_tokens_of_any_length(tmp_path):
    """The one case in which inductor writes C++, which takes most of the time."""
    torch.compiler.reset()
    eager, model = MasksItself(), MasksItself()
    reference = Reference().hook(eager)
    with attached(model.inner, tmp_path, every=2, mask_argument="attention_mask") as agent:
        compiled = torch.compile(model, fullgraph=True, dynamic=True)
        for reference.step, time in enumerate((16, 12, 20, 9, 33)):
            tokens = batch(reference.step, time)
            reference.counted = tokens % 5 != 0
            eager(tokens)
            with torch.compiler.set_stance("default" if reference.step == 0 else "fail_on_recompile"):
                compiled(tokens).square().mean().backward()
            agent.step(reference.step)
    reference.assert_stored(tmp_path, RUN, [0, 2, 4])


def test_the_operator_may_not_be_captured_into_a_cuda_graph():
    assert torch.Tag.cudagraph_unsafe in torch.ops.eigenwatch.observe.default.tags


@pytest.mark.parametrize("stack", ["eager", "checkpointed", "compiled"])
def test_300_steps_have_the_same_losses_to_the_last_bit(tmp_path, stack):
    config = DecoderConfig(model_dim=8, width=16, layers=1, heads=1, vocabulary=32)

    def losses(observed: bool) -> list[str]:
        torch.compiler.reset()
        torch.manual_seed(0)
        model = (Checkpointed if stack == "checkpointed" else Decoder)(config)
        agent = attached(model, tmp_path, every=10, sites=("post", "pre")) if observed else None
        runs = torch.compile(model, fullgraph=True, backend="aot_eager") if stack == "compiled" else model
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, foreach=True)
        found = []
        for step in range(300):
            found.append(trained(runs, batch(step, 8), optimizer))
            if agent is not None:
                agent.step(step)
        if agent is not None:
            assert agent.close() == 0
        return found

    assert losses(observed=True) == losses(observed=False)
    assert set(records(tmp_path, RUN)) == {
        Key(step, 0, site) for step, site in itertools.product(range(0, 300, 10), ("post", "pre"))
    }
