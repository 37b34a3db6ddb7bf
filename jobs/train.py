"""`deebert train`: a backbone and labelled texts in, a DeeBERT model folder out.

The folder also gets `training_log.jsonl` and `training_log.svg`. While it trains, checkpoints lie beside it in
`OUTPUT.training`; a kill at any moment leaves what `--resume` goes on with. Under `torchrun` every process does its
share and the first one writes.
"""

from __future__ import annotations

import logging
import shutil
import sys
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from jobs.flags import comma_list, flag, label_names, parse_job
from jobs.glue import TASK_NAMES, Columns
from jobs.terminal import quiet_libraries
from jobs.train_recipe import recipe_of
from pipeline.errors import UsageError
from pipeline.fields import integer, number, positive, random_seed

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from deebert.checkpoint import Checkpoint
    from deebert.evaluation import LabelledSequences
    from deebert.modeling import DeeBertForSequenceClassification
    from jobs.labelled import LabelledSource

log = logging.getLogger(__name__)

_BELONGS_TO = {
    "teacher_weight": "teacher",
    "teacher_hidden_weight": "teacher",
    "patience": "held_out",
    "evaluate_every": "held_out",
}
_POOLINGS = ("mean", "cls", "both", "attention")
_RECIPE_NAMES = ("two-stage", "joint", "alternating", "off-ramps", "best")


def _layers(text: str) -> tuple[int, ...]:
    """``0,2,4`` -> (0, 2, 4)."""
    try:
        return tuple(map(int, comma_list(text)))
    except ValueError:
        raise ValueError(f"{text!r} is not a list of layers") from None


def _shares(text: str) -> tuple[float, float]:
    """``0.4`` -> (0.4, 0.4); ``0.8,0`` -> (0.8, 0.0)."""
    with suppress(ValueError):
        shares = [float(part) for part in comma_list(text)]
        if len(shares) in (1, 2):
            return shares[0], shares[-1]
    raise ValueError(f"{text!r} is neither a share nor two: write 0.4 or 0.8,0")


@dataclass(frozen=True, kw_only=True)
class TrainJob:
    """What `deebert train` takes. A number left out is the recipe's own."""

    backbone: str | None = flag("start from: folder or hub id of an encoder of a known family", default=None)
    from_classifier: str | None = flag(
        "start from: folder or hub id of a fine-tuned Hugging Face classifier, whose weights are kept: "
        "stage 2 alone",
        default=None,
    )
    from_model: str | None = flag("start from: folder or hub id of a DeeBERT model", default=None)
    data: str | None = flag(
        "labelled texts: CSV, TSV, JSONL or Parquet, a saved data set, or hub-id[:configuration]",
        default=None,
    )
    glue_dir: str | None = flag("or GLUE's TSV folders, with --task", default=None, metavar="DIR")
    task: str | None = flag(
        "GLUE task of the data: settles columns and label names; a TSV is then read without quotes, as GLUE's are",
        default=None,
        choices=TASK_NAMES,
    )
    text_column: str = flag("column of the text", default="text")
    text_pair_column: str | None = flag("column of the second segment", default=None)
    label_column: str = flag("column of the label", default="label")
    labels: tuple[str, ...] | None = flag(
        "label names in the order of their ids; found in the data if left out; a classifier's LABEL_0, LABEL_1 "
        "are renamed so",
        default=None,
        parse=label_names,
        metavar="A,B",
    )
    problem: str | None = flag(
        "what the labels are: one of several (the default), any number of them (found where rows have lists), "
        "or a number (found for STS-B)",
        default=None,
        choices=("single_label_classification", "multi_label_classification", "regression"),
    )
    label_separator: str = flag("multi-label CSV and TSV: between the labels of a row", default=",")
    learn_to_exit: bool = flag(
        "also train a head that tells how certain each off-ramp is, to exit by with --certainty-threshold "
        "(BERxiT); a regression needs it",
        default=False,
    )
    output: str = flag("model folder to write")
    off_ramp_pooling: str | None = flag(
        "what off-ramps and the final classifier read (mean; best: attention, which learns which tokens count, in an "
        "exact stage 2 or a third stage)",
        default=None,
        choices=_POOLINGS,
    )
    off_ramp_layers: tuple[int, ...] | None = flag(
        "layers that get an off-ramp, 0 for the embeddings; left out, all but the last and the embeddings",
        default=None,
        parse=_layers,
        metavar="I,I",
    )
    shared_pooler: bool = flag("all off-ramps share one pooler; each has its own classifier", default=False)
    max_length: int | None = flag(
        "tokens a text is cut to; left out, what the model of --from-model is cut to, else 128",
        default=None,
        parse=positive,
    )
    max_rows: int | None = flag("train on a random sample of this many rows", default=None, parse=positive)
    recipe: str = flag(
        "two-stage is the paper's; joint and alternating train off-ramps with the backbone; off-ramps is stage 2 "
        "alone; best is what measured best: off-ramps on attention, an exact stage 2, then a third stage that trains "
        "all together, taught by what the two made",
        default="two-stage",
        choices=_RECIPE_NAMES,
    )
    weighting: str | None = flag(
        "joint, alternating: weights of the off-ramps' losses (linear: layer over depth)",
        default=None,
        choices=("linear", "uniform", "equilibrium"),
    )
    self_distillation: float | None = flag(
        "share of the off-ramps' loss that comes from the final classifier's answers, 0 for none",
        default=None,
        parse=number,
    )
    temperature: float = flag("of all distillation", default=2.0, parse=number)
    teacher: str | None = flag("folder of a DeeBERT model that stage 1 also learns from", default=None)
    teacher_weight: float = flag(
        "share of the final classifier's loss that comes from the teacher", default=0.5, parse=number
    )
    teacher_hidden_weight: float = flag(
        "weight of the mean squared distance to the teacher's token states", default=0.0, parse=number
    )
    stage_2: str | None = flag(
        "fast: on cached states of the frozen backbone; exact (best): through it, dropout on, as in the paper; none",
        default=None,
        choices=("fast", "exact", "none"),
    )
    epochs: float | None = flag(
        "stage 1, and stage 3 of best: epochs (as in the paper: 3; RoBERTa 10)", default=None, parse=number
    )
    batch_size: int | None = flag(
        "stages 1 and 3: samples per step, of all processes (8, as in the paper)", default=None, parse=integer
    )
    learning_rate: float | None = flag(
        "stages 1 and 3: peak learning rate (2e-5, as in the paper)", default=None, parse=number
    )
    interpolation: tuple[float, float] | None = flag(
        "stage 3 of best, or stage 1 with --from-model: share of its change to the weights that is kept (1), one for "
        "all layers, or the first layer's and the last's, with those between in between",
        default=None,
        parse=_shares,
        metavar="SHARE[,SHARE]",
    )
    off_ramp_epochs: float | None = flag("stage 2: epochs (3; exact, RoBERTa 10)", default=None, parse=number)
    off_ramp_batch_size: int | None = flag(
        "stage 2: samples per step (fast: 32, exact: 8 as in the paper)", default=None, parse=integer
    )
    off_ramp_learning_rate: float | None = flag(
        "off-ramps: peak learning rate in stage 2 (fast: 5e-4, exact: 2e-5 as in the paper) and in joint training "
        "(the backbone's)",
        default=None,
        parse=number,
    )
    weight_decay: float | None = flag("all stages: AdamW's (0)", default=None, parse=number)
    warmup: float | None = flag(
        "all stages: share of the steps in which the learning rate rises (0)", default=None, parse=number
    )
    adam_epsilon: float | None = flag("all stages: AdamW's epsilon (1e-8)", default=None, parse=number)
    max_grad_norm: float | None = flag("all stages: gradients are cut to it (1)", default=None, parse=number)
    exit_head_learning_rate: float | None = flag(
        "the --learn-to-exit head's (5e-3)", default=None, parse=number
    )
    accumulation_steps: int | None = flag(
        "pieces that a batch is computed in: less memory, the same step (1)", default=None, parse=integer
    )
    held_out: float | None = flag(
        "share of the rows kept back to stop early by; left out, training runs to its end",
        default=None,
        parse=number,
    )
    patience: int = flag(
        "early stopping: evaluations in a row without a better loss", default=3, parse=integer
    )
    evaluate_every: int = flag("early stopping: steps between evaluations", default=500, parse=integer)
    precision: str = flag(
        "auto is bfloat16 where the hardware has it",
        default="auto",
        choices=("auto", "float32", "bfloat16", "float16"),
    )
    seed: int = flag("random seed", default=42, parse=random_seed)
    allow_pickle: bool = flag(
        "read weights that are there as a pickle only, by torch's safe reader", default=False
    )
    checkpoint_steps: int = flag("steps between checkpoints", default=1000, parse=integer)
    resume: bool = flag("go on where a killed training stopped", default=False)
    overwrite: bool = flag("replace an existing model folder, or a killed training", default=False)

    @property
    def new_off_ramps_read(self) -> str:
        """The pooling of a model that begins with `backbone`."""
        return self.off_ramp_pooling or ("attention" if self.recipe == "best" else "mean")

    @property
    def work_dir(self) -> Path:
        """Where checkpoints lie until the model is written."""
        output = Path(self.output).resolve()  # "." has no name
        return output.with_name(output.name + ".training")


def execute(argv: Sequence[str], *, prog: str) -> int:
    """Parse and train."""
    train(parse_job(TrainJob, argv, prog=prog, description="Fine-tune a DeeBERT model."))
    return 0


def train(job: TrainJob) -> DeeBertForSequenceClassification:
    """Fine-tune as `job` says and write the model folder."""
    _check(job)
    # Heavy imports come after the checks that need none of them.
    from deebert.training import LOG_NAME, processes
    from deebert.training import train as train_by_recipe
    from jobs.training_plot import draw_training_log

    quiet_libraries()
    recipe_of(job)  # refuses what contradicts itself before anything is loaded
    # No process may find what the first one writes before it has looked.
    processes().wait_for_everyone()
    model, tokenizer, data = _load(job)
    recipe = recipe_of(job, model_type=model.config.backbone_config.model_type)
    report = train_by_recipe(model, tokenizer, data, recipe, job.work_dir, resume=job.resume)
    if not processes().is_main_process:
        return model
    log.info("trained on %d rows: %s", len(data), report)
    whole = job.work_dir / "model"
    whole.mkdir(exist_ok=True)
    model.save_pretrained(whole)
    tokenizer.save_pretrained(whole)
    shutil.copyfile(job.work_dir / LOG_NAME, whole / LOG_NAME)
    draw_training_log(whole / LOG_NAME)
    _hand_over(whole, Path(job.output))
    shutil.rmtree(job.work_dir)
    log.info("wrote %s", job.output)
    return model


def _hand_over(whole: Path, output: Path) -> None:
    """Rename the written model, so that it is there as a whole; into a folder that is there already, file by file."""
    if not output.exists():
        whole.rename(output)
        return
    for file in whole.iterdir():
        shutil.move(file, output / file.name)  # the folder may be the root of another file system


def _check(job: TrainJob) -> None:
    """What can be refused without looking at weights or data."""
    starts = [f for f in ("backbone", "from_classifier", "from_model") if getattr(job, f) is not None]
    if len(starts) != 1:
        found = "neither" if not starts else "more than one"
        raise UsageError(
            f"{found} of --backbone, --from-classifier and --from-model is given: give the one to start from"
        )
    if job.from_classifier is not None and job.recipe not in ("two-stage", "off-ramps"):
        raise UsageError(
            f"--from-classifier keeps its weights and --recipe {job.recipe} would change them: leave --recipe out"
        )
    if job.from_classifier is not None and job.off_ramp_pooling is not None:
        raise UsageError(
            "--from-classifier reads what its classifier was trained on: leave --off-ramp-pooling out"
        )
    if job.backbone is not None and job.recipe == "off-ramps":
        raise UsageError(
            "--recipe off-ramps leaves the final classifier as it is, and that of a bare --backbone is random: give "
            "--from-classifier or --from-model, or leave --recipe out"
        )
    new_kinds = job.off_ramp_pooling is not None or job.off_ramp_layers is not None or job.shared_pooler
    if job.from_model is not None and new_kinds:
        raise UsageError(
            "--from-model has its off-ramps already: leave --off-ramp-pooling, --off-ramp-layers and --shared-pooler "
            "out, or begin with --backbone"
        )
    if job.data is None and job.glue_dir is None:
        raise UsageError("give the labelled texts as --data, or as --glue-dir with --task")
    _check_pointless(job)
    _check_folders(job)


def _check_pointless(job: TrainJob) -> None:
    """Flags that the recipe has no place for."""
    has_stage_1 = job.recipe != "off-ramps" and job.from_classifier is None
    if job.weighting is not None and job.recipe not in ("joint", "alternating", "best"):
        raise UsageError(f"--weighting says nothing to --recipe {job.recipe}: give joint or alternating")
    for name in ("teacher", "epochs", "batch_size", "learning_rate"):
        if getattr(job, name) is not None and not has_stage_1:
            raise UsageError(
                f"--{name.replace('_', '-')} is for stage 1, which this training has not: leave it out"
            )
    if job.interpolation is not None and not (job.recipe == "best" or (has_stage_1 and job.from_model)):
        raise UsageError(
            "--interpolation is between a finished model and what training makes of it: give --recipe best, or "
            "--from-model with a recipe that trains the backbone"
        )
    for name, needed in _BELONGS_TO.items():
        if getattr(job, name) != getattr(TrainJob, name) and getattr(job, needed) is None:
            flags = (f"--{field.replace('_', '-')}" for field in (name, needed))
            raise UsageError("{} says nothing without {}: give both or neither".format(*flags))


def _check_folders(job: TrainJob) -> None:
    output = Path(job.output)
    if output.exists() and not output.is_dir():
        raise UsageError(f"the model folder {job.output!r} is a file: choose another")
    begun = job.work_dir.exists() and any(job.work_dir.iterdir())
    # A training that has begun was let have the folder: what is in it may be its own, cut short.
    if output.exists() and any(output.iterdir()) and not (job.overwrite or (begun and job.resume)):
        raise UsageError(f"the model folder {job.output!r} exists: choose another or give --overwrite")
    if begun and not (job.resume or job.overwrite):
        raise UsageError(
            f"a training of {job.output!r} was cut short: give --resume to go on with it or --overwrite to begin again"
        )


def _load(
    job: TrainJob,
) -> tuple[DeeBertForSequenceClassification, PreTrainedTokenizerBase, LabelledSequences]:
    """The model to start from, its tokenizer, and the rows."""
    from transformers import set_seed

    from jobs.labelled import sample
    from jobs.train_start import check_fit, fresh_start, name_labels, resolved_length, trained_start
    from pipeline.tokenization import TextTokenizer

    set_seed(job.seed)
    start = None if job.backbone is not None else trained_start(job)
    source = _source(job, start)
    texts = source.training_texts(job.labels)
    if start is None:
        start = fresh_start(job, texts)
    elif job.labels is not None or (source.glue_task is not None and source.glue_task.has_fixed_order):
        name_labels(start, texts)
    check_fit(start, texts)
    length = resolved_length(job, start)
    start.model.config.max_seq_length = length
    drawn = sample(texts, job.max_rows, seed=job.seed)
    data = drawn.tokenized(TextTokenizer(start.tokenizer, max_length=length))
    return start.model, start.tokenizer, data


def _source(job: TrainJob, start: Checkpoint | None) -> LabelledSource:
    """Where the rows are; a model that is there already says what their labels are of."""
    from deebert.problem import problem_of
    from jobs.labelled import LabelledSource

    asked = None if job.problem is None else problem_of(job.problem)
    known = None if start is None else start.model.config.problem
    if start is not None and asked not in (None, known):
        raise UsageError(
            f"the model {start.path!r} is a {known and known.name}: leave --problem {job.problem} out, or start from "
            "another model"
        )
    return LabelledSource(
        data=job.data,
        glue_dir=job.glue_dir,
        task=job.task,
        columns=Columns(text=job.text_column, pair=job.text_pair_column, label=job.label_column),
        problem=asked or known,
        label_separator=job.label_separator,
    )


if __name__ == "__main__":
    from jobs.cli import run

    sys.exit(run("train"))
