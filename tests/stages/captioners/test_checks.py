"""What makes a caption bad."""

import random

import pytest

from stages.captioners.checks import repeated_phrase


def followed_by_itself(words: list[str], max_repeats: int) -> bool:
    """By the definition: a phrase, and the first word of it again, behind more than `max_repeats` repetitions."""
    for length in range(1, len(words)):
        wanted = length * (max_repeats + 1) + 1
        for begin in range(len(words) - wanted + 1):
            part = words[begin : begin + wanted]
            if all(part[i] == part[i % length] for i in range(wanted)):
                return True
    return False


@pytest.mark.parametrize("max_repeats", [1, 2, 3])
def test_phrases_that_follow_themselves_are_those_of_the_definition(max_repeats: int) -> None:
    chance, found = random.Random(max_repeats), 0
    for _ in range(300):
        words = [chance.choice("ab") for _ in range(chance.randint(1, 24))]
        text = " ".join(words)
        assert bool(repeated_phrase(text, max_repeats)) == followed_by_itself(words, max_repeats), text
        found += followed_by_itself(words, max_repeats)
    assert 30 < found < 300


@pytest.mark.parametrize(
    ("text", "phrase"),
    [
        pytest.param("a red dot and " * 30, "a red dot and", id="words"),
        pytest.param("a dog " + "very " * 30 + "large", "very", id="within-a-text"),
        pytest.param("\u4e00\u53ea\u732b" * 30, "\u4e00\u53ea\u732b", id="no-spaces"),
        pytest.param("a red dot and " * 5, "", id="few-times"),
        pytest.param("", "", id="nothing"),
    ],
)
def test_the_phrase_is_named_from_whatever_word_it_begins_with(text: str, phrase: str) -> None:
    found = repeated_phrase(text, 8)
    turned = {(f"{phrase} " * 2 if " " in text else phrase * 2)[i:].strip() for i in range(len(phrase) + 1)}
    assert any(each.startswith(found) for each in turned)
    assert len(found) == len(phrase)
