from typing import Annotated, Any, Literal

import pytest
from pydantic import Field

from cloudagent_mcp.operations import Caller, check_arguments, operation, operations_of
from cloudagent_storage.errors import CloudAgentError
from cloudagent_storage.records import Record


class Echo(Record):
    said: str


class Nouns:
    @operation("POST", "/echo", title="Echo", read_only=True)
    def echo(
        self,
        caller: Caller,
        *,
        prompt: Annotated[str, Field(max_length=10, description="What to say.")],
        times: Annotated[int, Field(ge=1, le=3)] = 1,
        share: Annotated[float | None, Field(gt=0)] = None,
        mode: Literal["loud", "low"] = "low",
        tags: list[str] = [],  # noqa: B006
    ) -> Echo:
        """Say it again.

        This paragraph is for developers.
        """
        return Echo(said=prompt * times)


ECHO = operations_of(Nouns())["echo"]


def refusal(arguments: Any) -> CloudAgentError:
    with pytest.raises(CloudAgentError) as caught:
        check_arguments(ECHO.arguments, arguments)
    return caught.value


@pytest.mark.parametrize(
    ("arguments", "code", "field"),
    [
        ({}, "missing_argument", "prompt"),
        ({"promt": "x"}, "unknown_argument", "promt"),
        ({"prompt": 5}, "wrong_type", "prompt"),
        ({"prompt": {}}, "wrong_type", "prompt"),
        ({"prompt": "x" * 11}, "out_of_range", "prompt"),
        ({"prompt": "a\0b"}, "invalid_character", "prompt"),
        ({"prompt": "a\ud800b"}, "invalid_unicode", "prompt"),
        ({"prompt": "x", "times": 0}, "out_of_range", "times"),
        ({"prompt": "x", "times": 4}, "out_of_range", "times"),
        ({"prompt": "x", "times": 1.5}, "wrong_type", "times"),
        ({"prompt": "x", "times": "2"}, "wrong_type", "times"),
        ({"prompt": "x", "times": True}, "wrong_type", "times"),
        ({"prompt": "x", "share": float("nan")}, "out_of_range", "share"),
        ({"prompt": "x", "share": float("inf")}, "out_of_range", "share"),
        ({"prompt": "x", "mode": "shrill"}, "out_of_range", "mode"),
        ({"prompt": "x", "tags": ["a\0"]}, "invalid_character", "tags"),
        ({"prompt": "x", "tags": "a"}, "wrong_type", "tags"),
        ([], "wrong_type", None),
        (None, "wrong_type", None),
    ],
)
def test_bad_arguments_are_refused_with_a_code_and_the_field(arguments: Any, code: str, field: str | None) -> None:
    error = refusal(arguments)
    assert (error.code, error.field) == (code, field)
    assert error.message.endswith(".") and error.remedy


def test_an_unknown_argument_is_answered_with_the_nearest_name() -> None:
    assert refusal({"promt": "x"}).remedy == "Did you mean prompt?"
    assert "prompt, times, share" in refusal({"zzz": 1}).remedy


def test_the_value_that_was_sent_is_never_echoed() -> None:
    for arguments in ({"prompt": ["hunter2"]}, {"prompt": "x", "mode": "hunter2"}, {"prompt": "hunter2hunter2"}):
        assert "hunter2" not in repr(refusal(arguments).as_dict())


def test_a_hostile_argument_name_is_shown_harmlessly() -> None:
    assert refusal({"\x1b[31m<b>": 1}).field == "??31m?b?"


def test_the_schema_has_no_noise_that_a_model_would_pay_for() -> None:
    assert ECHO.schema == {
        "type": "object",
        "required": ["prompt"],
        "properties": {
            "prompt": {"type": "string", "description": "What to say."},
            "times": {"type": "integer", "maximum": 3, "default": 1},
            "share": {"type": "number"},
            "mode": {"type": "string", "enum": ["loud", "low"], "default": "low"},
            "tags": {"type": "array", "items": {"type": "string"}},
        },
    }
    assert ECHO.description == "Say it again."


@pytest.mark.anyio
async def test_a_checked_call_reaches_the_method_with_its_defaults() -> None:
    assert await ECHO.call(Caller(), {"prompt": "ha", "times": 2}) == Echo(said="haha")
