"""Ray Train's TorchTrainer on two workers, with eigenwatch attached in each.

    eigenwatch serve --store runs/ --json &              # prints the address of its Ray
    python examples/ray_train.py --aggregator ADDRESS

The workers run on the cluster on which `eigenwatch serve` runs, so its address is the one they are in. `.remote` calls
and the training share that cluster; the agent in a worker does not use the worker's own connection to Ray.
"""

import argparse
from pydoc_data.topics import topics

import ray
import ray.train
import torch
import torch.nn.functional as F
from eigenwatch.agent import attach
from ray.train.torch import TorchTrainer, prepare_model
from torch import Tensor, nn


class Decoder(nn.Module):
    """Predicts the next byte."""

    def __init__(self, model_dim: int = 64, width: int = 256, layers: int = 4) -> None:
        super().__init__()
        self.embedding = nn.Embedding(256, model_dim)
        layer = nn.TransformerEncoderLayer(model_dim, 4, width, dropout=0.0, batch_first=True, norm_first=True)
        self.blocks = nn.TransformerEncoder(layer, layers, enable_nested_tensor=False)
        self.head = nn.Linear(model_dim, 256)

    def forward(self, bytes_BT: Tensor) -> Tensor:
        causal = nn.Transformer.generate_square_subsequent_mask(bytes_BT.shape[1])
        return self.head(self.blocks(self.embedding(bytes_BT), mask=causal, is_causal=True))


def train(options: dict) -> None:
    """What each worker does."""
    model = prepare_model(Decoder())
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    text = torch.frombuffer(bytearray("".join(topics.values()).encode()), dtype=torch.uint8)
    draws = torch.Generator().manual_seed(ray.train.get_context().get_world_rank())
    layers = r"blocks\.layers\.(\d+)\.linear2"
    address = ray.get_runtime_context().gcs_address
    with attach(model, run_id=options["run_id"], every=options["every"], aggregator=address, layers=layers) as agent:
        for step in range(options["steps"]):
            starts = torch.randint(text.numel() - 65, (8,), generator=draws).tolist()
            windows = torch.stack([text[start : start + 65] for start in starts]).long()
            loss = F.cross_entropy(model(windows[:, :-1]).flatten(0, 1), windows[:, 1:].flatten())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            agent.step(step)
            if ray.train.get_context().get_world_rank() == 0:
                print(f"step {step}: loss {loss.item():.3f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--store", help="that `eigenwatch serve` was given, for the query printed at the end")
    parser.add_argument("--aggregator", default="auto", help="the address of the cluster with `eigenwatch serve`")
    parser.add_argument("--run-id", default="ray-train")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--every", type=int, default=5)
    options = parser.parse_args()

    ray.init(address=options.aggregator)
    resources = ray.train.ScalingConfig(num_workers=2, resources_per_worker={"memory": 64 << 20})
    TorchTrainer(train, train_loop_config=vars(options), scaling_config=resources).fit()
    store = f"--store {options.store} " if options.store else ""
    sql = f"SELECT step, layer, hard_rank, soft_rank FROM records WHERE run_id = '{options.run_id}' ORDER BY ALL"
    print(f'eigenwatch query {store}"{sql}"')


if __name__ == "__main__":
    main()
