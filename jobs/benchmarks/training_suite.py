"""What training costs: an epoch of stage 1 and the whole of stage 2 against an epoch of a plain Trainer.

The Trainer as it comes: Hugging Face's own classifier on the same backbone, rows in random order. Labels are drawn
at random, for seconds do not depend on them.
"""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Callable
from contextlib import redirect_stdout
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from typing import Any

import torch
from transformers import DataCollatorWithPadding, PrinterCallback, Trainer, TrainingArguments

from deebert.backbones import family_of
from deebert.evaluation import LabelledSequences
from deebert.training import BackboneStage, Recipe, StageReport, train
from deebert.training.data import Rows
from jobs.benchmarks.settings import BenchSettings
from jobs.benchmarks.timing import Spread, paired_ratios, take_turns
from jobs.benchmarks.workload import Workload

TRAINER, OURS = "Trainer, an epoch", "two-stage"
Outcome = tuple[StageReport, ...]
STAGES = {1: "stage 1, an epoch", 2: "stage 2, fast, 3 epochs"}


def run(workload: Workload, settings: BenchSettings) -> dict[str, Any]:
    """Time each; JSON-ready."""
    before = torch.get_num_threads()
    torch.set_num_threads(settings.threads)
    try:
        timed = take_turns(
            _contenders(workload, settings),
            repetitions=settings.repetitions,
            warm_up=settings.job_warm_up,
            device=settings.torch_device,
            title="training",
        )
    finally:
        torch.set_num_threads(before)
    seconds = {TRAINER: timed[TRAINER].seconds}
    for number, name in STAGES.items():
        stages = [stage for outcome in timed[OURS].outcomes for stage in outcome if stage.number == number]
        seconds[name] = Spread.of([stage.seconds for stage in stages])
    return {
        "rows": len(workload.tokens),
        "contenders": [
            {
                "name": name,
                "seconds": ours.to_dict(),
                "of_trainer": paired_ratios(ours, seconds[TRAINER]).to_dict(),
                "of_stage_1": paired_ratios(ours, seconds[STAGES[1]]).to_dict(),
            }
            for name, ours in seconds.items()
        ],
    }


def _contenders(workload: Workload, settings: BenchSettings) -> dict[str, Callable[[], Outcome]]:
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(len(workload.checkpoint.labels), (len(workload.tokens),), generator=generator)
    data = LabelledSequences(tokens=workload.tokens, labels=labels)
    recipe = Recipe(
        stage_1=BackboneStage(epochs=1, batch_size=settings.batch_size, learning_rate=5e-5),
        precision=settings.float_precision,
        checkpoint_steps=1 << 30,
    )
    return {
        TRAINER: _Plain(workload=workload, data=data, settings=settings),
        OURS: _Ours(workload=workload, data=data, recipe=recipe),
    }


@dataclass(frozen=True, kw_only=True, eq=False)
class _Ours:
    """Training by recipe; answers with what each stage took."""

    workload: Workload
    data: LabelledSequences
    recipe: Recipe

    def __call__(self) -> Outcome:
        # A copy: the other suites run the model, too.
        model = copy.deepcopy(self.workload.checkpoint.model)
        tokenizer = self.workload.checkpoint.tokenizer
        with tempfile.TemporaryDirectory() as work, redirect_stdout(StringIO()):
            return train(model, tokenizer, self.data, self.recipe, Path(work), show_progress=False).stages


@dataclass(frozen=True, kw_only=True, eq=False)
class _Plain:
    """A fine-tuning as most would write it."""

    workload: Workload
    data: LabelledSequences
    settings: BenchSettings

    def __call__(self) -> Outcome:
        config = copy.deepcopy(self.workload.checkpoint.config.backbone_config)
        config.num_labels = len(self.workload.checkpoint.labels)
        classifier: Any = family_of(config).classifier
        with tempfile.TemporaryDirectory() as work, redirect_stdout(StringIO()):
            arguments = TrainingArguments(
                output_dir=work,
                num_train_epochs=1,
                per_device_train_batch_size=self.settings.batch_size,
                bf16=self.settings.float_precision == "bfloat16",
                fp16=self.settings.float_precision == "float16",
                use_cpu=self.settings.device == "cpu",
                save_strategy="no",
                report_to="none",
                disable_tqdm=True,
            )
            trainer = Trainer(
                model=classifier(config),
                args=arguments,
                train_dataset=Rows(self.data),
                data_collator=DataCollatorWithPadding(self.workload.checkpoint.tokenizer),
            )
            trainer.remove_callback(PrinterCallback)
            trainer.train()
        return ()
