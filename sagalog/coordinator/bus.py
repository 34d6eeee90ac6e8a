"""The command bus: which handler does a command, how it is undone, how often it is tried."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias, TypeVar, overload

from sagalog.coordinator.commands import Retry
from sagalog.coordinator.signature import (
    NOT_SAID,
    Signature,
    event_type,
    is_async,
    is_lazy,
    mixes_lists,
    name_of,
    read_handler,
    reader_of,
    refuse_generator,
    refuse_keyword_only,
    resolved,
    shown,
    takes_none,
    without_none,
)
from sagalog.errors import StepRejected, UnusableHandler
from sagalog.moments import is_seconds
from sagalog.payload import check_text, decode_as, unreadable

F = TypeVar("F", bound=Callable[..., Any])
OnUnknown: TypeAlias = Literal["stop", "compensate"]
DEFAULT_TIMEOUT = 300.0
DEFAULT_SETTLE = 2.0
RESERVED = "sagalog."
"""What the names of the coordinator's own steps begin with."""


@dataclass(frozen=True, slots=True)
class Handler:
    """A registered handler; what `CommandBus.handler` was told, and what its annotations say."""

    function: Callable[..., Any]
    name: str
    signature: Signature
    rejects: tuple[type[BaseException], ...]
    timeout: float
    settle: float
    retry: Retry | None
    on_unknown: OnUnknown | None
    read_only: bool
    pivot: bool
    transactional: bool
    _read_output: Callable[[str | None, int, int], Any]

    @property
    def cmd_type(self) -> type[Any]:
        """The class of its command."""
        return self.signature.cmd_type

    @property
    def does_nothing_unless_it_ends(self) -> bool:
        """Whether a try whose end the log does not hold has changed nothing."""
        return self.transactional or self.read_only

    def read_cmd(self, text: str, saga_id: int, step_index: int) -> Any:
        """The command that the log holds."""
        return decode_as(self.cmd_type, text, "cmd_json", saga_id, step_index)

    def read_output(self, text: str | None, saga_id: int, step_index: int) -> Any:
        """What the log holds of the handler's answer, as the handler returned it."""
        return self._read_output(text, saga_id, step_index)


@dataclass(frozen=True, slots=True)
class Compensation:
    """What derives the compensating command of a forward one."""

    function: Callable[[Any, Any], Any]
    output: Any
    returns: Any


class CommandBus:
    """Knows, for each command's class, its handler and how it is undone.

    Attributes:
        has_pivots: Whether a handler is one.
        revision: Another one after each registration.
    """

    def __init__(self) -> None:
        self._by_type: dict[type[Any], Handler] = {}
        self._by_name: dict[str, Handler] = {}
        self._compensations: dict[type[Any], Compensation] = {}
        self.has_pivots = False
        self.revision = 0

    @overload
    def handler(self, function: F, /) -> F: ...

    @overload
    def handler(
        self,
        /,
        *,
        name: str | None = None,
        rejects: type[BaseException] | tuple[type[BaseException], ...] = (),
        timeout: float | None = None,
        settle: float = DEFAULT_SETTLE,
        retry: Retry | None = None,
        on_unknown: OnUnknown | None = None,
        read_only: bool = False,
        pivot: bool = False,
        transactional: bool = False,
        idempotent: bool = False,
    ) -> Callable[[F], F]: ...

    def handler(
        self,
        function: Any = None,
        /,
        *,
        name: str | None = None,
        rejects: type[BaseException] | tuple[type[BaseException], ...] = (),
        timeout: float | None = None,
        settle: float = DEFAULT_SETTLE,
        retry: Retry | None = None,
        on_unknown: OnUnknown | None = None,
        read_only: bool = False,
        pivot: bool = False,
        transactional: bool = False,
        idempotent: bool = False,
    ) -> Any:
        """Register what does a command; the command's class is the parameter's annotation.

        Args:
            function: The handler; it returns one event, a list of them, or None. Sync or async.
            name: The command's name in the log; its class's name if none is given.
            rejects: Exceptions that say that nothing was done, besides `StepRejected`.
            timeout: Seconds that one try may take; 300 if none is given.
            settle: Seconds that a request may still land after its handler gave up.
            retry: A try whose outcome is not known is repeated so; the handler promises that a repetition under the
                same key does no harm.
            on_unknown: What becomes of a step that stays in doubt: "stop" leaves it to a person, "compensate" undoes
                it as if it had happened. The coordinator's own setting if none is given.
            read_only: It changes nothing, so there is nothing to undo.
            pivot: It cannot be undone: once it succeeded or is in doubt, the saga only goes forward.
            transactional: It gets a Session on the log's database, and its writes commit with its step.
            idempotent: It takes no `StepInfo`, and a repetition does no harm all the same.

        Returns:
            The function, unchanged.

        Raises:
            UnusableHandler: Annotations and arguments do not fit each other, or the name is taken.
        """
        names = _names_at_call()

        def register(handled: Any) -> Any:
            signature = read_handler(handled, names)
            self._add(
                Handler(
                    function=handled,
                    name=check_text(name or signature.cmd_type.__name__, "command's name", name_of(handled)),
                    signature=signature,
                    rejects=(StepRejected, *(rejects if isinstance(rejects, tuple | list) else (rejects,))),
                    timeout=DEFAULT_TIMEOUT if timeout is None else timeout,
                    settle=settle,
                    retry=retry,
                    on_unknown=on_unknown,
                    read_only=read_only,
                    pivot=pivot,
                    transactional=transactional,
                    _read_output=reader_of(signature.returns),
                ),
                idempotent=idempotent,
            )
            return handled

        return register if function is None else register(function)

    def compensation(self, cmd_type: type[Any]) -> Callable[[F], F]:
        """Register what derives the command that undoes one of `cmd_type`, from what the log holds of it.

        Args:
            cmd_type: The forward command's class.

        Returns:
            A decorator of ``(cmd, output) -> compensating command``, which it returns unchanged. The function runs
            again at recovery: it must only derive.

        Raises:
            UnusableHandler: The class has one already, or the annotations do not fit.
        """
        names = _names_at_call()
        if not isinstance(cmd_type, type):
            raise UnusableHandler(
                f"compensation of {getattr(cmd_type, '__name__', repr(cmd_type))}",
                "that is no command's class",
                hint="Name the class of the command that is undone: @bus.compensation(ChargeCard).",
            )

        def register(function: F) -> F:
            asked = f"compensation of {cmd_type.__name__}"
            if cmd_type in self._compensations:
                raise UnusableHandler(asked, "it has one already", hint="One command is undone in one way.")
            signature = resolved(function, names)
            refuse_generator(function, asked)
            refuse_keyword_only(signature.parameters.values(), asked)
            annotations = [parameter.annotation for parameter in signature.parameters.values()]
            if is_async(function):
                raise UnusableHandler(asked, "it is async", hint="It only derives a command: write a plain def.")
            if len(annotations) != 2:
                raise UnusableHandler(
                    asked, f"it takes {len(annotations)} arguments", hint="It is called with (cmd, output)."
                )
            if annotations[0] not in (cmd_type, NOT_SAID, Any):
                raise UnusableHandler(
                    asked, f"its first parameter is a {annotations[0]}", hint=f"Annotate it as {cmd_type.__name__}."
                )
            made = Compensation(function, annotations[1], signature.return_annotation)
            handler = self._by_type.get(cmd_type)
            if handler is not None:
                _check_fit(handler, made)
            self._check_undo(made)
            self._compensations[cmd_type] = made
            self.revision += 1
            return function

        return register

    def handler_of(self, cmd: object) -> Handler:
        """The handler of a command.

        Raises:
            UnusableHandler: There is none.
        """
        handler = self._by_type.get(type(cmd))
        if handler is None and isinstance(cmd, type):
            raise UnusableHandler(
                f"dispatch of {cmd.__name__}", "it is a class, and no command", hint=f"Make one: {cmd.__name__}(...)."
            )
        if handler is None:
            raise UnusableHandler(
                f"dispatch of {type(cmd).__name__}",
                "no handler takes it",
                hint=f"Register one: @bus.handler def do(cmd: {type(cmd).__name__}).",
            )
        return handler

    def takes(self, cmd: object) -> bool:
        """Whether there is a handler of a command."""
        return type(cmd) in self._by_type

    def named(self, name: str) -> Handler | None:
        """The handler of the command of that name, or None."""
        return self._by_name.get(name)

    def compensation_of(self, handler: Handler) -> Compensation | None:
        """How a handler's command is undone, or None."""
        return self._compensations.get(handler.cmd_type)

    def check_undoable(self, handler: Handler) -> None:
        """A forward command says how it is undone.

        Raises:
            UnusableHandler: It says none.
        """
        if not (handler.read_only or handler.pivot or handler.cmd_type in self._compensations):
            raise UnusableHandler(
                f"dispatch of {handler.name}",
                "nothing says how it is undone",
                hint=f"Register @bus.compensation({handler.cmd_type.__name__}), or say read_only=True "
                "(nothing to undo) or pivot=True (cannot be undone).",
            )

    def _add(self, handler: Handler, *, idempotent: bool) -> None:
        _check_alone(handler, idempotent=idempotent)
        taken = self._by_name.get(handler.name) or self._by_type.get(handler.cmd_type)
        if taken is not None:
            raise UnusableHandler(
                name_of(handler.function),
                f"{name_of(taken.function)} handles the command {taken.name!r} already",
                hint="Give one of the two commands another name=.",
            )
        compensation = self._compensations.get(handler.cmd_type)
        if compensation is not None:
            _check_fit(handler, compensation)
        self._by_type[handler.cmd_type] = handler
        try:
            for made in self._compensations.values():
                self._check_undo(made)
        except UnusableHandler:
            del self._by_type[handler.cmd_type]
            raise
        self._by_name[handler.name] = handler
        self.has_pivots = self.has_pivots or handler.pivot
        self.revision += 1

    def _check_undo(self, compensation: Compensation) -> None:
        """What undoes is repeated under its key; it cannot itself be undone."""
        undo = self._by_type.get(compensation.returns) if isinstance(compensation.returns, type) else None
        if undo is not None and undo.on_unknown == "compensate":
            raise UnusableHandler(
                name_of(undo.function),
                'it undoes another command, so on_unknown="compensate" has no meaning',
                hint="An undo is tried again under its key, and then left to a person.",
            )


def _check_alone(handler: Handler, *, idempotent: bool) -> None:
    """What a handler's own arguments and annotations must be."""
    who = name_of(handler.function)
    wants = handler.signature.wants
    declared = event_type(handler.cmd_type)
    returns = handler.signature.returns
    problem = hint = ""
    if handler.name.startswith(RESERVED):
        problem, hint = f"names that begin with {RESERVED!r} are the coordinator's own", "Give another name=."
    elif not all(isinstance(kind, type) and issubclass(kind, Exception) for kind in handler.rejects):
        problem, hint = "rejects= holds what is no type of Exception", "Use rejects=(CardDeclined,)."
    elif handler.retry is not None and not isinstance(handler.retry, Retry):
        problem, hint = f"retry={handler.retry!r}", "Use retry=Retry(attempts=5)."
    elif not (is_seconds(handler.timeout) and (handler.settle == 0 or is_seconds(handler.settle))):
        problem, hint = (
            f"timeout={handler.timeout!r}, settle={handler.settle!r}",
            "Both are seconds, timeout above 0, at most ten years.",
        )
    elif handler.on_unknown not in (None, "stop", "compensate"):
        problem, hint = f"on_unknown={handler.on_unknown!r}", 'Use "stop" or "compensate".'
    elif handler.read_only and handler.pivot:
        problem, hint = "it is read_only and pivot", "What changes nothing needs no pivot."
    elif handler.on_unknown == "compensate" and (handler.read_only or handler.pivot):
        problem, hint = 'on_unknown="compensate", and nothing undoes it', 'Use on_unknown="stop".'
    elif handler.retry is not None and not (idempotent or handler.transactional or "info" in wants):
        problem = "retry= repeats it, and it does not take the idempotency key"
        hint = "Take step: StepInfo and send step.idempotency_key along, or say idempotent=True."
    elif handler.transactional and "session" not in wants:
        problem, hint = "it is transactional and takes no Session", "Add a parameter: session: Session."
    elif not handler.transactional and "session" in wants:
        problem, hint = "it takes a Session and is not transactional", "Say transactional=True."
    elif declared is not NOT_SAID and returns is not NOT_SAID and without_none(returns) != without_none(declared):
        problem = f"it returns {shown(returns)}, and {handler.cmd_type.__name__} says {shown(declared)}"
        hint = "Make the two the same."
    elif (why_not := unreadable(handler.cmd_type)) is not None:
        problem = f"its command, a {shown(handler.cmd_type)}, cannot be read back from the log: {why_not}"
        hint = "Make it a Pydantic model or a dataclass."
    elif returns not in (NOT_SAID, Any, None) and (why_not := unreadable(returns)) is not None:
        problem = f"what it returns, {shown(returns)}, cannot be read back from the log: {why_not}"
        hint = "Return a Pydantic model, a dataclass, what JSON holds, or a list of these."
    elif is_lazy(without_none(returns)):
        problem, hint = f"it returns {shown(returns)}, which can be read once", "Say that it returns a list."
    elif mixes_lists(returns):
        problem = f"it returns {shown(returns)}, and the log could not tell one event from a list of one"
        hint = "Say that it returns a list."
    if problem:
        raise UnusableHandler(who, problem, hint=hint)


def _check_fit(handler: Handler, compensation: Compensation) -> None:
    """A handler and what derives its undo."""
    asked = f"compensation of {handler.cmd_type.__name__}"
    output, returns = compensation.output, handler.signature.returns
    if handler.read_only or handler.pivot:
        kind = "read_only" if handler.read_only else "pivot"
        raise UnusableHandler(asked, f"its handler says {kind}", hint="Either it is undone, or it says so.")
    if handler.on_unknown == "compensate" and not (output is not NOT_SAID and takes_none(output)):
        raise UnusableHandler(
            asked,
            'its handler says on_unknown="compensate", and its output parameter does not admit None',
            hint="Of a step in doubt there may be no output: annotate it as X | None, and say what to do then.",
        )
    if NOT_SAID not in (output, returns) and Any not in (output, returns):
        held = None if returns is type(None) else returns
        if without_none(output) != without_none(held) and not (held is None and takes_none(output)):
            raise UnusableHandler(
                asked,
                f"its output parameter is {shown(output)}, and the handler returns {shown(returns)}",
                hint="Make the two the same.",
            )


def _names_at_call() -> Mapping[str, Any]:
    """The local names at the call of `handler` or `compensation`: annotations may name classes local to a function."""
    return sys._getframe(2).f_locals
