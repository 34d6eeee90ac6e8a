"""What the saga log alone can tell."""

from __future__ import annotations

from collections.abc import AsyncIterator

from sagalog import AsyncSagaLog


async def in_doubt(log: AsyncSagaLog) -> AsyncIterator[str]:
    """A line for each order's saga that was begun and has no end, naming the step whose outcome nobody knows."""
    for saga in await log.unresolved_sagas():
        if saga.name != "place_order":
            continue  # the coordinator sees to its own
        waiting = [step.name for step in saga.steps if step.state == "pending"]
        yield f"saga {saga.saga_id}: {', '.join(waiting) or 'no step'} in doubt"
