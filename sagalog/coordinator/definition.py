"""A saga as it was registered: its function, its version, what it takes and returns."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass
from typing import Any

from sagalog.coordinator.signature import (
    NOT_SAID,
    is_async,
    name_of,
    never_returns,
    refuse_generator,
    refuse_keyword_only,
    resolved,
    shown,
)
from sagalog.errors import PayloadError, UnusableHandler
from sagalog.moments import is_seconds
from sagalog.payload import check_text, decode, decode_as, encode, unreadable
from sagalog.plain import plain_check
from sagalog.read_back import check_had_back


@dataclass(frozen=True, slots=True)
class Definition:
    """A registered saga.

    Attributes:
        name: Its name in the log.
        function: What `SagaCoordinator.saga` decorated.
        version: Recorded with each saga that it starts.
        resumes: The versions whose sagas this function may go on with.
        timeout: Seconds after which a saga is undone, or None.
        takes_input: Whether the function takes an input besides the context.
        input_type: The input's annotation, or `NOT_SAID`.
        takes_plainly: Tells of an input whether the log will surely give it back as it is.
        returns: The annotation of its result, or `NOT_SAID`.
        answers_plainly: Tells of a result whether the log will surely give it back as it is.
    """

    name: str
    function: Callable[..., Any]
    version: int
    resumes: frozenset[int]
    timeout: float | None
    takes_input: bool
    input_type: Any
    takes_plainly: Callable[[Any], bool]
    returns: Any
    answers_plainly: Callable[[Any], bool]

    def input_of(self, given: tuple[Any, ...]) -> Any:
        """The input that the function was to be called with.

        Raises:
            UnusableHandler: It takes none, or one.
        """
        if len(given) != int(self.takes_input):
            raise UnusableHandler(
                f"run of {self.name}",
                f"it takes {int(self.takes_input)} input and was given {len(given)}",
                hint="An input of several values is one model.",
            )
        return given[0] if given else None

    def as_held(self, given: Any, text: str, asked: str) -> Any:
        """An input as whoever goes on with the saga will read it.

        Args:
            given: The input.
            text: What the log will hold of it.
            asked: "run" or "submit".

        Raises:
            UnusableHandler: The function takes none.
            PayloadError: It does not fit the function's annotation.
        """
        if not self.takes_input and given is not None:
            self.input_of((given,))
        if not self.takes_input or self.takes_plainly(given):
            return given
        if self.input_type in (NOT_SAID, Any):
            return decode(text, "input_json", None)
        return _had_back(self.input_type, given, text, f"{asked} of {self.name}", "input", "takes")

    def same_input(self, given: Any) -> Callable[[str], bool]:
        """Tells whether another text that the log holds is the same input: a set of strings looks otherwise elsewhere.

        Args:
            given: The input, as held.
        """

        def is_same(text: str) -> bool:
            try:
                return bool(self.read_input(text, 0) == given)
            except Exception:  # a class of the application's that cannot be read, or compared
                return False

        return is_same

    def result_as_held(self, result: Any, text: str, saga_id: int) -> Any:
        """A result as the log will give it back to whoever asks for it.

        Args:
            result: What the function returned.
            text: What the log will hold of it.
            saga_id: The saga.

        Raises:
            PayloadError: It does not fit the function's annotation.
        """
        if self.answers_plainly(result):
            return result
        if self.returns in (NOT_SAID, Any):
            return decode(text, "result_json", saga_id)
        return _had_back(self.returns, result, text, f"{self.name} (saga {saga_id})", "result", "returns")

    def read_input(self, text: str, saga_id: int) -> Any:
        """The input that the log holds, as the function takes it."""
        if self.input_type in (NOT_SAID, Any):
            return decode(text, "input_json", saga_id)
        return decode_as(self.input_type, text, "input_json", saga_id)

    def read_result(self, text: str | None, saga_id: int) -> Any:
        """The result that the log holds, as the function returned it."""
        if self.returns in (NOT_SAID, Any) or text is None:
            return decode(text, "result_json", saga_id)
        return decode_as(self.returns, text, "result_json", saga_id)


def _had_back(kind: Any, value: Any, text: str, asked: str, what: str, verb: str) -> Any:
    try:
        held = decode_as(kind, text, what, None)
    except PayloadError:
        problem = f"a {type(value).__name__} is no {what} of it"
        raise PayloadError(asked, problem, found=type(value).__name__, hint=f"It {verb} a {shown(kind)}.") from None

    def again(read: Any) -> Any:
        return decode_as(kind, encode(read, what), what, None)

    check_had_back(kind, value, held, again, f"{asked}, the {what}")
    return held


def _context_of(annotation: Any) -> str | None:
    """Which of the two contexts an annotation is, whose module stands above this one; None if it is none."""
    name = getattr(annotation, "__name__", None)
    ours = str(getattr(annotation, "__module__", "")).startswith("sagalog.")
    return {"SagaContext": "a SagaContext", "AsyncSagaContext": "an AsyncSagaContext"}.get(str(name)) if ours else None


def define(
    function: Callable[..., Any],
    names: Mapping[str, Any],
    *,
    name: str,
    version: int,
    timeout: float | None,
    resumes: tuple[int, ...],
    asynchronous: bool,
) -> Definition:
    """Check a saga's function and describe it.

    Raises:
        UnusableHandler: It does not take ``(ctx, input)``, or is async where it must not be, or the other way round.
    """
    asked = f"saga {name_of(function)}"
    check_text(name, "saga's name", asked)
    signature = resolved(function, names)
    refuse_generator(function, asked)
    parameters = list(signature.parameters.values())
    refuse_keyword_only(parameters, asked)
    takes_input = len(parameters) == 2
    input_type = parameters[1].annotation if takes_input else NOT_SAID
    returns = NOT_SAID if never_returns(signature.return_annotation) else signature.return_annotation
    wanted = "an AsyncSagaContext" if asynchronous else "a SagaContext"
    problem = hint = ""
    if not 1 <= len(parameters) <= 2:
        problem, hint = f"it takes {len(parameters)} arguments", "It is called with (ctx, input), or (ctx)."
    elif is_async(function) and not asynchronous:
        problem, hint = "it is async", "Register it with an AsyncSagaCoordinator."
    elif not is_async(function) and asynchronous:
        problem, hint = "it is not async", "Write async def, or register it with a SagaCoordinator."
    elif (given := _context_of(parameters[0].annotation)) not in (None, wanted):
        problem, hint = f"its context is annotated as {given}", f"It is given {wanted}."
    elif isinstance(version, bool) or not isinstance(version, int) or version < 0:
        problem, hint = f"version={version!r}", "A version is an int from 0."
    elif timeout is not None and not is_seconds(timeout):
        problem, hint = f"timeout={timeout!r}", "Seconds, above 0, or None for no end."
    elif not isinstance(resumes, tuple | list | set | frozenset) or not all(type(other) is int for other in resumes):
        problem, hint = f"resumes={resumes!r}", "Name versions: resumes=(1, 2)."
    elif input_type is not NOT_SAID and (why_not := unreadable(input_type)) is not None:
        problem = f"its input, a {shown(input_type)}, cannot be read back from the log: {why_not}"
        hint = "Make it a Pydantic model, a dataclass, or what JSON holds."
    elif returns is not NOT_SAID and (why_not := unreadable(returns)) is not None:
        problem = f"its result, {shown(returns)}, cannot be read back from the log: {why_not}"
        hint = "Return a Pydantic model, a dataclass, or what JSON holds."
    elif not isinstance(function, Hashable):
        problem, hint = "it cannot be looked up, for it is not hashable", "Register a function."
    if problem:
        raise UnusableHandler(asked, problem, hint=hint)
    return Definition(
        name=name,
        function=function,
        version=version,
        resumes=frozenset((version, *resumes)),
        timeout=timeout,
        takes_input=takes_input,
        input_type=input_type,
        takes_plainly=plain_check(input_type),
        returns=returns,
        answers_plainly=plain_check(returns),
    )
