"""GLUE's metrics against values computed by hand."""

from __future__ import annotations

import pytest
import torch

from deebert.problem import SINGLE_LABEL
from jobs.glue import find_task
from jobs.metrics import ACCURACY, PEARSON, SPEARMAN, NamedMetric, f1_of, metrics_of

LABELS = torch.tensor([1, 1, 0, 0, 1])
PREDICTIONS = torch.tensor([1, 0, 1, 0, 1])


def test_f1_counts_the_positive_class() -> None:
    # 2 found, 1 missed, 1 too many: 2·2 / (2·2 + 1 + 1)
    assert f1_of(1).compute(LABELS, PREDICTIONS) == pytest.approx(2 / 3)
    # The other class: 1 found, 1 missed, 1 too many.
    assert f1_of(0).compute(LABELS, PREDICTIONS) == pytest.approx(1 / 2)


def test_f1_where_nothing_is_positive_is_0() -> None:
    nobody = torch.zeros(4, dtype=torch.long)

    assert f1_of(1).compute(nobody, nobody) == 0.0


def test_accuracy_is_the_share_that_is_right() -> None:
    assert ACCURACY.compute(LABELS, PREDICTIONS) == pytest.approx(3 / 5)
    assert SINGLE_LABEL.agreement(PREDICTIONS, LABELS).mean().item() == pytest.approx(3 / 5)


@pytest.mark.parametrize("metric", [PEARSON, SPEARMAN], ids=lambda metric: metric.name)
def test_what_never_changes_goes_with_nothing(metric: NamedMetric) -> None:
    same, rising = torch.ones(3), torch.tensor([1.0, 2.0, 3.0])

    assert metric.compute(same, rising) == 0.0
    assert metric.compute(rising, same) == 0.0
    assert metric.compute(rising, rising) == pytest.approx(1.0)


@pytest.mark.parametrize("task", ["sst-2", "qnli", "rte", "mnli", None])
def test_most_tasks_are_scored_by_accuracy(task: str | None) -> None:
    found = find_task(task) if task else None

    assert [m.name for m in metrics_of(found, found.labels if found else ("a", "b"))] == ["accuracy"]


@pytest.mark.parametrize("task", ["mrpc", "qqp"])
def test_paraphrases_are_scored_by_f1_with_accuracy_beside(task: str) -> None:
    metrics = metrics_of(find_task(task), find_task(task).labels)

    assert [m.name for m in metrics] == ["F1", "accuracy"]
    assert metrics[0].compute(LABELS, PREDICTIONS) == pytest.approx(2 / 3)


def test_the_positive_class_is_found_by_name() -> None:
    f1, _ = metrics_of(find_task("mrpc"), ("Equivalent", "Not_equivalent"))

    assert f1.compute(LABELS, PREDICTIONS) == pytest.approx(1 / 2)
