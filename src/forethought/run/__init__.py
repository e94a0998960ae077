"""A run: its folder, checkpoints, ranks, signals, diagnostics, callbacks and trackers."""

__version__ = "0.2.0"
"""The version of the package, which every run folder records."""
