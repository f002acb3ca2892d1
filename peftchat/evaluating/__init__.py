"""Evaluation of runs and models on benchmark tasks, with paired intervals of the differences."""
