"""A sandbox's proxy whose names a test decides: `names.json` in the sandbox's folder, beside the sandbox's root.

`{"names": {NAME: [[ADDRESS, …], …]}, "head_s": SECONDS}`: what a name resolves to the first time, the second time and
so on; the last answer stays. How often it was asked for is written to `asked.json`. Everything else is the product's.
"""

from __future__ import annotations

import ipaddress
import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from cloudagent_queue.sandboxes import egress_proxy
from cloudagent_queue.sandboxes.egress import Address

PROGRAM = "from tests.support.named_hosts import main; main()"
asked: Counter[str] = Counter()


async def resolve(name: str, port: int) -> Sequence[Address]:
    answers = json.loads(Path("names.json").read_text())["names"].get(name)
    if answers is None:
        raise OSError("unknown name")
    asked[name] += 1
    Path("asked.json").write_text(json.dumps(asked))
    return [ipaddress.ip_address(address) for address in answers[min(asked[name], len(answers)) - 1]]


def main() -> None:
    if Path("names.json").exists():
        egress_proxy.HEAD_S = json.loads(Path("names.json").read_text()).get("head_s", egress_proxy.HEAD_S)
    egress_proxy.main(resolve)
