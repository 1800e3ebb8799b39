"""Rows and warnings of clients.jsonl: python3 summarise.py"""

import json
import pathlib
import random

ROWS = [json.loads(line) for line in (pathlib.Path(__file__).parent / "clients.jsonl").open()]
SCORES = ("ridge", "products", "refined")


def mean(values):
    return sum(values) / len(values)


def pgr_of_means(rows, score):
    student, teacher = (mean([row[name] for row in rows]) for name in ("p_s", "p_t"))
    return 100 * (mean([row[score] for row in rows]) - student) / (teacher - student)


def interval(rows, score, draws=2000):
    rng = random.Random(0)
    found = sorted(pgr_of_means([rng.choice(rows) for _ in rows], score) for _ in range(draws))
    return found[int(0.025 * draws)], found[int(0.975 * draws)]


def pgr(row, score):
    return pgr_of_means([row], score) if row["p_t"] > row["p_s"] else float("nan")


def auc(rows, score, doubt):
    bad = [doubt(row) for row in rows if pgr(row, score) < 50]
    good = [doubt(row) for row in rows if pgr(row, score) > 90]
    pairs = [1.0 if b > g else 0.5 if b == g else 0.0 for b in bad for g in good]
    return f"AUC {mean(pairs):.3f} of {len(bad)} bad and {len(good)} good" if pairs else "not enough"


def below(rows, score, level):
    bad = [row["agreement"] < level for row in rows if pgr(row, score) < 50]
    good = [row["agreement"] < level for row in rows if pgr(row, score) > 90]
    return f"{sum(bad)} of {len(bad)} bad, {sum(good)} of {len(good)} good"


kinds = {}
for row in ROWS:
    kinds.setdefault((row["clients"], row.get("left_out", "")), []).append(row)
first_fold = {row["group"] for row in ROWS if row["clients"] == "longer"}
kinds["as-curated", "(the groups of longer)"] = [
    row for row in kinds["as-curated", ""] if row["seed"] == 1 and row["group"] in first_fold
]
for (kind, left_out), rows in kinds.items():
    line = f"{kind} {left_out}: {len(rows)} groups, P_S {100 * mean([r['p_s'] for r in rows]):.1f}, "
    line += f"P_T {100 * mean([r['p_t'] for r in rows]):.1f}"
    for score in SCORES:
        low, high = interval(rows, score)
        line += f"; {score} {100 * mean([r[score] for r in rows]):.1f}, PGR {pgr_of_means(rows, score):.0f} [{low:.0f}, {high:.0f}]"
    print(line)
judged = [row for row in ROWS if row["clients"] != "mixture"]
for score in SCORES[1:]:
    print(score, "by agreement:", auc(judged, score, lambda row: -row["agreement"]))
    print(score, "by distance:", auc(judged, score, lambda row: row["distance"]))
    for level in (0.05, 0.1, 0.15, 0.2, 0.25, 0.3):
        print(score, f"agreement below {level}:", below(judged, score, level))
