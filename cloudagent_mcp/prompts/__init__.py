"""Prompts: texts that tell a client's model how to delegate a kind of work. Clients offer them as slash commands.

The built-in ones are files of the same kind as a user's own; nothing can take their names.

built_in/    one Markdown file each
shared/      what several of them say
files.py     how a file becomes a prompt
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from importlib import resources
from pathlib import Path

import anyio
from mcp import MCPError
from mcp.types import INVALID_PARAMS
from mcp.types import Prompt as PromptShown
from mcp.types import PromptArgument as ArgumentShown

from cloudagent_mcp.operations import Caller, Operation, in_thread
from cloudagent_mcp.prompts.files import Argument, Broken, Prompt, parse, read_folder
from cloudagent_mcp.untrusted import clean
from cloudagent_queue.repository import LocalRepository
from cloudagent_storage.errors import CloudAgentError
from cloudagent_storage.records import Task

__all__ = ["Argument", "Broken", "Prompt", "Prompts", "built_in"]

log = logging.getLogger(__name__)

VALUE_LIMIT = 10_000
"""Characters of one argument."""
COMPLETIONS_MAX = 100
"""As many as the protocol lets one answer have."""
COMPLETE_WITHIN_S = 3.0
"""Somebody is typing."""
PARENTS_SEARCHED = 50
WORDS_MAX = 40
"""Of one line, in a client that makes each word an argument."""


class Prompts:
    """The prompts that a caller has, read anew each time: files come and go."""

    def __init__(self, home: Path, operations: Mapping[str, Operation]) -> None:
        """`home` is the data folder."""
        self._home = home
        self._operations = operations
        self._told: set[tuple[str, str]] = set()

    def of(self, caller: Caller) -> Mapping[str, Prompt]:
        """By name: the built-in ones, the data folder's, and for a local caller the repository's. Earlier ones win."""
        found = dict(built_in())
        for place, name, prompt in self._own(caller):
            if isinstance(prompt, Broken):
                self._tell(place, name, str(prompt))
            elif name in found:
                self._tell(place, name, "has the name of another prompt, which stays")
            else:
                found[name] = prompt
        return found

    def broken(self, caller: Caller) -> list[str]:
        """What is wrong with files, for `ca doctor`: a sentence each."""
        names, said = set(built_in()), list[str]()
        for place, name, prompt in self._own(caller):
            if isinstance(prompt, Broken):
                said.append(f"{name}.md in {place} {prompt}")
            elif name in names:
                said.append(f"{name}.md in {place} has the name of another prompt, which stays")
            names.add(name)
        return said

    def fill(self, caller: Caller, name: str, arguments: Mapping[str, str]) -> tuple[Prompt, str]:
        """A prompt and its text. Raises `MCPError` for one that is not there, and for arguments that do not fit."""
        prompt = self.of(caller).get(name)
        if prompt is None:
            raise MCPError(code=INVALID_PARAMS, message="There is no prompt of that name; prompts/list has them.")
        arguments = _whole(prompt, arguments)
        known = [argument.name for argument in prompt.arguments]
        if not set(arguments) <= {*known}:
            told = f"They are: {', '.join(known)}." if known else "It has none."
            raise MCPError(code=INVALID_PARAMS, message=f"The prompt {name} has no such argument. {told}")
        given = {key: clean(value).strip() for key, value in arguments.items()}
        if too_long := [key for key, value in given.items() if len(value) > VALUE_LIMIT]:
            raise MCPError(
                code=INVALID_PARAMS, message=f"The argument {too_long[0]} has more than {VALUE_LIMIT} characters."
            )
        if missing := [a.name for a in prompt.arguments if a.required and not given.get(a.name)]:
            raise MCPError(code=INVALID_PARAMS, message=f"The prompt {name} needs the argument {missing[0]}.")
        return prompt, prompt.fill(given)

    async def complete(self, caller: Caller, prompt_name: str, argument: str, value: str) -> list[str]:
        """What may be meant by the beginning of an argument, the likeliest first. Never an error: somebody is typing.

        By the argument's name, so that a user's own prompts have it, too.
        """
        prompt = (await in_thread(lambda: self.of(caller))).get(prompt_name)
        if prompt is None or argument not in {known.name for known in prompt.arguments}:
            return []
        found: list[tuple[str, str]] = []
        with anyio.move_on_after(COMPLETE_WITHIN_S):
            try:
                match argument:
                    case "task" | "task_id":
                        found = [(task.task_id, task.title) for task in await self._tasks(caller)]
                    case "verify":
                        found = [(text, "") for task in await self._tasks(caller) if (text := _verify_of(task))]
                    case "repository":
                        here = await in_thread(lambda: _addresses(caller))
                        found = [(name, "") for name in [*here, *[t.repository for t in await self._tasks(caller)]]]
                    case "branch" | "base" | "base_ref" | "pull_request" | "run":
                        found = [(name, "") for name in await in_thread(lambda: _branches(caller))]
                    case _:
                        pass
            except CloudAgentError as error:
                log.warning("nothing to complete %s with: %s", argument, error)
        return _best(found, value)

    def _own(self, caller: Caller) -> Iterator[tuple[str, str, Prompt | Broken]]:
        for name, prompt in read_folder(self._home / "prompts", trusted=True):
            yield "the data folder", name, prompt
        top = _top_of(caller.folder) if caller.local and caller.folder is not None else None
        if top is not None:
            for name, prompt in read_folder(top, trusted=False):
                yield "the repository", name, prompt

    def _tell(self, place: str, name: str, what: str) -> None:
        """Once: files are read whenever a client asks."""
        if (name, what) not in self._told and len(self._told) < 1000:
            self._told.add((name, what))
            log.warning("the prompt file %s.md in %s %s", name, place, what)

    async def _tasks(self, caller: Caller) -> Sequence[Task]:
        return (await self._operations["list_tasks"].call(caller, {"limit": 100})).tasks


def words_of(prompt: Prompt) -> Sequence[Argument]:
    """Its arguments for Claude Code (2.1), which gives each word that is typed to the next one and drops the rest.

    So that the whole line arrives, one argument is followed by others for its further words; `_whole` puts them
    together again. It is the last of those that a user has to give, or else the first; and what could follow it is
    told in its words.
    """
    if not prompt.arguments:
        return []
    needed = [place for place, argument in enumerate(prompt.arguments) if argument.required]
    place = len(prompt.arguments) - 1 if prompt.positional else needed[-1] if needed else 0
    more = [f"{prompt.arguments[place].name}_{number}" for number in range(2, WORDS_MAX - place + 1)]
    return [*prompt.arguments[: place + 1], *(Argument(name=name) for name in more)]


def _whole(prompt: Prompt, arguments: Mapping[str, str]) -> Mapping[str, str]:
    """The arguments, with the words of one that came as several put together."""
    whole = dict(arguments)
    for argument in prompt.arguments:
        more = [whole.pop(name) for n in range(2, WORDS_MAX + 1) if (name := f"{argument.name}_{n}") in whole]
        if more:
            whole[argument.name] = " ".join([whole.get(argument.name, ""), *more])
    return whole


def shown(prompt: Prompt, *, client: str | None = None) -> PromptShown:
    """A prompt as that client sees it in the list."""
    arguments = words_of(prompt) if client == "claude-code" else prompt.arguments
    return PromptShown(
        name=prompt.name,
        title=prompt.title,
        description=prompt.description,
        arguments=[
            ArgumentShown(name=argument.name, description=argument.description, required=argument.required)
            for argument in arguments
        ],
    )


@cache
def built_in() -> Mapping[str, Prompt]:
    """The prompts that come with the product, by name."""
    here = resources.files(__name__)
    said = {
        "{{" + file.name.removesuffix(".md") + "}}": file.read_text("utf-8").strip()
        for file in here.joinpath("shared").iterdir()
    }
    found: dict[str, Prompt] = {}
    for file in sorted(here.joinpath("built_in").iterdir(), key=lambda file: file.name):
        text = file.read_text("utf-8")
        for place, words in said.items():
            text = text.replace(place, words)
        name = file.name.removesuffix(".md")
        found[name] = parse(name, text.encode())
    return found


def _top_of(folder: Path) -> Path | None:
    """The top of the repository that a folder lies in."""
    for place in [folder, *folder.parents][:PARENTS_SEARCHED]:
        if (place / ".git").exists():
            return place
    return None


def _verify_of(task: Task) -> str | None:
    return task.result.verify.command if task.result and task.result.verify else None


def _branches(caller: Caller) -> list[str]:
    """Those of the repository here, the latest first."""
    if not caller.local or caller.folder is None:
        return []
    repository = LocalRepository.find(caller.folder)
    listing = ["--sort=-committerdate", "--count=300", "--format=%(refname:lstrip=2)", "refs/heads", "refs/remotes"]
    names = repository.run("for-each-ref", *listing, timeout_s=COMPLETE_WITHIN_S).text.splitlines()
    return [name.removeprefix("origin/") for name in names if not name.endswith("/HEAD")]


def _addresses(caller: Caller) -> list[str]:
    """Of the remotes of the repository here, without what may be a password."""
    if not caller.local or caller.folder is None:
        return []
    repository = LocalRepository.find(caller.folder)
    found = repository.run("config", "--get-regexp", r"^remote\..*\.url$", ok=(0, 1)).text.splitlines()
    return [address for line in found if "@" not in (address := line.partition(" ")[2]) or "://" not in address]


def _best(found: Sequence[tuple[str, str]], value: str) -> list[str]:
    """The candidates that begin with it, and then those that hold it, or whose other name does; each once."""
    wanted = value.strip().casefold()
    names = {name: other for name, other in reversed(found) if clean(name) == name and "\n" not in name}
    order = [name for name in dict(found) if name in names]
    begins = [name for name in order if name.casefold().startswith(wanted)]
    holds = [name for name in order if wanted in name.casefold() or wanted in names[name].casefold()]
    return list(dict.fromkeys([*begins, *holds]))[:COMPLETIONS_MAX]
