"""`deebert VERB`: finds the verb's module and turns errors into exit codes.

Exit codes: 0 done, 1 the run failed (the same command resumes), 2 misuse, 130 interrupted.
"""

from __future__ import annotations

import atexit
import gc
import logging
import os
import sys
from collections.abc import Sequence
from importlib import import_module

from deebert.errors import (
    BackboneError,
    CheckpointError,
    DataError,
    DeeBertError,
    PolicyError,
    PrecisionError,
    RecipeError,
)
from pipeline.errors import UsageError

VERBS = {
    "train": "fine-tune a DeeBERT model from a backbone",
    "import": "turn an original DeeBERT checkpoint into a model folder",
    "evaluate": "score every off-ramp and sweep thresholds on a labelled set",
    "calibrate": "choose the threshold that meets a target, and store it with the model",
    "classify": "classify a corpus on Ray into Parquet",
    "stream": "classify stdin to stdout, each sample the moment it exits",
    "report": "what runs cost and saved, as a table and an HTML page; other thresholds, larger corpora",
    "bench": "measure engine and pipeline against baselines",
}

_HOW_TO_GO_ON = {
    "classify": "; the same command goes on where it stopped",
    "train": "; the same command with --resume goes on where it stopped",
}

_MISUSE = (
    UsageError,
    CheckpointError,
    PolicyError,
    PrecisionError,
    BackboneError,
    DataError,
    RecipeError,
)


def main(argv: Sequence[str] | None = None) -> int:
    """The console script."""
    words = list(sys.argv[1:] if argv is None else argv)
    if not words or words[0] in ("-h", "--help", "help"):
        print(_usage())
        return 0
    if words[0] == "--version":
        from deebert.version import __version__

        print(__version__)
        return 0
    verb, *rest = words
    if verb not in VERBS:
        print(f"deebert: unknown verb {verb!r}; choose one of {', '.join(VERBS)}", file=sys.stderr)
        return 2
    return run(verb, rest, prog=f"deebert {verb}")


def run(verb: str, argv: Sequence[str] | None = None, *, prog: str | None = None) -> int:
    """Run one verb: what `python -m jobs.VERB` and `deebert VERB` share."""
    words = sys.argv[1:] if argv is None else argv
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s", stream=sys.stderr)
    # What the libraries brought would be searched for cycles at the end, a second or more, to free memory that goes
    # with the process anyway.
    atexit.register(gc.freeze)
    # A library's bars would overwrite ours; `train` turns them on again where there is a terminal.
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    for noisy in ("httpx", "datasets", "fsspec", "matplotlib", "fontTools"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    # Two lines for each time that the hub is asked again: the error says in the end that it cannot be reached.
    logging.getLogger("huggingface_hub.utils._http").setLevel(logging.ERROR)
    try:
        return int(import_module(f"jobs.{verb}").execute(words, prog=prog or f"python -m jobs.{verb}"))
    except _MISUSE as error:
        print(f"deebert {verb}: {error}", file=sys.stderr)
        return 2
    except DeeBertError as error:
        print(f"deebert {verb}: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"deebert {verb}: interrupted{_HOW_TO_GO_ON.get(verb, '')}", file=sys.stderr)
        return 130
    except BrokenPipeError:
        # The reader of our stdout left: not an error. Keep the interpreter from failing on its last flush.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


def _usage() -> str:
    width = max(map(len, VERBS))
    verbs = "\n".join(f"  {verb:<{width}}  {what}" for verb, what in VERBS.items())
    codes = "exit codes: 0 done, 1 failed, 2 cannot be meant as given, 130 interrupted"
    return f"usage: deebert VERB [flags]\n\n{verbs}\n\n`deebert VERB --help` lists a verb's flags.\n{codes}"


if __name__ == "__main__":
    sys.exit(main())
