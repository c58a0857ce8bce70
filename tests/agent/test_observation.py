"""What the hook sees of a model that trains, and that the model does not notice."""

import gc
import weakref
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from eigenwatch.agent import find_layers
from eigenwatch.agent.capture import Room
from eigenwatch.agent.observation import MAX_ERRORS, Gate, Observer, Place, Shared
from eigenwatch.agent.padding import Padding
from eigenwatch.cli.demo.decoder import Decoder, DecoderConfig
from eigenwatch.spectrum import Moments, unpack
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from tests.spectrum.cases import two_pass_scatter

WIDTH, LAYERS, BATCH, TIME = 24, 2, 3, 8
CONFIG = DecoderConfig(model_dim=16, width=WIDTH, layers=LAYERS, heads=2, vocabulary=32)


def decoder(seed: int = 0) -> Decoder:
    torch.manual_seed(seed)
    return Decoder(CONFIG)


def batch(seed: int = 0, size: int = BATCH) -> Tensor:
    return torch.randint(32, (size, TIME), generator=torch.Generator().manual_seed(seed))


def loss_of(model: nn.Module, tokens_BT: Tensor) -> Tensor:
    logits = model(tokens_BT)
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), tokens_BT[:, 1:].flatten())


def nothing_shared() -> Shared:
    return Shared(room=Room(1 << 30), padding=Padding(), scratch={})


def observe(
    module: nn.Module, gate: Gate, layer: int = 0, width: int = WIDTH, shared: Shared | None = None
) -> Observer:
    """An observer of what goes into a module."""
    place = Place(layer=layer, site="post", name=f"layers.{layer}", width=width, share=0, block=(0, width))
    return Observer(place, module, gate, nothing_shared())


def take(observer: Observer) -> Moments | None:
    """What was seen since the last call, folded."""
    capture = observer.take().capture
    return None if capture is None else capture.moments()


class Watch:
    """Observers on every layer of a model, and beside each a witness that keeps what really came in."""

    def __init__(self, model: nn.Module) -> None:
        self.gate = Gate()
        self.inputs: list[list[Tensor]] = []
        self.observers = []
        for one in find_layers(model):
            inputs: list[Tensor] = []
            one.module.register_forward_pre_hook(lambda _, args, into=inputs: into.append(args[0].detach().clone()))
            self.inputs.append(inputs)
            self.observers.append(observe(one.module, self.gate, one.layer, one.width))

    def take(self) -> list[Moments | None]:
        return [take(observer) for observer in self.observers]

    def tokens(self) -> list[int]:
        """Of each layer since the last call; 0 where nothing was seen."""
        return [0 if moments is None else moments.tokens for moments in self.take()]

    def rows(self, layer: int) -> Tensor:
        """All that came into a layer (N, D)."""
        return torch.cat([x.reshape(-1, x.shape[-1]) for x in self.inputs[layer]])

    def assert_seen(self, tolerance: float = 1e-5) -> None:
        """What was seen since the last call is all that came in since the model was built."""
        for layer, moments in enumerate(self.take()):
            rows_ND = self.rows(layer).double()
            assert moments is not None
            assert moments.tokens == len(rows_ND)
            torch.testing.assert_close(moments.mean, rows_ND.mean(0), rtol=0, atol=1e-6 * float(rows_ND.std()))
            seen, true = unpack(moments.scatter, WIDTH).double(), two_pass_scatter(rows_ND)
            assert float((seen - true).norm() / true.norm()) < tolerance


def test_a_forward_is_seen_whole():
    watch = Watch(model := decoder())
    loss_of(model, batch()).backward()
    watch.assert_seen()
    assert watch.tokens() == [0] * LAYERS


def test_the_forwards_of_a_step_are_summed():
    watch = Watch(model := decoder())
    for micro_step in range(3):
        loss_of(model, batch(micro_step, size=micro_step + 1)).backward()
    assert len(watch.rows(0)) == 6 * TIME
    watch.assert_seen()


def test_only_training_counts():
    watch = Watch(model := decoder().eval())
    model(batch())
    assert watch.tokens() == [0] * LAYERS
    model.train()
    model(batch())
    assert watch.tokens() == [BATCH * TIME] * LAYERS


def test_a_forward_without_gradients_counts_while_the_model_is_in_training_mode():
    watch = Watch(model := decoder())
    with torch.no_grad():
        model(batch())
    assert watch.tokens() == [BATCH * TIME] * LAYERS


def test_only_sampled_steps_count():
    watch = Watch(model := decoder())
    for opened in (True, False, True):
        watch.gate.open = opened
        model(batch())
        assert watch.tokens() == [BATCH * TIME * opened] * LAYERS


def test_a_layer_that_no_token_reached_was_not_observed():
    watch = Watch(model := decoder())
    model.layers[1].mlp(torch.zeros(0, 16))
    assert watch.take() == [None] * LAYERS
    model.layers[1].mlp(torch.zeros(5, 16))
    model.layers[1].mlp(torch.zeros(16))
    assert watch.tokens() == [0, 6]


class Checkpointed(Decoder):
    """The demo's decoder with activation checkpointing of every block."""

    reentrant = False

    def forward(self, tokens_BT: Tensor) -> Tensor:
        x = self.embedding(tokens_BT)
        for layer in self.layers:
            x = checkpoint(layer, x, use_reentrant=self.reentrant)
        return self.head(self.norm(x))


@pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "not reentrant"])
def test_what_checkpointing_computes_again_is_not_counted_again(reentrant):
    torch.manual_seed(0)
    model = Checkpointed(CONFIG)
    model.reentrant = reentrant
    watch = Watch(model)
    for seed in range(2):
        loss_of(model, batch(seed)).backward()
    assert [len(inputs) for inputs in watch.inputs] == [4] * LAYERS
    assert watch.tokens() == [2 * BATCH * TIME] * LAYERS


def test_autocast_does_not_lower_the_precision_of_what_is_accumulated():
    watch = Watch(model := decoder())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss_of(model, batch(size=40)).backward()
    assert watch.inputs[0][0].dtype == torch.bfloat16
    watch.assert_seen(tolerance=2e-6)  # a product in bfloat16 is off by 1e-3


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_a_model_in_another_precision_is_seen_too(dtype):
    watch = Watch(model := decoder().to(dtype))
    with torch.no_grad():
        model(batch(size=20))
    watch.assert_seen(tolerance=2e-6)


def train(
    model: nn.Module, gate: Gate | None = None, steps: int = 4, ended: Callable[[], object] = lambda: None
) -> tuple[list[float], list[Tensor], Tensor]:
    """Losses, the last gradients, and where the random numbers have got to."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for step in range(steps):
        optimizer.zero_grad()
        if gate is not None:
            gate.open = step != 2
        loss = loss_of(model, batch(step))
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        ended()
    return losses, [parameter.grad for parameter in model.parameters()], torch.get_rng_state()


def test_loss_and_gradients_are_the_same_to_the_last_bit():
    alone, observed = decoder(), decoder()
    torch.manual_seed(1)
    losses, gradients, random_state = train(alone)
    watch = Watch(observed)
    torch.manual_seed(1)
    observed_losses, observed_gradients, observed_random_state = train(observed, watch.gate)
    assert watch.tokens() == [3 * BATCH * TIME] * LAYERS
    assert observed_losses == losses
    assert all(torch.equal(a, b) for a, b in zip(observed_gradients, gradients, strict=True))
    assert torch.equal(observed_random_state, random_state)


def test_a_checkpoint_of_the_model_holds_nothing_of_ours():
    model = decoder()
    before = list(model.state_dict())
    watch = Watch(model)
    model(batch())
    assert list(model.state_dict()) == before
    assert [name for name, _ in model.named_buffers()] == []
    decoder().load_state_dict(model.state_dict())
    assert watch.tokens() == [BATCH * TIME] * LAYERS


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_activations_that_are_not_finite_are_shown_and_not_raised(bad):
    watch = Watch(model := decoder())
    with torch.no_grad():
        model.layers[1].mlp.up_proj.weight[0] = bad
    model(batch())
    healthy, broken = watch.take()
    assert healthy is not None
    assert torch.isfinite(healthy.scatter).all()
    assert broken is not None
    assert not torch.isfinite(unpack(broken.scatter, WIDTH).diagonal()).all()
    model(batch())
    assert all(observer.errors.total() == 0 for observer in watch.observers)


def test_a_layer_whose_observation_fails_is_switched_off_and_the_training_goes_on(caplog):
    alone, observed = decoder(), decoder()
    losses, gradients, _ = train(alone, steps=MAX_ERRORS + 2)
    gate = Gate()
    wrong = observe(observed.layers[0].mlp.down_proj, gate, 0, WIDTH + 1)
    right = observe(observed.layers[1].mlp.down_proj, gate, 1)
    observed_losses, observed_gradients, _ = train(observed, steps=MAX_ERRORS + 2, ended=wrong.take)
    assert observed_losses == losses
    assert all(torch.equal(a, b) for a, b in zip(observed_gradients, gradients, strict=True))
    assert wrong.errors.total() == MAX_ERRORS == 3
    assert take(wrong) is None
    assert take(right).tokens == (MAX_ERRORS + 2) * BATCH * TIME
    messages = [record.getMessage() for record in caplog.records]
    assert len(messages) == 2
    assert all("layer 0" in message for message in messages)
    assert f"expected {WIDTH + 1}" in messages[0]


def test_a_step_of_which_a_forward_failed_is_not_shown_as_if_it_were_whole():
    watch = Watch(model := decoder())
    model(batch())
    watch.observers[0].see(torch.randn(5, WIDTH + 1))
    watch.observers[0].see(torch.randn(5, WIDTH))
    assert watch.tokens() == [0, BATCH * TIME]
    model(batch())
    assert watch.tokens() == [BATCH * TIME] * LAYERS


def test_an_observer_that_is_closed_sees_nothing():
    watch = Watch(model := decoder())
    for observer in watch.observers:
        observer.close()
        observer.close()
    model(batch())
    assert watch.take() == [None] * LAYERS


def test_observing_a_model_does_not_keep_it_alive():
    watch = Watch(model := decoder())
    model(batch())
    gone = weakref.ref(model.layers[0].mlp.down_proj)
    del model
    gc.collect()
    assert gone() is None
    assert watch.tokens() == [BATCH * TIME] * LAYERS


class Projections(nn.Module):
    """A feed-forward layer without what lies between its products: inductor writes no C++, which would take 20 s."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = decoder().layers[:1]

    def forward(self, x: Tensor) -> Tensor:
        mlp = self.layers[0].mlp
        return mlp.down_proj(mlp.up_proj(x))


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_a_compiled_model_is_seen_once_a_forward_and_computes_the_same(backend):
    x = torch.randn(BATCH, TIME, 16, generator=torch.Generator().manual_seed(0))
    results, observers = [], []
    for observed in (False, True):
        torch.compiler.reset()  # code compiled for an equal model without a hook would be used again
        model, gate = Projections(), Gate()
        for one in find_layers(model) if observed else []:
            observers.append(observe(one.module, gate, one.layer, one.width))
        out = torch.compile(model, fullgraph=True, backend=backend)(x)
        out.square().mean().backward()
        mlp = model.layers[0].mlp
        results.append((out, mlp.up_proj.weight.grad, mlp.down_proj.weight.grad))
    assert all(torch.equal(*pair) for pair in zip(*results, strict=True))

    eager = Watch(reference := Projections())
    reference(x)
    ((observer,), (true,)) = observers, eager.take()
    seen = take(observer)
    assert seen.tokens == BATCH * TIME
    torch.testing.assert_close(seen.scatter, true.scatter, rtol=1e-4, atol=1e-6)


def test_neither_the_gate_nor_an_error_compiles_a_model_again():
    torch.compiler.reset()
    watch = Watch(decoder())
    model, gate = decoder(), watch.gate
    wrong = observe(model.layers[0].mlp.down_proj, gate, 0, WIDTH + 1)
    right = observe(model.layers[1].mlp.down_proj, gate, 1)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    loss_of(compiled, batch()).backward()
    assert take(right).tokens == BATCH * TIME
    with torch.compiler.set_stance("fail_on_recompile"):
        for opened in (False, True, False, True):
            gate.open = opened
            loss_of(compiled, batch()).backward()
            wrong.take()
            moments = take(right)
            assert (moments.tokens if moments else 0) == BATCH * TIME * opened
    assert wrong.errors.total() == MAX_ERRORS


@pytest.mark.parametrize("whole", [True, False], ids=["whole model", "each block"])
def test_what_a_compiled_model_computes_again_is_not_counted_again(whole):
    torch.compiler.reset()
    torch.manual_seed(0)
    model = Checkpointed(CONFIG)
    gate = Gate()
    observers = [observe(one.module, gate, one.layer, one.width) for one in find_layers(model)]
    for compiled in [model] if whole else model.layers:
        compiled.compile(fullgraph=True, backend="aot_eager")
    for seed in range(2):
        loss_of(model, batch(seed)).backward()
    assert [take(observer).tokens for observer in observers] == [2 * BATCH * TIME] * LAYERS


class CallsByKeyword(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList([nn.ModuleDict({"mlp": nn.ModuleDict({"down_proj": nn.Linear(8, 4)})})])

    def forward(self, x):
        return self.layers[0]["mlp"]["down_proj"](input=x)


def test_a_projection_that_is_called_by_keyword_is_observed():
    model = CallsByKeyword()
    gate = Gate()
    projection = model.layers[0]["mlp"]["down_proj"]
    observer = observe(projection, gate, width=8)
    model(torch.randn(5, 8))
    assert take(observer).tokens == 5


def test_an_input_that_is_no_plain_tensor_is_let_through_unobserved():
    class Wrapped(torch.Tensor):
        pass

    projection = nn.Linear(8, 4)
    observer = observe(projection, Gate(), width=8)
    projection(torch.randn(5, 8).as_subclass(Wrapped))
    assert take(observer) is None
