"""How many random cases a property is tried on."""

from __future__ import annotations

import os


def examples(usual: int) -> int:
    """The usual number, times DEEBERT_EXAMPLES where that is set: `make test-thorough`."""
    return usual * int(os.environ.get("DEEBERT_EXAMPLES", "1"))
