"""The flags of commands that trace a model on labelled texts: which texts, and how they are read.

Knows nothing of models.
"""

from __future__ import annotations

from dataclasses import dataclass

from jobs.flags import flag, label_names
from jobs.glue import TASK_NAMES, Columns
from pipeline.config import PRECISION_HELP, PRECISIONS, WINDOW_STRIDE_HELP
from pipeline.fields import positive, whole


@dataclass(frozen=True, kw_only=True)
class SubjectFlags:
    """What `evaluate` and `calibrate` take alike."""

    model: str | None = flag("folder or hub id of a DeeBERT model", default=None)
    data: str | None = flag(
        "labelled texts that training has not seen: CSV, TSV, JSONL or Parquet, a saved data set, or "
        "hub-id[:configuration]",
        default=None,
    )
    glue_dir: str | None = flag("or GLUE's TSV folders, with --task", default=None, metavar="DIR")
    task: str | None = flag(
        "GLUE task of the data: settles columns, label names and metric; a TSV is then read without quotes, as "
        "GLUE's are",
        default=None,
        choices=TASK_NAMES,
    )
    text_column: str = flag("column of the text", default="text")
    text_pair_column: str | None = flag("column of the second segment", default=None)
    label_column: str = flag("column of the label: ids or names", default="label")
    labels: tuple[str, ...] | None = flag(
        "the model's label names in the order of its ids; left out, those it was saved with",
        default=None,
        parse=label_names,
        metavar="A,B",
    )
    label_separator: str = flag("multi-label CSV and TSV: between the labels of a row", default=",")
    split: str | None = flag("of a data set; left out, validation (MNLI: both, apart)", default=None)
    max_length: int | None = flag(
        "tokens a text is cut to; left out, what the model was trained with", default=None, parse=positive
    )
    window_stride: int | None = flag(WINDOW_STRIDE_HELP, default=None, parse=whole, metavar="TOKENS")
    precision: str = flag(PRECISION_HELP, default="float32", choices=PRECISIONS)
    trace: str | None = flag(
        "Parquet file of every off-ramp's logits: written, or read if it is there instead of running the model",
        default=None,
        metavar="T.parquet",
    )

    @property
    def columns(self) -> Columns:
        """Of data that belongs to no task."""
        return Columns(text=self.text_column, pair=self.text_pair_column, label=self.label_column)
