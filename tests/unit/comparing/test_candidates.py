"""Candidates by name and by grid, and the names of their files."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from peftchat.comparing.candidates import flags, make_candidates, parse_axis, rate_text, slug
from peftchat.errors import UserError
from peftchat.recipe.document import parse_yaml
from peftchat.variants import ADAPTERS


@pytest.mark.parametrize(
    ("name", "method", "variant"),
    [
        ("lora", "lora", "lora"),
        ("qlora", "qlora", "lora"),
        ("qlora+dora", "qlora", "dora"),
        ("dora+qlora", "qlora", "dora"),
        ("lora+", "lora", "loraplus"),
        ("qlora+lora+", "qlora", "loraplus"),
        ("loftq", "qlora", "loftq"),
    ],
)
def test_names_mean_a_method_and_a_variant(name: str, method: str, variant: str) -> None:
    (candidate,) = make_candidates([name], [])
    assert (candidate.name, candidate.variant) == (name, variant)
    assert candidate.settings == {"method": method, "adapter.variant": variant}


@pytest.mark.parametrize("name", ["lorra", "qlora+", "+qlora", "qlora+full", "full+dora", "dora+lora", ""])
def test_other_names_are_refused(name: str) -> None:
    with pytest.raises(UserError, match="no variant"):
        make_candidates([name], [])


def test_the_nearest_name_is_offered() -> None:
    with pytest.raises(UserError, match="Did you mean `dora`"):
        make_candidates(["dorra"], [])


def test_a_grid_crosses_variants_and_spares_full_the_adapter() -> None:
    axes = [parse_axis("adapter.r=8, 16"), parse_axis("training.weight_decay=0.1")]
    names = [candidate.name for candidate in make_candidates(["lora", "full"], axes)]
    assert names == ["lora r=8", "lora r=16", "full"]
    assert make_candidates(["full"], axes)[0].settings == {"method": "full", "training.weight_decay": 0.1}


def test_commas_inside_brackets_and_quotes_part_no_values() -> None:
    axis = parse_axis("adapter.target_modules=[q_proj, v_proj], all-linear, 'a,b'")
    assert axis.values == (["q_proj", "v_proj"], "all-linear", "a,b")


@pytest.mark.parametrize(
    "flag", ["adapter.r", "=3", "a..b=3", "method=full", "output_dir=x", "training.learning_rate=1e-3,1e-4", "a.b="]
)
def test_settings_that_are_none_are_refused(flag: str) -> None:
    with pytest.raises(UserError):
        parse_axis(flag)


values = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text()
all_settings = st.dictionaries(st.sampled_from(["a.r", "training.learning_rate", "b.names"]), values | st.lists(values))


@given(first=all_settings, second=all_settings)
def test_different_settings_have_different_file_names(first: dict[str, Any], second: dict[str, Any]) -> None:
    names = [slug(one) for one in (first, second)]
    assert all(len(name) < 80 and not set(name) & set('/\\ :*?"<>|\n\0') for name in names)
    assert (names[0] == names[1]) <= (first == second)


@given(value=st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(alphabet="abc: ,[]'\"#é"))
def test_flags_read_back_as_what_they_were(value: object) -> None:
    (flag,) = flags({"a.b": value})
    assert parse_yaml(flag.partition("=")[2], "test") == value


@given(rate=st.floats(allow_nan=False, allow_infinity=False))
def test_rates_in_few_characters_keep_their_value(rate: float) -> None:
    assert float(rate_text(rate)) == rate


def test_rates_look_as_people_write_them() -> None:
    assert [rate_text(rate) for rate in (2e-4, 6.7e-5, 0.05, 0.1, 3.0)] == ["2e-4", "6.7e-5", "5e-2", "0.1", "3"]


def test_every_adapter_of_the_registry_can_be_named() -> None:
    assert [candidate.variant for candidate in make_candidates(ADAPTERS, [])] == list(ADAPTERS)
