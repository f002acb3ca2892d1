"""Judging: pairs of answers, shown to a judge in both orders; what it said, read and counted."""
