"""A saga from its start to its end: the function runs, and is completed, or undone."""

from __future__ import annotations

from typing import Any

from sagalog.coordinator.definition import Definition
from sagalog.coordinator.dispatching import differs
from sagalog.coordinator.effects import Effect
from sagalog.coordinator.run import Run
from sagalog.coordinator.unwind import End, unwind, why
from sagalog.errors import LeaseLost, LogUnavailable, SagaFailed, UnusableHandler
from sagalog.log import owning
from sagalog.payload import encode
from sagalog.states import SagaState


class CallSaga(Effect[Any]):
    """Call a saga's function with a context of the shell's kind."""

    __slots__ = ("definition", "input", "run")

    def __init__(self, definition: Definition, run: Run, input: Any) -> None:
        self.definition = definition
        self.run = run
        self.input = input

    def call(self, context: Any) -> Any:
        """Call it."""
        definition = self.definition
        return definition.function(context, self.input) if definition.takes_input else definition.function(context)


class Waits(Exception):
    """A saga that recovery can do nothing for before a moment."""

    def __init__(self, end: End) -> None:
        self.end = end
        super().__init__(end.waits)


async def execute(run: Run, definition: Definition, input: Any) -> Any:
    """Run a saga's function and record how the saga ended.

    Returns:
        What the function returned.

    Raises:
        SagaFailed: It raised, was cancelled or late: with the outcome, from the cause.
        LeaseLost: Another executor took the saga over.
        LogUnavailable: The log stayed out of reach; recovery decides.
        Waits: Recovery has to leave it for now.
    """
    result: Any = None
    try:
        result = await _called(run, definition, input)
        run.refuse_stopped()
        run.over = True
        if run.calls:
            raise UnusableHandler(
                f"saga {run.saga_id} ({run.name})",
                "its function returned while a call of its context was under way",
                hint="Await each call, and join the threads that make them, before it returns.",
            )
        if run.replay:
            index = min(run.replay)
            raise run.stop(differs(run, index, f"the log holds step {index}, which the function did not ask for again"))
        text = encode(result, f"the result of {run.name}", run.saga_id)
        result = definition.result_as_held(result, text, run.saga_id)
        await run.written(owning.complete(run.fence, text, cancellable=not run.reached_pivot))
        run.state = SagaState.COMPLETED
        return result
    except Exception as error:
        cause: BaseException = run.stopped or error
    finally:
        run.over = True
    if isinstance(cause, LeaseLost | LogUnavailable) and cause is run.stopped:
        raise cause
    await run.let_calls_end()
    end = await unwind(run, why(cause))
    if end.state is SagaState.COMPLETED:
        return result  # only the answer of its last write was lost
    if end.waits is not None:
        if not run.patient:
            raise Waits(end)
        end = await _left(run, end)
    raise failure_of(run, end) from cause


async def _called(run: Run, definition: Definition, input: Any) -> Any:
    try:
        return await CallSaga(definition, run, input)
    except Exception as error:
        if run.interrupt is not None:
            raise run.interrupt from error  # the function called its context while it was interrupted
        raise


async def _left(run: Run, end: End) -> End:
    """A saga that this process cannot undo wholly is left to recovery."""
    reason = f"{end.reason}; {end.waits}"
    await run.written(owning.failed(run.fence, reason))
    run.state = SagaState.FAILED
    return End(SagaState.FAILED, reason)


def failure_of(run: Run, end: End) -> SagaFailed:
    """What `run` raises."""
    return SagaFailed(run.saga_id, run.name, end.state, end.reason)
