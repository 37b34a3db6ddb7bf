"""Whole jobs on Ray, as contenders: `classify`, and Ray Data with a transformers pipeline.

Texts from Parquet, answers to Parquet, each job on a local Ray of its own: as users run it, and so that no
job waits for what another has left behind. Knows nothing of time.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import nn
from transformers import BertConfig

from deebert.checkpoint import Checkpoint
from deebert.config import DeeBertConfig
from deebert.exit_policy import FULL_DEPTH
from deebert.modeling import DeeBertForSequenceClassification
from jobs.benchmarks.settings import BenchSettings
from pipeline.cluster import RaySession
from pipeline.config import ClassifyConfig, Replicas
from pipeline.run import classify


@dataclass(frozen=True, kw_only=True, eq=False)
class ClassifyJob:
    """`classify` over a corpus, each time into a fresh output."""

    model: str
    corpus: Path
    settings: BenchSettings
    max_length: int
    replicas: Replicas | None = None
    threads: int | None = None
    """CPU threads of one replica; None: as `classify` has it, the cores shared out among them."""
    shard_rows: int = 4096
    full_depth: bool = True
    _count: Any = field(default_factory=itertools.count)

    def __call__(self) -> int:
        """Run the job; returns the rows written."""
        return classify(self.config()).record.totals.rows

    def config(self) -> ClassifyConfig:
        """Of a run into the next fresh output."""
        output = self.corpus.with_name(f"{self.corpus.stem}-{id(self)}-{next(self._count)}")
        policy = FULL_DEPTH if self.full_depth else self.settings.policy
        # Below 0 never fires, whatever operating point the model was saved with.
        thresholds = -1.0 if policy.thresholds is None else policy.thresholds
        return ClassifyConfig(
            model=self.model,
            input=(str(self.corpus),),
            output=str(output),
            entropy_threshold=None if policy.reads_certainty else thresholds,
            certainty_threshold=thresholds if policy.reads_certainty else None,
            replicas=self.replicas,
            threads=self.threads,
            device=self.settings.device,
            micro_batch_tokens=max(self.settings.micro_batch_tokens[0], self.max_length),
            max_length=self.max_length,
            precision=self.settings.precision,
            shard_rows=self.shard_rows,
        )


@dataclass(frozen=True, kw_only=True, eq=False)
class RayDataJob:
    """`read_parquet`, `map_batches` with a transformers pipeline per actor, `write_parquet`."""

    model: str
    """A folder written by `save_plain`."""
    corpus: Path
    settings: BenchSettings
    max_length: int
    replicas: int
    threads: int
    num_cpus: float
    """Cores that an actor reserves; together they must leave one, or Ray Data never reads a row."""
    _count: Any = field(default_factory=itertools.count)

    def __call__(self) -> int:
        """Run the job; returns the rows written."""
        with RaySession() as session:
            session.start()
            return self._run()

    def _run(self) -> int:
        import ray.data

        logging.getLogger("ray.data").setLevel(logging.ERROR)
        ray.data.DataContext.get_current().enable_progress_bars = False
        output = self.corpus.with_name(f"{self.corpus.stem}-ray-data-{id(self)}-{next(self._count)}")
        on_gpu = self.settings.device == "cuda"
        # One small file is one block, which would keep one actor busy.
        rows = ray.data.read_parquet(str(self.corpus)).repartition(4 * self.replicas)
        rows.map_batches(
            TransformersPipeline,
            batch_size=8 * self.settings.batch_size,
            compute=ray.data.ActorPoolStrategy(size=self.replicas),
            fn_constructor_kwargs={
                "model": self.model,
                "device": self.settings.device,
                "precision": self.settings.float_precision,
                "batch_size": self.settings.batch_size,
                "max_length": self.max_length,
                "threads": self.threads,
            },
            num_cpus=self.num_cpus,
            num_gpus=1 if on_gpu else None,
        ).write_parquet(str(output))
        return sum(pq.read_metadata(part).num_rows for part in output.glob("*.parquet"))


class TransformersPipeline:
    """What a user of Ray Data writes first: a `pipeline("text-classification")` in an actor."""

    def __init__(
        self, *, model: str, device: str, precision: str, batch_size: int, max_length: int, threads: int
    ) -> None:
        from transformers import AutoTokenizer, pipeline
        from transformers.utils import logging as transformers_logging

        transformers_logging.set_verbosity_error()
        torch.set_num_threads(threads)
        loaded: Any = DeeBertForSequenceClassification.from_pretrained(model, dtype=getattr(torch, precision))
        self._pipeline = pipeline(
            "text-classification",
            model=loaded.eval(),
            tokenizer=AutoTokenizer.from_pretrained(model),
            device=device,
            batch_size=batch_size,
        )
        self._max_length = max_length

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Add a label and a score to each row."""
        answers = self._pipeline(batch["text"].tolist(), truncation=True, max_length=self._max_length)
        return {
            "text": batch["text"],
            "label": [answer["label"] for answer in answers],
            "score": [answer["score"] for answer in answers],
        }


def write_corpus(texts: Sequence[str], path: Path) -> Path:
    """One Parquet file with a column ``text``."""
    pq.write_table(pa.table({"text": list(texts)}), path)
    return path


def save_plain(checkpoint: Checkpoint, folder: Path) -> str:
    """The same weights without off-ramps: what a user without early exit would run."""
    config = DeeBertConfig(**{**checkpoint.config.to_dict(), "off_ramp_layers": []})
    plain = DeeBertForSequenceClassification(config)
    plain.backbone, plain.final_classifier = checkpoint.model.backbone, checkpoint.model.final_classifier
    plain.off_ramps = nn.ModuleList()
    return _save(plain, checkpoint, folder)


def save_one_layer(checkpoint: Checkpoint, folder: Path) -> str:
    """The host ceiling: a model so small that only what surrounds it costs time; everyone leaves at layer 1."""
    config = checkpoint.config
    backbone = BertConfig(
        vocab_size=int(config.backbone_config.vocab_size),
        max_position_embeddings=int(config.backbone_config.max_position_embeddings),
        num_hidden_layers=1,
        hidden_size=32,
        num_attention_heads=2,
        intermediate_size=64,
    )
    model = DeeBertForSequenceClassification(
        DeeBertConfig(backbone_config=backbone, id2label=config.id2label, label2id=config.label2id)
    )
    return _save(model, checkpoint, folder)


def save_whole(checkpoint: Checkpoint, folder: Path) -> str:
    """The model as it is."""
    return _save(checkpoint.model, checkpoint, folder)


def _save(model: DeeBertForSequenceClassification, checkpoint: Checkpoint, folder: Path) -> str:
    model.save_pretrained(folder)
    checkpoint.tokenizer.save_pretrained(folder)
    return str(folder)
