"""What the tests share: small models, tokenizers, conversations, recipes, and the command line."""
