"""A run: its folder, checkpoints, processes, signals, trackers, diagnostics."""
