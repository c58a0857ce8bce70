"""Hugging Face's Trainer on sentences of different lengths, with eigenwatch's callback.

    python examples/huggingface.py --store runs/

Batches are padded; the callback leaves the padding out. Records carry the step under which Trainer logs.
"""

import argparse
import tempfile
from pydoc_data.topics import topics

import torch
from eigenwatch.agent.huggingface import EigenwatchCallback
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments


def pad(sentences: list[bytes]) -> dict[str, torch.Tensor]:
    """One batch: bytes as tokens, and where they are."""
    rows = [torch.tensor(list(sentence)) for sentence in sentences]
    input_ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
    attention_mask = torch.nn.utils.rnn.pad_sequence([torch.ones_like(row) for row in rows], batch_first=True)
    return {
        "input_ids": input_ids,
        "attention_mask": attention_mask,
        "labels": input_ids.masked_fill(attention_mask == 0, -100),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--store", help="folder of the history (default: ./eigenwatch-store)")
    parser.add_argument("--aggregator", default="embedded", help="'inline', or the address of `eigenwatch serve`")
    parser.add_argument("--run-id", default="huggingface")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--every", type=int, default=5)
    options = parser.parse_args()

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=256, hidden_size=64, intermediate_size=192, num_hidden_layers=4, num_attention_heads=4
    )
    sentences = [part.encode()[:128] for text in topics.values() for part in text.split("\n\n") if len(part) > 20]
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            folder,
            run_name=options.run_id,
            max_steps=options.steps,
            per_device_train_batch_size=8,
            logging_steps=options.every,
            save_strategy="no",
            report_to="none",
            use_cpu=True,
        )
        callback = EigenwatchCallback(every=options.every, store=options.store, aggregator=options.aggregator)
        trainer = Trainer(
            LlamaForCausalLM(config), arguments, train_dataset=sentences, data_collator=pad, callbacks=[callback]
        )
        trainer.train()

    if trainer.is_world_process_zero():
        store = f"--store {options.store} " if options.store else ""
        sql = f"SELECT step, layer, hard_rank, soft_rank FROM records WHERE run_id = '{options.run_id}' ORDER BY ALL"
        print(f'eigenwatch query {store}"{sql}"')


if __name__ == "__main__":
    main()
