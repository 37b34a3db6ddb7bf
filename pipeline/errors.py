"""The pipeline's branch of the exception tree (the root and the method's branch: `deebert.errors`).

DeeBertError
└── PipelineError
    ├── UsageError         found before any actor starts; exit code 2
    │   └── InputError     an input that is missing, unreadable or lacks a column
    ├── ReadError          a shard's file could not be read: names the file and why
    ├── RunFailedError          the run ended with shards missing; exit code 1, the same command resumes
    └── InvariantError     a broken promise of ours (rows not conserved, a buffer over its bound)
"""

from deebert.errors import DeeBertError


class PipelineError(DeeBertError):
    """Root of the pipeline's errors."""


class UsageError(PipelineError):
    """The command cannot be meant as given: one sentence, no traceback, exit code 2."""


class InputError(UsageError):
    """An input that is missing, unreadable, or lacks a column."""


class ReadError(PipelineError):
    """A shard's file could not be read: names the file and why."""


class RunFailedError(PipelineError):
    """The run ended with planned shards uncommitted; the same command finishes the job (exit code 1)."""


class InvariantError(PipelineError):
    """A promise of this software was broken: never caught, always reported."""
