"""Request traces: which blocks each request has. A recorded one, and synthetic ones of other characters.

A block is named by a number that stands for its tokens and for all before it: equal numbers have equal parents.
"""

from __future__ import annotations

import gzip
import heapq
import json
import math
import random
from collections.abc import Callable, Sequence
from pathlib import Path

from experiments.framework.config import ROOT

MOONCAKE = ROOT / "data" / "traces" / "mooncake_conversation_trace.jsonl.gz"
BLOCK_TOKENS = 512

Request = Sequence[int]


def read_mooncake(path: Path = MOONCAKE) -> list[Request]:
    """``hash_ids`` of every line of a trace in Mooncake's format, plain or gzipped, in order."""
    with gzip.open(path, "rt") if path.suffix == ".gz" else path.open() as lines:
        return [json.loads(line)["hash_ids"] for line in lines]


class Chains:
    """Block numbers for chains of content: the same content behind the same content is the same block."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self._known: dict[tuple[int, object], int] = {}
        self._fresh = 0

    def fresh(self, count: int) -> list[object]:
        """Content that nobody has seen."""
        self._fresh += count
        return [("fresh", n) for n in range(self._fresh - count, self._fresh)]

    def blocks(self, content: Sequence[object]) -> list[int]:
        found, parent = [], -1
        for part in content:
            parent = self._known.setdefault((parent, part), len(self._known))
            found.append(parent)
        return found


def _zipf(rng: random.Random, n: int, exponent: float = 1.0) -> int:
    """A rank below ``n``, the first ones most often."""
    while (rank := int(rng.paretovariate(exponent))) > n:
        pass
    return rank - 1


def chat(seed: int = 0, requests: int = 8000, users: int = 600) -> list[Request]:
    """Many users, some of whom write much more than others; each goes on with a conversation or begins a new one."""
    chains, found = Chains(seed), list[Request]()
    rng = chains.random
    system: list[object] = [("system", n) for n in range(2)]
    talks: dict[int, list[object]] = {}
    for _ in range(requests):
        user = _zipf(rng, users, 0.7)
        talk = talks.get(user)
        if talk is None or len(talk) > 60 or rng.random() < 0.15:
            talk = [*system]
        talks[user] = talk = talk + chains.fresh(rng.randint(1, 5))
        found.append(chains.blocks([*talk, *chains.fresh(1)]))
    return found


def agents(seed: int = 0, requests: int = 8000, at_once: int = 40) -> list[Request]:
    """Agents in loops: each request is the one before and a little more, at once; then the task is done for good."""
    chains, found = Chains(seed), list[Request]()
    rng = chains.random
    tools: list[list[object]] = [[("tools", kind, n) for n in range(8)] for kind in range(5)]
    tasks: list[tuple[list[object], int]] = []
    while len(found) < requests:
        if len(tasks) < at_once:
            tasks.append((rng.choice(tools) + chains.fresh(rng.randint(1, 6)), rng.randint(2, 30)))
            continue
        index = rng.randrange(len(tasks))
        context, steps = tasks.pop(index)
        found.append(chains.blocks(context))
        if steps:
            tasks.append((context + chains.fresh(rng.randint(1, 3)), steps - 1))
    return found


def documents(seed: int = 0, requests: int = 8000, number: int = 800) -> list[Request]:
    """Questions about shared documents, some more popular than others; a question is asked once."""
    chains, found = Chains(seed), list[Request]()
    rng = chains.random
    sizes = [rng.randint(4, 60) for _ in range(number)]
    for _ in range(requests):
        document = _zipf(rng, number, 0.6)
        text = [("document", document, n) for n in range(sizes[document])]
        found.append(chains.blocks([("system",), *text, *chains.fresh(1)]))
    return found


def scans(seed: int = 0, requests: int = 8000) -> list[Request]:
    """Popular documents, and now and then a batch job of hundreds of long prompts that are never seen again."""
    chains = Chains(seed + 1)
    found = list[Request]()
    for index, request in enumerate(documents(seed, requests, 300)):
        # Other numbers than the documents': below zero.
        found.append(request)
        if index % 1500 > 1200:
            found.append([-1 - n for n in chains.blocks(chains.fresh(40))])
    return found


def phases(seed: int = 0, requests: int = 8000) -> list[Request]:
    """Chat, then agents, then documents, then other chat: what was learned is wrong after each change."""
    quarter, found, offset = requests // 4, list[Request](), 0
    for number, make in enumerate((chat, agents, documents, chat)):
        part = make(seed + number, quarter)
        found += [[block + offset for block in request] for request in part]
        offset += 1 + max(max(request) for request in part)
    return found


def service(
    seed: int = 0,
    requests: int = 8000,
    *,
    prompts: int = 100,
    skew: float = 0.8,
    prompt: tuple[int, int] = (1, 15),
    tail: tuple[int, int] = (1, 20),
    on: float = 0.3,
    think: float = 300.0,
    retry: float = 0.02,
    drift: int = 0,
) -> list[Request]:
    """Sessions behind shared system prompts, some prompts more popular than others, as in published traces.

    prompt, tail: blocks of a system prompt, of what a turn adds. on: chance of another turn, after ``think`` requests
    in the median. retry: chance that the same comes again. drift: requests after which other prompts are popular.
    """
    chains, found = Chains(seed), list[Request]()
    rng = chains.random
    lengths = [rng.randint(*prompt) for _ in range(prompts)]
    waiting: list[tuple[float, int, list[object]]] = []
    while len(found) < requests:
        now = len(found)
        if waiting and waiting[0][0] <= now:
            _, _, context = heapq.heappop(waiting)
        else:
            which = (_zipf(rng, prompts, skew) + (now // drift * 7 if drift else 0)) % prompts
            context = [("root",), *(("prompt", which, n) for n in range(lengths[which]))]
        again = rng.random() < retry
        if not again or len(context) == 1:
            context = context + chains.fresh(round(math.exp(rng.uniform(*map(math.log, tail)))))
        found.append(chains.blocks(context))
        if rng.random() < on:
            heapq.heappush(waiting, (now + 1 + rng.lognormvariate(math.log(think), 1.2), now, context))
    return found


def tools(seed: int = 0, requests: int = 8000) -> list[Request]:
    """Calls of tools and agents: mostly one turn or two behind a long system prompt that many share."""
    return service(seed, requests, prompts=300, prompt=(1, 15), tail=(1, 30), on=0.35, think=60)


def calls(seed: int = 0, requests: int = 8000) -> list[Request]:
    """An interface that programs call, in blocks of few tokens: one turn, the same instructions, drifting demand."""
    return service(seed, requests, prompts=60, skew=0.6, prompt=(5, 60), tail=(2, 60), on=0.02, retry=0.05, drift=1500)


def assistants(seed: int = 0, requests: int = 8000) -> list[Request]:
    """People who talk to a few assistants: one short prompt each, many turns, long pauses."""
    return service(seed, requests, prompts=8, skew=0.5, prompt=(1, 4), tail=(1, 30), on=0.7, think=400)


SYNTHETIC: dict[str, Callable[[], list[Request]]] = {
    "chat": chat,
    "agents": agents,
    "documents": documents,
    "scans": scans,
    "phases": phases,
    "tools": tools,
    "calls": calls,
    "assistants": assistants,
}


def read(name: str) -> list[Request]:
    """``mooncake``, the name of a synthetic trace, or the path of a file in Mooncake's format."""
    if name == "mooncake":
        return read_mooncake()
    return SYNTHETIC[name]() if name in SYNTHETIC else read_mooncake(Path(name))
