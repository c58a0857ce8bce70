"""The callback in Hugging Face's own `Trainer`, training a small LLaMA on batches with padding."""

from pathlib import Path

import pytest
import torch
from eigenwatch.agent.huggingface import EigenwatchCallback
from eigenwatch.cli.demo.decoder import Decoder, DecoderConfig
from eigenwatch.history import open_history
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from tests.agent.witness import Witness

EVERY, MAX_STEPS = 2, 6
SAMPLED = [1, 2, 4, 6]
"""The first step, which Trainer calls 1, and the multiples of two."""
LONGEST, BATCH = 12, 2


def examples(count: int, seed: int) -> list[list[int]]:
    """Token ids of different lengths."""
    draws = torch.Generator().manual_seed(seed)
    lengths = torch.randint(4, LONGEST + 1, (count,), generator=draws)
    return [torch.randint(1, 32, (n,), generator=draws).tolist() for n in lengths.tolist()]


def pad(batch: list[list[int]]) -> dict[str, torch.Tensor]:
    padded = torch.zeros(len(batch), LONGEST, dtype=torch.long)
    mask = torch.zeros_like(padded)
    for row, ids in enumerate(batch):
        padded[row, : len(ids)], mask[row, : len(ids)] = torch.tensor(ids), 1
    return {"input_ids": padded, "attention_mask": mask, "labels": padded.masked_fill(mask == 0, -100)}


class Training:
    """A Trainer, its model, and what a witness in it saw."""

    def __init__(self, folder: Path, callback: TrainerCallback | None, **changes: object) -> None:
        torch.manual_seed(0)
        self.model = LlamaForCausalLM(
            LlamaConfig(
                hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, vocab_size=32,
                max_position_embeddings=LONGEST,
            )
        )  # fmt: skip
        self.trainer = Trainer(
            self.model,
            TrainingArguments(
                **{
                    "output_dir": str(folder), "max_steps": MAX_STEPS, "per_device_train_batch_size": BATCH,
                    "gradient_accumulation_steps": 2, "eval_strategy": "steps", "eval_steps": 1, "eval_on_start": True,
                    "logging_steps": 1, "save_strategy": "no", "report_to": "none", "disable_tqdm": True,
                    "use_cpu": True, "learning_rate": 1e-2, **changes,
                }
            ),
            train_dataset=examples(5 * BATCH, seed=1),  # an epoch is two whole steps, and one of a single batch
            eval_dataset=examples(2 * BATCH, seed=2),
            data_collator=pad,
            callbacks=[callback] if callback else [],
        )  # fmt: skip
        self.losses: dict[int, list[float]] = {}
        """Of every training forward, by step."""
        self.witness = Witness(self.model, self._step)
        self.model.register_forward_hook(self._keep_loss)

    def _step(self) -> int:
        return self.trainer.state.global_step + 1

    def _keep_loss(self, model: LlamaForCausalLM, _arguments: tuple, output: dict[str, torch.Tensor]) -> None:
        if model.training:
            self.losses.setdefault(self._step(), []).append(output["loss"].item())


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("store")


@pytest.fixture(scope="module")
def observe(store):
    """A callback that writes to the shared store, without a Ray."""
    return lambda **options: EigenwatchCallback(**{"every": EVERY, "store": store, "aggregator": "inline", **options})


@pytest.fixture(scope="module")
def trained(observe, tmp_path_factory) -> Training:
    training = Training(tmp_path_factory.mktemp("trained"), observe(run_id="main"), save_strategy="steps", save_steps=4)
    training.trainer.train()
    return training


def test_every_record_equals_the_covariance_of_its_own_step_without_the_padding(trained, store):
    assert len(trained.witness.rows[2, 0]) == 2
    assert len(trained.witness.rows[3, 0]) == 1
    assert sum(len(rows) for rows in trained.witness.rows[2, 0]) < 2 * BATCH * LONGEST
    trained.witness.assert_agrees(store, "main", SAMPLED)


def test_a_record_has_the_step_under_which_trainer_logs_the_loss(trained):
    logged = {entry["step"]: entry["loss"] for entry in trained.trainer.state.log_history if "loss" in entry}
    assert list(logged) == list(trained.losses) == list(range(1, MAX_STEPS + 1))
    for step, losses in trained.losses.items():
        assert logged[step] == pytest.approx(sum(losses), rel=1e-3)


def test_evaluation_took_place_between_all_steps(trained):
    evaluated = [entry["step"] for entry in trained.trainer.state.log_history if "eval_loss" in entry]
    assert evaluated == list(range(MAX_STEPS + 1))


def test_the_losses_and_the_model_are_the_same_to_the_last_bit_without_the_callback(trained, tmp_path):
    alone = Training(tmp_path, None)
    alone.trainer.train()
    assert alone.losses == trained.losses
    assert all(torch.equal(*pair) for pair in zip(alone.model.parameters(), trained.model.parameters(), strict=True))


def test_padding_counts_where_no_mask_is_named(observe, store, tmp_path):
    training = Training(tmp_path, observe(run_id="unmasked", mask_argument=None), max_steps=2)
    training.trainer.train()
    assert _tokens(store, "unmasked") == {1: 2 * BATCH * LONGEST, 2: 2 * BATCH * LONGEST}


def test_a_model_whose_forward_has_no_attention_mask_needs_no_word_about_it(observe, tmp_path):
    model = Decoder(DecoderConfig(model_dim=16, width=24, layers=1, heads=2, vocabulary=32))
    arguments = TrainingArguments(output_dir=str(tmp_path), report_to="none", use_cpu=True)
    callback = observe(run_id="no-mask")
    callback.on_train_begin(arguments, TrainerState(), TrainerControl(), model=model)
    assert callback.agent is not None
    callback.close()
    with pytest.raises(ValueError, match="mask_argument='attention_mask' is no argument of the model's forward"):
        observe(run_id="no-mask", mask_argument="attention_mask").on_train_begin(
            arguments, TrainerState(), TrainerControl(), model=model
        )


def test_a_training_that_goes_on_from_a_checkpoint_goes_on_with_the_right_step(trained, observe, store, tmp_path):
    checkpoint = Path(trained.trainer.args.output_dir) / "checkpoint-4"
    resumed = Training(tmp_path, observe(run_id="resumed"))
    resumed.trainer.train(resume_from_checkpoint=str(checkpoint))
    resumed.witness.assert_agrees(store, "resumed", [5, 6])
    for layer in range(2):
        for before, after in zip(trained.witness.rows[5, layer], resumed.witness.rows[5, layer], strict=True):
            torch.testing.assert_close(after, before)


def test_a_compiled_model_is_observed_from_its_first_step(observe, store, tmp_path):
    torch.compiler.reset()
    options = {"torch_compile": True, "torch_compile_backend": "eager", "eval_strategy": "no", "eval_on_start": False}
    training = Training(tmp_path, observe(run_id="compiled"), max_steps=2, **options)
    training.trainer.train()
    training.witness.assert_agrees(store, "compiled", [1, 2])


class Failing(TrainerCallback):
    """Raises in the third step of the first training."""

    failed = False

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 3 and not self.failed:
            self.failed = True
            raise RuntimeError("out of memory")


def test_what_was_sampled_before_an_exception_is_kept_and_the_next_training_starts_anew(observe, store, tmp_path):
    callback = observe(run_id="failing")
    training = Training(tmp_path, callback)
    training.trainer.add_callback(Failing())
    with pytest.raises(RuntimeError, match="out of memory"):
        training.trainer.train()
    callback.close()
    assert callback.agent is None
    training.witness.assert_agrees(store, "failing", [1, 2])

    again = Training(tmp_path, callback)
    again.trainer.add_callback(Failing())
    with pytest.raises(RuntimeError, match="out of memory"):
        again.trainer.train()
    first = callback.agent
    again.witness.rows.clear()
    again.trainer.train()
    assert first is not None
    assert first.close() == 0
    again.witness.assert_agrees(store, "failing", SAMPLED)


@pytest.mark.parametrize(
    ("arguments", "named"),
    [({"run_name": "by-name", "output_dir": "x/y"}, "by-name"), ({"output_dir": "./by-folder/"}, "by-folder")],
)
def test_a_run_is_named_after_the_trainers_own(arguments, named, observe, store, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Training(tmp_path, observe(), **{"max_steps": 1, "eval_strategy": "no", **arguments}).trainer.train()
    assert set(_tokens(store, named)) == {1}


@pytest.mark.parametrize("arguments", [{"run_name": "my run"}, {"output_dir": "/tmp/some/where"}])
def test_a_name_that_may_not_stand_in_a_store_is_refused_with_the_remedy(arguments, observe, tmp_path):
    with pytest.raises(
        ValueError, match=rf"{next(iter(arguments))} names no run: .* pass EigenwatchCallback\(run_id=…\)"
    ):
        Training(tmp_path, observe(), **arguments).trainer.train()


def _tokens(store: Path, run_id: str) -> dict[int, int]:
    """Of layer 0, by step."""
    with open_history(store) as history:
        sql = "SELECT step, tokens FROM records WHERE run_id = ? AND layer = 0"
        return {row["step"]: row["tokens"] for row in history.query(sql, [run_id]).to_pylist()}
