"""Parquet, JSONL, CSV or text in, early-exit predictions out: the streaming batch-inference pipeline."""
