"""The pipeline's branch of the exception tree (the root and the method's branch: `deebert.errors`).

DeeBertError
└── PipelineError
    ├── UsageError         found before any actor starts; exit code 2
    │   └── InputError     an input that is missing, unreadable or lacks a column
    │       └── BrokenFileError   it is there and named, but cannot be read; the others can
    ├── ReadError          an input could not be read: names it and why
    ├── OutputError        something could not be written, read, listed or removed in the output: names it and why
    │   └── OutputFullError   because there is no room
    ├── BadRowsError       a shard has more rows that cannot be classified than the run allows
    ├── NotFiniteError     the model answers with numbers that are none: names the layer and the precision
    ├── RunFailedError     the run ended with shards missing; exit code 1, the same command resumes
    └── InvariantError     a broken promise of ours (rows not conserved, a buffer over its bound)
"""

from deebert.errors import DeeBertError


class PipelineError(DeeBertError):
    """Root of the pipeline's errors."""


class UsageError(PipelineError):
    """The command cannot be meant as given: one sentence, no traceback, exit code 2."""


class InputError(UsageError):
    """An input that is missing, unreadable, or lacks a column."""


class BrokenFileError(InputError):
    """One file of the input cannot be read; what is in the others can still be classified."""


class ReadError(PipelineError):
    """A shard's file could not be read: names the file and why."""


class OutputError(PipelineError):
    """Something could not be written, read, listed or removed in the output: names it and why."""


class OutputFullError(OutputError):
    """The output has no room left: no shard can be committed until it has."""


class BadRowsError(PipelineError):
    """A shard has more rows that cannot be classified than the whole run allows."""


class NotFiniteError(PipelineError):
    """The model's answers are not finite numbers: no label can be read from them, of no sample of the run."""


class RunFailedError(PipelineError):
    """The run ended with planned shards uncommitted; the same command finishes the job (exit code 1)."""


class InvariantError(PipelineError):
    """A promise of this software was broken: it ends the run, and is always reported."""
