"""The callback for Hugging Face's `Trainer`: one line, and records join the Trainer's own logs by step.

    Trainer(model, arguments, train_dataset=…, callbacks=[EigenwatchCallback(every=100, store="runs/")])

`Trainer` raises its counter before `on_step_end` and logs the loss of the step that has just ended under the new value,
from 1: that is the label here too. Gradient accumulation ends a step once, evaluation ends none and is not counted,
since it runs in evaluation mode. Everything is called by the training thread.

`Trainer` tells its callbacks nothing of an exception in the training. The agent then stays until `close`, the next
`train()` or the end of the process, whichever is first.
"""

import contextlib
import os
from typing import Any

from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ..schemas import check_run_id
from .attachment import attach
from .handle import Agent
from .observation import mask_position

USUAL_MASK = "attention_mask"


class EigenwatchCallback(TrainerCallback):
    """Observes the model that a `Trainer` trains; give one to the Trainer of every rank.

    Args:
        run_id: name of the training job; default: the `run_name` of the training arguments, else their `output_dir`.
        mask_argument: argument of the model's forward whose zeros mark padding, which is not counted; None counts all.
            Default: `attention_mask`, where the forward has it.
        options: whatever else `attach` accepts: `every`, `store`, `aggregator`, `layers`, `tags`, ….
    """

    def __init__(self, *, run_id: str | None = None, mask_argument: str | None = "default", **options: Any) -> None:
        self.agent: Agent | None = None
        """While a training is under way."""
        self._run_id = run_id
        self._mask_argument = mask_argument
        self._options = options

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Attaches: the process group exists, the model is wrapped, and nothing has been compiled yet.

        Raises:
            ValueError: as `attach`, or neither `run_name` nor `output_dir` may name a run.
        """
        self.close()  # of a training that ended by an exception
        model = kwargs["model"]
        mask = _usual_mask(model) if self._mask_argument == "default" else self._mask_argument
        self.agent = attach(model, run_id=self._run_id or _run_id(args), mask_argument=mask, **self._options)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self.agent is not None:
            self.agent.step(state.global_step)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.close()

    def close(self) -> None:
        """Ends the observation; needed only where `train()` raised and the process goes on. May be called again."""
        if self.agent is not None:
            self.agent.close()
            self.agent = None


def _usual_mask(model: nn.Module) -> str | None:
    with contextlib.suppress(ValueError):
        mask_position(model, USUAL_MASK)
        return USUAL_MASK
    return None


def _run_id(args: TrainingArguments) -> str:
    name = args.run_name or os.path.normpath(args.output_dir or "")
    try:
        return check_run_id(name)
    except ValueError as error:
        source = "run_name" if args.run_name else "output_dir"
        raise ValueError(f"the Trainer's {source} names no run: {error}; pass EigenwatchCallback(run_id=…)") from None
