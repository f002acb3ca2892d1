"""Serve runs and models by an inference engine that is installed."""
