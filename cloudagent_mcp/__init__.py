"""How people and programs talk to it: MCP tools, REST, `ca`."""

from importlib.metadata import version

__version__ = version("cloudagent-mcp")
