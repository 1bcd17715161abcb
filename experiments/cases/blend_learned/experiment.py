"""What blending loses by where the KV of passages comes from: `learned` behind the prefix, alone, or in other prompts.

    prefix      prefix | passage                                       what BlendEngine.learn does
    alone       passage
    reordered   prefix | the later half of the passages | passage      cut out of a prompt with the same passages
    prompt      prefix | passages of another article | passage         cut out of a prompt with other passages

The last two cost an engine nothing: it has them from prompts that it had to prefill anyway. Keys are moved, and what
else is measured is as in blend_quality.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from pydantic import Field
from tqdm import tqdm

from experiments.blending.prompts import Prompt
from experiments.blending.quality import REUSE, TITLES, ScaleConfig, Scored, blend, full_prefill, prompts
from experiments.blending.session import BlendSession, open_session
from experiments.framework import paired
from experiments.framework.config import ExperimentConfig, scale_of
from experiments.framework.report import Outcome, Results
from lmcache.blend.standalone import BlendEngine
from lmcache.errors import BlendError, ConfigError

Learned = Literal["prefix", "alone", "reordered", "prompt"]
OURS, THEIRS = "question", "cacheblend"


class Config(ExperimentConfig):
    scale: Literal["ci", "full"] = Field("ci", description="which of the scales")
    scales: dict[str, ScaleConfig] = Field(description="how much each scale measures; of its ratios the first")
    learned: tuple[Learned, ...] = Field(("prefix", "alone", "reordered", "prompt"), min_length=1, description="where")
    selectors: dict[str, dict[str, Any]] = Field(description="name in the table: the selector's type and options")


@dataclasses.dataclass(frozen=True)
class Row:
    learned: Learned
    scored: Scored


def run(config: Config, results: Results) -> Outcome:
    scale = scale_of(config.scales, config.scale)
    ratio = scale.ratios[0]
    rows: list[Row] = []
    with open_session(config) as session:
        caption = session.caption
        asked = prompts(session, scale, config.seed)
        for prompt in tqdm(asked, unit="prompt"):
            other = unrelated(prompt, asked, session)
            for row in measure(session, prompt, other, config.learned, config.selectors, ratio):
                results.write({"learned": row.learned, **dataclasses.asdict(row.scored)})
                rows.append(row)
    text = table(rows)
    results.table(text)
    return Outcome({"table": text, "caption": caption}, judge(rows), f"KL at {ratio:.0%} by where passages are learned")


def measure(
    session: BlendSession,
    prompt: Prompt,
    other: Prompt,
    learned: Sequence[Learned],
    selectors: Mapping[str, Mapping[str, Any]],
    ratio: float,
) -> list[Row]:
    """A prompt whose passages were learned each way, blended each way."""
    expected = full_prefill(session, prompt)
    asking = session.engine(prompt, {"type": REUSE})
    rows = []
    for way in learned:
        session.manager.clear()
        for place, passage in enumerate(prompt.passages):
            # Keys are of the passage's tokens alone: what it was learned behind makes no difference to who asks for it.
            prefix = before(prompt, place, other, way)
            engine = BlendEngine(session.adapted, session.manager, model_id=session.name, prefix=prefix)
            if not engine.learn([passage]):
                raise BlendError(f"{prompt.key}: storage did not take passage {place}; is it too small?")
        rows.append(Row(way, blend(session, asking, prompt, expected, REUSE, 0.0, {"type": "none"})))
        for name, options in selectors.items():
            rows.append(Row(way, blend(session, asking, prompt, expected, name, ratio, {**options, "ratio": ratio})))
    return rows


def unrelated(prompt: Prompt, asked: Sequence[Prompt], session: BlendSession) -> Prompt:
    """Passages of an article that the prompt has nothing of."""
    titles = {tuple(passage[:8]) for passage in prompt.passages}
    of_wiki = [other for other in asked if other.data == "wiki" and other.article != prompt.article]
    for other in of_wiki:
        if tuple(session.encode(session.texts[other.article])[:8]) not in titles:
            return other
    raise ConfigError(f"{prompt.key} has something of each of {len(of_wiki)} articles; it takes more articles")


def before(prompt: Prompt, place: int, other: Prompt, learned: Learned) -> list[int]:
    """The tokens that a passage of the prompt is learned behind."""
    if learned == "alone":
        return []
    behind: list[list[int]] = []
    if learned == "reordered":
        half = len(prompt.passages) // 4 * 2  # an article and its note stay together
        order = [*range(half, len(prompt.passages)), *range(half)]
        behind = [prompt.passages[i] for i in order[: order.index(place)]]
    if learned == "prompt":
        # Not as many as in the prompt itself, which would tell a passage its place among the others.
        behind = other.passages[: (place + 2) % len(prompt.passages) or 3]
    return [*prompt.prefix, *(token for passage in behind for token in passage)]


def table(rows: Sequence[Row]) -> str:
    """Markdown; the ratio is that of the mean KL to the same selector's with passages learned behind the prefix."""
    lines = ["| data | learned | selector | KL, nats (95%) | of that behind the prefix | top-1 | right answers |"]
    lines.append("|---|---|---|---|---|---|---|")
    for data, learned, selector, of in _groups(rows):
        kl = paired.mean([row.kl for row in of], [row.article for row in of])
        prefix = [row.scored for row in rows if (row.learned, row.scored.selector) == ("prefix", selector)]
        times = _compare(of, [row for row in prefix if row.data == data])
        right = f"{sum(row.right for row in of)}/{len(of)}" if data == "bind" else ""
        top1 = sum(row.top1 for row in of) / len(of)
        share = f"{times.ratio} x" if times and learned != "prefix" else ""
        lines.append(f"| {data} | {learned} | {selector} | {kl} | {share} | {top1:.3f} | {right} |")
    return "\n".join(lines)


def judge(rows: Sequence[Row]) -> list[str]:
    """Wherever passages are learned, ours must be nearer to a full prefill than cacheblend, and that than reuse."""
    by = {group[:3]: group[3] for group in _groups(rows)}
    failures = []
    for (data, learned, selector), of in by.items():
        base = {OURS: THEIRS, THEIRS: REUSE}.get(selector)
        if base is None:
            continue
        compared = _compare(of, by.get((data, learned, base), []))
        if compared is None or not compared.difference.high < 0:
            how = compared.difference if compared else "by what was not measured on the same prompts"
            failures.append(f"{data}, learned {learned}: {selector} / {base}: KL differs {how}; it must be below 0")
    return failures if by else ["nothing was measured"]


def _groups(rows: Sequence[Row]) -> list[tuple[str, Learned, str, list[Scored]]]:
    groups: dict[tuple[str, Learned, str], list[Scored]] = {}
    for row in rows:
        groups.setdefault((row.scored.data, row.learned, row.scored.selector), []).append(row.scored)
    ordered = sorted(groups, key=lambda group: list(TITLES).index(group[0]))
    return [(*group, groups[group]) for group in ordered]


def _compare(a: Sequence[Scored], b: Sequence[Scored]) -> paired.Comparison | None:
    if not a or [row.key for row in a] != [row.key for row in b]:
        return None
    return paired.compare([row.kl for row in a], [row.kl for row in b], [row.article for row in a])
