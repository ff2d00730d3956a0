"""`.cloudagent.toml` is hostile input: what may stand in it, what is refused and how, and who wins over it."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cloudagent_queue.agents import open_agent
from cloudagent_queue.candidates import split
from cloudagent_queue.repository import RepositoryConfig, read_config, setup_key
from cloudagent_queue.repository.config import SIZE_LIMIT
from cloudagent_storage.errors import InvalidRepositoryConfig
from cloudagent_storage.records import TaskSpec

SPEC = TaskSpec(prompt="Fix it.", title="Fix it")
DOCUMENTATION = Path(__file__).parents[2] / "docs" / "repository-settings.md"


def refusal(text: str | bytes) -> InvalidRepositoryConfig:
    with pytest.raises(InvalidRepositoryConfig) as caught:
        read_config(text.encode() if isinstance(text, str) else text)
    error = caught.value
    assert ".cloudagent.toml" in error.message and error.message.endswith(".") and error.remedy.endswith((".", "?"))
    return error


def test_every_setting_is_read() -> None:
    config = read_config(
        b"\xef\xbb\xbfsetup = 'npm ci'\r\nverify = 'npm test'\r\ntemplate = 'node-24'\r\n"
        b"egress = ['packages.example.org', '*.example.com', 'db.example.com:5432', '10.0.0.1']\r\n"
        b"[environment]\r\nNODE_ENV = 'test'\r\nPYTHONPATH = 'src'\r\n[limits]\r\ntimeout_minutes = 30\r\nmax_turns = 5"
    )
    assert (config.setup, config.verify, config.template) == ("npm ci", "npm test", "node-24")
    assert config.egress == ("packages.example.org", "*.example.com", "db.example.com:5432", "10.0.0.1")
    assert config.environment == {"NODE_ENV": "test", "PYTHONPATH": "src"}
    assert (config.limits.timeout_minutes, config.limits.max_turns, config.limits.max_budget_usd) == (30, 5, None)
    assert config.named == "setup, verify, environment, egress, template, limits"


def test_the_example_of_the_documentation_can_be_used_and_names_every_setting() -> None:
    example = DOCUMENTATION.read_text().partition("```toml\n")[2].partition("```")[0]
    assert read_config(example.encode()).named.split(", ") == list(RepositoryConfig.model_fields)


def test_without_a_file_or_with_an_empty_one_nothing_is_set() -> None:
    assert read_config(None) == read_config(b"") == RepositoryConfig()
    assert read_config(b"").applied_to(SPEC) == SPEC and read_config(b"").named == ""
    assert read_config(b"egress = []").egress == () and read_config(b"").egress is None


def test_the_commands_of_a_submit_win_and_the_files_fill_in() -> None:
    config = read_config(b"setup = 'from the file'\nverify = 'from the file'")
    assert config.applied_to(SPEC).setup == config.applied_to(SPEC).verify == "from the file"
    asked = SPEC.model_copy(update={"setup": "asked for", "verify": ""})
    assert (config.applied_to(asked).setup, config.applied_to(asked).verify) == ("asked for", "")


@pytest.mark.parametrize("asked", [None, 5.0, 50.0])
def test_candidates_never_spend_more_than_the_repository_allows_all_of_them(asked: float | None) -> None:
    config = read_config(b"[limits]\nmax_budget_usd = 9.0\n")
    tries = split(SPEC.model_copy(update={"best_of": 3, "max_budget_usd": asked}))
    spent = [config.applied_to(one).max_budget_usd or math.inf for one in tries]
    assert len(spent) == 3 and sum(spent) == pytest.approx(min(asked or 9.0, 9.0))


def test_limits_of_the_file_fill_in_and_lower_and_never_raise() -> None:
    told = read_config(b"retries = 2")
    assert told.applied_to(SPEC).retries == 2 and told.applied_to(SPEC.model_copy(update={"retries": 0})).retries == 0
    config = read_config(b"[limits]\ntimeout_minutes = 90\nmax_turns = 50\nmax_budget_usd = 2.5")
    spec = config.applied_to(SPEC)
    assert (spec.timeout_minutes, spec.max_turns, spec.max_budget_usd) == (60, 50, 2.5)
    spec = config.applied_to(SPEC.model_copy(update={"timeout_minutes": 600, "max_turns": 10, "max_budget_usd": 9.0}))
    assert (spec.timeout_minutes, spec.max_turns, spec.max_budget_usd) == (90, 10, 2.5)


limit = st.none() | st.floats(0.1, 1000)


@given(asked=limit, bound=limit)
def test_a_limit_is_never_above_what_was_asked_for(asked: float | None, bound: float | None) -> None:
    config = RepositoryConfig.model_validate({"limits": {"max_budget_usd": bound}})
    found = config.applied_to(SPEC.model_copy(update={"max_budget_usd": asked})).max_budget_usd
    assert found in (asked, bound)
    assert asked is None or (found is not None and found <= asked)
    assert bound is None or (found is not None and found <= bound)


@pytest.mark.parametrize(
    ("text", "field", "says"),
    [
        ("setup = ''", "setup", "at least 1 character"),
        ("setup = 5", "setup", "must be text"),
        ("verify = ['a']", "verify", "must be text"),
        (f"setup = '{'x' * 10_001}'", "setup", "at most 10000 characters"),
        ('verify = "a\\u0000b"', "verify", "NUL"),
        ("environment = 5", "environment", "must be a table"),
        ("[environment]\nPORT = 3000", "environment.PORT", "must be text"),
        ("[environment]\n'A-B' = 'x'", "environment.A-B", "no name of a variable"),
        ("[environment]\n'A=B' = 'x'", "environment.A?B", "no name of a variable"),
        ("[environment]\n'' = 'x'", "environment.", "no name of a variable"),
        ('[environment]\nA = "a\\u0000b"', "environment.A", "NUL"),
        (f"[environment]\nA = '{'x' * 4001}'", "environment.A", "longer than 4000"),
        ("[environment]\n" + "\n".join(f"A{n} = ''" for n in range(101)), "environment", "at most 100 entries"),
        ("egress = 'example.com'", "egress", "must be a list"),
        ("egress = [1]", "egress.0", "must be text"),
        ("egress = ['ok.example', 'https://example.com']", "egress.1", "form of host"),
        ("egress = ['a b']", "egress.0", "form of host"),
        ("egress = ['*']", "egress.0", "form of host"),
        ("egress = ['a.*.com']", "egress.0", "form of host"),
        ("egress = ['-a.com']", "egress.0", "form of host"),
        ("egress = ['a..com']", "egress.0", "form of host"),
        ('egress = ["a.com\\n"]', "egress.0", "form of host"),
        ("egress = ['a.com:0']", "egress.0", "form of host"),
        ("egress = ['a.com:65536']", "egress.0", "form of host"),
        ("egress = ['a.com/x']", "egress.0", "form of host"),
        ("egress = ['user@a.com']", "egress.0", "form of host"),
        ("template = '--x'", "template", "form of a name"),
        ("template = 'a b'", "template", "form of a name"),
        ("template = ''", "template", "form of a name"),
        ("limits = 5", "limits", "must be a table"),
        ("retries = 6", "retries", "at most 5"),
        ("retries = -1", "retries", "at least 0"),
        ("[limits]\nmax_turns = 0", "limits.max_turns", "at least 1"),
        ("[limits]\nmax_turns = 1.5", "limits.max_turns", "whole number"),
        ("[limits]\nmax_turns = true", "limits.max_turns", "whole number"),
        ("[limits]\ntimeout_minutes = 1441", "limits.timeout_minutes", "at most 1440"),
        ("[limits]\ntimeout_minutes = nan", "limits.timeout_minutes", "finite"),
        ("[limits]\nmax_budget_usd = 0", "limits.max_budget_usd", "more than 0"),
        ("[limits]\nmax_budget_usd = inf", "limits.max_budget_usd", "finite"),
        ("[limits]\nmax_budget_usd = '5'", "limits.max_budget_usd", "a number"),
    ],
)
def test_what_lies_outside_of_its_bounds_is_refused_with_its_key(text: str, field: str, says: str) -> None:
    error = refusal(text)
    assert error.code == "invalid_repository_config"
    assert error.field == field and field in error.message and says in error.message


@pytest.mark.parametrize(
    ("text", "field", "remedy"),
    [
        ("setpu = 'x'", "setpu", "Did you mean setup?"),
        ("[limit]\nmax_turns = 5", "limit", "Did you mean limits?"),
        ("[limits]\nmax_turn = 5", "limits.max_turn", "Did you mean max_turns?"),
        ("zzz = 1", "zzz", "setup, verify, retries, environment, egress, template, limits"),
        ("[limits]\nzzz = 1", "limits.zzz", "timeout_minutes, max_turns, max_budget_usd"),
        ('"\\u001b[31m<b>" = 1', "??31m?b?", "setup, verify"),
        (f"{'z' * 5000} = 1", "z" * 40, "setup, verify"),
    ],
)
def test_an_unknown_key_is_refused_with_the_nearest_name(text: str, field: str, remedy: str) -> None:
    error = refusal(text)
    assert error.field == field and remedy in error.remedy


@pytest.mark.parametrize(
    "name",
    [
        *open_agent("claude").environment,
        *["PATH", "HOME", "LD_PRELOAD", "https_proxy", "ALL_PROXY", "GIT_SSH_COMMAND", "GH_TOKEN", "GITHUB_TOKEN"],
        *["CLAUDE_CONFIG_DIR", "CLOUDAGENT_SANDBOX", "NODE_OPTIONS", "SSL_CERT_FILE", "IS_SANDBOX", "Path"],
    ],
)
def test_what_the_agent_its_credential_or_the_runner_depend_on_is_not_the_repositorys_to_set(name: str) -> None:
    error = refusal(f"[environment]\n{name} = 'x'")
    assert error.field == f"environment.{name}" and "in front of the command" in error.remedy


@pytest.mark.parametrize("name", ["PYTHONPATH", "NODE_ENV", "DATABASE_URL", "GITHUB_ACTIONS", "PATHS", "MY_HOME", "_"])
def test_other_variables_are(name: str) -> None:
    assert read_config(f"[environment]\n{name} = 'x'".encode()).environment == {name: "x"}


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("setup = 'x'\nverify =\n", "Invalid value, at line 2, column 9"),
        ("setup", "Expected '=' after a key in a key/value pair, at"),
        ("[canary]\n[canary]", "Something cannot be read, at line 2"),
        ("a = {canary = 1, canary = 2}", "Something cannot be read, at line 1"),
        ("a = 'canary", "end of document"),
        ("x = 1" + "0" * 5000, "too long or too deep"),
        ("x = " + "[" * 8000, "too long or too deep"),
        ("x = " + "{a=" * 5000, "too long or too deep"),
        (b"setup = '\xff'", "no UTF-8"),
        ("# " + "x" * SIZE_LIMIT, "larger than 16 KB"),
    ],
)
def test_what_is_no_toml_is_refused_with_its_place_and_nothing_of_its_text(text: str | bytes, says: str) -> None:
    error = refusal(text)
    assert says in error.message and error.field is None and "canary" not in error.message


def test_the_value_of_a_setting_is_never_repeated() -> None:
    for text in (
        "egress = ['https://canary']",
        "setup = ['canary']",
        "template = 'canary canary'",
        "[environment]\nPATH = 'canary'",
        "[limits]\nmax_turns = 'canary'",
    ):
        assert "canary" not in repr(refusal(text).as_dict())


@pytest.mark.parametrize("start", ["{}=1", "environment.{}=1", "limits.{}=1", "[{}]", "environment = {{{}=1}}"])
def test_the_longest_key_that_fits_is_refused_like_any_other(start: str) -> None:
    """Neither the parser's time, which grows with its square, nor its depth brings anything down."""
    refusal(start.format(".".join("a" * (SIZE_LIMIT // 2 - 20))))


@given(st.binary(max_size=300) | st.text(max_size=300).map(lambda text: text.encode()))
def test_whatever_the_bytes_are_only_one_kind_of_error_comes_out(data: bytes) -> None:
    try:
        read_config(data)
    except InvalidRepositoryConfig as error:
        assert error.message.isprintable()


KEY: dict[str, Any] = {
    "repository": "https://example.com/a.git",
    "provider": "e2b",
    "template": "base",
    "setup": "npm ci",
    "environment": {"A": "1", "B": "2"},
    "manifests": "0" * 64,
}


def test_the_key_of_a_set_up_covers_everything_that_it_depends_on() -> None:
    others: dict[str, Any] = {
        "repository": "https://example.com/b.git",
        "provider": "novita",
        "template": None,
        "setup": "npm ci ",
        "environment": {"A": "1"},
        "manifests": None,
    }
    changed: list[dict[str, Any]] = [{**KEY, name: value} for name, value in others.items()]
    keys = {setup_key(**fields) for fields in (KEY, *changed)}
    assert others.keys() == KEY.keys() and len(keys) == len(KEY) + 1
    reordered: dict[str, Any] = {**KEY, "environment": {"B": "2", "A": "1"}}
    assert setup_key(**KEY) == setup_key(**reordered)
