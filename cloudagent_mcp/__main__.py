"""`python -m cloudagent_mcp` is `ca`."""

from cloudagent_mcp.cli import main

main()
