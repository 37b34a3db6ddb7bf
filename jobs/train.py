"""`deebert train`: a backbone and labelled texts in, a DeeBERT model folder out."""

from __future__ import annotations

import logging
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from jobs.flags import comma_list, flag, parse_job
from jobs.glue import TASK_NAMES, Columns
from jobs.terminal import quiet_libraries
from pipeline.errors import UsageError

if TYPE_CHECKING:
    from deebert.modeling import DeeBertForSequenceClassification
    from deebert.training import TwoStageConfig

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class TrainJob:
    """What `deebert train` takes."""

    backbone: str = flag("folder or hub id of a BERT or RoBERTa encoder")
    data: str | None = flag(
        "labelled texts: CSV, TSV, JSONL or Parquet, a saved data set, or hub-id[:configuration]",
        default=None,
    )
    glue_dir: str | None = flag("or GLUE's TSV folders, with --task", default=None, metavar="DIR")
    task: str | None = flag(
        "GLUE task of the data: settles columns and label names", default=None, choices=TASK_NAMES
    )
    text_column: str = flag("column of the text", default="text")
    text_pair_column: str | None = flag("column of the second segment", default=None)
    label_column: str = flag("column of the label", default="label")
    labels: tuple[str, ...] | None = flag(
        "label names in the order of their ids; found in the data if left out",
        default=None,
        parse=comma_list,
        metavar="A,B",
    )
    output: str = flag("model folder to write")
    off_ramp_pooling: str = flag("what off-ramps read", default="mean", choices=("mean", "cls"))
    max_length: int = flag("tokens a text is cut to", default=128, parse=int)
    max_rows: int | None = flag("train on a random sample of this many rows", default=None, parse=int)
    epochs: float = flag("stage 1: epochs", default=3.0, parse=float)
    batch_size: int = flag("stage 1: samples per step", default=8, parse=int)
    learning_rate: float = flag("stage 1: peak learning rate", default=2e-5, parse=float)
    off_ramp_epochs: float = flag("stage 2: epochs", default=3.0, parse=float)
    off_ramp_batch_size: int = flag("stage 2: samples per step", default=32, parse=int)
    off_ramp_learning_rate: float = flag("stage 2: peak learning rate", default=5e-4, parse=float)
    precision: str = flag(
        "auto is bfloat16 where the hardware has it", default="auto", choices=("auto", "float32", "bfloat16")
    )
    seed: int = flag("random seed", default=42, parse=int)
    overwrite: bool = flag("replace an existing model folder", default=False)


def execute(argv: Sequence[str], *, prog: str) -> int:
    """Parse and train."""
    train(
        parse_job(
            TrainJob, argv, prog=prog, description="Fine-tune a DeeBERT model, two-stage as in the paper."
        )
    )
    return 0


def train(job: TrainJob) -> DeeBertForSequenceClassification:
    """Fine-tune as `job` says and write the model folder."""
    output = Path(job.output)
    if output.exists() and not output.is_dir():
        raise UsageError(f"the model folder {job.output!r} is a file: choose another")
    if output.exists() and any(output.iterdir()) and not job.overwrite:
        raise UsageError(f"the model folder {job.output!r} exists: choose another or give --overwrite")
    if job.data is None and job.glue_dir is None:
        raise UsageError("give the labelled texts as --data, or as --glue-dir with --task")
    # Heavy imports come after the checks that need none of them.
    from transformers import AutoTokenizer, set_seed

    from deebert.modeling import DeeBertForSequenceClassification
    from deebert.training import train_two_stage
    from jobs.labelled import LabelledSource, sample
    from pipeline.tokenization import TextTokenizer

    quiet_libraries()
    columns = Columns(text=job.text_column, pair=job.text_pair_column, label=job.label_column)
    source = LabelledSource(data=job.data, glue_dir=job.glue_dir, task=job.task, columns=columns)
    texts = source.training_texts(job.labels)
    set_seed(job.seed)
    try:
        model = DeeBertForSequenceClassification.from_backbone(
            job.backbone,
            labels=list(texts.names),
            off_ramp_pooling=job.off_ramp_pooling,  # type: ignore[arg-type]  # one of the flag's choices
            max_seq_length=job.max_length,
        )
        tokenizer = AutoTokenizer.from_pretrained(job.backbone)
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UsageError(f"cannot load the backbone {job.backbone!r}: {reason}") from error
    everything = texts.tokenized(TextTokenizer(tokenizer, max_length=job.max_length))
    data = sample(everything, job.max_rows, seed=job.seed)
    with tempfile.TemporaryDirectory() as work:
        train_two_stage(model, tokenizer, data, _recipe(job), Path(work))
    output.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(output)
    tokenizer.save_pretrained(output)
    log.info("wrote %s", output)
    return model


def _recipe(job: TrainJob) -> TwoStageConfig:
    from deebert.precision import resolve_precision
    from deebert.training import StageConfig, TwoStageConfig

    return TwoStageConfig(
        stage_1=StageConfig(epochs=job.epochs, batch_size=job.batch_size, learning_rate=job.learning_rate),
        stage_2=StageConfig(
            epochs=job.off_ramp_epochs,
            batch_size=job.off_ramp_batch_size,
            learning_rate=job.off_ramp_learning_rate,
        ),
        seed=job.seed,
        bf16=resolve_precision(job.precision) == "bfloat16",
    )


if __name__ == "__main__":
    from jobs.cli import run

    sys.exit(run("train"))
