"""A run's progress as metrics of Ray: who scrapes a cluster's nodes with Prometheus sees it as ``ray_deebert_…``.

Without a cluster's agent they go nowhere, at no cost. Knows nothing of how progress is counted.
"""

from __future__ import annotations

from ray.util.metrics import Gauge

from pipeline.progress import ProgressSample


class Gauges:
    """Those of one run.

    Args:
        output: The run's output, the label by which runs are told apart.
        total_rows: Rows that the run will have, as far as the planner can tell; None if it cannot.
    """

    def __init__(self, *, output: str, total_rows: int | None) -> None:
        self._total_rows = total_rows
        self._labels = {"output": output}
        self._rows = self._gauge(
            "rows", "Rows of the run that have their answers, those of earlier attempts included."
        )
        self._planned = self._gauge("rows_planned", "Rows that the run will have, estimated.")
        self._exit_layer = self._gauge("mean_exit_layer", "Mean exit layer of the rows so far, from 1.")
        self._saving = self._gauge(
            "saving", "Share of the layers that early exits have spared so far (DeeBERT, Eq. 2)."
        )

    def set(self, sample: ProgressSample) -> None:
        """How far the run is now."""
        self._rows.set(sample.rows_done)
        if self._total_rows is not None:
            self._planned.set(self._total_rows)
        if sample.rows_done:
            self._exit_layer.set(sample.mean_exit_layer)
            self._saving.set(sample.saving)

    def _gauge(self, name: str, description: str) -> Gauge:
        gauge = Gauge(f"deebert_{name}", description=description, tag_keys=tuple(self._labels))
        gauge.set_default_tags(self._labels)
        return gauge
