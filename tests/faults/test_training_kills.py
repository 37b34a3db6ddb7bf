"""A training that is killed and resumed ends where the undisturbed one does: real processes, real SIGKILL."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file
from transformers import PreTrainedTokenizerFast

from deebert.training import LOG_NAME, read_log
from tests.conftest import REPOSITORY, make_model
from tests.integration.conftest import sentences

FLAGS = {
    "--recipe": "joint",
    "--self-distillation": "0.5",
    "--stage-2": "fast",
    "--epochs": "3",
    "--batch-size": "16",
    "--learning-rate": "1e-3",
    "--precision": "float32",
    "--checkpoint-steps": "10",
}


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory, tokenizer: PreTrainedTokenizerFast) -> list[str]:
    """Words of a small training, without its output."""
    folder = tmp_path_factory.mktemp("job")
    model = make_model(num_layers=3, num_labels=2)
    model.save_pretrained(folder / "start")
    tokenizer.save_pretrained(folder / "start")
    with (folder / "data.jsonl").open("w") as file:
        for text in sentences(480, longest=12):
            file.write(json.dumps({"text": text, "label": int("good" in text)}) + "\n")
    labels = ("--labels", "negative,neutral")
    return [
        "--from-model",
        str(folder / "start"),
        "--data",
        str(folder / "data.jsonl"),
        *labels,
        *(word for pair in FLAGS.items() for word in pair),
    ]


def start(job: list[str], output: Path, *words: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "jobs.train", *job, "--output", str(output), *words],
        cwd=REPOSITORY,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY)},
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(process: subprocess.Popen[str]) -> None:
    _, errors = process.communicate(timeout=540)
    assert process.returncode == 0, errors


def kill_at_checkpoint(process: subprocess.Popen[str], output: Path, checkpoint: int) -> None:
    """SIGKILL once this checkpoint is there."""
    state = work_dir(output) / "stage-1" / f"checkpoint-{checkpoint}" / "trainer_state.json"
    deadline = time.monotonic() + 240
    while not state.exists():
        assert process.poll() is None, "the training ended before it could be killed"
        assert time.monotonic() < deadline
        time.sleep(0.002)  # waits for another process, not for luck: the condition is the file
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL


def work_dir(output: Path) -> Path:
    return output.with_name(output.name + ".training")


def losses(output: Path) -> list[dict[str, Any]]:
    return [{k: v for k, v in r.items() if k != "seconds"} for r in read_log(output / LOG_NAME)]


def test_killed_twice_and_resumed_equals_undisturbed(job: list[str], tmp_path: Path) -> None:
    undisturbed, killed = tmp_path / "undisturbed", tmp_path / "killed"
    whole = start(job, undisturbed)
    kill_at_checkpoint(start(job, killed), killed, 20)
    finish(whole)

    kill_at_checkpoint(start(job, killed, "--resume"), killed, 50)
    finish(start(job, killed, "--resume"))

    one, other = (load_file(folder / "model.safetensors") for folder in (undisturbed, killed))
    assert all((one[name] == other[name]).all() for name in one)
    assert losses(killed) == losses(undisturbed)
    assert sorted(p.name for p in killed.iterdir()) == sorted(p.name for p in undisturbed.iterdir())
    assert not work_dir(killed).exists()
