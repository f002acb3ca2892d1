"""Models: loading, the rows of new tokens, adapters and their files."""
