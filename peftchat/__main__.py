"""`python -m peftchat`: the same as the `peftchat` command."""

from peftchat.cli.main import main

if __name__ == "__main__":
    main()
