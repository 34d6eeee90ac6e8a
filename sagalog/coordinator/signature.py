"""What a handler's annotations say: the command it takes, what else it wants, what it returns."""

from __future__ import annotations

import collections.abc
import inspect
import types
import typing
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias, TypeVar

from sagalog.coordinator.commands import Command, StepInfo
from sagalog.errors import PayloadError, UnusableHandler, where
from sagalog.payload import decode_as
from sagalog.plain import plain_check, unchangeable_check

Wanted: TypeAlias = Literal["cmd", "info", "session"]
NOT_SAID: Any = inspect.Parameter.empty
_NONE = type(None)


@dataclass(frozen=True, slots=True)
class Signature:
    """A handler's parameters, in order, and its annotations.

    Attributes:
        wants: What to call it with.
        session: The class of the session that it is given, or None.
        cmd_type: The command's class.
        returns: The annotation of what it returns, or else what its command says by `Command[...]`, or `NOT_SAID`.
        is_async: Whether calling it gives an awaitable.
        returns_list: Whether it returns a list of events, as annotated.
        answers_plainly: Tells of an answer whether the log will surely give it back as it is.
        asks_unchangeably: The same of a command that its handler cannot change.
    """

    wants: tuple[Wanted, ...]
    session: Any
    cmd_type: type[Any]
    returns: Any
    is_async: bool
    returns_list: bool
    answers_plainly: Callable[[Any], bool]
    asks_unchangeably: Callable[[Any], bool]

    def events_of(self, returned: Any) -> list[Any]:
        """What a handler returned, as the list that the log holds."""
        if returned is None:
            return []
        if isinstance(returned, list) or (self.returns_list and isinstance(returned, tuple)):
            return list(returned)
        return [returned]


def name_of(function: Callable[..., Any]) -> str:
    """A function's name for messages."""
    return getattr(function, "__qualname__", None) or type(function).__name__


def shown(annotation: Any) -> str:
    """An annotation for messages."""
    return annotation.__name__ if isinstance(annotation, type) else str(annotation)


def is_async(function: Callable[..., Any]) -> bool:
    """Whether calling it gives an awaitable."""
    call = getattr(function, "__call__", None)  # noqa: B004 - an object with an async __call__
    return inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(call)


def resolved(function: Callable[..., Any], names: Mapping[str, Any]) -> inspect.Signature:
    """A signature with its annotations as objects.

    Args:
        function: Whose.
        names: What the place of registration knows besides the function's own globals: classes local to a function.

    Raises:
        UnusableHandler: An annotation cannot be read.
    """
    try:
        return inspect.signature(function, eval_str=True, locals=dict(names))
    except (NameError, SyntaxError, TypeError, ValueError, AttributeError) as error:
        raise UnusableHandler(
            name_of(function), f"its annotations cannot be read ({error})", hint="Import what they name at run time."
        ) from error


def refuse_generator(function: Callable[..., Any], asked: str) -> None:
    """A function that yields does nothing when it is called.

    Raises:
        UnusableHandler: It does.
    """
    if any(
        yields(called)
        for called in (function, getattr(function, "__call__", None))  # noqa: B004 - an object with such a __call__
        for yields in (inspect.isgeneratorfunction, inspect.isasyncgenfunction)
    ):
        raise UnusableHandler(asked, "it yields, and nothing would run it", hint="Return what it yields.")


def refuse_keyword_only(parameters: Iterable[inspect.Parameter], asked: str) -> None:
    """A function is called by position.

    Raises:
        UnusableHandler: It could not be.
    """
    for parameter in parameters:
        if parameter.kind is inspect.Parameter.KEYWORD_ONLY:
            raise UnusableHandler(
                asked, f"its parameter {parameter.name!r} is keyword-only", hint="Take it by position."
            )


def read_handler(function: Callable[..., Any], names: Mapping[str, Any]) -> Signature:
    """What a handler's annotations say.

    Raises:
        UnusableHandler: No parameter is a command, or one is nothing that a handler is given.
    """
    signature = resolved(function, names)
    refuse_generator(function, name_of(function))
    wants: list[Wanted] = []
    session_type: Any = None
    cmd_type: type[Any] | None = None
    passed_over: str | None = None
    for parameter in signature.parameters.values():
        kind = parameter.annotation
        if without_none(kind) is StepInfo:
            wants.append("info")
        elif (session := _session_of(kind)) is not None:
            wanted = "AsyncSession" if is_async(function) else "Session"
            if session != wanted:
                raise UnusableHandler(
                    name_of(function),
                    f"its parameter {parameter.name!r} is a {session}, and an async function is given an AsyncSession, "
                    "any other one a Session",
                    hint=f"Annotate it as {wanted}.",
                )
            wants.append("session")
            session_type = kind
        elif (
            cmd_type is None
            and kind is not NOT_SAID
            and isinstance(kind, type)
            and parameter.kind is not inspect.Parameter.KEYWORD_ONLY
        ):
            cmd_type = kind
            wants.append("cmd")
        elif parameter.default is NOT_SAID and parameter.kind not in _VARIADIC:
            raise UnusableHandler(
                name_of(function),
                f"nothing says what its parameter {parameter.name!r} is"
                if kind is NOT_SAID
                else f"its parameter {parameter.name!r} is neither a command's class, StepInfo nor a Session",
                hint="Annotate it: def charge(cmd: ChargeCard, step: StepInfo) -> CardCharged.",
            )
        else:
            passed_over = passed_over or parameter.name
            continue
        if passed_over is not None:
            raise UnusableHandler(
                name_of(function),
                f"its parameter {parameter.name!r} comes after {passed_over!r}, which it is not given",
                hint="Put what a handler is given first: the command, StepInfo, a Session.",
            )
        refuse_keyword_only((parameter,), name_of(function))
    if cmd_type is None:
        raise UnusableHandler(name_of(function), "it takes no command", hint="Annotate its first parameter.")
    said = None if never_returns(signature.return_annotation) else signature.return_annotation
    returns = event_type(cmd_type) if said is NOT_SAID else said
    return Signature(
        tuple(wants),
        session_type,
        cmd_type,
        returns,
        is_async(function),
        returns_list=is_list(without_none(returns)),
        answers_plainly=_answer_check(returns),
        asks_unchangeably=unchangeable_check(cmd_type),
    )


def _answer_check(returns: Any) -> Callable[[Any], bool]:
    """One event is read back as it is; of a list, or where nothing is annotated, that depends on how many there are."""
    one = without_none(returns)
    return plain_check(None if returns is NOT_SAID or is_list(one) else one)


_VARIADIC = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)


def _session_of(kind: Any) -> str | None:
    """Which of SQLAlchemy's two kinds of session an annotation is; None if it is none."""
    for base in kind.__mro__ if isinstance(kind, type) else ():
        if base.__module__.startswith("sqlalchemy") and base.__name__ in ("Session", "AsyncSession"):
            return str(base.__name__)
    return None


def never_returns(annotation: Any) -> bool:
    """Whether a function always raises."""
    return annotation in (typing.NoReturn, typing.Never)


def takes_none(annotation: Any) -> bool:
    """Whether an annotation admits None."""
    if annotation is None or annotation is _NONE or annotation is Any:
        return True
    origin = typing.get_origin(annotation)
    if origin in (typing.Union, types.UnionType):
        return any(takes_none(part) for part in typing.get_args(annotation))
    return False


def without_none(annotation: Any) -> Any:
    """The annotation of what is there, if something is."""
    annotation = _named(annotation)
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        parts = [part for part in typing.get_args(annotation) if part is not _NONE]
        return parts[0] if len(parts) == 1 else typing.Union[tuple(parts)]  # noqa: UP007 - made at run time
    return annotation


def is_list(annotation: Any) -> bool:
    """Whether an annotation means several events."""
    one = _named(annotation)
    return (typing.get_origin(one) or one) in _LISTS


def is_lazy(annotation: Any) -> bool:
    """Whether an annotation means something that is used up by reading it."""
    one = _named(annotation)
    return (typing.get_origin(one) or one) in _LAZY


def _named(annotation: Any) -> Any:
    """What an alias, a NewType, or an annotation with more to it stands for."""
    while True:
        if typing.get_origin(annotation) is typing.Annotated:
            annotation = typing.get_args(annotation)[0]
        elif isinstance(annotation, typing.NewType):
            annotation = annotation.__supertype__
        elif type(annotation).__name__ == "TypeAliasType":  # of typing from Python 3.12 on, or of typing_extensions
            annotation = annotation.__value__
        else:
            return annotation


def mixes_lists(annotation: Any) -> bool:
    """Whether an annotation means one event, or a list of them: the log could not tell which it was."""
    one = without_none(annotation)
    parts = typing.get_args(one) if typing.get_origin(one) in (typing.Union, types.UnionType) else ()
    return any(is_list(part) for part in parts)


_LISTS = (list, collections.abc.Sequence, collections.abc.MutableSequence, collections.abc.Collection)
_LAZY = (
    collections.abc.Iterable,
    collections.abc.Iterator,
    collections.abc.AsyncIterable,
    collections.abc.AsyncIterator,
)


def event_type(cmd_type: type[Any]) -> Any:
    """What a command class says that its handler returns, by `Command[...]`; `NOT_SAID` if it does not."""
    chosen: dict[Any, Any] = {}  # what stands for the type variables of generic classes between
    for base in cmd_type.__mro__:
        described = getattr(base, "__pydantic_generic_metadata__", None)
        if not described or not described["args"]:
            continue
        args = [_filled_in(arg, chosen) for arg in described["args"]]
        if described["origin"] is Command:
            return NOT_SAID if _variables(args[0]) else args[0]
        chosen.update(zip(described["origin"].__pydantic_generic_metadata__["parameters"], args, strict=False))
    return NOT_SAID


def _filled_in(annotation: Any, chosen: Mapping[Any, Any]) -> Any:
    if isinstance(annotation, TypeVar):
        return chosen.get(annotation, annotation)
    variables = _variables(annotation)
    return annotation[tuple(chosen.get(one, one) for one in variables)] if variables else annotation


def _variables(annotation: Any) -> tuple[Any, ...]:
    if isinstance(annotation, TypeVar):
        return (annotation,)
    described = getattr(annotation, "__pydantic_generic_metadata__", None)
    found = described["parameters"] if described else getattr(annotation, "__parameters__", ())
    return tuple(found)


def reader_of(returns: Any) -> Callable[[str | None, int, int], Any]:
    """What reads a stored list of events as what the handler returned.

    Args:
        returns: The handler's annotation, or `NOT_SAID`.

    Returns:
        A function of the stored JSON, and of the saga and step that messages name; it raises `PayloadError` if the
        JSON does not fit the annotation.
    """
    unsaid = returns is NOT_SAID or returns is Any
    kind = Any if unsaid else without_none(returns)
    if kind is None or kind is _NONE:
        return lambda text, saga_id, step_index: None
    returns_list = is_list(kind)
    held = kind if returns_list else list[kind]  # type: ignore[valid-type]

    def read(text: str | None, saga_id: int, step_index: int) -> Any:
        if text is None:
            return [] if returns_list else None  # a person said that it succeeded
        events = decode_as(held, text, "output_json", saga_id, step_index)
        if returns_list or (unsaid and len(events) > 1):
            return events
        if len(events) > 1:
            raise PayloadError(
                f"reading {where(saga_id, step_index)}",
                f"there are {len(events)} events, and its handler says that it returns one",
                saga_id=saga_id,
                step_index=step_index,
                found=str(len(events)),
                hint=f"Annotate what the handler returns as a list: -> list[{getattr(kind, '__name__', kind)}].",
            )
        return events[0] if events else None

    return read
