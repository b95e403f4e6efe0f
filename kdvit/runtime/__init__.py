"""A run as a process: checkpoints on disk, signals, processes, logs."""
