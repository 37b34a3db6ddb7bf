"""`deebert classify`: a corpus in, Parquet out, on Ray. Also `ray job submit -- python -m jobs.classify`."""

from __future__ import annotations

import logging
import signal
import sys
from collections.abc import Sequence
from typing import Any, NoReturn

from jobs.flags import parse_job
from jobs.terminal import native_messages_aside, quiet_libraries
from pipeline.config import ClassifyConfig

log = logging.getLogger(__name__)


def execute(argv: Sequence[str], *, prog: str) -> int:
    """Parse and run."""
    config = parse_job(
        ClassifyConfig,
        argv,
        prog=prog,
        description="Classify a corpus with early exits. The same command resumes a run that was cut short.",
    )
    # `ray job stop` and schedulers say SIGTERM: end as tidily as on Ctrl-C.
    signal.signal(signal.SIGTERM, _interrupt)
    from pipeline.run import classify

    quiet_libraries()
    if sys.stderr.isatty():  # the bar says it; a line per shard is for collectors of logs
        logging.getLogger("pipeline.shards_done").setLevel(logging.WARNING)
    with native_messages_aside():
        result = classify(config)
    totals = result.record.totals
    if result.new_shards:
        log.info(
            "%d rows in %d parts, %d bad rows: %s", totals.rows, totals.shards, totals.bad_rows, config.output
        )
    return 0


def _interrupt(signum: int, frame: Any) -> NoReturn:
    raise KeyboardInterrupt


if __name__ == "__main__":
    from jobs.cli import run

    sys.exit(run("classify"))
