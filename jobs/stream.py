"""`deebert stream`: stdin in, one JSON object a line out, each the moment its sample exits. No Ray."""

from __future__ import annotations

import logging
import sys
from collections.abc import Sequence
from dataclasses import dataclass

from jobs.flags import flag, parse_job
from jobs.terminal import quiet_libraries
from pipeline.config import (
    MICRO_BATCH_HELP,
    PRECISION_HELP,
    PRECISIONS,
    WINDOW_STRIDE_HELP,
    Thresholds,
    certainties,
    thresholds,
)
from pipeline.fields import positive, whole

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class StreamJob:
    """What `deebert stream` takes."""

    model: str = flag("folder or hub id of a DeeBERT model")
    entropy_threshold: Thresholds | None = flag(
        "nats below which a sample leaves: one, one per layer, or none for full depth; "
        "left out, the model's own operating point",
        default=None,
        parse=thresholds,
        metavar="S",
    )
    certainty_threshold: Thresholds | None = flag(
        "of a model that learns to exit: certainty, 0 to 1, above which a sample leaves: one, or one per layer",
        default=None,
        parse=certainties,
        metavar="C",
    )
    text_column: str = flag("field of the text in JSON lines", default="text")
    text_pair_column: str | None = flag(
        "field of the second text of a pair; every line has to be JSON then", default=None
    )
    id_column: str = flag("field that names the sample", default="id")
    max_length: int | None = flag(
        "tokens a text is cut to; left out, what the model was trained with", default=None, parse=positive
    )
    micro_batch_tokens: int | None = flag(MICRO_BATCH_HELP, default=None, parse=positive)
    window_stride: int | None = flag(WINDOW_STRIDE_HELP, default=None, parse=whole, metavar="TOKENS")
    precision: str = flag(
        PRECISION_HELP,
        default="auto",
        choices=PRECISIONS,
    )


def execute(argv: Sequence[str], *, prog: str) -> int:
    """Parse and stream until stdin ends or breaks off, or stdout closes."""
    job = parse_job(
        StreamJob,
        argv,
        prog=prog,
        description="Classify lines of text or JSON objects from stdin; answers leave in order of exit.",
    )
    import torch

    from deebert.checkpoint import load_checkpoint
    from deebert.precision import resolve_precision
    from pipeline.planning import resolve_max_length, resolve_policy
    from pipeline.stream import StreamConfig, stream
    from pipeline.tokenization import check_windows

    quiet_libraries()
    checkpoint = load_checkpoint(job.model)
    max_length = resolve_max_length(job.max_length, job.micro_batch_tokens, checkpoint)
    check_windows(
        checkpoint.tokenizer,
        max_length=max_length,
        window_stride=job.window_stride,
        of_pairs=job.text_pair_column is not None,
    )
    config = StreamConfig(
        text_column=job.text_column,
        text_pair_column=job.text_pair_column,
        id_column=job.id_column,
        max_length=max_length,
        window_stride=job.window_stride,
        micro_batch_tokens=job.micro_batch_tokens,
        precision=resolve_precision(job.precision, int8_agreement=checkpoint.config.int8_agreement),
        device="cuda" if torch.cuda.is_available() else "cpu",
    )
    policy = resolve_policy(job.entropy_threshold, job.certainty_threshold, checkpoint)
    # Not `sys.stdin`: the interpreter closes that at its end, and aborts if the reader thread waits in it.
    lines = open(sys.stdin.fileno(), "rb", closefd=False)  # noqa: SIM115
    ended = stream(checkpoint, policy, lines, sys.stdout, config)
    if ended.unreadable:
        log.warning(
            "%d of %d lines could not be read and are answered with an error, the first: %s",
            ended.unreadable,
            ended.lines,
            ended.first_error,
        )
    # Not one line that could be read: a wrong --text-column rather than a few bad lines.
    return 1 if 0 < ended.lines == ended.unreadable else 0


if __name__ == "__main__":
    from jobs.cli import run

    sys.exit(run("stream"))
