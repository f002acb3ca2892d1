"""What the documentation shows runs: every command, every Python block, every recipe, every link."""

import gzip
import json
import re
import shlex
import shutil
from pathlib import Path
from typing import Any

import pytest
from ruamel.yaml import YAML

from peftchat.recipe import load_recipe
from tests.docs.fences import PAGES, PROJECT, Block, blocks, shell_lines
from tests.support.cli import peftchat
from tests.support.data import write_small_talk
from tests.support.models import small_model
from tests.support.pairs import write_pairs
from tests.support.recipes import FEW_STEPS, write_training_recipe

COMMANDS = [line for line in shell_lines() if "peftchat " in line.text and not line.text.startswith("pip ")]
OTHERS = [line for line in shell_lines() if line not in COMMANDS]
COMPARISONS = [line for line in COMMANDS if line.text.startswith("peftchat compare")]


def by_id(lines: list[Block]) -> list[Any]:
    return [pytest.param(line, id=line.id) for line in lines]


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the files that the documentation names, small ones, and two finished runs."""
    folder = tmp_path_factory.mktemp("documentation")
    base = Path(shutil.copytree(small_model(), folder / "models" / "base"))
    train = write_small_talk(folder / "conversations.jsonl")
    for name in ("train", "eval"):
        (folder / "data").mkdir(exist_ok=True)
        shutil.copy(train, folder / "data" / f"{name}.jsonl")
    (folder / "arc.jsonl").write_text(json.dumps({"question": "which of these is a cat " * 5}) + "\n")
    with gzip.open(folder / "humaneval.jsonl.gz", "wt", encoding="utf-8") as file:
        file.write(json.dumps({"prompt": "write a function that adds two numbers " * 3}) + "\n")
    with gzip.open(folder / "oasst_trees.jsonl.gz", "wt", encoding="utf-8") as file:
        file.writelines(json.dumps(tree(number)) + "\n" for number in range(12))
    pairs = write_pairs(folder / "pairs.jsonl")
    for recipe in sorted((PROJECT / "recipes").glob("*.yaml")):
        source = pairs if "objective:" in recipe.read_text() else train
        write_small_version(recipe, folder / "recipes" / recipe.name, base, source)
    # The length of a run is given where it matters: a schedule needs more than one step.
    write_training_recipe(folder / "my.yaml", base, train, train, Path("runs/my-assistant"))
    for name, variant in (("assistant", "lora"), ("style", "lora"), ("my-assistant", "lora"), ("ia3", "ia3")):
        path = folder / f"{name}.yaml"
        settings = {"adapter": {"variant": variant}, "training": {"max_steps": 1}}
        write_training_recipe(path, base, train, None, Path("runs", name), **settings)
        done = peftchat("train", path, cwd=folder)
        assert done.returncode == 0, done.stderr
    (folder / "comparison").mkdir()
    shutil.copy(folder / "my.yaml", folder / "comparison" / "recommended.yaml")
    return folder


def tree(number: int) -> dict[str, Any]:
    """An OpenAssistant tree of one question and one answer."""
    common = {"lang": "en", "deleted": False, "synthetic": False, "review_result": True, "rank": 0}
    reply = {"message_id": f"b{number}", "role": "assistant", "text": f"answer {number}", "replies": [], **common}
    prompt = {
        "message_id": f"a{number}",
        "role": "prompter",
        "text": f"question {number}",
        "replies": [reply],
        **common,
    }
    return {"message_tree_id": f"a{number}", "tree_state": "ready_for_export", "prompt": {**prompt, "replies": [reply]}}


def write_small_version(recipe: Path, path: Path, base: Path, train: Path) -> None:
    """Write a shipped recipe with a small model, a small data set, two steps and the processes that are here."""
    values = YAML(typ="safe").load(recipe.read_text(encoding="utf-8"))
    values["model"] = {**values["model"], "name": str(base)}
    values["model"].pop("revision", None)
    values["data"] = {"train": [{"path": str(train)}], "eval_fraction": 0.2, "max_length": 128}
    values["training"] = {**FEW_STEPS, "max_steps": 2, "eval_strategy": "epoch"}
    if values["chat"]["template"] == "model":
        values["chat"]["template"] = "starchat"  # the small tokenizer has no template of its own
    values["distributed"] = {"strategy": values.get("distributed", {}).get("strategy", "auto")}
    if values["distributed"]["strategy"].startswith("zero"):
        # DeepSpeed computes in the dtype of the weights; without kernels for bfloat16 that takes a minute.
        values["model"]["dtype"] = "float32"
    path.parent.mkdir(exist_ok=True)
    with path.open("w", encoding="utf-8") as file:
        YAML().dump(values, file)


@pytest.fixture
def sandbox(workspace: Path, tmp_path: Path) -> Path:
    """A copy of the workspace, which a command may change."""
    return Path(shutil.copytree(workspace, tmp_path / "work"))


@pytest.mark.parametrize("line", by_id([line for line in COMMANDS if line not in COMPARISONS]))
def test_a_command_runs(line: Block, sandbox: Path) -> None:
    stdin = "a change\n" if "|" in line.text else "/quit\n"
    arguments = shlex.split(line.text.split("|")[-1].split(" > ")[0])[1:]
    if arguments[0] == "init":
        arguments = [str(sandbox / "models" / "base") if part == "MODEL" else part for part in arguments]
        (sandbox / arguments[arguments.index("-o") + 1]).unlink()
    if arguments[0] == "train" and "--resume" not in arguments:
        shutil.rmtree(sandbox / "runs" / "my-assistant")
    if arguments[:2] == ["export", "runs/assistant"] and arguments[-1] == "vllm":
        # An adapter with added tokens is served once it is merged.
        assert peftchat("merge", "runs/assistant", "--no-verify", cwd=sandbox).returncode == 0
    done = peftchat(*arguments, cwd=sandbox, stdin=stdin)
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    # An old name of an option is answered with the new one.
    assert " is now " not in done.stderr


@pytest.mark.parametrize("line", by_id(COMPARISONS))
def test_a_comparison_is_accepted(line: Block) -> None:
    """Parse the options of each; `tests/integration/compare` runs comparisons."""
    from peftchat.cli.main import cli

    name, *arguments = shlex.split(line.text)[1:]
    command = cli.commands[name]
    assert command.make_context(name, arguments).params["variants"]


@pytest.mark.parametrize("line", by_id(OTHERS))
def test_another_command_names_what_exists(line: Block) -> None:
    """`make` targets exist, and nothing else stands in the documentation untested."""
    program, target, *_ = shlex.split(line.text)
    if program == "make":
        assert re.search(rf"^{target}:", (PROJECT / "Makefile").read_text(), re.MULTILINE)
    else:
        assert program == "pip", f"{line.id}: add a test for {program}, or write the block as ```text"


@pytest.mark.parametrize("block", by_id(list(blocks("python"))))
def test_a_python_block_runs(block: Block, sandbox: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(sandbox)
    shutil.rmtree(sandbox / "runs" / "my-assistant")
    vocabulary = 1 + max(token["id"] for token in json.loads(Path("runs/assistant/run.json").read_text())["new_tokens"])
    # Other variants than LoRA keep the added tokens in a folder of their own.
    run = "runs/ia3" if "token_rows" in block.text else "runs/assistant"
    names = {"BASE": "models/base", "RUN": run, "VOCABULARY_SIZE": vocabulary, "__name__": "example"}
    exec(compile(block.text, block.id, "exec"), names)


@pytest.mark.parametrize("block", by_id(list(blocks("yaml"))))
def test_a_yaml_block_is_a_recipe(block: Block, sandbox: Path) -> None:
    """A whole recipe loads; a part of one loads on top of another."""
    path = sandbox / "shown.yaml"
    is_whole = "model:" in block.text and "data:" in block.text
    path.write_text(block.text if is_whole else f"extends: my.yaml\n{block.text}", encoding="utf-8")
    assert load_recipe(path, to_train=False).recipe.data.train


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    text = re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if target.startswith(("http", "mailto")):
            continue
        name, _, anchor = target.partition("#")
        file = page.parent / name if name else page
        assert file.exists(), target
        if anchor and file.suffix == ".md":
            headings = re.findall(r"^#+ (.*)$", file.read_text(encoding="utf-8"), re.MULTILINE)
            anchors = {re.sub(r"[^\w\- ]", "", heading).strip().lower().replace(" ", "-") for heading in headings}
            assert anchor in anchors, target
