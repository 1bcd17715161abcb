"""More request traces, to try an eviction policy on what it was not made for. Each is a function of a seed.

``DEVELOPMENT`` are for tuning, ``HELD_OUT`` are other kinds, and other seeds of the same; it has been looked at often
enough to count as tuning, too. ``FRESH`` was made when the policy was finished, and run once.
"""

from __future__ import annotations

import heapq
import math
import random
from collections.abc import Callable, Sequence

from experiments.replaying import traces
from experiments.replaying.traces import Chains, Request

Trace = Callable[[int], list[Request]]


class Zipf:
    """Ranks below ``n``, the first ones most often: rank r as often as ``r ** -skew``."""

    def __init__(self, n: int, skew: float) -> None:
        self._ranks = range(n)
        total = 0.0
        self._weights = [total := total + (rank + 1) ** -skew for rank in self._ranks]

    def draw(self, rng: random.Random) -> int:
        return rng.choices(self._ranks, cum_weights=self._weights)[0]


def offset(requests: Sequence[Request], by: int) -> list[Request]:
    return [[block + by for block in request] for request in requests]


def joined(*parts: Sequence[Request]) -> list[list[Request]]:
    """The same traces with different block numbers."""
    found, by = list[list[Request]](), 0
    for part in parts:
        low, high = min(map(min, part)), max(map(max, part))
        found.append(offset(part, by - low))
        by += high - low + 1
    return found


def after_one_another(*parts: Sequence[Request]) -> list[Request]:
    return [request for part in joined(*parts) for request in part]


def interleaved(seed: int, *parts: Sequence[Request]) -> list[Request]:
    """All at once, each in its own order."""
    rng = random.Random(seed)
    keyed: list[tuple[float, Request]] = []
    for part in joined(*parts):
        keyed += zip(sorted(rng.random() for _ in part), part, strict=True)
    return [request for _, request in sorted(keyed, key=lambda pair: pair[0])]


# Of the recorded trace.


def half(seed: int) -> list[Request]:
    requests = traces.read_mooncake()
    middle = len(requests) // 2
    return requests[middle:] if seed % 2 else requests[:middle]


def quarter(seed: int) -> list[Request]:
    """A quarter of the conversations."""
    return [
        request
        for request in traces.read_mooncake()
        if hash((seed // 4, request[min(1, len(request) - 1)])) % 4 == seed % 4
    ]


def subsample(seed: int) -> list[Request]:
    """Half of the requests."""
    rng = random.Random(seed)
    return [request for request in traces.read_mooncake() if rng.random() < 0.5]


def doubled(seed: int) -> list[Request]:
    """The two half hours at once."""
    return interleaved(seed, half(0), half(1))


def recorded_and_scans(seed: int) -> list[Request]:
    return interleaved(seed, traces.read_mooncake(), long_documents(seed))


def recorded_then_agents(seed: int) -> list[Request]:
    return after_one_another(half(seed), traces.agents(seed, 5000))


# Made up.


def conversations(
    seed: int, requests: int = 9000, prompts: int = 20, on: float = 0.75, tail: float = 0.8
) -> list[Request]:
    """Turns come back after times with a heavy tail; answers are part of the next prompt."""
    chains, found = Chains(seed), list[Request]()
    rng, popular = chains.random, Zipf(prompts, 1.0)
    lengths = [rng.randint(1, 6) for _ in range(prompts)]
    waiting: list[tuple[float, int, list[object]]] = []
    while len(found) < requests:
        now = len(found)
        if waiting and waiting[0][0] <= now:
            _, _, context = heapq.heappop(waiting)
        else:
            which = popular.draw(rng)
            context = [("prompt", which, n) for n in range(lengths[which])]
        context = context + chains.fresh(1 + int(rng.expovariate(1 / 4)))
        found.append(chains.blocks([*context, *chains.fresh(1)]))
        if rng.random() < on and len(context) < 200:
            heapq.heappush(waiting, (now + 20 * rng.paretovariate(tail), now, context))
    return found


def passages(seed: int, requests: int = 9000, number: int = 3000, skew: float = 0.9, drift: int = 0) -> list[Request]:
    """Retrieval: some passages by popularity, the best first, behind one system prompt, and a question."""
    chains, found = Chains(seed), list[Request]()
    rng, popular = chains.random, Zipf(number, skew)
    sizes = [rng.randint(1, 8) for _ in range(number)]
    for index in range(requests):
        shift = index // drift * 131 if drift else 0
        chosen = sorted({(popular.draw(rng) + shift) % number for _ in range(rng.randint(2, 5))})
        text: list[object] = [("system", n) for n in range(2)]
        for passage in chosen:
            text += [("passage", passage, n) for n in range(sizes[passage])]
        found.append(chains.blocks([*text, *chains.fresh(1)]))
    return found


def loop(seed: int, requests: int = 9000, number: int = 300, noise: float = 0.05) -> list[Request]:
    """A batch job that goes through the same documents again and again."""
    chains, found = Chains(seed), list[Request]()
    rng = chains.random
    sizes = [rng.randint(5, 45) for _ in range(number)]
    turn = 0
    while len(found) < requests:
        if rng.random() < noise:
            found.append(chains.blocks([("system",), *chains.fresh(rng.randint(2, 20))]))
            continue
        document, turn = turn % number, turn + 1
        text = [("document", document, n) for n in range(sizes[document])]
        found.append(chains.blocks([("system",), *text, *chains.fresh(1)]))
    return found


def bursts(seed: int, requests: int = 9000, period: int = 1500) -> list[Request]:
    """Chat; at fixed times the same job comes again, with the same prompts."""
    chains = Chains(seed + 1000)
    rng = chains.random
    job = [chains.blocks([("job",), *chains.fresh(rng.randint(5, 50))]) for _ in range(period // 8)]
    talks, jobs = joined(traces.chat(seed, requests), job)
    found = list[Request]()
    for index, request in enumerate(talks):
        found.append(request)
        if index % period == period - 1:
            found += jobs
    return found


def shifts(seed: int, requests: int = 9000, every: int = 1800, number: int = 400) -> list[Request]:
    """Popular documents; every so often all of them are others."""
    parts = [traces.documents(seed + n, every, number) for n in range(requests // every)]
    return after_one_another(*parts)


def long_documents(seed: int, requests: int = 1500) -> list[Request]:
    """Each is read once."""
    chains = Chains(seed)
    return [chains.blocks(chains.fresh(chains.random.randint(20, 150))) for _ in range(requests)]


def chat_and_scans(seed: int) -> list[Request]:
    return interleaved(seed, conversations(seed, 7000), long_documents(seed, 1500))


def samples(seed: int, requests: int = 12000) -> list[Request]:
    """Evaluations: a prompt behind a shared few-shot prefix is sampled several times, soon after one another."""
    chains, found = Chains(seed), list[Request]()
    rng = chains.random
    pending: list[list[object]] = []
    task = 0
    while len(found) < requests:
        if len(found) % 2000 == 0:
            task += 1
        if len(pending) < 64:
            text = [*(("shots", task, n) for n in range(12)), *chains.fresh(rng.randint(1, 12))]
            pending += [text] * rng.choice([1, 4, 8])
        found.append(chains.blocks([*pending.pop(rng.randrange(len(pending))), *chains.fresh(1)]))
    return found


def keyed(seed: int, requests: int = 60000, number: int = 60000, skew: float = 0.9) -> list[Request]:
    """Short prompts by popularity, as web caches see them."""
    rng, popular = random.Random(seed), Zipf(number, skew)
    sizes = [rng.randint(1, 5) for _ in range(number)]
    return [[8 * which + n for n in range(sizes[which])] for which in (popular.draw(rng) for _ in range(requests))]


def repositories(seed: int, requests: int = 8000, number: int = 30) -> list[Request]:
    """Coding agents behind the text of a repository, which changes from some point on with every commit."""
    chains, found = Chains(seed), list[Request]()
    rng, popular = chains.random, Zipf(number, 0.8)
    texts = [[("file", which, n) for n in range(rng.randint(20, 120))] for which in range(number)]
    tasks: list[tuple[int, list[object], int]] = []
    while len(found) < requests:
        if rng.random() < 0.01:
            which = popular.draw(rng)
            at = int(len(texts[which]) * rng.random() ** 0.5)
            texts[which] = texts[which][:at] + chains.fresh(len(texts[which]) - at)  # type: ignore[operator]
        if len(tasks) < 25:
            which = popular.draw(rng)
            tasks.append((which, [*texts[which], *chains.fresh(2)], int(rng.paretovariate(0.9)) + 1))
            continue
        which, context, steps = tasks.pop(int(len(tasks) * rng.random() ** 2))
        found.append(chains.blocks(context))
        if steps and len(context) < 250:
            tasks.append((which, context + chains.fresh(rng.randint(1, 4)), min(steps, 60) - 1))
    return found


def branches(seed: int, requests: int = 9000) -> list[Request]:
    """Searches: a request goes on from a random point of an earlier one, the later the likelier."""
    chains, found = Chains(seed), list[Request]()
    rng = chains.random
    known: list[list[object]] = []
    while len(found) < requests:
        if not known or rng.random() < 0.03:
            known.append([("system",), *chains.fresh(rng.randint(3, 15))])
        index = len(known) - 1 - min(int(rng.expovariate(1 / 40)), len(known) - 1)
        base = known[index]
        grown = base[: rng.randint(max(1, len(base) // 2), len(base))] + chains.fresh(rng.randint(1, 6))
        known.append(grown[:80])
        found.append(chains.blocks(known[-1]))
    return found


def lengths(seed: int, name: str = "conv") -> list[Request]:
    """Sessions of an arrival process that swells and ebbs, with lengths like those of a recorded service."""
    chains, found = Chains(seed), list[Request]()
    rng = chains.random
    clock = 0.0
    waiting: list[tuple[float, int, list[object]]] = []
    while len(found) < 12000:
        clock += rng.expovariate(5 * (1 + 0.8 * math.sin(clock / 300)))
        if waiting and waiting[0][0] <= clock and rng.random() < 0.8:
            _, _, context = heapq.heappop(waiting)
        else:
            context = [("prompt", int(rng.paretovariate(0.7)) % 200, n) for n in range(rng.choice([0, 1, 2, 8]))]
        context = context + chains.fresh(max(1, int(rng.lognormvariate(1.6, 1.0))))
        found.append(chains.blocks(context))
        if rng.random() < 0.6 and len(context) < 250:
            heapq.heappush(waiting, (clock + rng.lognormvariate(math.log(90), 1.0), len(found), context))
    return found


def mixture(seed: int) -> list[Request]:
    return interleaved(seed, traces.assistants(seed, 4000), traces.agents(seed, 3000), passages(seed, 3000))


def worlds(seed: int) -> list[Request]:
    """One kind of use after another."""
    return after_one_another(
        passages(seed, 2500), conversations(seed, 2500), keyed(seed, 15000), loop(seed, 1800, 80), samples(seed, 2500)
    )


def service(seed: int) -> list[Request]:
    """``traces.service`` with numbers that the seed chooses."""
    rng = random.Random(seed)
    return traces.service(
        seed,
        8000,
        prompts=rng.choice([5, 30, 200]),
        skew=rng.uniform(0.4, 1.2),
        prompt=(1, rng.choice([3, 15, 50])),
        tail=(1, rng.choice([8, 30])),
        on=rng.choice([0.05, 0.4, 0.8]),
        think=rng.choice([20, 200, 1500]),
        retry=rng.choice([0.0, 0.05]),
        drift=rng.choice([0, 0, 1000]),
    )


def turns(seed: int) -> list[Request]:
    """Two kinds of use that take turns: by day conversations, by night a job over documents."""
    day, night = joined(conversations(seed, 6000), passages(seed, 3000, 1500))
    by_turns = list[Request]()
    for turn in range(6):
        by_turns += day[turn * 1000 : turn * 1000 + 1000] + night[turn * 500 : turn * 500 + 500]
    return by_turns


def questions(seed: int, requests: int = 9000) -> list[Request]:
    """Each document is asked several things soon after one another, and then no more; some answers take long."""
    chains, found = Chains(seed), list[Request]()
    rng = chains.random
    open_documents: list[tuple[list[object], int]] = []
    while len(found) < requests:
        while len(open_documents) < 40:
            open_documents.append((chains.fresh(int(rng.lognormvariate(2.5, 0.8)) + 1), rng.choice([1, 1, 3, 10])))
        text, left = open_documents.pop(min(int(rng.expovariate(1 / 8)), len(open_documents) - 1))
        found.append(chains.blocks([("system",), *text, *chains.fresh(1)]))
        if left > 1:
            open_documents.append((text, left - 1))
    return found


def flips(seed: int, requests: int = 40000, number: int = 20000, every: int = 8000) -> list[Request]:
    """Short prompts by popularity, which is another one every so often: what was used most is used no more."""
    rng, popular = random.Random(seed), Zipf(number, 0.9)
    sizes = [rng.randint(1, 6) for _ in range(number)]
    found = list[Request]()
    for index in range(requests):
        which = (popular.draw(rng) + index // every * (number // 3)) % number
        found.append([8 * which + n for n in range(sizes[which])])
    return found


def of(make: Callable[..., list[Request]], **given: object) -> Trace:
    return lambda seed: make(seed, **given)


KINDS: dict[str, Trace] = {
    "mooncake": lambda seed: traces.read_mooncake(),
    "chat": traces.chat,
    "agents": traces.agents,
    "documents": traces.documents,
    "scans": traces.scans,
    "phases": traces.phases,
    "tools": traces.tools,
    "calls": traces.calls,
    "assistants": traces.assistants,
    "half": half,
    "quarter": quarter,
    "subsample": subsample,
    "doubled": doubled,
    "recorded_and_scans": recorded_and_scans,
    "recorded_then_agents": recorded_then_agents,
    "conversations": conversations,
    "passages": passages,
    "passages_drift": of(passages, drift=1500),
    "loop": loop,
    "bursts": bursts,
    "shifts": shifts,
    "chat_and_scans": chat_and_scans,
    "samples": samples,
    "keyed": keyed,
    "repositories": repositories,
    "branches": branches,
    "lengths": lengths,
    "mixture": mixture,
    "worlds": worlds,
    "service": service,
    "turns": turns,
    "questions": questions,
    "flips": flips,
    "pure_loop": of(loop, noise=0.0),
}
DEVELOPMENT = [
    "mooncake:0", "half:0", "quarter:1", "chat:1", "agents:1", "documents:1", "scans:1", "phases:1", "tools:1",
    "calls:1", "assistants:1", "conversations:1", "passages:1", "loop:1", "shifts:1", "chat_and_scans:1", "keyed:1",
    "mixture:1", "service:1", "service:2", "service:3", "lengths:1",
]  # fmt: skip
HELD_OUT = [
    "half:1", "quarter:2", "quarter:7", "subsample:5", "doubled:5", "recorded_and_scans:5", "recorded_then_agents:5",
    "chat:5", "agents:5", "documents:5", "scans:5", "phases:5", "tools:5", "calls:5", "assistants:5", "conversations:5",
    "passages:5", "passages_drift:5", "bursts:5", "shifts:5", "samples:5", "keyed:5", "repositories:5", "branches:5",
    "lengths:5", "mixture:5", "worlds:5", "service:11", "service:12", "service:13", "service:14", "service:15",
]  # fmt: skip

FRESH = [
    "quarter:13", "subsample:31", "chat:31", "documents:31", "scans:31", "tools:31", "assistants:31",
    "conversations:31", "shifts:31", "keyed:31", "lengths:31", "mixture:31", "service:31", "service:32", "turns:31",
    "questions:31", "flips:31", "pure_loop:31",
]  # fmt: skip


def named(entry: str) -> list[str]:
    """The traces of a list, or the one trace that ``entry`` is."""
    return {"development": DEVELOPMENT, "held_out": HELD_OUT, "fresh": FRESH}.get(entry, [entry])


def read(name: str) -> list[Request]:
    kind, _, seed = name.partition(":")
    return KINDS[kind](int(seed or 0))
