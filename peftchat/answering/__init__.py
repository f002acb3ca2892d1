"""Answers of models to the questions of a file."""
