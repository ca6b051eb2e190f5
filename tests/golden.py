"""Data of every format as its own documentation writes it, and what it means. Imports nothing of ours.

GOLDEN     formats whose texts are in their rows: records, and of each (query, pos, neg, further fields)
FOLDERS    formats whose texts are in files of their own: the files, and the rows that they make

A file is a list of records or of lines, or the object of a JSON file; fuzz.py and the tests write them.
"""

# name -> [(record, (query, pos, neg, further fields of the row))]
GOLDEN = {
    "ours": [
        (
            {"query": "q", "pos": ["p"], "neg": ["n", "m"], "neg_scores": [1, 2.5]},
            ("q", ["p"], ["n", "m"], {"neg_scores": [1.0, 2.5]}),
        ),
        (
            {"query": "q", "pos": ["p"], "neg": [], "id": 3, "group": "g"},
            ("q", ["p"], [], {"id": "3", "group": "g"}),
        ),
    ],
    "flagembedding": [
        (
            {
                "query": "q",
                "pos": ["p"],
                "neg": ["n"],
                "pos_scores": [0.9],
                "neg_scores": [0.1],
                "prompt": "Find answers",
                "type": "normal",
            },
            ("q", ["p"], ["n"], {"prompt": "Find answers", "pos_scores": [0.9], "neg_scores": [0.1]}),
        ),
        (
            {"query": "q", "pos": ["p", "r"], "neg": ["n"], "prompt": ""},
            ("q", ["p", "r"], ["n"], {"prompt": ""}),
        ),
        ({"query": "q", "pos": ["p"], "neg": ["n"], "type": "symmetric_sts"}, ("q", ["p"], ["n"], {})),
    ],
    "sentence-transformers": [
        ({"anchor": "a", "positive": "p"}, ("a", ["p"], [], {})),
        ({"anchor": "a", "positive": "p", "negative": "n"}, ("a", ["p"], ["n"], {})),
        (
            {"query": "a", "positive": "p", "negative_1": "n", "negative_2": "m", "scores": [0.9, 0.2, 0.1]},
            ("a", ["p"], ["n", "m"], {"pos_scores": [0.9], "neg_scores": [0.2, 0.1]}),
        ),
        ({"question": "a", "answer": "p"}, ("a", ["p"], [], {})),
    ],
    "tevatron": [
        (
            {
                "query_id": "1",
                "query": "q",
                "positive_passages": [{"docid": "7", "title": "T", "text": "p", "score": 0.9}],
                "negative_passages": [
                    {"docid": "8", "title": "", "text": "n"},
                    {"docid": "9", "text": "m", "score": 0.5},
                ],
            },
            (
                "q",
                ["T p"],
                ["n", "m"],
                {"id": "1", "pos_ids": ["7"], "neg_ids": ["8", "9"], "pos_scores": [0.9]},
            ),
        ),
        (
            {
                "query_id": 2,
                "query": "q",
                "answers": ["x"],
                "positive_passages": [{"docid": "7", "title": None, "text": "p"}],
                "negative_passages": [],
            },
            ("q", ["p"], [], {"id": "2", "pos_ids": ["7"]}),
        ),
    ],
    "automodel": [
        ({"query": "q", "pos_doc": "p", "neg_doc": ["n", "m"]}, ("q", ["p"], ["n", "m"], {})),
        ({"question": "q", "pos_doc": [{"text": "p"}], "neg_doc": {"text": "n"}}, ("q", ["p"], ["n"], {})),
        (
            {"question_id": "5", "question": "q", "pos_doc": [{"id": "a", "text": "p"}], "neg_doc": []},
            ("q", ["p"], [], {"id": "5", "pos_ids": ["a"]}),
        ),
    ],
    "contrastors": [
        (
            {
                "query": "q",
                "document": "p",
                "negatives": ["n", "m"],
                "metadata": {
                    "objective": {"self": [], "paired": [], "triplet": [["query", "document", "negatives"]]}
                },
            },
            ("q", ["p"], ["n", "m"], {}),
        ),
        ({"query": "q", "document": "p"}, ("q", ["p"], [], {})),
    ],
    "f2llm": [
        (
            {"query": "q", "passage": "p", **{f"negative_{i}": f"n{i}" for i in range(1, 12)}},
            ("q", ["p"], [f"n{i}" for i in range(1, 12)], {}),
        ),
        ({"query": "q", "passage": "p"}, ("q", ["p"], [], {})),
    ],
    "ms-swift": [
        (
            {
                "messages": [{"role": "user", "content": "q"}],
                "positive_messages": [[{"role": "user", "content": "p"}]],
                "negative_messages": [
                    [{"role": "user", "content": "n"}],
                    [{"role": "assistant", "content": "m"}],
                ],
            },
            ("q", ["p"], ["n", "m"], {}),
        ),
        ({"query": "q", "response": "p", "rejected_response": ["n", "m"]}, ("q", ["p"], ["n", "m"], {})),
        ({"query": "q", "response": "p"}, ("q", ["p"], [], {})),
    ],
    "sts": [
        ({"sentence1": "a", "sentence2": "b", "score": 2.5}, ("a", ["b"], [], {"grade": 2.5})),
        ({"sentence_A": "a", "sentence_B": "b", "score": 4}, ("a", ["b"], [], {"grade": 4.0})),
    ],
    "labels": [
        (
            {"text": "my card is late", "label": "card_arrival"},
            ("my card is late", ["card_arrival"], ["refund", "top up"], {"group": "card_arrival"}),
        ),
        (
            {"text": "give it back", "label": "refund"},
            ("give it back", ["refund"], ["card_arrival", "top up"], {"group": "refund"}),
        ),
        (
            {"text": "more money", "label": 5, "label_text": "top up"},
            ("more money", ["top up"], ["card_arrival", "refund"], {"group": "top up"}),
        ),
    ],
    "bitext": [
        ({"en": "dog", "de": "Hund"}, ("dog", ["Hund"], [], {"lang": "en"})),
        ({"translation": {"de": "Hund", "en": "dog"}}, ("Hund", ["dog"], [], {"lang": "de"})),
        ({"sentence1": "dog", "sentence2": "Hund"}, ("dog", ["Hund"], [], {})),
        ({"deu_Latn": "Hund", "pt-BR": "cão"}, ("Hund", ["cão"], [], {"lang": "deu_Latn"})),
    ],
}

METADATA = {
    "class": "TextQADataset", "corpus_id": "c", "query_instruction": "", "passage_instruction": "",
    "task_type": "Retrieval",
}  # fmt: skip
CORPUS = [{"id": "a", "text": "text a"}, {"id": "b", "text": "text b"}, {"id": "d", "text": "text d"}]
QUESTIONS = [
    {"question_id": "1", "question": "one", "corpus_id": "c",
     "pos_doc": [{"id": "a"}], "neg_doc": [{"id": "b"}]},
    {"question_id": "2", "question": "two", "corpus_id": "c",
     "pos_doc": [{"id": "b"}], "neg_doc": []},
    {"question_id": "3", "question": "three", "corpus_id": "c",
     "pos_doc": [{"id": "d"}], "neg_doc": [{"id": "a"}]},
]  # fmt: skip
ASKED = [("one", ["text a"], ["text b"]), ("two", ["text b"], []), ("three", ["text d"], ["text a"])]
JUDGED = ["1\ta\t1", "1\tb\t0", "2\tb\t1", "3\td\t1", "3\ta\t0"]

# name -> (path, options, {file: what is in it}, rows)
FOLDERS = {
    "beir": ("", {}, {
        "corpus.jsonl": [{"_id": r["id"], "title": "", "text": r["text"]} for r in CORPUS],
        "queries.jsonl": [{"_id": q["question_id"], "text": q["question"]} for q in QUESTIONS],
        "qrels/train.tsv": ["query-id\tcorpus-id\tscore", *JUDGED],
    }, ASKED),
    "dataset": ("", {}, {
        "dataset_metadata.json": METADATA, "corpus.parquet": CORPUS, "queries.parquet": QUESTIONS,
    }, ASKED),
    "automodel-ids": ("train.json", {}, {
        "c/merlin_metadata.json": METADATA, "c/train.jsonl": CORPUS,
        "train.json": {"corpus": [{"path": "c"}], "data": QUESTIONS},
    }, ASKED),
    "tevatron-ids": ("train.jsonl", {"source": "texts.jsonl"}, {
        "texts.jsonl": [
            {"docid": "a", "text": "text a"}, {"docid": "b", "title": None, "text": "text b"},
            {"docid": "d", "title": "text", "document_text": "d"},
        ],
        "train.jsonl": [
            {"query_id": q["question_id"], "query_text" if i else "query": q["question"], "answer": None,
             "positive_document_ids": [d["id"] for d in q["pos_doc"]],
             "negative_document_ids": [d["id"] for d in q["neg_doc"]]}
            for i, q in enumerate(QUESTIONS)
        ],
    }, ASKED),
    "msmarco": ("", {}, {
        "collection.tsv": [f"{r['id']}\t{r['text']}" for r in CORPUS],
        "queries.train.tsv": [f"{q['question_id']}\t{q['question']}" for q in QUESTIONS],
        "qrels.train.tsv": [line.replace("\t", "\t0\t", 1) for line in JUDGED],
    }, ASKED),
    "msmarco-triples": ("qidpidtriples.train.tsv", {}, {
        "collection.tsv": [f"{r['id']}\t{r['text']}" for r in CORPUS],
        "queries.train.tsv": [f"{q['question_id']}\t{q['question']}" for q in QUESTIONS],
        "qidpidtriples.train.tsv": ["1\ta\tb", "3\td\ta", "1\ta\td"],
    }, [("one", ["text a"], ["text b"]), ("three", ["text d"], ["text a"]), ("one", ["text a"], ["text d"])]),
    "triples": ("triples.train.tsv", {}, {
        "triples.train.tsv": ["one\ttext a\ttext b", "two\ttext b\ttext a", 'a "three"\ttext d\ttext a'],
    }, [("one", ["text a"], ["text b"]), ("two", ["text b"], ["text a"]),
        ('a "three"', ["text d"], ["text a"])]),
    "aligned": ("x.en,x.de", {}, {
        "x.en": ["dog", "cat", "mouse"], "x.de": ["Hund", "Katze", "Maus"],
    }, [("dog", ["Hund"], []), ("cat", ["Katze"], []), ("mouse", ["Maus"], [])]),
}  # fmt: skip
