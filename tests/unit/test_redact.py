import base64
from urllib.parse import quote

import pytest

from cloudagent_queue.redact import Redactor

SECRET = "sk-ant-api03-/Secret+Value=="


@pytest.mark.parametrize(
    "form",
    [
        SECRET,
        SECRET[::-1],
        quote(SECRET, safe=""),
        SECRET.encode().hex(),
        SECRET.encode().hex().upper(),
        base64.b64encode(SECRET.encode()).decode(),
        base64.b64encode(b"x" + SECRET.encode() + b"yz").decode(),
        base64.b64encode(b"xy" + SECRET.encode() + b"z").decode(),
        base64.urlsafe_b64encode(b"KEY=" + SECRET.encode()).decode(),
    ],
)
def test_a_known_secret_is_taken_out_in_every_usual_encoding(form: str) -> None:
    redacted = Redactor([SECRET]).text(f"before {form} after")
    assert "[redacted]" in redacted
    assert SECRET not in redacted
    assert "before " in redacted and " after" in redacted
    if form[:8].isalnum():
        assert form not in redacted


def test_secrets_are_taken_out_of_json_in_values_and_keys() -> None:
    value = {"env": [f"KEY={SECRET}", 1, None], SECRET: {"deep": SECRET}}
    assert Redactor([SECRET]).value(value) == {
        "env": ["KEY=[redacted]", 1, None],
        "[redacted]": {"deep": "[redacted]"},
    }


def test_bytes_that_are_no_text_stay_as_they_are() -> None:
    data = b"\xff\xfe" + SECRET.encode() + b"\x80"
    assert Redactor([SECRET]).data(data) == b"\xff\xfe[redacted]\x80"


def test_short_values_are_left_alone_since_they_are_ordinary_words() -> None:
    assert Redactor(["true", ""]).text("it is true") == "it is true"
