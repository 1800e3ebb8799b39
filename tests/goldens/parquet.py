"""Writes Parquet files as other programs do, and the same rows as JSON.

Encodings: one file per way in which the same rows of mixed types can be stored, beside
`encodings/rows.json`. Tasks: for each published data set a Parquet file in the hub's
columns and types, and a JSON or JSONL file in those of the original release, of rows
that are invented here.
"""

import json

import pyarrow as pa
import pyarrow.parquet as pq

ROWS = [
    {
        "text": f"row {i}: Grüße 漢字 🙂\r\n\"quoted\"" if i != 2 else None,
        "kind": ["a", "b", "c"][i % 3],
        "int": i * 10**15 - 7,
        "small": -i if i % 4 else None,
        "unsigned": 2**63 + i,
        "float": i / 8 - 1,
        "flag": i % 2 == 0,
        "list": [f"x{j}" for j in range(i % 4)] if i != 3 else None,
        "nested": [[i, None], []] if i % 2 else [[]],
        "struct": {"label": ["A", "B"][: i % 3], "text": ["one", None][: i % 3], "inner": {"n": i}},
        "turns": [{"role": "user", "content": f"q{i}"}, {"role": "assistant", "content": f"a{i}"}],
        "null": None,
    }
    for i in range(23)
]

TYPES = pa.schema(
    [
        ("text", pa.string()),
        ("kind", pa.string()),
        ("int", pa.int64()),
        ("small", pa.int8()),
        ("unsigned", pa.uint64()),
        ("float", pa.float32()),
        ("flag", pa.bool_()),
        ("list", pa.list_(pa.string())),
        ("nested", pa.list_(pa.list_(pa.int32()))),
        (
            "struct",
            pa.struct(
                [
                    ("label", pa.list_(pa.string())),
                    ("text", pa.list_(pa.string())),
                    ("inner", pa.struct([("n", pa.int16())])),
                ]
            ),
        ),
        ("turns", pa.list_(pa.struct([("role", pa.string()), ("content", pa.string())]))),
        ("null", pa.null()),
    ]
)


def with_type(name, new):
    """The columns' types with another one for a column."""
    at = TYPES.get_field_index(name)
    return TYPES.set(at, pa.field(name, new))


ENCODINGS = {
    "plain": (TYPES, {"compression": "none", "use_dictionary": False}),
    "snappy": (TYPES, {}),
    "zstd": (TYPES, {"compression": "zstd"}),
    "gzip": (TYPES, {"compression": "gzip"}),
    "lz4": (TYPES, {"compression": "lz4"}),
    "brotli": (TYPES, {"compression": "brotli"}),
    "row_groups": (TYPES, {"row_group_size": 5}),
    "pages": (TYPES, {"data_page_version": "2.0", "data_page_size": 64, "write_batch_size": 4}),
    "delta": (
        TYPES,
        {
            "use_dictionary": False,
            "column_encoding": {"text": "DELTA_BYTE_ARRAY", "kind": "DELTA_LENGTH_BYTE_ARRAY", "int": "DELTA_BINARY_PACKED"},
        },
    ),
    "split_bytes": (TYPES, {"use_dictionary": False, "column_encoding": {"float": "BYTE_STREAM_SPLIT"}}),
    "old_version": (with_type("unsigned", pa.uint64()), {"version": "1.0"}),
    "large_types": (with_type("text", pa.large_string()).set(7, pa.field("list", pa.large_list(pa.large_string()))), {}),
    "dictionary": (with_type("kind", pa.dictionary(pa.int32(), pa.string())), {}),
    "binary": (with_type("text", pa.binary()), {}),
    "checksums": (TYPES, {"write_page_checksum": True}),
}

STRING = pa.string()
HUB_TYPES = {
    "aqua_rat": [("question", STRING), ("options", pa.list_(STRING)), ("rationale", STRING), ("correct", STRING)],
    "gsm8k": [("question", STRING), ("answer", STRING)],
    "commonsense_qa": [
        ("id", STRING),
        ("question", STRING),
        ("question_concept", STRING),
        ("choices", pa.struct([("label", pa.list_(STRING)), ("text", pa.list_(STRING))])),
        ("answerKey", STRING),
    ],
    "drop": [
        ("section_id", STRING),
        ("query_id", STRING),
        ("passage", STRING),
        ("question", STRING),
        ("answers_spans", pa.struct([("spans", pa.list_(STRING)), ("types", pa.list_(STRING))])),
    ],
    "samsum": [("id", STRING), ("dialogue", STRING), ("summary", STRING)],
    "dialogsum": [("id", STRING), ("dialogue", STRING), ("summary", STRING), ("topic", STRING)],
}

HUB_ROWS = {
    "aqua_rat": [
        {
            "question": "A shop sells 3 pens for $2. What do 12 pens cost?",
            "options": ["A)$6", "B)$8", "C)$9", "D)$10", "E)None of these"],
            "rationale": "12 pens are 4 times 3 pens.\n4 * 2 = 8",
            "correct": "B",
        },
        {
            "question": "x + 4 = 9, x = ?",
            "options": ["A)3", "B)4", "C)5", "D)6", "E)7"],
            "rationale": "x = 9 – 4",
            "correct": "C",
        },
    ],
    "gsm8k": [
        {
            "question": "Ada reads 14 pages a day. How many does she read in 3 weeks?",
            "answer": "3 weeks are 3*7=<<3*7=21>>21 days.\n14*21=<<14*21=294>>294 pages.\n#### 294",
        },
        {"question": "What is half of 1,000?", "answer": "1000/2=<<1000/2=500>>500\n#### 500"},
    ],
    "commonsense_qa": [
        {
            "id": "c1",
            "question": "Where would you leave a wet umbrella?",
            "question_concept": "umbrella",
            "choices": {"label": list("ABCDE"), "text": ["bed", "stand", "cake", "piano", "letter"]},
            "answerKey": "B",
        },
        {
            "id": "c2",
            "question": "What do bees make?",
            "question_concept": "bee",
            "choices": {"label": list("ABCDE"), "text": ["glass", "wool", "honey", "salt", "paper"]},
            "answerKey": "C",
        },
    ],
    "drop": [
        {
            "section_id": "s1",
            "query_id": "q1",
            "passage": "The home team led by 3, then by 10. It won 24 to 14.",
            "question": "How many points did the winner score?",
            "answers_spans": {"spans": ["24"], "types": ["number"]},
        },
        {
            "section_id": "s1",
            "query_id": "q2",
            "passage": "The home team led by 3, then by 10. It won 24 to 14.",
            "question": "Which leads are named?",
            "answers_spans": {"spans": ["3", "10"], "types": ["span", "span"]},
        },
        {
            "section_id": "s2",
            "query_id": "q3",
            "passage": "The bridge was opened on 3 May 1887.",
            "question": "When was it opened?",
            "answers_spans": {"spans": ["3 May 1887"], "types": ["date"]},
        },
    ],
    "samsum": [
        {"id": "1", "dialogue": "Ann: tea?\r\nBo: yes pls :)\r\nAnn: 5 min", "summary": "Ann makes tea for Bo."},
        {"id": "2", "dialogue": "Cy: where r u\r\nDi: train late", "summary": "Di's train is late."},
    ],
    "dialogsum": [
        {
            "id": "train_0",
            "dialogue": "#Person1#: Is this seat taken?\n#Person2#: No, please sit down.",
            "summary": "#Person1# takes a free seat.",
            "topic": "seat",
        },
        {
            "id": "train_1",
            "dialogue": "#Person1#: How much is it?\n#Person2#: Nine euros.",
            "summary": "#Person2# tells #Person1# a price.",
            "topic": "shopping",
        },
    ],
}


def original_rows():
    """The same rows in the columns of the original releases, by file name."""
    choices = lambda row: [{"label": a, "text": b} for a, b in zip(row["choices"]["label"], row["choices"]["text"])]
    commonsense = [
        {
            "answerKey": row["answerKey"],
            "id": row["id"],
            "question": {"question_concept": row["question_concept"], "choices": choices(row), "stem": row["question"]},
        }
        for row in HUB_ROWS["commonsense_qa"]
    ]
    empty = {"number": "", "date": {"day": "", "month": "", "year": ""}, "spans": []}
    answers = [
        {**empty, "number": "24"},
        {**empty, "spans": ["3", "10"]},
        {**empty, "date": {"day": "3", "month": "May", "year": "1887"}},
    ]
    sections = {}
    for row, answer in zip(HUB_ROWS["drop"], answers):
        section = sections.setdefault(row["section_id"], {"passage": row["passage"], "qa_pairs": []})
        section["qa_pairs"].append({"question": row["question"], "answer": answer, "query_id": row["query_id"]})
    dialogsum = [{"fname": r["id"], **{k: r[k] for k in ("dialogue", "summary", "topic")}} for r in HUB_ROWS["dialogsum"]]
    return {
        "aqua_rat.jsonl": HUB_ROWS["aqua_rat"],
        "gsm8k.jsonl": HUB_ROWS["gsm8k"],
        "commonsense_qa.jsonl": commonsense,
        "drop.json": sections,
        "samsum.json": [{k: r[k] for k in ("id", "summary", "dialogue")} for r in HUB_ROWS["samsum"]],
        "dialogsum.jsonl": dialogsum,
    }


def make_parquet(root):
    """Writes all files below `root`/parquet."""
    encodings, tasks = root / "parquet" / "encodings", root / "parquet" / "tasks"
    encodings.mkdir(parents=True, exist_ok=True)
    tasks.mkdir(parents=True, exist_ok=True)
    for name, (schema, options) in ENCODINGS.items():
        rows = [{**row, "text": row["text"] and row["text"].encode()} for row in ROWS] if name == "binary" else ROWS
        pq.write_table(pa.Table.from_pylist(rows, schema=schema), encodings / f"{name}.parquet", **options)
    (encodings / "rows.json").write_text(json.dumps(ROWS, ensure_ascii=False, indent=1))
    for name, rows in HUB_ROWS.items():
        pq.write_table(pa.Table.from_pylist(rows, schema=pa.schema(HUB_TYPES[name])), tasks / f"{name}.parquet")
    for name, rows in original_rows().items():
        lines = [json.dumps(row, ensure_ascii=False) for row in rows]
        text = "\n".join(lines) + "\n" if name.endswith("l") else json.dumps(rows, ensure_ascii=False, indent=1)
        (tasks / name).write_text(text)
