"""The ways to train: what each is, what it takes, and what it works with. Light to import; libraries come when used."""

from peftchat.variants.entry import Paper, Variant
from peftchat.variants.facts import ModelFacts
from peftchat.variants.options import AdapterSection
from peftchat.variants.registry import ADAPTERS, VARIANTS, entry, proper_name

__all__ = ["ADAPTERS", "VARIANTS", "AdapterSection", "ModelFacts", "Paper", "Variant", "entry", "proper_name"]
