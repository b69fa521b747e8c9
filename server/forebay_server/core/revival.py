"""What brings an engine back after it died: at once the first time, then slower and slower."""

from __future__ import annotations

import logging
from collections.abc import Callable

from forebay.errors import Unavailable

from forebay_server.core.intake import Intake
from forebay_server.core.interfaces import Engine

log = logging.getLogger("forebay.batcher")

#: Seconds that waiting requests are kept for an engine that does not come back.
PATIENCE_S = 5.0
BACKOFF_S, MAX_BACKOFF_S = 0.05, 5.0


class Revival:
    """The lives of one slot's engine.

    Args:
        revive: brings the engine back; raises while it cannot.
        wait: sleeps the seconds given, or less when the client closes.
        closed: whether the slot is closed.
    """

    def __init__(
        self,
        intake: Intake,
        engine: Engine,
        revive: Callable[[Engine], None],
        wait: Callable[[float], object],
        closed: Callable[[], bool],
    ) -> None:
        self._intake = intake
        self._engine = engine
        self._revive = revive
        self._wait = wait
        self._closed = closed
        #: Deaths since it last answered a batch.
        self.deaths = 0

    def run(self) -> None:
        """Return when the engine is back, the slot is closed, or the client closes."""
        intake = self._intake
        intake.statistics.restarts += 1
        self.deaths += 1
        # An engine that dies over and over is not started at full speed.
        delay = 0.0 if self.deaths == 1 else min(MAX_BACKOFF_S, BACKOFF_S * 2**self.deaths)
        waited = 0.0
        given_up = False
        while not self._closed():
            if delay:
                self._wait(delay)
                waited += delay
            try:
                self._revive(self._engine)
                self._engine.check_health()
            except BaseException as e:
                log.error("engine %s does not come back: %s", intake.name, e)
            else:
                if self._closed():  # closed meanwhile: it must not outlive its slot
                    self._engine.close()
                if given_up:
                    intake.set_down(self, False)
                log.info("engine %s is back", intake.name)
                return
            if intake.closing.is_set():
                error = Unavailable("the engine is down", reason="ENGINE_DIED", retry_after_s=1.0)
                intake.fail_waiting(error)
                return
            if not given_up and waited >= PATIENCE_S:
                given_up = True
                intake.set_down(self, True)
            delay = min(MAX_BACKOFF_S, max(BACKOFF_S, delay * 2))
