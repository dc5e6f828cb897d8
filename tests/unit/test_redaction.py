"""What is written for others holds no secret."""

from __future__ import annotations

import json
import secrets

import pytest

from pool.redaction import Redaction, as_plain

ENVIRONMENT = {
    "RAY_AUTH_TOKEN": "correct horse",
    "HF_TOKEN": "hf_AbCdEfGh",
    "MY_PASSWORD": "tr0ub4dor&3",
    "AWS_SECRET_ACCESS_KEY": "hf_AbCdEfGhIjKl",  # which begins as another does
    "SHORT_TOKEN": "abc",
    "TOKEN_FILE": "/home/me/token",
    "HOME": "/home/somebody",
}


@pytest.mark.parametrize(
    ("text", "left"),
    [
        ("Ray said no to correct horse battery", "Ray said no to *** battery"),
        ("hf_AbCdEfGhIjKl, hf_AbCdEfGh", "***, ***"),
        ("with tr0ub4dor&3.", "with ***."),
        ("proxy http://me:pass@10.0.0.1:3128/x", "proxy http://***@10.0.0.1:3128/x"),
        ("http://127.0.0.1:4000/enter/abcDEF-_0123456789abcdef", "http://127.0.0.1:4000/enter/***"),
        ("about:neterror?u=http%3A//[::1]%3A40/enter%2FabcDEF0123456789", "%2F***"),
        ("GET /?token=abcdefgh12&x=1", "token=***&x=1"),
        ('{"api_key": "abcdefgh12"}', '"api_key": "***"'),
        ("Authorization: Bearer abc.def.ghi", "Authorization: Bearer ***"),
        ("x Zx9-kQ_3vT7bLmNp2RsUwYa4CdEfGh5JkMnPqRsTuVw y", "x *** y"),
    ],
)
def test_a_secret_is_taken_out(text, left):
    assert left in Redaction(ENVIRONMENT).text(text)


@pytest.mark.parametrize(
    "text",
    [
        "max_new_tokens: 12345678, tokens 99999999",
        "Unexpected token '<', \"<!DOCTYPE\"... is not valid JSON",
        "abc /home/me/token /home/somebody",
        "0" * 64,
        "sha256 " + "0123456789abcdef" * 4,
        "tokenizer: distilbert-base",
        "mail me@example.org",
        "http://127.0.0.1:8265/#/actors",
    ],
)
def test_what_is_no_secret_is_left(text):
    assert Redaction(ENVIRONMENT).text(text) == text


def test_a_token_as_tabpool_makes_them_is_taken_out():
    for _ in range(100):
        token = secrets.token_urlsafe(32)
        if any(c.isdigit() for c in token):  # all but one in 1,500 have a digit
            assert Redaction({}).text(f'["{token}"]') == '["***"]'


def test_every_text_of_a_structure_is_searched_and_the_rest_is_as_it_was():
    value = {
        "a": ["correct horse", {"hf_AbCdEfGh": ("x", 1, 2.5, None, True)}],
        "never": float("inf"),
        "half": "\ud800",
        1: object,
    }
    plain = Redaction(ENVIRONMENT).plain(value)
    assert plain == {
        "a": ["***", {"***": ["x", 1, 2.5, None, True]}],
        "never": "inf",
        "half": "?",
        "1": "<class 'object'>",
    }
    json.dumps(plain, allow_nan=False).encode("ascii")


def test_a_structure_without_end_ends():
    value: list[object] = []
    value.append(value)
    json.dumps(as_plain(value))
