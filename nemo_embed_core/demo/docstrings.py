"""Retrieval data that is on every machine: the docstrings of the installed Python packages.

query:   the summary line of a docstring (its first paragraph on one line, 20 to 250 characters)
passage: the rest of it (at least 80 characters, cut at 2,000)

Sources are parsed with `ast`; nothing is imported or run. Thousands of real English texts, with the
near-duplicates (overloads, copied methods, families of functions) that make natural false negatives.
"""

from __future__ import annotations

import ast
import gc
import hashlib
import inspect
import json
import random
import re
import sysconfig
import warnings
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from nemo_embed_core.errors import UserError

MIN_QUERY_CHARS, MAX_QUERY_CHARS = 20, 250
MIN_PASSAGE_CHARS, MAX_PASSAGE_CHARS = 80, 2000

# Chosen for prose per megabyte of source, so that parsing takes half a minute on one core. What is not
# installed is left out: the corpus then is smaller, and the split of what remains is the same.
PACKAGES = (
    *("datasets", "fsspec", "huggingface_hub", "hypothesis", "joblib", "jsonargparse", "matplotlib"),
    *("narwhals", "networkx", "numpy", "pandas", "polars", "pyarrow", "pydantic", "scipy", "setuptools"),
    *("sentence_transformers", "sklearn", "sympy", "tensorboard", "tokenizers", "torch", "tqdm"),
    *("transformers", "triton", "urllib3", "werkzeug"),
)
# Copies of other packages and tests; then the sources that cost most to parse for what they give:
# transformers/models is fifty megabytes in which each docstring stands dozens of times with another model's
# name, torch/_* its private compiler.
SKIPPED_FOLDERS = {
    *("test", "tests", "_vendor", "vendored", "site-packages", "dist-packages", "__pycache__"),
    *("distutils", "_distutils", "encodings", "f2py", "idlelib", "lib2to3"),
}
SKIPPED_PATHS = ("transformers/models/", "torch/_", "torch/testing/_internal/", "torch/fx/", "torch/onnx/")

# Shares of the groups in 1/100, by hash; the rest is for training. Groups differ much in size (pandas/core
# has 1,800 rows): with this salt none is over a tenth of test. Chosen for that alone; no model was evaluated
# to choose it.
SPLIT_SALT = "15"
TEST_SHARE, DEV_SHARE = 18, 10
TEST_CORPUS_SIZE, DEV_CORPUS_SIZE = 4000, 2000  # passages searched, the queries' own included


@dataclass(frozen=True)
class Doc:
    id: str  # path from the package on, line of the definition, qualified name: unique and stable
    query: str
    passage: str

    @property
    def group(self) -> str:
        """ "torch/nn", "scipy/stats", "argparse.py": all of it is in one split."""
        path = self.id.split(":")[0].split("/")
        return "/".join(path[:2])


def default_roots() -> list[Path]:
    """The standard library's modules and the installed folders of PACKAGES."""
    paths = sysconfig.get_paths()
    files = [p for p in Path(paths["stdlib"]).iterdir() if p.name not in SKIPPED_FOLDERS]
    stdlib = [p for p in files if p.suffix == ".py" or (p / "__init__.py").is_file()]
    site = {Path(paths["purelib"]), Path(paths["platlib"])}
    installed = [folder / name for folder in site for name in PACKAGES if (folder / name).is_dir()]
    return sorted(stdlib) + sorted(installed)


def _sources(root: Path) -> Iterator[tuple[str, Path]]:
    """(path from the package on, file) of every source under a package folder, or of one module file."""
    if root.is_file():
        yield root.name, root
        return
    for path in sorted(root.rglob("*.py")):
        relative = path.relative_to(root.parent)
        name = relative.as_posix()
        if SKIPPED_FOLDERS.isdisjoint(relative.parts) and not name.startswith(SKIPPED_PATHS):
            yield name, path


# A colon that ends a line, comments, a triple quote: a tenth of all sources has none and need not be parsed.
_MAY_HAVE_DOCSTRINGS = re.compile(rb':[^\n]*\n(?:[ \t]*#[^\n]*\n|[ \t]*\n)*[ \t]+[rRuU]?(?:"""|\'\'\')')


def _docstrings(source: bytes) -> Iterator[tuple[str, str]]:
    """("line:qualified name", docstring) of a source's classes and functions in order, not of nested ones.

    By hand because ast.walk visits every expression, which takes longer than the parsing.
    """
    if not _MAY_HAVE_DOCSTRINGS.search(source):
        return
    try:
        tree = ast.parse(source)
    except (SyntaxError, ValueError):  # ValueError: null bytes
        return
    stack: list[tuple[str, ast.AST]] = [("", tree)]
    while stack:
        prefix, node = stack.pop()
        if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            yield f"{node.lineno}:{prefix}{node.name}", ast.get_docstring(node, clean=False) or ""
            if not isinstance(node, ast.ClassDef):
                continue
            prefix = f"{prefix}{node.name}."
        elif not isinstance(node, ast.Module | ast.If | ast.Try | ast.ExceptHandler):
            continue  # `if TYPE_CHECKING:` and `try: import ... except: def ...` hold definitions too
        stack += [
            (prefix, child)
            for child in reversed(list(ast.iter_child_nodes(node)))
            if not isinstance(child, ast.expr)
        ]


def split_docstring(docstring: str) -> tuple[str, str] | None:
    """(query, passage) of a docstring, or None when it has no summary line or too little after it."""
    summary, *rest = re.split(r"\n\s*\n", inspect.cleandoc(docstring), maxsplit=1)
    query, passage = " ".join(summary.split()), re.sub(r"[ \t]+\n", "\n", "".join(rest)).strip()
    if not MIN_QUERY_CHARS <= len(query) <= MAX_QUERY_CHARS or len(passage) < MIN_PASSAGE_CHARS:
        return None
    text = query + passage
    if "\0" in text or (not text.isascii() and any("\ud800" <= c <= "\udfff" for c in text)):
        # Examples of broken text in docstrings about encodings: a lone surrogate has no UTF-8 form.
        return None
    if re.search(r"[=~^`-]{4}", query):
        return None  # a section heading ("Parameters ----------") instead of a summary
    return query, passage[:MAX_PASSAGE_CHARS].rstrip()


def extract(roots: Iterable[Path]) -> list[Doc]:
    """The rows of all sources under `roots`, in the order of roots and paths; an exact pair is kept once.

    A root is a package folder or a module file. Sources that this Python cannot parse (templates, other
    versions' syntax) are left out; they are a handful of files.
    """
    docs: list[Doc] = []
    seen: set[tuple[str, str]] = set()
    sources = [source for root in roots for source in _sources(root)]
    if len(sources) < 500:
        files = [_rows(source) for source in sources]
    else:  # half a minute of parsing on one core
        with ProcessPoolExecutor() as pool:
            files = list(pool.map(_rows, sources, chunksize=64))
    for rows in files:
        for definition, query, passage in rows:
            if (query, passage) not in seen:
                seen.add((query, passage))
                docs.append(Doc(definition, query, passage))
    return docs


def _rows(source: tuple[str, Path]) -> list[tuple[str, str, str]]:
    """(id, query, passage) of one file."""
    name, path = source
    with _many_small_objects(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # invalid escapes in other people's strings
        found = [(definition, split_docstring(text)) for definition, text in _docstrings(path.read_bytes())]
    return [(f"{name}:{definition}", *pair) for definition, pair in found if pair]


@contextmanager
def _many_small_objects() -> Iterator[None]:
    """No garbage collection: looking for cycles among millions of AST nodes takes a third of the time."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def split(docs: Sequence[Doc]) -> dict[str, list[Doc]]:
    """{"train", "dev", "test", "dropped"}: whole groups by hash, so a file is in one split on every machine.

    No text is in two splits: a row whose query or passage also stands in train, or (for test) in dev, is
    "dropped".
    """
    splits: dict[str, list[Doc]] = {"train": [], "dev": [], "test": [], "dropped": []}
    for doc in docs:
        bucket = hashlib.sha256((SPLIT_SALT + doc.group).encode()).digest()[0] * 100 // 256
        name = "test" if bucket < TEST_SHARE else "dev" if bucket < TEST_SHARE + DEV_SHARE else "train"
        splits[name].append(doc)
    taken = {text for doc in splits["train"] for text in (doc.query, doc.passage)}
    for name in ("dev", "test"):
        rows, splits[name] = splits[name], []
        for doc in rows:
            splits["dropped" if taken & {doc.query, doc.passage} else name].append(doc)
        taken |= {text for doc in splits[name] for text in (doc.query, doc.passage)}
    return splits


def write_demo_data(
    folder: Path,
    num_test_queries: int = 1000,
    num_dev_queries: int = 500,
    seed: int = 0,
    docs: list[Doc] | None = None,
) -> dict[str, int]:
    """folder/train.jsonl ({"query", "pos", "neg"} rows) and the BEIR folders folder/dev and folder/test.

    A query that stands over several passages is one row with all of them as positives. The corpus of dev and
    test is the queries' own passages and, as distractors, other passages of the same split drawn at random,
    up to 2,000 and 4,000. docs: what `extract` gave; by default that of `default_roots()`.

    Returns the counts, for the log; `dropped_rows` are those left out so that no text is in two splits.
    UserError if the installed packages have too few docstrings.
    """
    docs = extract(default_roots()) if docs is None else docs
    splits = split(docs)
    folder.mkdir(parents=True, exist_ok=True)
    passages_of = _passages_by_query(splits["train"])
    _write_jsonl(folder / "train.jsonl", [{"query": q, "pos": p, "neg": []} for q, p in passages_of.items()])
    counts = {f"{name}_rows": len(rows) for name, rows in splits.items()}
    counts["train_queries"] = len(passages_of)
    sizes = {"dev": (num_dev_queries, DEV_CORPUS_SIZE), "test": (num_test_queries, TEST_CORPUS_SIZE)}
    for name, size in sizes.items():
        corpus, queries = _write_beir(folder / name, splits[name], *size, random.Random(seed))
        counts |= {f"{name}_corpus": corpus, f"{name}_queries": queries}
    return counts


def _passages_by_query(docs: Iterable[Doc]) -> dict[str, list[str]]:
    passages_of: dict[str, list[str]] = defaultdict(list)
    for doc in docs:
        passages_of[doc.query].append(doc.passage)  # distinct: extract keeps a pair once
    return dict(passages_of)


def _write_beir(
    folder: Path, docs: Sequence[Doc], num_queries: int, corpus_size: int, rng: random.Random
) -> tuple[int, int]:
    """corpus.jsonl, queries.jsonl and qrels/test.tsv; returns their numbers of passages and queries."""
    passages_of = _passages_by_query(docs)
    if len(passages_of) < num_queries:
        raise UserError(
            f"{folder}: {num_queries} queries asked for, but the installed packages give {len(passages_of)} "
            "for this split; install the [eval,demo,log,dev] extras or ask for fewer"
        )
    queries = sorted(rng.sample(sorted(passages_of), num_queries))
    chosen = set(queries)
    relevant = {passage for query in queries for passage in passages_of[query]}
    unasked = {passage for query, ps in passages_of.items() if query not in chosen for passage in ps}
    others = sorted(unasked - relevant)
    distractors = rng.sample(others, min(len(others), max(0, corpus_size - len(relevant))))
    id_of: dict[str, str] = {}  # one id per distinct text: its first place in the sources
    for doc in docs:
        id_of.setdefault(doc.passage, doc.id)
    corpus = sorted([*relevant, *distractors], key=id_of.__getitem__)
    (folder / "qrels").mkdir(parents=True, exist_ok=True)
    _write_jsonl(folder / "corpus.jsonl", [{"_id": id_of[p], "title": "", "text": p} for p in corpus])
    rows = [{"_id": f"q{i}", "text": query} for i, query in enumerate(queries)]
    _write_jsonl(folder / "queries.jsonl", rows)
    lines = ["query-id\tcorpus-id\tscore"]
    lines += [f"q{i}\t{id_of[p]}\t1" for i, query in enumerate(queries) for p in passages_of[query]]
    (folder / "qrels" / "test.tsv").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return len(corpus), len(queries)


def _write_jsonl(path: Path, rows: Iterable[dict]) -> None:
    with path.open("w", encoding="utf-8") as file:
        for row in rows:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
