"""Workloads: which requests are sent, in which order."""

from __future__ import annotations

import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from experiments.framework.config import ROOT, WorkloadConfig
from lmcache.errors import ConfigError

INSTRUCTION = "Read this text, then answer the question about it in one short sentence."
# Text that is in no document, long enough that an engine's first-time work is done when it has been read.
WARM_UP = "The ferry leaves the harbour at dawn and comes back when the lamps are lit along the quay. " * 20


@dataclass(frozen=True)
class Request:
    """One question about one document.

    tokens: the prompt itself, instead of what `user` says. kv_transfer_params: as vLLM hands them to the connector.
    """

    document: str
    question: int
    user: str = ""
    tokens: list[int] | None = None
    kv_transfer_params: dict[str, Any] | None = None

    @property
    def key(self) -> str:
        return f"{self.document}#{self.question}"


@dataclass(frozen=True)
class Corpus:
    """Documents in the order in which they are first read, each with its questions."""

    documents: dict[str, str]
    questions: dict[str, list[str]]

    def round(self, question: int) -> list[Request]:
        """The question of that number about every document."""
        return [self.request(name, question) for name in self.documents]

    def request(self, document: str, question: int) -> Request:
        text, asked = self.documents[document], self.questions[document][question]
        # The text comes before the question, so that all questions about it share its prefix.
        return Request(document, question, f"{INSTRUCTION}\n\n{text}\n\nQuestion: {asked}")


def load_corpus(config: WorkloadConfig, seed: int) -> Corpus:
    """The corpus that ``config`` describes. Raises ConfigError when it does not have that much."""
    folder = ROOT / config.corpus
    files = sorted((folder / "documents").glob("*.txt"))
    if len(files) < config.documents:
        raise ConfigError(f"workload.documents={config.documents}: {folder / 'documents'} has {len(files)} text files")
    chosen = random.Random(seed).sample(files, config.documents)
    questions = {file.stem: read_questions(folder, file.stem) for file in chosen}
    for name, lines in questions.items():
        if len(lines) < config.questions:
            raise ConfigError(f"workload.questions={config.questions}: there are {len(lines)} about {name}")
    return Corpus({file.stem: file.read_text().strip() for file in chosen}, questions)


def read_questions(folder: Path, document: str) -> list[str]:
    return (folder / "questions" / f"{document}.txt").read_text().splitlines()
