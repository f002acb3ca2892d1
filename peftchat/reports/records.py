"""What a finished run leaves for people: the model card and the report."""

from pathlib import Path

from peftchat.files import write_text
from peftchat.reports.model_card import model_card
from peftchat.reports.run_report import write_report
from peftchat.runs.run_summary import read_run_json


def write_records(run: Path) -> None:
    """Write `README.md` and `report.html` into a run folder that has its `run.json`."""
    recipe = (run / "recipe.yaml").read_text(encoding="utf-8")
    write_text(run / "README.md", model_card(read_run_json(run), recipe))
    write_report(run)
