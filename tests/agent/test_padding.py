"""Padding: tokens under a mask do not count, in whatever order a model keeps them, and a misfit gives no record."""

from pathlib import Path

import pytest
import torch
from eigenwatch.agent import Agent, attach
from eigenwatch.cli.demo.decoder import DecoderConfig, FeedForward
from torch import Tensor, nn

from tests.agent.reference import Key, Reference, records

WIDTH, LAYERS, BATCH, TIME, VOCABULARY = 24, 2, 6, 16, 32
CONFIG = DecoderConfig(model_dim=8, width=WIDTH)
ORDERS = ("batch first", "time first", "flat")


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.mlp = FeedForward(CONFIG)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.mlp(x)


class Masked(nn.Module):
    """Feed-forward layers over (B, T, d), Megatron's (T, B, d) or rows."""

    def __init__(self, order: str = "batch first") -> None:
        super().__init__()
        self.order = order
        self.embedding = nn.Embedding(VOCABULARY, CONFIG.model_dim)
        self.layers = nn.ModuleList(Layer() for _ in range(LAYERS))

    def arranged(self, x: Tensor) -> Tensor:
        """(B, T, …) in the model's order."""
        if self.order == "flat":
            return x.flatten(0, 1)
        return x.transpose(0, 1) if self.order == "time first" else x

    def forward(self, tokens_BT: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        x = self.arranged(self.embedding(tokens_BT))
        for layer in self.layers:
            x = layer(x)
        return x


def model(order: str = "batch first") -> Masked:
    torch.manual_seed(0)
    return Masked(order)


def batch(seed: int) -> tuple[Tensor, Tensor]:
    """Tokens and their mask, each sequence of a length of its own."""
    draws = torch.Generator().manual_seed(seed)
    lengths = torch.randint(2, TIME, (BATCH, 1), generator=draws)
    return torch.randint(VOCABULARY, (BATCH, TIME), generator=draws), (torch.arange(TIME) < lengths).long()


def attached(model: nn.Module, store: Path, **options: object) -> Agent:
    return attach(model, run_id="padded", every=1, store=store, aggregator="inline", **options)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("given", ["by hand", "by keyword", "by position"])
def test_tokens_under_the_mask_do_not_count(tmp_path, order, given):
    """Two micro-batches a step, each with its own mask."""
    masked = model(order)
    reference = Reference().hook(masked, ("post", "pre"))
    argument = None if given == "by hand" else "attention_mask"
    with attached(masked, tmp_path, sites=("post", "pre"), mask_argument=argument) as agent:
        for reference.step in range(3):
            for micro in range(2):
                tokens_BT, mask_BT = batch(2 * reference.step + micro)
                reference.counted = masked.arranged(mask_BT)
                if given == "by hand":
                    agent.mask(mask_BT.bool())
                    masked(tokens_BT).square().mean().backward()
                elif given == "by keyword":
                    masked(tokens_BT, attention_mask=mask_BT).square().mean().backward()
                else:
                    masked(tokens_BT, mask_BT).square().mean().backward()
            agent.step(reference.step)
    assert agent.close() == 0
    found = reference.assert_stored(tmp_path, "padded", range(3))
    for step in range(3):
        assert found[Key(step, 0)]["tokens"] == found[Key(step, 0, "pre")]["tokens"] < 2 * BATCH * TIME


def test_the_mask_is_gone_after_the_step_and_after_a_forward_without_one(tmp_path):
    masked = model()
    reference = Reference().hook(masked)
    with attached(masked, tmp_path, mask_argument="attention_mask") as agent:
        for reference.step in range(4):
            tokens_BT, mask_BT = batch(reference.step)
            reference.counted = mask_BT if reference.step % 2 == 0 else None
            if reference.step == 0:
                masked(tokens_BT, attention_mask=mask_BT)
            elif reference.step == 1:
                masked(tokens_BT)
            else:
                if reference.step == 2:
                    agent.mask(mask_BT)
                for layer in masked.layers:  # not the model's forward, whose argument would be taken instead
                    layer(masked.embedding(tokens_BT))
            agent.step(reference.step)
    reference.assert_stored(tmp_path, "padded", range(4))


def test_a_mask_that_fits_nothing_gives_no_record_and_switches_the_layers_off(tmp_path, caplog):
    masked = model()
    reference = Reference().hook(masked)
    with attached(masked, tmp_path, mask_argument="attention_mask") as agent:
        for reference.step in range(7):
            tokens_BT, mask_BT = batch(reference.step)
            reference.counted = mask_BT
            wrong = mask_BT[:, None, None, :] if reference.step in (1, 3, 4) else mask_BT
            masked(tokens_BT, attention_mask=wrong)
            agent.step(reference.step)
    # A step with an error has no record; after the third nothing is observed any more.
    reference.assert_stored(tmp_path, "padded", [0, 2])
    assert agent.dropped == {"observation_error": 3 * LAYERS}
    assert "the mask has shape (6, 1, 1, 16) and the activations (6, 16)" in caplog.text
    assert caplog.text.count("is no longer observed after 3 errors") == LAYERS


def test_a_keyword_that_the_model_does_not_have_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"mask_argument='padding_mask'.*attention_mask"):
        attached(model(), tmp_path, mask_argument="padding_mask")


def test_the_mask_of_a_compiled_model_is_seen_and_compiles_nothing_again(tmp_path):
    torch.compiler.reset()
    masked, compiled = model(), model()
    reference = Reference().hook(masked)
    with attached(compiled, tmp_path, mask_argument="attention_mask") as agent:
        compiled.compile(fullgraph=True, backend="aot_eager")
        for reference.step in range(3):
            for micro in range(2):
                tokens_BT, reference.counted = batch(2 * reference.step + micro)
                masked(tokens_BT)
                with torch.compiler.set_stance("default" if reference.step == 0 else "fail_on_recompile"):
                    compiled(tokens_BT, attention_mask=reference.counted).square().mean().backward()
            agent.step(reference.step)
    reference.assert_stored(tmp_path, "padded", range(3))


def zero_(mask: Tensor) -> None:
    mask.zero_()


def test_a_mask_that_changes_in_place_after_the_forward_began_is_the_one_that_it_began_with(tmp_path):
    """As a compiler's reuse of its memory would change it."""
    masked = model()
    reference = Reference().hook(masked)
    with attached(masked, tmp_path, mask_argument="attention_mask") as agent:
        tokens_BT, mask_BT = batch(0)
        reference.counted = mask_BT.clone()
        masked.embedding.register_forward_hook(lambda *_: zero_(mask_BT))
        masked(tokens_BT, attention_mask=mask_BT)
        agent.step(0)
    assert records(tmp_path, "padded")
    reference.assert_stored(tmp_path, "padded", [0])
