"""Lightning's Trainer with eigenwatch's callback.

    python examples/lightning_module.py --store runs/

The decoder is torch's own, so `layers=` says where its down-projections are. Records carry the step under which
Lightning's loggers write.
"""

import argparse
from pydoc_data.topics import topics

import torch
import torch.nn.functional as F
from eigenwatch.agent.lightning import EigenwatchCallback
from lightning.pytorch import LightningModule, Trainer, seed_everything
from torch import Tensor, nn
from torch.utils.data import DataLoader


class Decoder(LightningModule):
    """Predicts the next byte."""

    def __init__(self, model_dim: int = 64, width: int = 256, layers: int = 4) -> None:
        super().__init__()
        self.embedding = nn.Embedding(256, model_dim)
        layer = nn.TransformerEncoderLayer(model_dim, 4, width, dropout=0.0, batch_first=True, norm_first=True)
        self.blocks = nn.TransformerEncoder(layer, layers, enable_nested_tensor=False)
        self.head = nn.Linear(model_dim, 256)

    def forward(self, bytes_BT: Tensor) -> Tensor:
        causal = nn.Transformer.generate_square_subsequent_mask(bytes_BT.shape[1], device=bytes_BT.device)
        return self.head(self.blocks(self.embedding(bytes_BT), mask=causal, is_causal=True))

    def training_step(self, windows: Tensor, batch_idx: int) -> Tensor:
        loss = F.cross_entropy(self(windows[:, :-1]).flatten(0, 1), windows[:, 1:].flatten())
        self.log("loss", loss, prog_bar=True)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=1e-3)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--store", help="folder of the history (default: ./eigenwatch-store)")
    parser.add_argument("--aggregator", default="embedded", help="'inline', or the address of `eigenwatch serve`")
    parser.add_argument("--run-id", default="lightning")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--every", type=int, default=5)
    options = parser.parse_args()

    seed_everything(0)
    text = torch.frombuffer(bytearray("".join(topics.values()).encode()), dtype=torch.uint8).long()
    loader = DataLoader(text[: text.numel() // 65 * 65].view(-1, 65), batch_size=8, shuffle=True)
    callback = EigenwatchCallback(
        run_id=options.run_id,
        every=options.every,
        store=options.store,
        aggregator=options.aggregator,
        layers=r"blocks\.layers\.(\d+)\.linear2",
    )
    trainer = Trainer(
        accelerator="cpu",
        max_steps=options.steps,
        accumulate_grad_batches=2,
        callbacks=[callback],
        logger=False,
        enable_checkpointing=False,
    )
    trainer.fit(Decoder(), loader)

    if trainer.is_global_zero:
        store = f"--store {options.store} " if options.store else ""
        sql = f"SELECT step, layer, hard_rank, soft_rank FROM records WHERE run_id = '{options.run_id}' ORDER BY ALL"
        print(f'eigenwatch query {store}"{sql}"')


if __name__ == "__main__":
    main()
