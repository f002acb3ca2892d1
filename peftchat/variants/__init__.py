"""The ways to train: what each is, which settings it takes, and what it works with. Importing it loads no torch."""

from peftchat.variants.base import Adapter, Paper, TrainerHooks, Variant
from peftchat.variants.model_shape import ModelShape
from peftchat.variants.registry import ADAPTERS, VARIANTS, canonical_name, get_adapter, get_variant

__all__ = [
    "ADAPTERS",
    "VARIANTS",
    "Adapter",
    "ModelShape",
    "Paper",
    "TrainerHooks",
    "Variant",
    "canonical_name",
    "get_adapter",
    "get_variant",
]
