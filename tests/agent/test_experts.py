"""Experts of a mixture: a record for each, those that no token reached included; fused ones are shown by hand."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from eigenwatch.agent import Agent, Declared, attach
from eigenwatch.cli.demo.decoder import DecoderConfig, FeedForward
from torch import Tensor, nn
from transformers import MixtralConfig, MixtralForCausalLM

from tests.agent.reference import Key, Reference, records
from tests.processes import wait_until

WIDTH, MODEL_DIM, EXPERTS, TOP, BATCH, TIME, VOCABULARY = 24, 8, 4, 2, 6, 16, 32
CONFIG = DecoderConfig(model_dim=MODEL_DIM, width=WIDTH)


class Mixture(nn.Module):
    """Routed experts, each with modules of its own; those in `closed` are never chosen."""

    def __init__(self) -> None:
        super().__init__()
        self.router = nn.Linear(MODEL_DIM, EXPERTS, bias=False)
        self.experts = nn.ModuleList(FeedForward(CONFIG) for _ in range(EXPERTS))
        self.closed: list[int] = []

    def forward(self, x_BTd: Tensor) -> Tensor:
        x_Nd = x_BTd.flatten(0, 1)
        logits_NE = self.router(x_Nd).index_fill(1, torch.tensor(self.closed, dtype=torch.long), -torch.inf)
        weight_NK, chosen_NK = logits_NE.softmax(-1).topk(TOP)
        out = torch.zeros_like(x_Nd)
        for number, expert in enumerate(self.experts):
            token, which = (chosen_NK == number).nonzero(as_tuple=True)
            if len(token):  # many implementations skip the call
                out = out.index_add(0, token, expert(x_Nd[token]) * weight_NK[token, which, None])
        return out.view_as(x_BTd)


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.mlp = Mixture()

    def forward(self, x: Tensor) -> Tensor:
        return x + self.mlp(x)


class Routed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, MODEL_DIM)
        self.layers = nn.ModuleList([Layer()])

    def forward(self, tokens_BT: Tensor) -> Tensor:
        x = self.embedding(tokens_BT)
        for layer in self.layers:
            x = layer(x)
        return x


def tokens(seed: int) -> Tensor:
    return torch.randint(VOCABULARY, (BATCH, TIME), generator=torch.Generator().manual_seed(seed))


def attached(model: nn.Module, store: Path, **options: object) -> Agent:
    return attach(model, run_id="experts", every=1, store=store, aggregator="inline", **options)


def test_each_expert_has_a_record_and_one_without_tokens_is_not_waited_for(tmp_path):
    torch.manual_seed(0)
    model = Routed()
    reference = Reference().hook(model, ("post", "pre"))
    keys = [Key(step, 0, site, expert) for step in range(3) for site in ("post", "pre") for expert in range(EXPERTS)]
    with attached(model, tmp_path, sites=("post", "pre")) as agent:
        for reference.step in range(3):
            model.layers[0].mlp.closed = [1] if reference.step == 1 else []
            for micro in range(2):
                model(tokens(2 * reference.step + micro)).square().mean().backward()
            agent.step(reference.step)
        # Long before the deadline of 60 s, after which it would be incomplete.
        wait_until(lambda: set(records(tmp_path, "experts")) >= set(keys), "all records")
    found = reference.assert_stored_keys(tmp_path, "experts", keys)
    assert sum(found[Key(0, 0, "post", e)]["tokens"] for e in range(EXPERTS)) == 2 * BATCH * TIME * TOP
    empty = found[Key(1, 0, "post", 1)]
    assert empty["tokens"] == 0
    assert empty["complete"]
    assert empty["finite"]
    assert empty["hard_rank"] is None
    assert empty["eigenvalues"] is None


def mixtral() -> MixtralForCausalLM:
    torch.manual_seed(0)
    return MixtralForCausalLM(
        MixtralConfig(
            hidden_size=MODEL_DIM, intermediate_size=WIDTH, num_hidden_layers=2, num_attention_heads=2,
            num_key_value_heads=2, vocab_size=VOCABULARY, num_local_experts=EXPERTS, num_experts_per_tok=TOP,
            max_position_embeddings=TIME,
        )
    )  # fmt: skip


DECLARED = [Declared(layer=layer, width=WIDTH, expert=expert) for layer in range(2) for expert in range(EXPERTS)]


def show(model: MixtralForCausalLM, agent: Agent, reference: Reference) -> None:
    """Gives the fused experts a forward that shows each expert's activations to the agent, and to the reference."""
    for index, layer in enumerate(model.model.layers):
        experts = layer.mlp.experts

        def forward(x_Nd: Tensor, chosen_NK: Tensor, weight_NK: Tensor, experts=experts, index=index) -> Tensor:
            out = torch.zeros_like(x_Nd)
            for number in range(EXPERTS):
                token, which = (chosen_NK == number).nonzero(as_tuple=True)
                gate, up = F.linear(x_Nd[token], experts.gate_up_proj[number]).chunk(2, dim=-1)
                activations = F.silu(gate) * up
                agent.observe(activations, layer=index, expert=number)
                reference.keep(activations, index, expert=number)
                out.index_add_(
                    0, token, F.linear(activations, experts.down_proj[number]) * weight_NK[token, which, None]
                )
            return out

        experts.forward = forward


def test_fused_experts_are_refused_with_the_remedy(tmp_path):
    with pytest.raises(ValueError, match=r"experts.*fused experts.*agent\.observe\(x, layer=, site=, expert=\)"):
        attached(mixtral(), tmp_path)


def test_fused_experts_that_are_declared_and_shown_have_records_and_train_the_same(tmp_path):
    plain, model, reference = mixtral(), mixtral(), Reference()
    with attached(model, tmp_path, declared=DECLARED) as agent:
        show(model, agent, reference)
        for reference.step in range(2):
            ids = tokens(reference.step)
            loss = model(input_ids=ids, labels=ids).loss
            loss.backward()
            torch.testing.assert_close(loss, plain(input_ids=ids, labels=ids).loss)
            agent.step(reference.step)
    keys = [Key(step, one.layer, "post", one.expert) for step in range(2) for one in DECLARED]
    reference.assert_stored_keys(tmp_path, "experts", keys)


class ByHand(nn.Module):
    """A feed-forward without modules, which shows its activations itself."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Parameter(torch.randn(WIDTH, MODEL_DIM))
        self.agent: Agent | None = None
        self.layer = 0

    def forward(self, x: Tensor) -> Tensor:
        activations = F.silu(x @ self.up.T)
        self.agent.observe(activations, layer=self.layer)
        return activations @ self.up


def test_showing_what_was_not_declared_warns_once_and_is_ignored(tmp_path, caplog):
    model = ByHand()
    with attached(model, tmp_path, declared=[Declared(layer=0, width=WIDTH)]) as agent:
        model.agent = agent
        for step in range(3):
            for model.layer in (0, 7):
                model(torch.randn(BATCH, MODEL_DIM))
            agent.step(step)
    found = records(tmp_path, "experts")
    assert set(found) == {Key(step, 0) for step in range(3)}
    assert {one["tokens"] for one in found.values()} == {BATCH}
    assert caplog.text.count("observe() of layer 7, site post is ignored") == 1


def test_only_training_is_taken_from_what_is_shown(tmp_path):
    model = ByHand()
    with attached(model, tmp_path, declared=[Declared(layer=0, width=WIDTH)]) as agent:
        model.agent = agent
        for training in (True, False, True):
            model.train(training)
            model(torch.randn(BATCH, MODEL_DIM))
        agent.step(0)
    assert records(tmp_path, "experts")[Key(0, 0)]["tokens"] == 2 * BATCH


def test_a_compiled_forward_may_show_its_activations(tmp_path):
    torch.compiler.reset()
    torch.manual_seed(0)
    model, reference = ByHand(), Reference()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with attached(compiled, tmp_path, declared=[Declared(layer=0, width=WIDTH)]) as agent:
        model.agent = agent
        for reference.step in range(4):
            x = torch.randn(40, MODEL_DIM)
            reference.keep(F.silu(x @ model.up.T), 0)
            with torch.compiler.set_stance("default" if reference.step == 0 else "fail_on_recompile"):
                compiled(x).square().mean().backward()
            compiled.eval()
            with torch.compiler.set_stance("force_eager"):
                compiled(x)
            compiled.train()
            agent.step(reference.step)
    reference.assert_stored(tmp_path, "experts", range(4))
