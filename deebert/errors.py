"""The exception tree of the method.

DeeBertError
├── CheckpointError     a model folder lacks weights, configuration or tokenizer, or does not fit them
├── PolicyError         an exit policy that does not exist or whose threshold makes no sense
├── BackboneError       a backbone family that has no off-ramps here
├── PrecisionError      a number format that the machine does not compute in
├── DataError           labelled data that cannot be trained or evaluated on
└── RecipeError         a training recipe whose parts contradict each other or the machine, or that diverges

Every message is one sentence that names the thing and the remedy: command lines print it as it is.
`pipeline.errors` continues the tree.
"""


class DeeBertError(Exception):
    """Root of all errors that this software raises on purpose."""


class CheckpointError(DeeBertError):
    """A model folder lacks weights, configuration or tokenizer, or they do not fit together."""


class PolicyError(DeeBertError):
    """An exit policy is unknown or has a threshold that cannot be meant."""


class BackboneError(DeeBertError):
    """A backbone family for which no off-ramps are implemented."""


class PrecisionError(DeeBertError):
    """A number format that the machine does not compute in."""


class DataError(DeeBertError):
    """Labelled data that cannot be trained or evaluated on."""


class RecipeError(DeeBertError):
    """A training recipe whose parts contradict each other, the models or the machine, or that diverges."""
