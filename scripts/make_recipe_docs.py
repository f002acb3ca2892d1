"""Write the recipe's JSON Schema and its manual page from the types: `python scripts/make_recipe_docs.py`."""

from pathlib import Path

from peftchat.recipe.reference import SCHEMA_FILE, manual, schema_text

MANUAL = Path(__file__).parent.parent / "docs" / "recipe.md"


def main() -> None:
    SCHEMA_FILE.write_text(schema_text(), encoding="utf-8")
    MANUAL.parent.mkdir(exist_ok=True)
    MANUAL.write_text(manual(), encoding="utf-8")
    print(f"wrote {SCHEMA_FILE} and {MANUAL}")


if __name__ == "__main__":
    main()
