"""The report's tables: layer by layer, the recount, the run, its attempts, its bad rows.

Cells are spelled here, once for the page and for the terminal; how a table looks is theirs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from deebert.errors import PolicyError
from deebert.exit_policy import policy_from_dict
from pipeline.records import Identity, RunRecord
from pipeline.report import quantities as q
from pipeline.report.accounting import Accounting, LayerAccount
from pipeline.report.evidence import Evidence

MAX_POLICY_CHARS = 40


@dataclass(frozen=True, kw_only=True)
class Table:
    """A table: the first column is text, the others are numbers unless `is_text`."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    is_text: bool = False
    note: str = ""


def state_tables(record: RunRecord, accounting: Accounting, evidence: Evidence) -> tuple[Table, ...]:
    """All tables of one run, in the order of the page."""
    return (
        _layer_table(accounting, evidence),
        _recount_table(record, evidence),
        _identity_table(record),
        _attempt_table(record),
        _bad_row_table(record),
    )


def _layer_table(accounting: Accounting, evidence: Evidence) -> Table:
    rows = tuple(_layer_row(layer, accounting, evidence) for layer in accounting.layers)
    return Table(
        title="Layer by layer",
        columns=(
            "Layer",
            "Leaving",
            "Share",
            "Samples run",
            "Tokens run",
            "Micro-batches",
            "Seconds",
            "At full depth",
            "Control rows",
            "Agreement",
        ),
        rows=rows,
        note="A dot after the layer marks an off-ramp; layer 0 is the embeddings. At full depth: the "
        "seconds of the control sample, scaled to all tokens. Control rows, agreement: of rows leaving after a layer, "
        "recounted from the parts.",
    )


def _layer_row(layer: LayerAccount, accounting: Accounting, evidence: Evidence) -> tuple[str, ...]:
    audited, agreeing = evidence.audited_rows[layer.layer], evidence.agreeing_rows[layer.layer]
    full_depth = layer.full_depth_seconds
    return (
        f"{layer.layer}{' •' if layer.has_off_ramp else ''}",
        q.count(layer.exit_rows),
        q.percent(layer.exit_rows / accounting.rows) if accounting.rows else "–",
        q.count(layer.samples),
        q.count(layer.tokens),
        "–" if layer.steps is None else q.count(layer.steps),
        f"{layer.seconds:,.2f}",
        "–" if full_depth is None else f"{full_depth:,.2f}",
        q.count(audited),
        q.percent(agreeing / audited) if audited and accounting.agreement is not None else "–",
    )


def _recount_table(record: RunRecord, evidence: Evidence) -> Table:
    totals = record.totals
    pairs = (
        ("Parts", totals.shards, evidence.parts),
        ("Rows", totals.rows, evidence.rows),
        ("Tokens", totals.tokens, evidence.tokens),
        ("Truncated rows", totals.truncated_rows, evidence.truncated_rows),
        ("Control rows", totals.audited_rows, sum(evidence.audited_rows)),
        ("Control rows that agree", totals.audit_agreements, sum(evidence.agreeing_rows)),
        ("Rows that left before the last layer", sum(totals.exit_rows[:-1]), sum(evidence.exit_rows[:-1])),
    )
    return Table(
        title="Recount",
        columns=("Quantity", "Run record", "Recounted from the parts", "Same"),
        rows=tuple((name, q.count(a), q.count(b), "yes" if a == b else "NO") for name, a, b in pairs),
        note="All rows of the parts were read again, with another Parquet library than the one that wrote "
        "them. "
        + ("Every count agrees, layer by layer." if not evidence.findings else "The counts do NOT agree."),
    )


def _identity_table(record: RunRecord) -> Table:
    identity, model = record.identity, record.model
    off_ramps = ", ".join(map(str, model.off_ramp_layers)) or "none"
    if 0 in model.off_ramp_layers:
        off_ramps += " (0: the embeddings)"
    return Table(
        title="Run",
        columns=("What", "Value"),
        rows=(
            ("Status", record.status),
            ("Inputs", ", ".join(record.inputs)),
            (
                "Files and shards",
                f"{q.count(record.planned_files)} and {q.count(record.planned_shards)}",
            ),
            ("Model", model.path),
            ("Layers", f"{model.num_layers} layers of {model.hidden_size}; off-ramps after {off_ramps}"),
            ("Labels", ", ".join(model.labels)),
            ("Exit policy", spell_policy(identity.exit_policy)),
            ("Text columns", ", ".join(identity.text_columns)),
            ("Max length", f"{q.count(identity.max_length)} tokens"),
            *_windows(identity),
            ("Precision", identity.precision),
            ("Computed on", _hardware(record)),
            ("Model digest", identity.model_digest),
            ("Tokenizer digest", identity.tokenizer_digest),
            ("Run digest", identity.digest),
            ("Software version", record.software_version),
        ),
        is_text=True,
    )


def _windows(identity: Identity) -> tuple[tuple[str, str], ...]:
    """How longer texts were read, where they were not cut."""
    if identity.window_stride is None:
        return ()
    return (("Longer texts", f"in windows; neighbours share {q.count(identity.window_stride)} tokens"),)


def _hardware(record: RunRecord) -> str:
    """Seconds and money are of these machines."""
    found = sorted(record.totals.hardware.items(), key=lambda item: -item[1])
    return "; ".join(f"{name} ({q.count(rows)} rows)" for name, rows in found) or "not recorded"


def spell_policy(policy: dict[str, Any]) -> str:
    """``entropy < 0.2 nats``; of a policy that this version does not know, what was recorded."""
    try:
        return str(policy_from_dict(policy))
    except PolicyError:
        return "; ".join(f"{name}: {value}" for name, value in policy.items())


def brief_policy(policy: dict[str, Any]) -> str:
    """The same for a cell: thresholds of many layers are not spelled out."""
    spelled = spell_policy(policy)
    return spelled if len(spelled) <= MAX_POLICY_CHARS else f"{policy.get('type')}, thresholds per layer"


def _attempt_table(record: RunRecord) -> Table:
    return Table(
        title="Attempts",
        columns=("Started", "Status", "Host", "Replicas", "Device", "Wall time", "Shards", "Rows", "Error"),
        rows=tuple(
            (
                a.started_at,
                a.status,
                a.host,
                a.replicas,
                a.device,
                q.duration(a.wall_seconds),
                q.count(a.committed_shards),
                q.count(a.committed_rows),
                a.error or "–",
            )
            for a in record.attempts
        ),
        is_text=True,
    )


def _bad_row_table(record: RunRecord) -> Table:
    totals = record.totals
    seen = totals.rows + totals.bad_rows
    rows = (("Bad rows", totals.bad_rows, seen), ("Truncated rows", totals.truncated_rows, totals.rows))
    return Table(
        title="Bad and truncated rows",
        columns=("Kind", "Rows", "Share"),
        rows=tuple((name, q.count(n), q.percent(n / of) if of else "–") for name, n, of in rows),
        note="Bad rows (null, not text, undecodable) are kept with source, row and reason in "
        "_deebert/dead_letters/; truncated rows were longer than "
        f"{q.count(record.identity.max_length)} tokens and are flagged in the column `truncated`.",
    )
