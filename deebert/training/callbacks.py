"""What the Trainer calls on its way: the epoch for the row order, when to log, and what is shown of it.

Knows nothing of losses or models.
"""

from __future__ import annotations

import logging
from typing import Any

from tqdm import tqdm
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from deebert.training.data import LengthGrouped

log = logging.getLogger(__name__)


class Conduct(TrainerCallback):
    """Keeps the row order in step with the epoch, and logs where a resumed training will start to count."""

    def __init__(self, sampler: LengthGrouped) -> None:
        self._sampler = sampler

    def on_epoch_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """See `LengthGrouped`."""
        self._sampler.epoch = int(state.epoch or 0)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """A record before every checkpoint and at the end: means never span a kill."""
        if state.global_step >= state.max_steps:
            # The best weights may be the last ones; without that question the stage's result is all to keep.
            control.should_evaluate = control.should_save = args.load_best_model_at_end
            control.should_log = True
        if control.should_save or control.should_evaluate:
            control.should_log = True


class Lines(TrainerCallback):
    """A line in the log file of a machine for each tenth of the way."""

    def __init__(self, stage: int) -> None:
        self._stage = stage
        self._tenths = 0

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """A new tenth begins."""
        logs, tenths = kwargs.get("logs") or {}, 10 * state.global_step // max(1, state.max_steps)
        if "loss" in logs and tenths > self._tenths:
            self._tenths = tenths
            log.info(
                "stage %d: step %d of %d, loss %.3f",
                self._stage,
                state.global_step,
                state.max_steps,
                logs["loss"],
            )


class Bar(TrainerCallback):
    """One bar, with the loss."""

    def __init__(self, stage: int) -> None:
        self._stage = stage
        self._bar: tqdm[Any] | None = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Where it starts."""
        self._bar = tqdm(total=state.max_steps, initial=state.global_step, desc=f"stage {self._stage}")

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """One step on."""
        if self._bar is not None:
            self._bar.update(1)

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """The loss beside the bar."""
        logs = kwargs.get("logs") or {}
        if self._bar is not None and "loss" in logs:
            self._bar.set_postfix(loss=f"{logs['loss']:.3f}")

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Leave the line."""
        if self._bar is not None:
            self._bar.close()
