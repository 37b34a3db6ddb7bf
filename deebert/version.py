"""The software version: written into every part's footer and every run record."""

__version__ = "0.1.0"
