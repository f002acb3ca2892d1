"""`peftchat chat`: prompts, answers, loading; stock transformers and peft are the oracles."""

import json
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import PeftModel
from transformers import AutoModelForCausalLM, GenerationConfig

from peftchat.answering.batch import generate_batch
from peftchat.answering.prompting import TemplatePrompting
from peftchat.chat_template.chat_format import make_format
from peftchat.conversation import Conversation, Message
from peftchat.errors import UserError
from peftchat.serving.chat_model import load_for_chat
from peftchat.serving.generate import generate_answer
from peftchat.serving.prompt import PromptEncoder
from peftchat.serving.sampling import Sampling, apply_sampling
from peftchat.training.questions import sample_answers
from tests.support.chat_models import QUESTIONS, in_format, save_adapter_run, save_model, save_scripted
from tests.support.tokenizers import byte_level

GREEDY = Sampling(greedy=True, max_new_tokens=24)
LOGITS = torch.arange(0, 40).reshape(2, 20)


@pytest.fixture(scope="module", params=["starchat", "chatml"])
def tokenizer(request: pytest.FixtureRequest) -> Any:
    return in_format(byte_level(), request.param, "Be brief.")


def user(text: str) -> Message:
    return Message("user", text)


# Prompts


def test_a_plain_conversation_is_encoded_as_stock_transformers_does(tokenizer: Any) -> None:
    conversation = (user("one"), Message("assistant", "two"), user(QUESTIONS[1]))
    for messages in (conversation[:1], conversation, (Message("system", "Say no."), *conversation)):
        stock = tokenizer.apply_chat_template(
            Conversation(messages).as_dicts(), add_generation_prompt=True, return_dict=False
        )
        assert PromptEncoder(tokenizer).encode(messages).ids == stock


def test_the_end_token_of_a_run_ends_answers_where_its_template_writes_none() -> None:
    """`chat.end_token` is the `eos_token` of the run's tokenizer; without one, nothing ends an answer."""
    tokenizer = in_format(byte_level(), "chatml", None)
    tokenizer.chat_template = "{% for m in messages %}{{ m.role + ': ' + m.content + '\n' }}{% endfor %}"
    encoder = PromptEncoder(tokenizer)
    assert encoder.end_id == tokenizer.eos_token_id
    assert tokenizer.decode(encoder.encode((user("Hi"),)).ids) == "user: Hi\n"
    tokenizer.eos_token = None
    with pytest.raises(UserError, match="no special token behind an answer"):
        PromptEncoder(tokenizer)


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_nothing_that_a_user_types_becomes_a_special_token(tokenizer: Any, data: st.DataObject) -> None:
    special = sorted(
        {"<|endoftext|>", "<|user|>", "<|end|>", "<|im_start|>", "<|im_end|>"} & set(tokenizer.get_vocab())
    )
    content = data.draw(st.lists(st.sampled_from([*special, "a", "\n", " ", "é", "<|"]), max_size=8).map("".join))
    encoder = PromptEncoder(tokenizer)
    frame, prompt = encoder.encode((user(""),)), encoder.encode((user(content),))

    def special_ids(ids: list[int]) -> list[int]:
        return [index for index in ids if index in tokenizer.all_special_ids or index in tokenizer.added_tokens_decoder]

    assert special_ids(prompt.ids) == special_ids(frame.ids)
    assert content in tokenizer.decode(prompt.ids, skip_special_tokens=False)
    assert (prompt.special_token_text > 0) == any(token in content for token in special)


def test_a_long_history_loses_whole_exchanges_and_keeps_the_system_message(tokenizer: Any) -> None:
    encoder = PromptEncoder(tokenizer)
    system = Message("system", "Rules.")
    exchanges = [(user(f"question {n} " * 5), Message("assistant", f"answer {n} " * 5)) for n in range(6)]
    messages = [system, *(message for pair in exchanges for message in pair), user("last")]
    whole = encoder.truncate_to_fit(messages, 10_000)
    assert whole.dropped == 0
    for limit in range(len(whole.ids), 60, -7):
        prompt = encoder.truncate_to_fit(messages, limit)
        kept = [system, *messages[1 + 2 * prompt.dropped :]]
        assert prompt.ids == encoder.encode(kept).ids
        assert len(prompt.ids) <= limit
        # One exchange more would not have fitted.
        if prompt.dropped:
            assert len(encoder.encode([system, *messages[2 * prompt.dropped - 1 :]]).ids) > limit
    with pytest.raises(UserError, match="the model's context allows 5"):
        encoder.truncate_to_fit(messages, 5)


# Answers


def test_an_answer_is_the_greedy_one_of_stock_transformers(tmp_path: Path) -> None:
    chat = load_for_chat(str(save_model(tmp_path / "model")))
    for question in QUESTIONS:
        pieces: list[str] = []
        said = generate_answer(chat, [user(question)], apply_sampling(chat.generation_config, GREEDY), pieces.append)
        inputs = chat.tokenizer.apply_chat_template(
            [{"role": "user", "content": question}], add_generation_prompt=True, return_dict=True, return_tensors="pt"
        )
        stock = AutoModelForCausalLM.from_pretrained(tmp_path / "model").generate(
            **inputs, max_new_tokens=24, do_sample=False, eos_token_id=sorted(chat.stop_ids | chat.prompts.turn_ids)
        )
        text = chat.tokenizer.decode(stock[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        assert said.text == text.strip() == "".join(pieces)


def test_an_answer_stops_at_the_end_token_and_does_not_show_it(tmp_path: Path) -> None:
    chat = load_for_chat(str(save_scripted(tmp_path / "model", "Tag né!")))
    pieces: list[str] = []
    said = generate_answer(chat, [user("hello")], apply_sampling(chat.generation_config, GREEDY), pieces.append)
    assert (said.text, said.finish, said.stopped) == ("Tag né!", "end", True)
    # The two bytes of a character come out together.
    assert pieces == ["T", "a", "g", " n", "é", "!"]
    assert said.tokens == len("Tag né!".encode())


def test_an_answer_that_goes_on_to_another_turn_is_stopped(tmp_path: Path) -> None:
    chat = load_for_chat(str(save_scripted(tmp_path / "model", "Yes", after="<|user|>")))
    said = generate_answer(chat, [user("hello")], apply_sampling(chat.generation_config, GREEDY))
    assert (said.text, said.finish, said.stopped) == ("Yes", "turn", False)


def test_a_long_answer_is_cut_and_says_so(tmp_path: Path) -> None:
    chat = load_for_chat(str(save_scripted(tmp_path / "model", "abcdefgh")))
    said = generate_answer(chat, [user("hello")], apply_sampling(chat.generation_config, Sampling(max_new_tokens=3)))
    assert (said.text, said.finish, said.tokens) == ("abc", "length", 3)


def test_the_answer_has_room_in_a_small_context(tmp_path: Path) -> None:
    chat = load_for_chat(str(save_scripted(tmp_path / "model", "ok", context=64)))
    turns = [user("x" * 10), Message("assistant", "ok")] * 5
    said = generate_answer(chat, [*turns, user("yy")], apply_sampling(chat.generation_config, Sampling()))
    assert said.text == "ok"
    assert said.dropped == 4
    with pytest.raises(UserError, match="context allows 32"):
        generate_answer(chat, [user("z" * 60)], apply_sampling(chat.generation_config, Sampling()))


# Sampling


def test_generation_config_is_respected_unless_flags_say_otherwise() -> None:
    own = GenerationConfig(do_sample=True, temperature=0.7, top_p=0.9, top_k=40, max_new_tokens=77)
    kept = apply_sampling(own, Sampling())
    assert (kept.do_sample, kept.temperature, kept.top_p, kept.top_k, kept.max_new_tokens) == (True, 0.7, 0.9, 40, 77)
    warmer = apply_sampling(own, Sampling(temperature=1.5, max_new_tokens=5))
    assert (warmer.temperature, warmer.top_p, warmer.max_new_tokens) == (1.5, 0.9, 5)
    for sampling in (Sampling(greedy=True), Sampling(temperature=0.0)):
        greedy = apply_sampling(own, sampling)
        assert (greedy.do_sample, greedy.temperature, greedy.top_p) == (False, None, None)
    assert apply_sampling(GenerationConfig(), Sampling(top_k=5)).do_sample
    assert own.temperature == 0.7
    with pytest.raises(UserError, match="--greedy does not sample"):
        Sampling(greedy=True, top_p=0.5)


@pytest.mark.parametrize(
    "own",
    [
        {"num_beams": 3, "early_stopping": True},
        {"num_beams": 4, "num_beam_groups": 2, "diversity_penalty": 0.5},
        {"num_beams": 2, "num_return_sequences": 2},
        {"penalty_alpha": 0.6, "top_k": 4},
        {"dola_layers": "high"},
        {"prompt_lookup_num_tokens": 3},
        {"return_dict_in_generate": True, "output_scores": True},
    ],
)
def test_settings_for_other_ways_of_decoding_change_no_answer(own: dict[str, Any], tmp_path: Path) -> None:
    folder = save_scripted(tmp_path / "model", "Tag né!")
    file = folder / "generation_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **own}))
    chat = load_for_chat(str(folder))
    chosen = apply_sampling(chat.generation_config, GREEDY)
    pieces: list[str] = []
    said = generate_answer(chat, [user("hello")], chosen, pieces.append)
    assert (said.text, said.finish, "".join(pieces)) == ("Tag né!", "end", "Tag né!")
    prompting = TemplatePrompting(chat.tokenizer, chat.generation_config)
    prompts = [prompting.encode([user(word)], 200).ids for word in ("hello", "you")]
    batch = generate_batch(chat, prompting, prompts, chosen, 20, [0, 0])
    assert [one.text for one in batch] == ["Tag né!"] * 2
    format = make_format("starchat", None, chat.tokenizer)
    trained: Any = AutoModelForCausalLM.from_pretrained(folder)
    before = trained.generation_config.to_dict()
    sampled = sample_answers(trained, format, ["hello", "you"], 20)
    assert [one.answer for one in sampled] == ["Tag né!"] * 2
    assert trained.generation_config.to_dict() == before


def test_a_stop_string_of_the_model_ends_its_answer(tmp_path: Path) -> None:
    chat = load_for_chat(str(save_scripted(tmp_path / "model", "abcdefgh")))
    chat.generation_config.stop_strings = chat.model.generation_config.stop_strings = ["cd"]
    said = generate_answer(chat, [user("hello")], apply_sampling(chat.generation_config, GREEDY))
    assert (said.text, said.finish) == ("abcd", "end")
    format = make_format("starchat", None, chat.tokenizer)
    assert sample_answers(cast("Any", chat.model), format, ["hello"], 20)[0].answer == "abcd"


@pytest.mark.parametrize("own", [{"temperature": "0.7"}, {"temperature": -1.0}, {"top_p": 1.5}, {"top_k": 2.5}])
def test_a_setting_of_the_model_that_is_no_setting_is_named(own: dict[str, Any]) -> None:
    wrong = GenerationConfig(do_sample=True)
    vars(wrong).update(own)
    with pytest.raises(UserError, match=f"{next(iter(own))} is .*, expected"):
        apply_sampling(wrong, Sampling())


# Loading


@pytest.mark.parametrize("kind", ["llama-tied", "llama"])
def test_an_adapter_with_new_tokens_runs_on_its_base(tmp_path: Path, kind: str) -> None:
    tokenizer = in_format(byte_level())
    run = save_adapter_run(tmp_path / "base", tmp_path / "run", tokenizer, kind)
    chat = load_for_chat(str(run))
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    base.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    stock = PeftModel.from_pretrained(base, run).eval()
    with torch.no_grad():
        assert torch.equal(chat.model(LOGITS).logits, stock(LOGITS).logits)
    assert chat.stop_ids == {tokenizer.convert_tokens_to_ids("<|end|>"), 0}


def test_a_biased_head_keeps_its_bias(tmp_path: Path) -> None:
    tokenizer = in_format(byte_level())
    run = save_adapter_run(tmp_path / "base", tmp_path / "run", tokenizer, "phi")
    with torch.no_grad():
        logits = load_for_chat(str(run)).model(LOGITS).logits
        base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
        bias = base.lm_head.bias.detach().clone()
        base.resize_token_embeddings(len(tokenizer), mean_resizing=False)
        base.lm_head.bias.data = torch.cat([bias, bias.mean().expand(len(tokenizer) - len(bias))])
        stock = PeftModel.from_pretrained(base, run).eval()
        unmerged = stock(LOGITS).logits
        merged = stock.merge_and_unload()(LOGITS).logits
    assert torch.allclose(logits, merged, atol=1e-4)
    assert not torch.allclose(unmerged, merged, atol=1e-2), (
        "PEFT now adds the bias of a head with trained rows (huggingface/peft#3649): "
        "remove peftchat.serving.chat_model and the same in peftchat.merging.streaming"
    )


def test_a_qlora_run_is_quantized_as_it_was_trained(tmp_path: Path) -> None:
    bitsandbytes = pytest.importorskip("bitsandbytes")
    tokenizer = in_format(byte_level())
    run = save_adapter_run(tmp_path / "base", tmp_path / "run", tokenizer)
    (run / "recipe.yaml").write_text(
        f"model: {{name: {tmp_path / 'base'}}}\nmethod: qlora\nadapter: {{}}\nquantization: {{bits: 4}}\n"
        "data: {train: [{path: gone.jsonl}]}\noutput_dir: gone\n",
        encoding="utf-8",
    )
    chat = load_for_chat(str(run))
    assert any(isinstance(module, bitsandbytes.nn.Linear4bit) for module in chat.model.modules())
    said = generate_answer(
        chat, [user("hello")], apply_sampling(chat.generation_config, Sampling(greedy=True, max_new_tokens=3))
    )
    assert said.tokens <= 3


def test_what_cannot_be_talked_to_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such folder"):
        load_for_chat(str(tmp_path / "gone"))
    plain = save_model(tmp_path / "plain", tokenizer=byte_level())
    with pytest.raises(UserError, match="no chat template"):
        load_for_chat(str(plain))
    lost = save_model(tmp_path / "lost")
    (lost / "chat_template.jinja").write_text(
        "{% for m in messages %}<|speaker|>{{ m['content'] }}<|end|>{% endfor %}", encoding="utf-8"
    )
    with pytest.raises(UserError, match=r"<\|speaker\|>, which is not a special token"):
        load_for_chat(str(lost))
    small = save_model(tmp_path / "small")
    in_format(byte_level(merges=200)).save_pretrained(small)
    with pytest.raises(UserError, match="tokens and the model's embedding only"):
        load_for_chat(str(small))
    unfinished = tmp_path / "unfinished"
    unfinished.mkdir()
    (unfinished / "recipe.yaml").write_text("model: {name: x}\n", encoding="utf-8")
    with pytest.raises(UserError, match="has not finished"):
        load_for_chat(str(unfinished))
    run = save_adapter_run(tmp_path / "base", tmp_path / "run", in_format(byte_level()))
    save_model(tmp_path / "base", hidden_size=32)
    with pytest.raises(UserError, match="does not load onto its base"):
        load_for_chat(str(run))
