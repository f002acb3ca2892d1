"""peftchat: turn a base language model into a chat assistant on your own conversations."""

__version__ = "0.1.0"
