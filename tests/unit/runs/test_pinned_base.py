"""A hub model is trained at one commit, and a resumed run stays with it.

huggingface_hub reads its variables when it is imported, so this runs in fresh interpreters.
"""

import json
import shutil
import subprocess
import sys
from pathlib import Path

from tests.support.data import write_small_talk
from tests.support.models import small_model
from tests.support.recipes import write_training_recipe

RUN = """
import sys
from pathlib import Path
from peftchat.recipe import load_recipe
from peftchat.runs.fingerprints import Fingerprints, RunRecord
from peftchat.runs.run_folder import RunFolder
from peftchat.training.run_content import pin_base
from peftchat.models.base_content import base_content
from peftchat.models.source import ModelSource
recipe, run = load_recipe(Path(sys.argv[1])), RunFolder(Path(sys.argv[2]))
pinned = pin_base(recipe, run, resume=True).recipe
content = base_content(ModelSource.of_recipe(pinned), exact=False)
if not run.fingerprints.exists():
    run.path.mkdir()
    RunRecord(fingerprints=content.model_copy(update={"base_revision": None})).write(run.fingerprints)
print(pinned.model.revision, content.base_commit, *sorted(content.base))
"""


def commit(hub: Path, number: str) -> None:
    """Put a commit of a model into the cache, as the head of its branch."""
    repository = hub / "models--someone--base"
    shutil.copytree(small_model(), repository / "snapshots" / (number * 40))
    (repository / "refs").mkdir(exist_ok=True)
    (repository / "refs" / "main").write_text(number * 40)


def test_a_resumed_run_stays_with_its_commit(tmp_path: Path) -> None:
    hub = tmp_path / "hub"
    data = write_small_talk(tmp_path / "train.jsonl", 6)
    recipe = write_training_recipe(tmp_path / "recipe.yaml", small_model(), data, None, tmp_path / "run")
    content = json.loads(recipe.read_text())
    content["model"]["name"] = "someone/base"
    recipe.write_text(json.dumps(content))

    environment = {
        "HF_HUB_CACHE": str(hub),
        "HF_HUB_OFFLINE": "1",
        "PYTHONPATH": ":".join(sys.path),
        "HOME": str(tmp_path),
    }

    def pinned(run: str) -> list[str]:
        done = subprocess.run(
            [sys.executable, "-c", RUN, str(recipe), str(tmp_path / run)],
            capture_output=True, text=True, check=True,
            env=environment,
        )  # fmt: skip
        return done.stdout.split()

    commit(hub, "a")
    assert pinned("run") == ["a" * 40, "a" * 40, "config.json", "model.safetensors"]
    commit(hub, "b")
    assert pinned("run")[:2] == ["a" * 40, "a" * 40]
    assert pinned("other")[:2] == ["b" * 40, "b" * 40]
