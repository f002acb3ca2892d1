"""The ways to train: what each is, what it takes, and what it works with. Light to import; libraries come when used."""

from peftchat.variants.base import AdapterSection, ModelShape, Paper, Variant
from peftchat.variants.registry import ADAPTERS, VARIANTS, canonical_name, get_variant

__all__ = ["ADAPTERS", "VARIANTS", "AdapterSection", "ModelShape", "Paper", "Variant", "get_variant", "canonical_name"]
