"""Hand a task to a remote agent from a Python program, over MCP, and apply what comes back.

    uv run python examples/delegate.py "Add a docstring to every public function" --verify "python3 -m compileall -q ."

It works on the repository in the current folder, and needs a credential for the model in the environment.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import Any, cast

import anyio
from mcp import Client, StdioServerParameters


async def delegate(prompt: str, verify: str | None) -> int:
    """Submit, wait, show the diff, and apply it when the verdict is not failed."""
    server = StdioServerParameters(
        command=sys.executable, args=["-m", "cloudagent_mcp", "mcp"], env=dict(os.environ), cwd=Path.cwd()
    )
    async with Client(server) as client:

        async def call(tool: str, **arguments: Any) -> dict[str, Any]:
            result = await client.call_tool(tool, arguments)
            answer = cast("dict[str, Any]", result.structured_content or {})
            if result.is_error:
                raise SystemExit(f"{answer['code']}: {answer['detail']} {answer['remedy']}")
            return answer

        task = await call("submit_task", prompt=prompt, verify=verify)
        while not task["completed_at"]:
            task = await call("get_task", task_id=task["task_id"], wait_seconds=50)
            print(task["status"], task["phase"] or "")
        print(task["result"]["summary"] if task["result"] else task["error"]["message"])
        if task["status"] != "completed" or task["verdict"] == "failed":
            return 1
        applied = await call("apply_task", task_id=task["task_id"])
        for file in applied["files"]:
            print(file["change"], file["path"])
    return 0


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("prompt")
    parser.add_argument("--verify")
    given = parser.parse_args()
    sys.exit(anyio.run(delegate, given.prompt, given.verify))
