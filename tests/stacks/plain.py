"""The truth that every stack is compared with: the same model, trained on the same batches in one process, eagerly.

However a stack spreads the model and the batch over ranks, the activations of a step are these, but for rounding.
"""

import torch
import torch.nn.functional as F
from eigenwatch.cli.demo.decoder import Decoder, DecoderConfig
from torch import Tensor, nn

LAYERS, WIDTH, MODEL_DIM, HEADS, VOCABULARY = 4, 320, 32, 4, 64
SEQUENCES, TIME, STEPS, EVERY = 16, 32, 5, 2
SAMPLED = range(0, STEPS, EVERY)
LEARNING_RATE = 0.05
CONFIG = DecoderConfig(model_dim=MODEL_DIM, width=WIDTH, layers=LAYERS, heads=HEADS, vocabulary=VOCABULARY)


def build() -> Decoder:
    torch.manual_seed(0)
    return Decoder(CONFIG)


def batch(step: int) -> tuple[Tensor, Tensor]:
    """Inputs and targets (SEQUENCES, TIME) of the whole job's step."""
    tokens = torch.randint(VOCABULARY, (SEQUENCES, TIME + 1), generator=torch.Generator().manual_seed(step))
    return tokens[:, :-1], tokens[:, 1:]


def loss_of(logits: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=LEARNING_RATE)


def activations() -> dict[tuple[int, int, str], Tensor]:
    """(step, layer, site) → (N, D) of every sampled step."""
    model, kept = build(), {}
    optimizer, now = sgd(model), 0
    for index, layer in enumerate(model.layers):

        def keep_post(_: nn.Module, arguments: tuple[Tensor], index: int = index) -> None:
            kept[now, index, "post"] = arguments[0].detach().flatten(0, 1).clone()

        def keep_pre(_: nn.Module, __: object, output: Tensor, index: int = index) -> None:
            kept[now, index, "pre"] = output.detach().flatten(0, 1).clone()

        layer.mlp.down_proj.register_forward_pre_hook(keep_post)
        layer.mlp.gate_proj.register_forward_hook(keep_pre)
    for now in range(STEPS):
        inputs, targets = batch(now)
        optimizer.zero_grad()
        loss_of(model(inputs), targets).backward()
        optimizer.step()
    return {key: x_ND for key, x_ND in kept.items() if key[0] in SAMPLED}
