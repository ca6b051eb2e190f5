"""The documents of one language, and the queries that they answer, of a split of retrieval."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from nemo_embed_core.data.readers import Beir
from nemo_embed_core.errors import UserError
from nemo_embed_core.evaluation.encoding import say


class Pool(Mapping[str, str]):
    """Some documents of a corpus, in its order; texts stay where they are."""

    def __init__(self, corpus: Mapping[str, str], ids: Iterable[str]):
        self.corpus, self.ids = corpus, dict.fromkeys(ids)

    def __getitem__(self, key: str) -> str:
        if key not in self.ids:
            raise KeyError(key)
        return self.corpus[key]

    def __contains__(self, key: object) -> bool:
        return key in self.ids

    def __iter__(self) -> Iterator[str]:
        return iter(self.ids)

    def __len__(self) -> int:
        return len(self.ids)


def pools_of(given: Sequence[str], beir: Beir) -> list[str]:
    """The languages of the pools ("" all documents): of lang=each those of relevant documents, sorted."""
    spoken = beir.document_languages
    if not spoken:
        raise UserError("pool: no document of the corpus has a lang: give the corpus one, or leave pool out")
    judged = {d for grades in beir.qrels.values() for d, grade in grades.items() if grade > 0}
    relevant = sorted({spoken[document] for document in judged if document in spoken})
    pools = list[str]()
    for pool in given:
        name = pool.removeprefix("lang=")
        pools += relevant if name == "each" else ["" if name == "all" else name]
    there = sorted(set(spoken.values()))
    if unknown := [name for name in pools if name and name not in there]:
        raise UserError(f"pool=lang={unknown[0]}: the documents are in {', '.join(there)}")
    return list(dict.fromkeys(pools))


def restricted(
    beir: Beir, facts: Mapping[str, Any], language: str, digests: Digests
) -> tuple[Beir, dict[str, Any]]:
    """The documents of one language, the judgements of these, and the queries that have a relevant one."""
    spoken = beir.document_languages
    corpus = Pool(beir.corpus, (document for document in beir.corpus if spoken.get(document) == language))
    qrels = {
        query: {document: grade for document, grade in grades.items() if document in corpus}
        for query, grades in beir.qrels.items()
    }
    queries = {
        query: text for query, text in beir.queries.items() if max(qrels[query].values(), default=0) > 0
    }
    pool = f"lang={language}"
    if not queries:
        raise UserError(f"{facts['path']}: pool={pool}: no query has a relevant document in it")
    own = Beir(corpus, queries, {query: qrels[query] for query in queries}, beir.languages, spoken)
    left = len(beir.queries) - len(queries)
    shown = f"{len(queries)} queries; {left} have no relevant document in it"
    say(f"pool {pool}: {len(corpus)} documents, {shown}")
    counts = Counter(beir.languages.get(query) or "unknown" for query in queries) if beir.languages else {}
    return own, {
        **facts,
        **{"name": f"{facts['name']}@{pool}", "pool": pool, "digest": digests.of(own, pool)},
        **{"queries": len(queries), "documents": len(corpus), "languages": dict(counts)},
    }


class Digests:
    """sha256 of ids, texts and judgements in the order in which they are read: of all documents, then of what
    a split has of its own."""

    def __init__(self) -> None:
        self._of_corpus: dict[str, Any] = {}  # by pool, which is the same documents in every split

    def of(self, beir: Beir, pool: str) -> str:
        if pool not in self._of_corpus:
            self._of_corpus[pool] = hashlib.sha256()
            _hash(self._of_corpus[pool], beir.corpus.items())
        digest = self._of_corpus[pool].copy()
        _hash(digest, beir.queries.items())
        _hash(digest, ((query, beir.qrels.get(query)) for query in beir.queries))
        return str(digest.hexdigest())


def _hash(digest: Any, items: Iterable[Any]) -> None:
    for item in items:
        digest.update(f"{json.dumps(item)}\n".encode())
    digest.update(b"\n")
