import pytest

from peftchat.errors import UserError
from peftchat.serving.sampling import Sampling
from peftchat.web.settings_panel import read_settings


def test_an_empty_field_leaves_the_setting_to_the_model() -> None:
    assert read_settings(("", "", "", None, " ", "", "")) == (None, None, Sampling())
    _, _, sampling = read_settings(("", "", "0", "0.9", "40", "64", "7"))
    assert sampling == Sampling(64, 0.0, 0.9, 40, seed=7)


@pytest.mark.parametrize(
    ("place", "value", "message"),
    [
        (2, "hot", "Temperature: expected a number such as 0.7 or nothing, got `hot`"),
        (2, "-1", "Temperature: expected 0 or more, got -1"),
        (3, "nan", "Top p: expected a number"),
        (4, "1.5", "Top k: expected a whole number or nothing, got `1.5`"),
        (5, "0", "Most tokens: expected 1 or more, got 0"),
        (6, "inf", "Seed: expected a whole number"),
    ],
)
def test_what_is_no_such_number_is_named(place: int, value: str, message: str) -> None:
    values: list[str | None] = [None] * 7
    values[place] = value
    with pytest.raises(UserError) as error:
        read_settings(tuple(values))
    assert message in str(error.value)
