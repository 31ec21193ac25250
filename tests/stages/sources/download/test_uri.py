"""URLs are asked for as browsers ask for them, whatever letters they have."""

import pytest

from stages.sources.download.uri import to_uri


@pytest.mark.parametrize(
    ("url", "uri"),
    [
        ("http://h/plain.jpg?a=1&b=[2]#c", "http://h/plain.jpg?a=1&b=[2]#c"),
        ("http://h/peñoles.jpg", "http://h/pe%C3%B1oles.jpg"),
        ("http://h/画像/a.jpg", "http://h/%E7%94%BB%E5%83%8F/a.jpg"),
        ("http://h/a b.jpg", "http://h/a%20b.jpg"),
        ("http://h/a\u00a0b\u3000c.jpg", "http://h/a%C2%A0b%E3%80%80c.jpg"),
        ("http://h/a\u2028b.jpg", "http://h/a%E2%80%A8b.jpg"),
        ("http://h/q.jpg?x=ü y", "http://h/q.jpg?x=%C3%BC%20y"),
        ("http://h/pe%C3%B1oles%20a.jpg", "http://h/pe%C3%B1oles%20a.jpg"),
        ("http://h/100%.jpg", "http://h/100%.jpg"),
        ("http://h/%zz/ä", "http://h/%zz/%C3%A4"),
        ('http://h/"<>`{}', "http://h/%22%3C%3E%60%7B%7D"),
        (" http://h/a.jpg \n", "http://h/a.jpg"),
        ("HTTP://h/ä", "HTTP://h/%C3%A4"),
        ("http://münchen.de/a", "http://xn--mnchen-3ya.de/a"),
        ("https://MÜNCHEN.de:8443/a", "https://xn--mnchen-3ya.de:8443/a"),
        ("http://a_b.münchen。de/a", "http://a_b.xn--mnchen-3ya.de/a"),
        ("http://faß.de/", "http://xn--fa-hia.de/"),
        ("http://１２７.0.0.1/", "http://127.0.0.1/"),
        ("http://[::1]:80/ä", "http://[::1]:80/%C3%A4"),
        ("http://h", "http://h"),
    ],
)
def test_letters_beyond_ascii_are_encoded_and_the_rest_stays(url: str, uri: str) -> None:
    assert to_uri(url) == uri
    assert to_uri(uri) == uri


@pytest.mark.parametrize(
    "url",
    [
        "",
        "ftp://h/a.jpg",
        "file:///etc/passwd",
        "127.0.0.1/x.png",
        "http://[::1/x.png",
        "http:///a.png",
        "http:/a.png",
        "http://h/a\0b.png",
        "http://h/a\nb.png",
        "http://h/caf\udce9.png",
        "http://\u2488com/a",
        "http://ab\u2024\u0378.de/",
        "http://xn--\u00fc.de/",
        "http://user:pass@h/a.png",
        "http://user@h/a.png",
        "http://@h/a.png",
        "http://h\\@evil.example/a.png",
    ],
)
def test_what_cannot_be_asked_for_is_refused(url: str) -> None:
    with pytest.raises(ValueError, match=r"\w"):
        to_uri(url)
