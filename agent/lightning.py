"""The callback for Lightning's `Trainer`: one line, and records join the metrics that its loggers write.

    Trainer(callbacks=[EigenwatchCallback(run_id="llama-130m", every=100, store="runs/")])

Lightning counts twice. `trainer.global_step` counts the optimizers' steps and has been raised when a batch ends; its
loggers write under the number of batches that stepped before, from 0. A step ends here when the first has moved, and
carries the second as its label, so that a record and the loss of the same step have one number, with several
optimizers and with accumulation too. Everything is called by the training thread.
"""

from typing import Any

try:
    from lightning.pytorch import Callback, LightningModule, Trainer
except ImportError:  # the same framework under its older name
    from pytorch_lightning import Callback, LightningModule, Trainer  # type: ignore[assignment]

from .attachment import attach
from .handle import Agent


class EigenwatchCallback(Callback):
    """Observes the decoder inside a `LightningModule`; give one to the Trainer of every rank.

    Args:
        run_id: name of the training job.
        options: whatever else `attach` accepts: `every`, `store`, `aggregator`, `layers`, `tags`, ….

    Where batches are padded, call `callback.agent.mask(mask)` in `training_step` before the forward.
    """

    def __init__(self, *, run_id: str, **options: Any) -> None:
        self.agent: Agent | None = None
        """While a training is under way."""
        self._options = {"run_id": run_id, **options}
        self._optimizer_steps = 0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Attaches: after the sanity check and the learning rate finder, whose steps are none of the training's.

        What the sanity check compiled is compiled again for the training, since gradients are on now, with the hooks.
        """
        self.agent = attach(pl_module, **self._options)
        self._optimizer_steps = trainer.global_step

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if self.agent is not None and trainer.global_step != self._optimizer_steps:
            self._optimizer_steps = trainer.global_step
            self.agent.step(trainer.fit_loop.epoch_loop._batches_that_stepped)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._close()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._close()

    def _close(self) -> None:
        if self.agent is not None:
            self.agent.close()
            self.agent = None
