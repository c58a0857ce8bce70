"""A plain training loop under torchrun, with eigenwatch attached.

    torchrun --nproc-per-node 2 examples/torchrun.py --store runs/

The decoder is torch's own, so `layers=` says where its down-projections are.
"""

import argparse
from pydoc_data.topics import topics

import torch
import torch.distributed as dist
import torch.nn.functional as F
from eigenwatch.agent import attach
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel


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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--store", help="folder of the history (default: ./eigenwatch-store)")
    parser.add_argument("--aggregator", default="embedded", help="or the address of a cluster with `eigenwatch serve`")
    parser.add_argument("--run-id", default="torchrun")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--every", type=int, default=5)
    options = parser.parse_args()

    dist.init_process_group("gloo")
    torch.manual_seed(0)
    model = DistributedDataParallel(Decoder())
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    text = torch.frombuffer(bytearray("".join(topics.values()).encode()), dtype=torch.uint8)
    draws = torch.Generator().manual_seed(dist.get_rank())

    with attach(
        model,
        run_id=options.run_id,
        every=options.every,
        store=options.store,
        aggregator=options.aggregator,
        layers=r"blocks\.layers\.(\d+)\.linear2",
    ) as agent:
        for step in range(options.steps):
            starts = torch.randint(text.numel() - 65, (8,), generator=draws).tolist()
            windows = torch.stack([text[start : start + 65] for start in starts]).long()
            loss = F.cross_entropy(model(windows[:, :-1]).flatten(0, 1), windows[:, 1:].flatten())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            agent.step(step)
            if dist.get_rank() == 0:
                print(f"step {step}: loss {loss.item():.3f}")

    if dist.get_rank() == 0:
        store = f"--store {options.store} " if options.store else ""
        sql = f"SELECT step, layer, hard_rank, soft_rank FROM records WHERE run_id = '{options.run_id}' ORDER BY ALL"
        print(f'eigenwatch query {store}"{sql}"')
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
