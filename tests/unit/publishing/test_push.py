"""A push to a stand-in of the hub: what arrives, what stays, and what stops it."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import huggingface_hub.constants
import pytest
from huggingface_hub import HfApi, ModelCard

from peftchat.errors import UserError
from peftchat.publishing.push import plan_push, push
from tests.support.chat_models import in_format, save_adapter_run, save_model
from tests.support.hub import Hub, hub_on_loopback
from tests.support.tokenizers import byte_level

CARD = """---
library_name: peft
---

# run

```python
base = "base"  # the model it was trained from
```
"""


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_XET", True)
    with hub_on_loopback() as found:
        yield found


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder with everything that a run leaves, and secrets where they must not be read."""
    folder = tmp_path_factory.mktemp("push")
    run = save_adapter_run(folder / "base", folder / "run", in_format(byte_level()))
    (run / "README.md").write_text(CARD)
    for name in (
        "recipe.yaml",
        "metrics.jsonl",
        "run.json",
        "eval_losses.jsonl",
        "train.jsonl",
        ".env",
        "training_args.bin",
    ):
        (run / name).write_text("canary")
    (run / "checkpoints" / "checkpoint-5").mkdir(parents=True)
    (run / "checkpoints" / "checkpoint-5" / "optimizer.pt").write_text("canary")
    return run


@pytest.fixture
def run(trained: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(trained, tmp_path / "run"))


def api(hub: Hub) -> HfApi:
    return HfApi(endpoint=hub.address, token="hf_none")


def test_an_adapter_arrives_and_everything_else_stays(hub: Hub, run: Path) -> None:
    plan = plan_push(str(run), "me/assistant", base="someone/base")
    push(plan, api(hub))
    arrived = hub.files["me/assistant"]
    assert hub.repos["me/assistant"] is True
    assert set(arrived) == {file.name for file in plan.files}
    assert arrived["adapter_model.safetensors"] == (run / "adapter_model.safetensors").read_bytes()
    assert arrived["tokenizer.json"] == (run / "tokenizer.json").read_bytes()
    assert json.loads(arrived["adapter_config.json"])["base_model_name_or_path"] == "someone/base"
    card = ModelCard(arrived["README.md"].decode())
    assert card.data.to_dict()["base_model"] == "someone/base"
    assert 'base = "someone/base"' in card.text
    everything = b"".join(arrived.values())
    assert b"canary" not in everything
    assert str(run.parent).encode() not in everything
    assert {"recipe.yaml", "checkpoints", ".env", "train.jsonl"} <= set(plan.left)
    # Nothing was written into the run folder.
    assert (run / "README.md").read_text() == CARD


def test_a_push_that_failed_sends_no_weights_again(hub: Hub, run: Path) -> None:
    hub.fails = 1
    plan = plan_push(str(run), "me/assistant", base="someone/base")
    with pytest.raises(UserError, match="the push failed"):
        push(plan, api(hub))
    assert hub.sent == 1
    push(plan, api(hub))
    assert hub.sent == 1
    assert "adapter_model.safetensors" in hub.files["me/assistant"]


def test_a_complete_model_arrives(hub: Hub, tmp_path: Path) -> None:
    model = save_model(tmp_path / "model")
    push(plan_push(str(model), "me/model", public=True), api(hub))
    assert hub.repos["me/model"] is False
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= set(hub.files["me/model"])


def test_a_public_repository_is_not_taken_for_a_private_push(hub: Hub, run: Path) -> None:
    hub.repos["me/assistant"] = False
    hub.files["me/assistant"] = {}
    with pytest.raises(UserError, match="is public"):
        push(plan_push(str(run), "me/assistant", base="someone/base"), api(hub))
    assert not hub.files["me/assistant"]


def test_a_hub_that_is_not_there_is_one_message(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    plan = plan_push(str(run), "me/assistant", base="someone/base")
    with pytest.raises(UserError, match="push again"):
        push(plan, HfApi(endpoint="http://127.0.0.1:9", token="hf_none"))


def test_what_cannot_be_pushed(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match="a path of this machine"):
        plan_push(str(run), "me/assistant")
    with pytest.raises(UserError, match="OWNER/NAME"):
        plan_push(str(run), "assistant", base="someone/base")
    with pytest.raises(UserError, match="OWNER/NAME"):
        plan_push(str(run), "me/../assistant", base="someone/base")
    monkeypatch.setenv("SOME_API_KEY", "very-secret-value")
    (run / "README.md").write_text(f"{CARD}\nvery-secret-value\n")
    with pytest.raises(UserError, match="the environment variable SOME_API_KEY"):
        plan_push(str(run), "me/assistant", base="someone/base")
    (run / "README.md").write_text(f"{CARD}\nhf_{'a' * 34}\n")
    with pytest.raises(UserError, match="looks like a key"):
        plan_push(str(run), "me/assistant", base="someone/base")
    (run / "README.md").write_text("---\ntags: [\n---\n")
    with pytest.raises(UserError, match="metadata cannot be read"):
        plan_push(str(run), "me/assistant", base="someone/base")
