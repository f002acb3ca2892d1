"""Chat with a model in the terminal."""
