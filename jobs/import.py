"""`deebert import`: a checkpoint of the original DeeBERT, or of Hugging Face's port, in; a model folder out."""

from __future__ import annotations

import logging
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from jobs.flags import flag, label_names, parse_job
from jobs.terminal import quiet_libraries
from pipeline.errors import UsageError

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class ImportJob:
    """What `deebert import` takes."""

    source: str = flag("folder or hub id of the checkpoint; also the first word, without the flag")
    output: str = flag("model folder to write")
    labels: tuple[str, ...] | None = flag(
        "label names in the order of their ids; left out, those of its config.json",
        default=None,
        parse=label_names,
        metavar="A,B",
    )
    allow_pickle: bool = flag("read weights from pytorch_model.bin where there are no others", default=False)
    overwrite: bool = flag("replace an existing model folder", default=False)


def execute(argv: Sequence[str], *, prog: str) -> int:
    """Parse, read and write."""
    words = ["--source", *argv] if argv and not argv[0].startswith("-") else argv
    job = parse_job(
        ImportJob,
        words,
        prog=prog,
        description="Turn a checkpoint of castorini/DeeBERT, or of Hugging Face's port, into a model folder: "
        "`import SRC --output DIR [flags]`.",
    )
    output = Path(job.output)
    if output.exists() and not output.is_dir():
        raise UsageError(f"the model folder {job.output!r} is a file: choose another")
    if output.exists() and any(output.iterdir()) and not job.overwrite:
        raise UsageError(f"the model folder {job.output!r} exists: choose another or give --overwrite")
    # Heavy imports come after the checks that need none of them.
    from deebert.importing import import_checkpoint

    quiet_libraries()
    checkpoint = import_checkpoint(job.source, labels=job.labels, allow_pickle=job.allow_pickle)
    output.mkdir(parents=True, exist_ok=True)
    checkpoint.model.save_pretrained(output)
    checkpoint.tokenizer.save_pretrained(output)
    config = checkpoint.config
    log.info(
        "wrote %s: %s, %d layers, labels %s; it runs at full depth until it is given a threshold",
        output,
        config.backbone_config.model_type,
        config.num_hidden_layers,
        ", ".join(checkpoint.labels),
    )
    return 0


if __name__ == "__main__":
    from jobs.cli import run

    sys.exit(run("import"))
