"""Statistics and hygiene of conversations: lengths, languages, code, duplicates, overlaps. One pass, sketches only."""

from peftchat.conversations.stats.gather import gather
from peftchat.conversations.stats.parts import StatsPart, parts_of_path, parts_of_recipe
from peftchat.conversations.stats.result import BenchmarkOverlap, DataStats, Overlap, PartStats

__all__ = [
    "BenchmarkOverlap",
    "DataStats",
    "Overlap",
    "PartStats",
    "StatsPart",
    "gather",
    "parts_of_path",
    "parts_of_recipe",
]
