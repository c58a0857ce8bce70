"""A loop with Hugging Face Accelerate that accumulates gradients, with eigenwatch attached.

    accelerate launch --cpu examples/accelerate_loop.py --store runs/

A step of the optimizer is several forwards: `agent.step` is called when the gradients were synchronised.
"""

import argparse
from pydoc_data.topics import topics

import torch
from accelerate import Accelerator
from eigenwatch.agent import attach
from torch.utils.data import DataLoader
from transformers import LlamaConfig, LlamaForCausalLM


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--store", help="folder of the history (default: ./eigenwatch-store)")
    parser.add_argument("--aggregator", default="embedded", help="'inline', or the address of `eigenwatch serve`")
    parser.add_argument("--run-id", default="accelerate")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--every", type=int, default=5)
    options = parser.parse_args()

    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=256, hidden_size=64, intermediate_size=192, num_hidden_layers=4, num_attention_heads=4
    )
    model = LlamaForCausalLM(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    text = torch.frombuffer(bytearray("".join(topics.values()).encode()), dtype=torch.uint8).long()
    loader = DataLoader(text[: text.numel() // 64 * 64].view(-1, 64), batch_size=4, shuffle=True)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)

    step = 0
    with attach(
        accelerator.unwrap_model(model),
        run_id=options.run_id,
        every=options.every,
        store=options.store,
        aggregator=options.aggregator,
    ) as agent:
        for batch in loader:
            with accelerator.accumulate(model):
                loss = model(input_ids=batch, labels=batch).loss
                accelerator.backward(loss)
                optimizer.step()
                optimizer.zero_grad()
            if accelerator.sync_gradients:
                agent.step(step)
                accelerator.print(f"step {step}: loss {loss.item():.3f}")
                step += 1
            if step == options.steps:
                break

    store = f"--store {options.store} " if options.store else ""
    sql = f"SELECT step, layer, hard_rank, soft_rank FROM records WHERE run_id = '{options.run_id}' ORDER BY ALL"
    accelerator.print(f'eigenwatch query {store}"{sql}"')
    accelerator.end_training()


if __name__ == "__main__":
    main()
