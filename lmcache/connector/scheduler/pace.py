"""How fast this engine computes prompts, measured step by step, and how long a scheduler step may wait."""

from __future__ import annotations

import time
from collections import deque

DECAY = 0.8  # weight of what was known, when a step comes in
LEAST_TOKENS = 32  # of a step that says something of prompts
UNKNOWN_RATE = 500.0  # tokens a second, until a step was measured: a small model on one core
# How long one scheduler step may wait for answers, when the last step computed something and when it did not.
BUSY_WAIT_S, IDLE_WAIT_S = 0.002, 0.02


class WaitBudget:
    """Seconds that one scheduler step may wait, for all its requests together."""

    def __init__(self) -> None:
        self.left_s = IDLE_WAIT_S

    def spend(self) -> None:
        """A wait brought no answer: no other request waits in this step."""
        self.left_s = 0.0

    def renew(self, *, computes: bool) -> None:
        """Another step begins, which computes something or not."""
        self.left_s = BUSY_WAIT_S if computes else IDLE_WAIT_S


class Pace:
    """Tokens a second of steps that mostly compute prompts. Used by one thread.

    A step is timed from its begin (or from the end of the step before, when it was launched while that still ran) to
    its end. vLLM's own LMCacheConnectorV1 reports no ends (`ends` is never called): there a step ends when a request
    finishes or the next step begins.
    """

    def __init__(self) -> None:
        self._steps: deque[tuple[float, int]] = deque()  # under way: begun at, tokens (0: says nothing)
        self._ended_at = 0.0
        self._hears_ends = False
        self._tokens = self._seconds = 0.0

    @property
    def rate(self) -> float:
        return self._tokens / self._seconds if self._seconds > 0 else UNKNOWN_RATE

    def begins(self, tokens: int, of_prompts: int) -> None:
        """A step of so many tokens, ``of_prompts`` of them of prompts."""
        now = time.monotonic()
        if not self._hears_ends and self._steps:
            self._end(now)
        if tokens:
            telling = of_prompts >= LEAST_TOKENS and 2 * of_prompts >= tokens
            self._steps.append((now, tokens if telling else 0))

    def ends(self) -> None:
        """The oldest step under way has ended."""
        self._hears_ends = True
        if self._steps:
            self._end(time.monotonic())

    def results_came(self) -> None:
        """A request has finished, so a step has ended; counts only where vLLM reports no ends."""
        if not self._hears_ends and self._steps:
            self._end(time.monotonic())

    def _end(self, now: float) -> None:
        begun, tokens = self._steps.popleft()
        seconds = now - max(begun, self._ended_at)
        self._ended_at = now
        if tokens and seconds > 0:
            self._tokens = DECAY * self._tokens + tokens
            self._seconds = DECAY * self._seconds + seconds
