"""A hub model is trained at one commit, and a resumed run stays with it.

huggingface_hub reads its variables when it is imported, so this runs in a fresh interpreter.
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
recipe, branch = load_recipe(Path(sys.argv[1])), Path(sys.argv[2])
for head, folder in zip(sys.argv[3::2], sys.argv[4::2], strict=True):
    branch.write_text(head)
    run = RunFolder(Path(folder))
    pinned = pin_base(recipe, run, resume=True).recipe
    content = base_content(ModelSource.of_recipe(pinned), exact=False)
    if not run.fingerprints.exists():
        run.path.mkdir()
        RunRecord(fingerprints=content.model_copy(update={"base_revision": None})).write(run.fingerprints)
    print(pinned.model.revision, content.base_commit, *sorted(content.base))
"""


def commit(hub: Path, number: str) -> None:
    """Put a commit of a model into the cache."""
    repository = hub / "models--someone--base"
    shutil.copytree(small_model(), repository / "snapshots" / (number * 40))
    (repository / "refs").mkdir(exist_ok=True)


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

    for number in "ab":
        commit(hub, number)
    branch = hub / "models--someone--base" / "refs" / "main"
    first, second = "a" * 40, "b" * 40
    run, other = str(tmp_path / "run"), str(tmp_path / "other")
    done = subprocess.run(
        [sys.executable, "-c", RUN, str(recipe), str(branch), first, run, second, run, second, other],
        capture_output=True, text=True, check=True,
        env=environment,
    )  # fmt: skip
    begun, resumed, begun_later = [line.split() for line in done.stdout.splitlines()]
    assert begun == [first, first, "config.json", "model.safetensors"]
    assert resumed[:2] == [first, first]
    assert begun_later[:2] == [second, second]
