"""peftchat: turn a base language model into a chat assistant on your own dialogues."""

__version__ = "0.1.0"
