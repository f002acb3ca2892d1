"""A model that learned to call a tool: a chat shows the call, takes its result, and the model goes on."""

import io
import json
import shutil
import sys
from pathlib import Path

import pytest

from peftchat.recipe import load_recipe
from peftchat.training.context import TrainOptions
from peftchat.training.train import train
from tests.support.in_process import peftchat_in_process
from tests.support.models import small_model
from tests.support.recipes import write_training_recipe

TOOLS = [{"type": "function", "function": {"name": "find", "parameters": {"type": "object", "properties": {}}}}]


def talk() -> dict[str, object]:
    call = {"id": "call00001", "type": "function", "function": {"name": "find", "arguments": {"who": "Ada"}}}
    messages = [
        {"role": "user", "content": "Where is Ada?"},
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "content": "home", "tool_call_id": "call00001", "name": "find"},
        {"role": "assistant", "content": "Ada is at home."},
    ]
    return {"messages": messages, "tools": TOOLS}


def test_a_chat_takes_results_of_calls(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    base = Path(shutil.copytree(small_model(tied=True), tmp_path / "base"))
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps({**config, "max_position_embeddings": 2048}))
    data = tmp_path / "train.jsonl"
    data.write_text("".join(json.dumps(talk()) + "\n" for _ in range(4)))
    recipe = write_training_recipe(
        tmp_path / "recipe.yaml", base, data, None, tmp_path / "run", method="full",
        chat={"template": "chatml"}, data={"max_length": 600},
        training={"max_steps": 60, "learning_rate": 0.005, "per_device_train_batch_size": 1},
    )  # fmt: skip
    train(load_recipe(recipe), TrainOptions())
    (tmp_path / "tools.json").write_text(json.dumps(TOOLS))

    def chat(*lines: str, flags: tuple[str, ...] = ()) -> list[dict[str, object]]:
        monkeypatch.setattr(sys, "stdin", io.StringIO("\n".join(lines) + "\n"))
        always = ("--greedy", "--json", "--max-new-tokens", 200)
        done = peftchat_in_process(capsys, "chat", tmp_path / "run", *always, *flags)
        assert done.returncode == 0, done.stderr
        said.append(done.stderr)
        return [json.loads(line) for line in done.stdout.splitlines()]

    said: list[str] = []
    saved = tmp_path / "saved.jsonl"
    given = ("--tools", str(tmp_path / "tools.json"))
    called, answered = chat("/result early", "Where is Ada?", "/result home", f"/save {saved}", flags=given)
    assert called["tool_calls"] == [{"name": "find", "arguments": {"who": "Ada"}}]
    assert called["answer"] == "" and called["stopped"]
    assert answered["answer"] == "Ada is at home." and answered["tool_calls"] == [] and answered["stopped"]
    assert "No call waits" in said[0] and "find(" in said[0]
    # What was said is what was trained, and can be data again.
    record = json.loads(saved.read_text())
    assert record["messages"] == talk()["messages"]
    assert json.loads(record["tools"]) == TOOLS
    # The command defines tools as well; without them a call is text.
    again = chat(f"/tools {tmp_path / 'tools.json'}", "Where is Ada?")
    assert again[0]["tool_calls"] == called["tool_calls"] and "Tools: find." in said[1]
