"""A run: its folder, checkpoints, ranks, signals, diagnostics, callbacks and trackers."""
