"""Serving: talking to a model in the terminal, and handing it to other programs."""
