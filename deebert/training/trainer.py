"""A stage that runs the backbone: the Hugging Face Trainer with a loss of ours.

The Trainer gives mixed precision, accumulation, several processes, checkpoints and their resumption; here
are the loss, the order of the rows, the log and the choice of what may move. Knows nothing of recipes'
meaning beyond the `StageLoss` it is given.
"""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import (
    EarlyStoppingCallback,
    PreTrainedTokenizerBase,
    PrinterCallback,
    ProgressCallback,
    Trainer,
    TrainingArguments,
)
from transformers.trainer_utils import EvalLoopOutput

from deebert.errors import RecipeError
from deebert.modeling import DeeBertForSequenceClassification
from deebert.training.callbacks import Bar, Conduct, Lines
from deebert.training.config import StageConfig
from deebert.training.data import SAMPLES, LengthGrouped, Rows, own_batches
from deebert.training.losses import Answers, StageLoss, hidden_distance
from deebert.training.processes import processes, summed
from deebert.training.stage import Clock, StageContext, StageReport


@dataclass(frozen=True, kw_only=True, eq=False)
class StageData:
    """What a stage learns from."""

    rows: Rows
    held_out: Rows | None
    hidden_teacher: DeeBertForSequenceClassification | None = None
    """In eval mode, where its token states are wanted."""


def train_through_backbone(
    model: DeeBertForSequenceClassification,
    tokenizer: PreTrainedTokenizerBase,
    data: StageData,
    stage: StageConfig,
    loss: StageLoss,
    context: StageContext,
    *,
    off_ramp_learning_rate: float | None = None,
) -> StageReport:
    """Train what is not frozen in `model`, in place; leave it in eval mode.

    The off-ramps' learning rate is the stage's unless they have one of their own.

    Raises:
        RecipeError: a batch that the processes cannot share evenly, a precision that the machine lacks, or losses or
            weights that are no longer finite.
    """
    checkpoint = last_checkpoint(context.folder) if context.resume else None
    if checkpoint is None and processes().is_main_process:
        shutil.rmtree(context.folder, ignore_errors=True)
    processes().wait_for_everyone()
    steps = -(-len(data.rows) // stage.batch_size)
    clock = context.begin(step_of(checkpoint))
    trainer = _StageTrainer(
        model=model,
        args=_arguments(stage, loss, context, total_steps=max(1, round(stage.epochs * steps))),
        train_dataset=data.rows,
        eval_dataset=data.held_out,
        tokenizer=tokenizer,
        loss=loss,
        context=context,
        clock=clock,
        sampler=LengthGrouped(data.rows.lengths, stage.batch_size, context.recipe.seed),
        classifiers=_training_classifiers(model),
        hidden_teacher=data.hidden_teacher,
        off_ramp_learning_rate=off_ramp_learning_rate,
        exit_head_learning_rate=stage.exit_head_learning_rate,
    )
    trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    # Takes the Trainer's autocast off the model's forward again.
    trainer.accelerator.unwrap_model(trainer.model_wrapped, keep_fp32_wrapper=False)
    # And its mark, or the next stage would take the model for wrapped and compute in float32.
    vars(model).pop("_is_accelerate_prepared", None)
    model.train(False)
    return trainer.report()


@contextmanager
def frozen(modules: Iterable[nn.Module]) -> Iterator[None]:
    """While the block runs, these modules' parameters get no gradient."""
    parameters = [p for module in modules for p in module.parameters() if p.requires_grad]
    for parameter in parameters:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in parameters:
            parameter.requires_grad_(True)


def last_checkpoint(folder: Path) -> Path | None:
    """The latest checkpoint that was written to its end."""
    found = [path for path in folder.glob("checkpoint-*") if _is_whole(path)]
    return max(found, key=step_of, default=None)


def step_of(checkpoint: Path | None) -> int:
    """Optimizer steps before a checkpoint; 0 for none."""
    return 0 if checkpoint is None else int(checkpoint.name.rpartition("-")[2])


def _is_whole(checkpoint: Path) -> bool:
    """The Trainer writes its state last: where that reads, the rest is there."""
    try:
        json.loads((checkpoint / "trainer_state.json").read_text())
    except (OSError, ValueError):
        return False
    return True


def _arguments(
    stage: StageConfig, loss: StageLoss, context: StageContext, *, total_steps: int
) -> TrainingArguments:
    recipe, world = context.recipe, processes()
    _check_machine(stage, context)
    stopping = recipe.early_stopping
    arguments = TrainingArguments(
        output_dir=str(context.folder),
        num_train_epochs=stage.epochs,
        # Of one process, but for the last batch of an epoch, which each takes its share of.
        per_device_train_batch_size=stage.batch_size // stage.accumulation_steps // world.num_processes,
        per_device_eval_batch_size=8 * max(1, stage.batch_size // world.num_processes),
        gradient_accumulation_steps=stage.accumulation_steps,
        learning_rate=stage.learning_rate,
        weight_decay=stage.weight_decay,
        adam_epsilon=stage.adam_epsilon,
        max_grad_norm=stage.max_grad_norm,
        lr_scheduler_type="linear",
        warmup_steps=round(stage.warmup_share * total_steps),
        seed=recipe.seed,
        bf16=recipe.precision == "bfloat16",
        fp16=recipe.precision == "float16",
        use_cpu=not torch.cuda.is_available(),
        # Losses that take turns leave the off-ramps out on some steps.
        ddp_find_unused_parameters=len(loss.turns) > 1,
        save_strategy="steps",
        save_steps=recipe.checkpoint_steps if stopping is None else stopping.every_steps,
        save_total_limit=1,
        eval_strategy="no" if stopping is None else "steps",
        eval_steps=None if stopping is None else stopping.every_steps,
        load_best_model_at_end=stopping is not None,
        restore_callback_states_from_checkpoint=stopping is not None,
        metric_for_best_model="loss",
        prediction_loss_only=True,
        remove_unused_columns=False,
        report_to="none",
        logging_steps=context.log_every(total_steps),
        # It would put a mean of earlier losses in the place of one that is not finite.
        logging_nan_inf_filter=False,
        disable_tqdm=not context.show_progress,
    )
    # One process drives one device: the Trainer would spread a lone process over all, by replicas whose
    # outputs it joins along the wrong axis.
    arguments._n_gpu = min(1, arguments.n_gpu)
    return arguments


def _training_classifiers(model: DeeBertForSequenceClassification) -> dict[int, int]:
    """Layer -> place among all classifiers, the final one last, of those whose weights may move."""
    layers = (*model.config.off_ramp_layers, model.config.num_hidden_layers)
    classifiers = (*model.off_ramps, model.final_classifier)
    return {
        layer: place
        for place, (layer, module) in enumerate(zip(layers, classifiers, strict=True))
        if all(p.requires_grad for p in module.parameters())
    }


def _ids(*modules: nn.Module) -> set[int]:
    return {id(p) for module in modules for p in module.parameters()}


def _split_groups(optimizer: torch.optim.Optimizer, chosen: set[int], learning_rate: float) -> None:
    """Move the parameters with these ids to groups that differ in the learning rate alone."""
    for group in list(optimizer.param_groups):
        settings = {name: value for name, value in group.items() if name != "params"}
        moved = [p for p in group["params"] if id(p) in chosen]
        group["params"] = [p for p in group["params"] if id(p) not in chosen]
        if moved:
            optimizer.add_param_group({**settings, "params": moved, "lr": learning_rate})


def _check_machine(stage: StageConfig, context: StageContext) -> None:
    world = processes().num_processes
    if stage.batch_size % (world * stage.accumulation_steps):
        raise RecipeError(
            f"a batch of {stage.batch_size} samples in {stage.accumulation_steps} pieces does not divide among "
            f"{world} processes: choose a multiple of {world * stage.accumulation_steps}"
        )
    if context.recipe.precision == "float16" and not torch.cuda.is_available():
        raise RecipeError("float16 training needs a GPU: choose bfloat16 or float32")


class _StageTrainer(Trainer):
    """The Trainer with our loss, row order and log."""

    loss_is_scaled_for_ga = True
    """`compute_loss` divides by the samples of the whole step."""

    def __init__(
        self,
        *,
        tokenizer: PreTrainedTokenizerBase,
        loss: StageLoss,
        context: StageContext,
        clock: Clock,
        sampler: LengthGrouped,
        classifiers: dict[int, int],
        hidden_teacher: DeeBertForSequenceClassification | None,
        off_ramp_learning_rate: float | None,
        exit_head_learning_rate: float,
        **kwargs: Any,
    ) -> None:
        self._loss, self._context, self._clock, self._sampler = loss, context, clock, sampler
        self._tokenizer, self._off_ramp_learning_rate = tokenizer, off_ramp_learning_rate
        self._exit_head_learning_rate = exit_head_learning_rate
        self._problem = kwargs["model"].config.problem
        self._label_scale = self._problem.label_scale(kwargs["train_dataset"].labels)
        super().__init__(**kwargs)
        self._classifiers, self._hidden_teacher = classifiers, hidden_teacher
        self._meters = {
            training: _Meter(tuple(classifiers.values()), self.args.device) for training in (True, False)
        }
        self._last_loss = context.last_loss()
        self.remove_callback(PrinterCallback)
        self.remove_callback(ProgressCallback)
        self.add_callback(Conduct(sampler))
        if context.show_progress:
            self.add_callback(Bar(context.number) if sys.stderr.isatty() else Lines(context.number))
        if (stopping := context.recipe.early_stopping) is not None:
            self.add_callback(EarlyStoppingCallback(early_stopping_patience=stopping.patience))

    def get_train_dataloader(self) -> DataLoader[dict[str, Any]]:
        """See `own_batches`; what accelerate would make of it fills the last batch with rows that it repeats."""
        size = self.args.train_batch_size * self.args.world_size
        return own_batches(cast(Rows, self.train_dataset), self._sampler, size, self._tokenizer)

    def get_eval_dataloader(self, eval_dataset: Any = None) -> DataLoader[dict[str, Any]]:
        """See `own_batches`, in the order of the rows."""
        rows = cast(Rows, self.eval_dataset)
        size = self.args.eval_batch_size * self.args.world_size
        return own_batches(rows, range(len(rows)), size, self._tokenizer)

    @torch.no_grad()
    def evaluation_loop(self, dataloader: DataLoader[Any], *args: Any, **kwargs: Any) -> EvalLoopOutput:
        """The held-out rows' mean loss over all processes; the Trainer takes every share for a whole batch."""
        # Not the one that waits for the others' gradients: a share may be a batch shorter.
        model = cast(nn.Module, self.model).eval()
        sums = torch.zeros(2, device=self.args.device)
        for batch in dataloader:
            inputs = self._prepare_inputs(batch)
            with self.compute_loss_context_manager():
                loss = self.compute_loss(model, inputs)
            sums += torch.stack([loss * inputs[SAMPLES], loss.new_tensor(inputs[SAMPLES])])
        summed([sums])
        metrics = {"eval_loss": float(sums[0] / sums[1])}
        return EvalLoopOutput(
            predictions=np.empty(0), label_ids=None, metrics=metrics, num_samples=int(sums[1])
        )

    def create_optimizer(self, *args: Any) -> torch.optim.Optimizer:
        """The Trainer's AdamW; groups of their own for what has a learning rate of its own."""
        optimizer, model = super().create_optimizer(*args), cast(Any, self.model)
        if self._off_ramp_learning_rate is not None:
            _split_groups(optimizer, _ids(*model.exit_modules), self._off_ramp_learning_rate)
        if model.exit_head is not None:
            _split_groups(optimizer, _ids(model.exit_head), self._exit_head_learning_rate)
        return optimizer

    def _get_num_items_in_batch(self, batch_samples: list[dict[str, Any]], device: torch.device) -> Tensor:
        """Samples of a step, over its pieces and all processes: a scalar."""
        # The Trainer's own count is of labels but -100: a multi-label sample has many, and a number may be -100.
        samples = torch.tensor(sum(piece[SAMPLES] for piece in batch_samples), device=device)
        summed([samples])
        return samples

    def compute_loss(  # type: ignore[override]
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | None = None,
    ) -> Any:
        """This step's loss, scaled so that pieces and processes add up to a mean over the step's samples."""
        answers = self._answers(model, inputs)
        turn = self._loss.at(self.state.global_step) if model.training else self._loss.whole
        loss = turn(answers)
        self._meters[model.training].add(answers, inputs[SAMPLES])
        if num_items_in_batch is not None and model.training:
            loss = loss * (inputs[SAMPLES] * self.args.world_size / num_items_in_batch)
        return (loss, {}) if return_outputs else loss

    def _answers(self, model: nn.Module, inputs: dict[str, Any]) -> Answers:
        features = {name: inputs[name] for name in _FEATURES if name in inputs}
        teacher = self._hidden_teacher
        output = model(**features, output_hidden_states=teacher is not None)
        ramps = output.off_ramp_logits
        distance = None
        if teacher is not None:
            with torch.no_grad(), self.accelerator.autocast():
                states = teacher.hidden_states(
                    features["input_ids"], features["attention_mask"], features.get("token_type_ids")
                )
            distance = hidden_distance(output.hidden_states[1:], states[1:], features["attention_mask"])
        return Answers(
            off_ramp_logits=output.logits.new_empty(0, *output.logits.shape) if ramps is None else ramps,
            final_logits=output.logits,
            labels=inputs["labels"],
            problem=self._problem,
            label_scale=self._label_scale,
            certainties=output.certainties,
            target_logits=inputs.get("target_logits"),
            hidden_distance=distance,
        )

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """The Trainer's record, and ours with every classifier's loss against the labels."""
        super().log(logs, start_time)
        place = {"step": self.state.global_step, "epoch": round(self.state.epoch or 0.0, 4)}
        if "loss" in logs:
            self._last_loss = logs["loss"]
            self._context.write(
                **place,
                loss=logs["loss"],
                losses=self._drain(training=True),
                learning_rate=logs["learning_rate"],
                seconds=self._clock.seconds,
            )
        elif "eval_loss" in logs:
            self._context.write(
                **place, held_out_loss=logs["eval_loss"], held_out_losses=self._drain(training=False)
            )

    def _drain(self, *, training: bool) -> dict[str, float]:
        return dict(zip(map(str, self._classifiers), self._meters[training].drain(), strict=True))

    def report(self) -> StageReport:
        """What the stage took."""
        return self._context.done(
            StageReport(
                number=self._context.number,
                seconds=self._clock.seconds,
                steps=self.state.global_step,
                loss=self._last_loss,
            ),
            cast(nn.Module, self.model).parameters(),
        )


_FEATURES = ("input_ids", "attention_mask", "token_type_ids")


class _Meter:
    """Mean loss of each classifier over samples, on the device: nobody waits for what is not shown."""

    def __init__(self, classifiers: tuple[int, ...], device: torch.device) -> None:
        self._classifiers = list(classifiers)
        self._sums = torch.zeros(len(classifiers) + 1, device=device)

    @torch.no_grad()
    def add(self, answers: Answers, samples: int) -> None:
        """One batch, of which so many count."""
        everyone = torch.cat([answers.off_ramp_logits, answers.final_logits[None]])
        means = answers.problem.losses(everyone[self._classifiers], answers.labels).mean(-1)
        self._sums += torch.cat([means * samples, means.new_tensor([samples])])

    def drain(self) -> list[float]:
        """The means since the last time, over all processes."""
        summed([self._sums])
        *means, _ = (self._sums / self._sums[-1]).tolist()
        self._sums.zero_()
        return means
