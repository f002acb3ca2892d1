"""From a source to a folder that a recipe can name: clean train and eval files, a quarantine, and a card of counts."""

from peftchat.sources.prepare.card import Card, card_text
from peftchat.sources.prepare.run import PrepareSettings, prepare

__all__ = ["Card", "PrepareSettings", "card_text", "prepare"]
