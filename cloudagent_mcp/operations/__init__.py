"""Operations: what the product does, each written once and offered as an MCP tool, a REST route and a client call.

An operation is a method marked with `@operation`. Its signature is its schema: keyword-only parameters with
`Annotated[type, Field(description=…)]`; its docstring's first paragraph is its description.
"""

from __future__ import annotations

import difflib
import inspect
import unicodedata
from collections.abc import Awaitable, Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar, cast, get_type_hints

import anyio.to_thread
from pydantic import BaseModel, ConfigDict, Field, ValidationError, create_model

from cloudagent_storage.errors import (
    CloudAgentError,
    DatabaseBusy,
    InvalidCharacter,
    InvalidInput,
    InvalidUnicode,
    MissingArgument,
    OutOfRange,
    UnknownArgument,
    WrongType,
)
from cloudagent_storage.records import LOCAL_ACCOUNT

Method = Literal["GET", "POST", "PATCH", "DELETE"]
T = TypeVar("T")

THREADS = 20
"""Calls that one process works on at once: as many as the store has connections, so that no thread waits for one."""
THREAD_WAIT_S = 4.0
"""How long a call waits for a thread. With the store's own patience it is answered within ten seconds."""


@dataclass(frozen=True)
class Caller:
    """Who calls, and from where."""

    account_id: str = LOCAL_ACCOUNT
    local: bool = False
    """On this machine, as its user: folders may be named, and results written."""
    operator: bool = False
    """May see to the installation: its user on this machine, or whoever holds the server's own key."""
    folder: Path | None = None
    """Where a local caller works."""
    environment: Mapping[str, str] = field(default_factory=dict[str, str], repr=False)
    """The variables from which an agent's credentials are taken."""
    progress: Callable[[float, float, str], Awaitable[None]] | None = None
    """Told, while a call waits, how much of its time has passed, of how much, and what happens."""


@dataclass(frozen=True)
class Marked:
    """What `@operation` says of a method."""

    method: Method
    path: str
    """Empty where REST has no route, as two of its others do the same."""
    title: str
    read_only: bool
    destructive: bool
    idempotent: bool
    open_world: bool
    status: int
    tool: bool
    """Is it one that models are told of?"""


@dataclass(frozen=True)
class Operation:
    """One operation, ready to be called with arguments that nobody has checked yet."""

    name: str
    description: str
    marked: Marked
    arguments: type[BaseModel]
    answer: Any
    """The type that it returns: a record, or str for text that is meant to be read."""
    call_checked: Callable[..., Any] = field(repr=False)

    async def call(self, caller: Caller, arguments: Mapping[str, Any]) -> Any:
        """Check the arguments and do it. Raises only errors of the error tree, for whatever is sent."""
        checked = check_arguments(self.arguments, arguments)
        if inspect.iscoroutinefunction(self.call_checked):
            return await self.call_checked(caller, **checked)
        return await in_thread(lambda: self.call_checked(caller, **checked))

    @property
    def schema(self) -> dict[str, Any]:
        """The JSON schema of its arguments, without the noise that pydantic adds."""
        return plain_schema(self.arguments.model_json_schema(), of_arguments=True)


async def in_thread(function: Callable[[], T]) -> T:
    """Call a function that may wait for the database on a thread. Raises `DatabaseBusy` when none is free in time.

    Who comes while all are in use waits here, without a thread and not for ever.
    """
    threads, me = anyio.to_thread.current_default_thread_limiter(), object()
    threads.total_tokens = THREADS
    try:
        with anyio.fail_after(THREAD_WAIT_S):
            await threads.acquire_on_behalf_of(me)
    except TimeoutError:
        raise DatabaseBusy() from None
    try:
        return await anyio.to_thread.run_sync(function, limiter=anyio.CapacityLimiter(1))
    finally:
        threads.release_on_behalf_of(me)


def operation(
    method: Method,
    path: str,
    *,
    title: str,
    read_only: bool = False,
    destructive: bool = False,
    idempotent: bool = False,
    open_world: bool = False,
    status: int = 200,
    tool: bool = True,
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Mark a method as an operation. The flags are MCP's tool annotations; `status` is REST's on success."""
    marked = Marked(method, path, title, read_only, destructive, idempotent, open_world, status, tool)

    def mark(function: Callable[..., Any]) -> Callable[..., Any]:
        function.__operation__ = marked  # pyright: ignore[reportFunctionMemberAccess]
        return function

    return mark


def operations_of(*nouns: object) -> dict[str, Operation]:
    """Every operation of these objects, by name, in the order in which they are written."""
    return {found.name: found for noun in nouns for found in _find(noun)}


def marks_of(*kinds: type) -> dict[str, Marked]:
    """How each operation of these classes is reached, by name."""
    found = {name: getattr(function, "__operation__", None) for kind in kinds for name, function in vars(kind).items()}
    return {name: marked for name, marked in found.items() if isinstance(marked, Marked)}


def _find(noun: object) -> Iterator[Operation]:
    for name, function in vars(type(noun)).items():
        marked = getattr(function, "__operation__", None)
        if not isinstance(marked, Marked):
            continue
        hints = get_type_hints(function, include_extras=True)
        parameters = [p for p in inspect.signature(function).parameters.values() if p.kind is p.KEYWORD_ONLY]
        fields: dict[str, Any] = {
            p.name: (hints[p.name], Field(...) if p.default is p.empty else Field(default=p.default))
            for p in parameters
        }
        config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False, hide_input_in_errors=True)
        arguments = create_model(name, __config__=config, **fields)
        description = (inspect.getdoc(function) or "").partition("\n\n")[0].replace("\n", " ")
        yield Operation(name, description, marked, arguments, hints["return"], getattr(noun, name))


def check_arguments(model: type[BaseModel], arguments: object) -> dict[str, Any]:
    """The arguments, checked. Raises an `InvalidInput` that names the field and its limit, and never the value."""
    if not isinstance(arguments, Mapping):
        raise WrongType("The arguments are not an object with names and values.")
    given = cast("Mapping[str, Any]", arguments)
    for name in given:
        if name not in model.model_fields:
            near = difflib.get_close_matches(str(name), model.model_fields, n=1)
            known = f"The arguments are: {', '.join(model.model_fields)}." if model.model_fields else "It takes none."
            raise UnknownArgument(
                remedy=f"Did you mean {near[0]}?" if near else known,
                field=_shown(str(name)),
            )
    for name, value in given.items():
        check_text(name, value)
    try:
        checked = model.model_validate(given)
    except ValidationError as error:
        raise _refusal(error) from None
    return {name: getattr(checked, name) for name in model.model_fields}


def check_text(field_name: str, value: object) -> None:
    """No text anywhere in `value` holds a NUL or half a surrogate pair: databases and programs choke on them."""
    if isinstance(value, str):
        if (position := value.find("\0")) >= 0:
            raise InvalidCharacter(f"The text holds a NUL character at position {position}.", field=field_name)
        try:
            value.encode()
        except UnicodeEncodeError:
            raise InvalidUnicode(field=field_name) from None
    elif isinstance(value, Mapping):
        for key, item in cast("Mapping[Any, Any]", value).items():
            check_text(field_name, key)
            check_text(field_name, item)
    elif isinstance(value, list | tuple):
        for item in cast("list[Any]", value):
            check_text(field_name, item)


def _refusal(error: ValidationError) -> CloudAgentError:
    first = error.errors(include_url=False, include_input=False)[0]
    name = ".".join(str(part) for part in first["loc"][:1])
    kind, context = first["type"], first.get("ctx", {})
    if kind == "extra_forbidden":  # within an entry of a list; its name is not ours
        return UnknownArgument(f"An entry of {name} has a field that there is not.", field=name)
    if kind == "missing" and len(first["loc"]) > 1:
        return MissingArgument(f"An entry of {name} has no {first['loc'][-1]}.", field=name)
    if kind == "missing":
        return MissingArgument(f"The argument {name} is missing.", field=name)
    bounds = {
        "greater_than_equal": ("at least", "ge"),
        "greater_than": ("more than", "gt"),
        "less_than_equal": ("at most", "le"),
        "less_than": ("less than", "lt"),
        "string_too_short": ("at least this many characters:", "min_length"),
        "string_too_long": ("at most this many characters:", "max_length"),
        "too_short": ("at least this many items:", "min_length"),
        "too_long": ("at most this many items:", "max_length"),
    }
    if kind in bounds:
        words, key = bounds[kind]
        return OutOfRange(f"{name} must be {words} {context[key]}.", field=name)
    if kind == "literal_error":
        return OutOfRange(f"{name} must be one of {context['expected']}.", field=name)
    if kind == "finite_number":
        return OutOfRange(f"{name} must be a finite number.", field=name)
    if kind == "string_pattern_mismatch":
        return InvalidInput(f"{name} has the wrong form.", field=name)
    wanted = kind.partition("_")[0]
    words = {"int": "a whole number", "float": "a number", "string": "text", "bool": "true or false", "list": "a list"}
    return WrongType(f"{name} must be {words.get(wanted, 'of another type')}.", field=name)


def _shown(name: str) -> str:
    """An unknown argument's name, as far as it can be shown safely."""
    return "".join(c if unicodedata.category(c)[0] in "LN" or c in "_-" else "?" for c in name[:40])


UNTOLD = frozenset(
    {"additionalProperties", "minLength", "maxLength", "minItems", "maxItems", "pattern", "writeOnly"}
    | {"minimum", "exclusiveMinimum"}
)
TOLD_MAX = 5000
"""No model comes near a larger maximum."""


def plain_schema(schema: Any, *, of_arguments: bool) -> Any:
    """A schema without `title`s: a model needs none, and pays for each.

    Of arguments, "X or null" becomes X as well, as they may be left out anyway; and what no model gets near, such as
    the length of a text or a number below one, is told in the refusal of whoever does. Of answers, which leave
    nothing out, defaults are left out, and "X or null" is one type where it can be.
    """
    if isinstance(schema, list):
        return [plain_schema(item, of_arguments=of_arguments) for item in cast("list[Any]", schema)]
    if not isinstance(schema, dict):
        return schema
    plain = cast("dict[str, Any]", schema)
    if of_arguments:
        kept = [option for option in cast("list[Any]", plain.get("anyOf", [])) if option != {"type": "null"}]
        if len(kept) == 1:
            plain = {**kept[0], **{name: value for name, value in plain.items() if name != "anyOf"}}
    else:
        match plain.get("anyOf"):
            case [{"type": str(kind), **rest}, {"type": "null"}] if "enum" not in rest:
                plain = {"type": [kind, "null"], **rest, **{k: value for k, value in plain.items() if k != "anyOf"}}
            case _:
                pass
    left_out = {"title", *(UNTOLD if of_arguments else ("default",))}
    if of_arguments and isinstance(most := plain.get("maximum"), int | float) and most > TOLD_MAX:
        left_out.add("maximum")
    return {
        name: plain_schema(value, of_arguments=of_arguments)
        for name, value in plain.items()
        # An argument may have such a name; its value is a schema then.
        if isinstance(value, dict) or not (name in left_out or (of_arguments and name == "default" and not value))
    }
