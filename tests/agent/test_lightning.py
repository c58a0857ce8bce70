"""The callback in Lightning's own `Trainer`, with accumulation, validation, resumption and several optimizers."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from eigenwatch.agent.lightning import EigenwatchCallback
from eigenwatch.cli.demo.decoder import Decoder, DecoderConfig
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.loggers import Logger
from torch.utils.data import DataLoader

from tests.agent.witness import Witness

EVERY, BATCHES = 2, 5
"""An epoch is, at two batches a step, two whole steps and one of a single batch."""


class Logged(Logger):
    """Lightning's own logger interface, kept in memory: the training losses by the step that Lightning gave them."""

    def __init__(self) -> None:
        super().__init__()
        self.losses: dict[int, float] = {}

    name = version = property(lambda self: "logged")

    def log_metrics(self, metrics, step=None):
        if "loss" in metrics:
            self.losses[step] = metrics["loss"]

    def log_hyperparams(self, *args, **kwargs):
        pass


class Module(LightningModule):
    """A decoder whose every step has data of its own; counts the steps of the optimizer itself."""

    def __init__(self, first_step: int = 0) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.decoder = Decoder(DecoderConfig(model_dim=16, width=24, layers=2, heads=2, vocabulary=32))
        self.step = first_step
        self.losses: dict[int, list[float]] = {}
        self.validated_after: list[int] = []
        self.witness = Witness(self.decoder, lambda: self.step)

    def loss(self, tokens_BT):
        return F.cross_entropy(self.decoder(tokens_BT)[:, :-1].flatten(0, 1), tokens_BT[:, 1:].flatten())

    def training_step(self, batch, batch_idx):
        loss = self.loss(batch)
        self.losses.setdefault(self.step, []).append(loss.item())
        self.log("loss", loss)
        return loss

    def validation_step(self, batch, batch_idx):
        self.validated_after.append(self.step)
        self.log("validation", self.loss(batch))

    def on_train_batch_end(self, outputs, batch, batch_idx):
        if batch_idx % 2 == 1 or batch_idx == BATCHES - 1:
            self.step += 1

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=1e-2)


def batches(count: int, seed: int) -> DataLoader:
    draws = torch.Generator().manual_seed(seed)
    return DataLoader([torch.randint(32, (3, 8), generator=draws) for _ in range(count)], batch_size=None)


def train(module: LightningModule, folder: Path, callback: EigenwatchCallback | None, *, epochs: int = 2, **options):
    """Trains and gives back the losses that were logged."""
    logged, resume = Logged(), options.pop("resume", None)
    trainer = Trainer(
        **{
            "accelerator": "cpu", "max_epochs": epochs, "accumulate_grad_batches": 2, "val_check_interval": 1,
            "num_sanity_val_steps": 1, "log_every_n_steps": 1, "logger": logged, "enable_checkpointing": False,
            "enable_progress_bar": False, "enable_model_summary": False, "default_root_dir": folder,
            "callbacks": [callback] if callback else [], **options,
        }
    )  # fmt: skip
    trainer.fit(module, batches(BATCHES, seed=1), batches(1, seed=2), ckpt_path=resume)
    return trainer, logged


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("store")


@pytest.fixture(scope="module")
def observe(store):
    """A callback that writes to the shared store, without a Ray."""
    return lambda run_id: EigenwatchCallback(run_id=run_id, every=EVERY, store=store, aggregator="inline")


@pytest.fixture(scope="module")
def trained(observe, tmp_path_factory):
    module = Module()
    return module, *train(module, tmp_path_factory.mktemp("trained"), observe("main"))


def test_every_record_equals_the_covariance_of_its_own_step(trained, store):
    module, *_ = trained
    assert [len(module.witness.rows[step, 0]) for step in range(6)] == [2, 2, 1, 2, 2, 1]
    module.witness.assert_agrees(store, "main", [0, 2, 4])


def test_a_record_has_the_step_under_which_lightning_logs_the_loss(trained):
    module, _, logged = trained
    assert list(logged.losses) == list(module.losses) == list(range(6))
    for step, losses in module.losses.items():
        assert logged.losses[step] == pytest.approx(losses[-1], rel=1e-6)


def test_validation_took_place_before_the_training_and_within_every_step(trained):
    module, *_ = trained
    assert module.validated_after == [0, 0, 1, 1, 2, 3, 3, 4, 4, 5, 6]


def test_the_losses_and_the_model_are_the_same_to_the_last_bit_without_the_callback(trained, tmp_path):
    module, *_ = trained
    alone = Module()
    train(alone, tmp_path, None)
    assert alone.losses == module.losses
    assert all(torch.equal(*pair) for pair in zip(alone.parameters(), module.parameters(), strict=True))


def test_a_training_that_goes_on_from_a_checkpoint_goes_on_with_the_right_step(trained, observe, store, tmp_path):
    begun, checkpoint = Module(), tmp_path / "epoch.ckpt"
    trainer, _ = train(begun, tmp_path, None, epochs=1)
    trainer.save_checkpoint(checkpoint)
    resumed = Module(first_step=3)
    _, logged = train(resumed, tmp_path, observe("resumed"), resume=checkpoint)
    assert list(logged.losses) == [3, 4, 5]
    resumed.witness.assert_agrees(store, "resumed", [3, 4])


class TwoOptimizers(Module):
    """Steps both of its optimizers after every second batch, as an accumulation by hand does."""

    automatic_optimization = False

    def training_step(self, batch, batch_idx):
        self.step = self.trainer.current_epoch * BATCHES + batch_idx // 2 * 2 + 1
        loss = super().training_step(batch, batch_idx)
        self.manual_backward(loss)
        if batch_idx % 2 == 1:
            for optimizer in self.optimizers():
                optimizer.step()
                optimizer.zero_grad()

    def configure_optimizers(self):
        first, *others = self.decoder.parameters()
        return [torch.optim.SGD([first], lr=1e-2), torch.optim.SGD(others, lr=1e-2)]


def test_a_step_of_several_optimizers_is_one_step_under_the_number_that_lightning_logs(observe, store, tmp_path):
    module = TwoOptimizers()
    options = {"accumulate_grad_batches": 1, "limit_train_batches": 4, "epochs": 1}
    trainer, logged = train(module, tmp_path, observe("several"), **options)
    assert trainer.global_step == 4
    for step in (1, 3):
        assert logged.losses[step] == pytest.approx(module.losses[step][-1], rel=1e-6)
    module.witness.assert_agrees(store, "several", [1, 3])


def test_a_model_that_validation_compiled_before_the_training_is_observed(observe, store, tmp_path):
    torch.compiler.reset()
    module = Module()
    module.decoder.compile(backend="eager")
    train(module, tmp_path, observe("compiled"), epochs=1)
    module.witness.assert_agrees(store, "compiled", [0, 2])


class Failing(Module):
    def training_step(self, batch, batch_idx):
        if self.step == 1:
            raise RuntimeError("out of memory")
        return super().training_step(batch, batch_idx)


def test_what_was_sampled_before_an_exception_is_kept(observe, store, tmp_path):
    module, callback = Failing(), observe("failing")
    with pytest.raises(RuntimeError, match="out of memory"):
        train(module, tmp_path, callback)
    assert callback.agent is None
    module.witness.assert_agrees(store, "failing", [0])


def test_the_older_name_of_the_framework_will_do():
    script = (
        "import sys; sys.modules['lightning'] = None\n"
        "import pytorch_lightning\n"
        "from eigenwatch.agent.lightning import EigenwatchCallback\n"
        "assert issubclass(EigenwatchCallback, pytorch_lightning.Callback)"
    )
    subprocess.run([sys.executable, "-c", script], check=True, timeout=120)
