"""What a sandbox costs: by the table that comes along, or the operator's; what is not known is not 0."""

from __future__ import annotations

from pathlib import Path

import pytest

from cloudagent_queue.sandboxes import PROVIDERS, Resources
from cloudagent_queue.sandboxes.prices import Prices
from cloudagent_storage.errors import InvalidInput
from cloudagent_storage.records import Usage

TWO_BY_ONE = Resources(cpus=2, memory_mb=1024)


@pytest.fixture
def own(tmp_path: Path) -> Path:
    """The operator's file."""
    return tmp_path / "prices.toml"


def refusal(own: Path, content: str | bytes) -> InvalidInput:
    own.write_bytes(content.encode() if isinstance(content, str) else content)
    with pytest.raises(InvalidInput) as caught:
        Prices.read(own)
    error = caught.value
    assert error.field == "SANDBOX_PRICES" and "SANDBOX_PRICES" in error.message and str(own) not in error.message
    return error


def test_an_hour_costs_what_the_provider_itself_works_out_as_an_example() -> None:
    # Its documentation: 8 vCPUs with 4 GB are $0.468 an hour; 2 vCPUs with 512 MiB about $0.109.
    prices = Prices.read()
    assert prices.cost_usd("e2b", Resources(8, 4096), 3600) == pytest.approx(0.468)
    assert prices.cost_usd("e2b", Resources(2, 512), 3600) == pytest.approx(0.1089)
    assert prices.cost_usd("e2b", TWO_BY_ONE, 0) == 0.0


def test_sandboxes_of_this_machine_cost_nothing_whatever_they_occupy() -> None:
    for provider in ("local", "unsafe-process"):
        assert provider in PROVIDERS
        assert Prices.read().cost_usd(provider, None, 1000) == Prices.read().cost_usd(provider, TWO_BY_ONE, 1000) == 0.0


def test_a_price_or_a_size_that_is_not_known_makes_a_cost_that_is_not_known() -> None:
    assert Prices.read().cost_usd("novita", TWO_BY_ONE, 10) is None
    assert Prices.read().cost_usd("novita", TWO_BY_ONE, 0) is None
    assert Prices.read().cost_usd("e2b", None, 10) is None


def test_the_operators_file_takes_the_place_of_what_it_names(own: Path) -> None:
    own.write_text("[novita]\nvcpu_second = 0.00001\ngib_second = 0\n[local]\nvcpu_second = 0.000001\ngib_second = 0\n")
    prices = Prices.read(own)
    assert prices.cost_usd("novita", TWO_BY_ONE, 10) == pytest.approx(0.0002)
    assert prices.cost_usd("local", TWO_BY_ONE, 10) == pytest.approx(0.00002)
    assert prices.cost_usd("local", None, 10) is None
    assert prices.cost_usd("e2b", TWO_BY_ONE, 10) == Prices.read().cost_usd("e2b", TWO_BY_ONE, 10)


def test_a_copy_of_the_file_that_comes_along_can_be_used(own: Path) -> None:
    from cloudagent_queue.sandboxes import prices

    own.write_bytes(Path(prices.__file__).with_name("prices.toml").read_bytes())
    assert Prices.read(own).cost_usd("e2b", TWO_BY_ONE, 3600) == Prices.read().cost_usd("e2b", TWO_BY_ONE, 3600)


def test_a_price_is_told_in_words() -> None:
    prices = Prices.read()
    assert prices.told("e2b") == "e2b: $0.0504 per vCPU and $0.0162 per GiB an hour"
    assert prices.told("local") == "local: free"
    assert "not known" in prices.told("novita") and "SANDBOX_PRICES" in prices.told("novita")


def test_stretches_add_up_and_one_that_is_not_known_makes_the_sum_so() -> None:
    prices = Prices.read()
    usage = Usage(input_tokens=5, cost_usd=1.0)
    once = prices.charged(usage, "e2b", TWO_BY_ONE, 100)
    assert once.sandbox_seconds == 100 and once.sandbox_cost_usd == pytest.approx(100 * (0.000028 + 0.0000045))
    assert (once.input_tokens, once.cost_usd) == (5, 1.0)
    twice = prices.charged(once, "e2b", TWO_BY_ONE, 50)
    assert once.sandbox_cost_usd is not None
    assert twice.sandbox_seconds == 150 and twice.sandbox_cost_usd == pytest.approx(once.sandbox_cost_usd * 1.5)
    assert prices.charged(once, "local", None, 50).sandbox_cost_usd == once.sandbox_cost_usd
    unknown = prices.charged(once, "novita", TWO_BY_ONE, 50)
    assert unknown.sandbox_seconds == 150 and unknown.sandbox_cost_usd is None
    assert prices.charged(unknown, "e2b", TWO_BY_ONE, 50).sandbox_cost_usd is None
    assert prices.charged(usage, "local", None, 7).sandbox_cost_usd == 0.0


@pytest.mark.parametrize(
    ("content", "says", "remedy"),
    [
        ("[e2b]\nvcpu_second = 0.05\ngib_second = 0", "e2b.vcpu_second", "form"),
        ("[e2b]\nvcpu_second = -1\ngib_second = 0", "e2b.vcpu_second", "form"),
        ("[e2b]\nvcpu_second = nan\ngib_second = 0", "e2b.vcpu_second", "form"),
        ("[e2b]\nvcpu_second = '1'\ngib_second = 0", "must be a number", "form"),
        ("[e2b]\nvcpu_second = true\ngib_second = 0", "must be a number", "form"),
        ("[e2b]\nvcpu_second = 0", "lacks e2b.gib_second", "form"),
        ("[e2b]\nvcpu_second = 0\ngib_secnd = 0\ngib_second = 0", "e2b.gib_secnd", "gib_second?"),
        ("[e2b]\nzzz = 0\nvcpu_second = 0\ngib_second = 0", "e2b.zzz", "vcpu_second and gib_second"),
        ("e2b = 5", "must be a table", "form"),
        ("[e2b]\nvcpu_second =\n", "line 2", "form"),
        ("canary = canary\n", "line 1", "form"),
        (b"\xff", "no UTF-8", "form"),
        ("a = " + "[" * 9000, "no TOML", "form"),
        ("#" * 70_000, "larger than 64 KB", "form"),
    ],
)
def test_a_file_that_cannot_be_used_is_refused_with_the_key(
    own: Path, content: str | bytes, says: str, remedy: str
) -> None:
    error = refusal(own, content)
    assert says in error.message and remedy in error.remedy and "canary" not in error.message


def test_a_file_that_is_not_there_or_is_none_is_refused(tmp_path: Path) -> None:
    for path in (tmp_path / "nowhere", tmp_path):
        with pytest.raises(InvalidInput, match="cannot be read") as caught:
            Prices.read(path)
        assert caught.value.field == "SANDBOX_PRICES" and str(path) not in caught.value.message
