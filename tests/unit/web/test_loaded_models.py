"""Models that share weights are switched: each answers as it does alone, and the text streams until it is stopped."""

import threading
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

from peftchat.conversation import Conversation, Message
from peftchat.errors import UserError
from peftchat.serving.chat_model import load_for_chat
from peftchat.serving.sampling import Sampling
from peftchat.web.answer_stream import stream_answer
from peftchat.web.loaded_models import LoadedModels, load_models, open_models
from peftchat.web.token_view import tokens_as_html, view_tokens
from tests.support.chat_models import in_format, save_adapter_run, save_model, save_scripted
from tests.support.tokenizers import byte_level

ASKED = (Message("user", "Hello you"),)


def logits(chat: Any, rows: int | None = None) -> torch.Tensor:
    ids = torch.tensor([chat.prompts.encode(ASKED).ids])
    with torch.inference_mode():
        found: torch.Tensor = chat.model(input_ids=ids).logits[..., :rows]
    return found


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Two adapters that add tokens to one base, and another model."""
    place = tmp_path_factory.mktemp("page")
    tokenizer = in_format(byte_level())
    save_adapter_run(place / "base", place / "one", tokenizer, r=4)
    save_adapter_run(place / "base", place / "two", tokenizer, r=2, use_dora=True)
    save_model(place / "other")
    return [str(place / name) for name in ("one", "other", "two")]


def test_switched_adapters_answer_as_they_do_alone(folders: list[str]) -> None:
    models = load_models(open_models(folders))
    assert models.names == folders
    one, other, two = (models.models[name] for name in folders)
    assert one.chat.model is two.chat.model
    assert other.chat.model is not one.chat.model
    alone = {name: logits(load_for_chat(name)) for name in folders}
    # In any order, and back.
    for name in (folders[0], folders[2], folders[1], folders[0]):
        with models.using(name) as chat:
            assert torch.equal(logits(chat), alone[name])
    assert not torch.equal(alone[folders[0]], alone[folders[2]])


def test_a_base_below_an_adapter_answers_as_it_does_alone(tmp_path: Path) -> None:
    base = save_model(tmp_path / "base")
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, AutoTokenizer

    wrapped: Any = get_peft_model(
        AutoModelForCausalLM.from_pretrained(base), LoraConfig(target_modules="all-linear", init_lora_weights=False)
    )
    wrapped.save_pretrained(tmp_path / "run")
    AutoTokenizer.from_pretrained(base).save_pretrained(tmp_path / "run")
    names = [str(base), str(tmp_path / "run")]
    models = load_models(open_models(names))
    assert models.models[names[0]].chat.model is models.models[names[1]].chat.model
    for name in (names[0], names[1], names[0]):
        with models.using(name) as chat:
            assert torch.equal(logits(chat), logits(load_for_chat(name)))


def test_mistakes_are_told_before_anything_is_loaded(folders: list[str], tmp_path: Path) -> None:
    with pytest.raises(UserError, match="named twice"):
        open_models([folders[0], folders[0]])
    with pytest.raises(UserError, match="needs a base"):
        open_models([folders[1]], base=folders[1])
    with pytest.raises(UserError):
        open_models([folders[0], str(tmp_path)])


def one_model(folder: Path) -> tuple[LoadedModels, str]:
    name = str(folder)
    return load_models(open_models([name])), name


def test_an_answer_streams_and_ends_with_what_it_streamed(tmp_path: Path) -> None:
    models, name = one_model(save_scripted(tmp_path / "model", "Tag né!"))
    stop = threading.Event()
    # The second is not stopped by the end of the first.
    for _ in range(2):
        steps = list(stream_answer(models, name, ASKED, Sampling(greedy=True), stop=stop))
    texts = [step.content for step in steps]
    assert all(after.startswith(before) for before, after in pairwise(texts))
    assert texts[-1] == "Tag né!"
    assert steps[-1].answer is not None
    assert steps[-1].answer.finish == "end"


def test_a_stopped_answer_keeps_what_was_written(tmp_path: Path) -> None:
    models, name = one_model(save_scripted(tmp_path / "model", "abcdefg\n", after=None, context=4096))
    stop = threading.Event()
    steps = []
    for step in stream_answer(models, name, ASKED, Sampling(greedy=True, max_new_tokens=2000), stop=stop):
        steps.append(step)
        stop.set()
    last = steps[-1]
    assert last.answer is not None
    assert last.answer.finish == "interrupted"
    assert 0 < last.answer.tokens < 2000
    assert ("abcdefg\n" * 250).startswith(last.content)
    # A caller that goes away ends the generation too, and the model is free again.
    for _ in stream_answer(models, name, ASKED, Sampling(greedy=True, max_new_tokens=2000), stop=threading.Event()):
        break
    with models.using(name):
        pass


def test_a_problem_reaches_the_caller(tmp_path: Path) -> None:
    models, name = one_model(save_scripted(tmp_path / "model", "Tag né!", context=64))
    with pytest.raises(UserError, match="context allows"):
        list(stream_answer(models, name, (Message("user", "x" * 99),), Sampling(), stop=threading.Event()))


def test_tokens_have_the_probabilities_of_the_model_and_the_mask_of_training(folders: list[str]) -> None:
    chat = load_for_chat(folders[1])
    talk = Conversation((*ASKED, Message("assistant", "Hi <there>")))
    views = view_tokens(chat, talk)
    ids = torch.tensor([[view.id for view in views]])
    with torch.inference_mode():
        expected = chat.model(input_ids=ids).logits[0].float().softmax(-1)
    for at, view in enumerate(views[1:], start=1):
        assert view.probability == pytest.approx(float(expected[at - 1, view.id]), rel=1e-4)
        assert view.alternatives[0][1] == pytest.approx(float(expected[at - 1].max()), rel=1e-4)
    text = "".join(view.text for view in views)
    assert text == chat.tokenizer.apply_chat_template(talk.as_dicts(), tokenize=False)
    assert "".join(view.text for view in views if view.trained) == "Hi <there><|end|>"
    page = tokens_as_html(views)
    assert "<code>&lt;</code>" in page
    assert "<code><" not in page
