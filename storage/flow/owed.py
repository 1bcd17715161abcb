"""Removals that a tier owes: not done yet, or to be done again. Until then their chunks count as not there.

remove ──> it failed ──────────────────────────> owed: tried again until it succeeds
       └─> it succeeded, but a write may land late ──> owed: done once more when that can be no more

A write that ended without an answer (the server was frozen, the connection broke) may land after it was reported as
failed: its bytes lie in a buffer of the server's machine. So after such a write a removal is done twice, the second
time some seconds after the tier has answered again.
"""

from __future__ import annotations

import itertools
import logging
import math
import threading
import time
from collections.abc import Callable, Collection, Iterable, Sequence

from lmcache.keys import ChunkKey
from lmcache.storage.flow.owed_files import OwedFiles
from lmcache.storage.selection import Selection

logger = logging.getLogger(__name__)

MOST_KEYS = 65_536  # owed; of more, their whole formats are
AT_ONCE = 1000  # keys of one try
PAUSE_S = 1.0  # between two tries

Debt = ChunkKey | Selection


class OwedRemovals:
    """Removals that a tier owes, and a thread that has them done, while there are any. Thread-safe.

    remove: takes keys, or a selection, out of the tier; whether that succeeded.
    returning: keys of writes under way that are to be undone: until those have ended their removal is not final.
    files: where selections are kept, so that they are owed after a restart too.
    grace_s: how long after the tier has answered again a write that nobody answered may still land.
    """

    def __init__(
        self,
        name: str,
        remove: Callable[[Sequence[ChunkKey] | Selection], bool],
        returning: Callable[[], Collection[ChunkKey]],
        grace_s: float,
        files: OwedFiles | None = None,
    ) -> None:
        self._name = name
        self._remove = remove
        self._returning = returning
        self._grace_s = grace_s
        self._files = files
        self._changed = threading.Condition()
        self._due: dict[Debt, float] = {}  # when each is tried next
        self._selections: list[Selection] = []  # of those
        self._thread: threading.Thread | None = None
        self._closed = False
        self._doubted_at = self._certain_at = 0.0
        if files is not None and (left := files.load()):
            logger.warning("tier %s: owes %d clears of an earlier process", name, len(left))
            self.settle(left, False, 0.0)

    def __len__(self) -> int:
        return len(self._due)

    def __contains__(self, key: ChunkKey) -> bool:
        """Whether ``key`` counts as not there."""
        return key in self._due or any(selection.matches(key) for selection in self._selections)

    def leading(self, keys: Sequence[ChunkKey]) -> Sequence[ChunkKey]:
        """``keys`` up to the first that counts as not there."""
        if not self._due:
            return keys
        return list(itertools.takewhile(lambda key: key not in self, keys))

    @property
    def selections(self) -> Sequence[Selection]:
        """What of it was a clear."""
        return self._selections

    def owe(self, selection: Selection) -> None:
        """It counts as not there, and somebody is about to clear it, who will ``settle`` it."""
        with self._changed:
            self._due[selection] = math.inf
            self._note_selections()

    def doubt(self) -> None:
        """A write ended, and nobody knows whether it did."""
        self._doubted_at, self._certain_at = time.monotonic(), math.inf

    def answered(self, asked_at: float) -> None:
        """The place itself, and no index of ours, answered what it was asked at that time."""
        if self._certain_at == math.inf and asked_at >= self._doubted_at:
            self._certain_at = time.monotonic() + self._grace_s

    def settle(self, debts: Iterable[Debt], done: bool, began_at: float) -> None:
        """A try to remove them, which began then, has ended: what may still be there, or come back, is owed."""
        if done:
            self.answered(began_at)
        returning = self._returning()
        with self._changed:
            again_at = time.monotonic() + PAUSE_S
            final = done and began_at >= self._certain_at
            due = max(again_at, self._certain_at) if done and self._certain_at < math.inf else again_at
            for debt in debts:
                if final and not _any_of(debt, returning):
                    self._due.pop(debt, None)
                else:
                    self._due[debt] = due
            if len(self._due) > MOST_KEYS:
                logger.error("tier %s: too many removals are owed: all chunks of their formats are", self._name)
                formats = {debt if isinstance(debt, Selection) else Selection(debt.fingerprint) for debt in self._due}
                self._due = dict.fromkeys(formats, due)
            self._note_selections()
            if self._due and self._thread is None and not self._closed:
                self._thread = threading.Thread(target=self._run, name=f"lmcache-{self._name}-owed", daemon=True)
                self._thread.start()
            self._changed.notify_all()

    def pay(self, before: float) -> None:
        """Try once what is due before that time."""
        with self._changed:
            due = [debt for debt, at in self._due.items() if at <= before]
        keys = [debt for debt in due if isinstance(debt, ChunkKey)]
        for debts in [keys[at : at + AT_ONCE] for at in range(0, len(keys), AT_ONCE)]:
            self._pay(debts, debts)
        for selection in due:
            if isinstance(selection, Selection):
                self._pay([selection], selection)

    def close(self) -> None:
        """Try nothing more by itself. Idempotent."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()

    def _note_selections(self) -> None:
        before, self._selections = self._selections, [debt for debt in self._due if isinstance(debt, Selection)]
        if self._files is not None:
            for selection in self._selections:
                self._files.add(selection)
            for selection in set(before).difference(self._selections):
                self._files.done(selection)

    def _pay(self, debts: Sequence[Debt], what: Sequence[ChunkKey] | Selection) -> None:
        began_at = time.monotonic()
        self.settle(debts, self._remove(what), began_at)

    def _run(self) -> None:
        while True:
            with self._changed:
                if self._closed or not self._due:
                    self._thread = None
                    return
                if (wait_s := min(self._due.values()) - time.monotonic()) > 0:
                    self._changed.wait(min(wait_s, 60.0))
                    continue
            self.pay(time.monotonic())


def _any_of(debt: Debt, keys: Collection[ChunkKey]) -> bool:
    return debt in keys if isinstance(debt, ChunkKey) else any(map(debt.matches, keys))
