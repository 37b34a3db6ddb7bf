"""Thin entry points: one module per verb, each a Ray job and a command of `deebert`."""
