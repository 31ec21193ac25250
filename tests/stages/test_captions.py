"""Captions as the internet writes them have a defined form."""

import unicodedata

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stages.captions import MAX_CHARACTERS, clean_caption, clean_captions, is_valid_text, on_one_line


@pytest.mark.parametrize(
    ("raw", "clean"),
    [
        ("a cat", "a cat"),
        ("  a cat \n", "a cat"),
        ("a\0cat", "a cat"),
        ("a\tcat\r\non a mat\n", "a\tcat\r\non a mat"),
        ('{\n  "subject": "a\\ncat"\n}', '{\n  "subject": "a\\ncat"\n}'),
        ("a\x0bcat\x0con\x1fa mat", "a cat on a mat"),
        ("\x1b[31mred\x7f", "[31mred"),
        ("\u0085next line\u0085", "next line"),
        ("A Cat, UPPER and lower.", "A Cat, UPPER and lower."),
        ("🐈\u200d⬛ 🇨🇭", "🐈\u200d⬛ 🇨🇭"),
        ("\u200fخط عربي\u200e", "\u200fخط عربي\u200e"),
        ("e\u0301", "e\u0301"),
        ("\ufeffa cat", "\ufeffa cat"),
        ("a\u00a0b\u00a0", "a\u00a0b"),
        ("", ""),
        (" \0\n\t ", ""),
        ("x" * 100_000, "x" * 100_000),
    ],
)
def test_control_characters_but_tabs_and_line_ends_become_spaces_and_all_else_stays(raw: str, clean: str) -> None:
    assert clean_caption(raw) == clean


@settings(deadline=None, max_examples=50)
@given(st.text(max_size=100))
def test_a_clean_caption_is_clean(raw: str) -> None:
    clean = clean_caption(raw)
    assert clean_caption(clean) == clean
    assert not any(unicodedata.category(c) == "Cc" and c not in "\t\n\r" for c in clean)
    assert clean == clean.strip()


@settings(deadline=None, max_examples=50)
@given(st.text("ab \t\n\r\0\u0085\u00a0é", max_size=30))
def test_an_encoder_without_a_recipe_reads_what_earlier_versions_stored(raw: str) -> None:
    earlier = "".join(" " if unicodedata.category(c) == "Cc" else c for c in raw).strip()
    assert on_one_line(clean_caption(raw)) == earlier
    assert clean_caption(earlier) == earlier


@pytest.mark.parametrize(
    ("raw", "valid"), [("a cat", True), ("", True), ("🐈", True), ("caf\udce9", False), ("\ud800", False)]
)
def test_text_that_was_not_utf_8_is_told_apart(raw: str, valid: bool) -> None:
    assert is_valid_text(raw) is valid


@pytest.mark.parametrize(
    ("raw", "captions"),
    [
        (["a", "b"], ("a", "b")),
        (["b", "a", "b", " a "], ("b", "a")),
        (["", "a", "\0"], ("a",)),
    ],
)
def test_empty_and_repeated_captions_go_and_the_order_stays(raw: list[str], captions: tuple[str, ...]) -> None:
    assert clean_captions(raw) == (captions, None)


@pytest.mark.parametrize("raw", [[], [""], [" ", "\n\0"]])
def test_a_sample_without_a_caption_is_dropped(raw: list[str]) -> None:
    assert clean_captions(raw) == ((), "empty_caption")


def test_samples_of_a_source_without_captions_have_the_empty_caption() -> None:
    assert clean_captions(None) == (("",), None)


def test_one_caption_that_is_not_text_drops_the_sample() -> None:
    assert clean_captions(["a cat", "caf\udce9"]) == ((), "invalid_caption")


@pytest.mark.parametrize(
    "captions", [["x" * (MAX_CHARACTERS + 1)], ["x" * 60_000, "y" * 60_000], ["x\n" * MAX_CHARACTERS]]
)
def test_captions_of_too_many_characters_are_a_drop(captions: list[str]) -> None:
    assert clean_captions(captions) == ((), "caption_too_long")


def test_captions_of_as_many_characters_as_allowed_are_kept() -> None:
    longest = "x" * MAX_CHARACTERS
    assert clean_captions([f"  {longest}{' ' * 9}"]) == ((longest,), None)
