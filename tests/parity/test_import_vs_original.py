"""An imported checkpoint answers as the original's forward pass does, after every layer."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from deebert.checkpoint import load_checkpoint
from deebert.encoder import PackedEncoder
from deebert.evaluation import trace
from deebert.packing import PackedTokens
from jobs import cli
from tests.original_deebert import POSITIONS, make_original
from tests.parity.test_encoder_vs_transformers import random_ids, training_form

TOLERANCE = {"atol": 1e-5, "rtol": 0.0}


@pytest.mark.parametrize("pickled", [False, True], ids=["safetensors", "bin"])
@pytest.mark.parametrize("num_layers", [12, 24], ids=["base", "large"])
@pytest.mark.parametrize("prefix", ["bert", "roberta"])
def test_both_forms_give_the_originals_logits(
    tmp_path: Path, prefix: str, num_layers: int, pickled: bool
) -> None:
    original = make_original(prefix, num_layers=num_layers, num_labels=3)
    source = original.save(tmp_path / "theirs", pickled=pickled)
    flags = ["--allow-pickle"] if pickled else []

    assert cli.main(["import", str(source), "--output", str(tmp_path / "ours"), *flags]) == 0

    model = load_checkpoint(str(tmp_path / "ours")).model
    rows = random_ids([1, 2, 5, 5, 17, POSITIONS - 2])
    answers = [original(row) for row in rows]
    # The highway after the last layer is not among ours: the final classifier answers there.
    highways = [
        torch.stack([exits[layer] for exits, _ in answers]).float() for layer in range(num_layers - 1)
    ]
    expected = torch.stack([*highways, torch.stack([final for _, final in answers]).float()])
    packed = trace(PackedEncoder.of(model), PackedTokens.pack(rows))
    assert packed.layers == tuple(range(1, num_layers + 1))
    torch.testing.assert_close(packed.logits, expected, **TOLERANCE)
    torch.testing.assert_close(training_form(model, rows), expected, **TOLERANCE)
    assert (expected[1:] - expected[:-1]).abs().amax(dim=(1, 2)).min() > 0.1  # no two layers answer alike
