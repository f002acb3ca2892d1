"""Run folders: their files, checkpoints, metrics and summary."""
