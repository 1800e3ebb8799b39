"""Scores of every held-out task of several runs, and what all of them give together: PGR of means with 95 % bootstrap intervals
over tasks, and the paired difference to `products`.

    held_out_scores.py RUN... > scores.json        (the table goes to standard error)

RUN is a run directory after `gradtx cross-validate`. Needs nothing but Python.
"""

import json
import pathlib
import random
import sys

DRAWS = 10_000
ENDS = ["finetuned-tiny", "finetuned-llm"]
rows = []
for run in map(pathlib.Path, sys.argv[1:]):
    home, name = run / "cross-validation", run.name if run.name != "run" else run.parent.name
    for client in json.loads((home / "clients.json").read_text()):
        found = (home / client["dir"] / "evaluated").glob("*/score.json")
        scores = {path.parent.name: 100 * json.loads(path.read_text())["score"] for path in found}
        rows.append({"run": name, "fold": client["fold"], "task": client["name"], **dict(sorted(scores.items()))})
print("[\n" + ",\n".join(json.dumps(row) for row in rows) + "\n]")


def pgr(method, tasks):
    student, teacher, found = (sum(row[name] for row in tasks) for name in [*ENDS, method])
    return 100 * (found - student) / (teacher - student)


def interval(statistic):
    found = sorted(map(statistic, draws))
    return "[{:.1f}, {:.1f}]".format(found[round(0.025 * (DRAWS - 1))], found[round(0.975 * (DRAWS - 1))])


stream = random.Random(1)
draws = [stream.choices(rows, k=len(rows)) for _ in range(DRAWS)]
methods = sorted(set.intersection(*(set(row) for row in rows)) - {"run", "fold", "task", *ENDS})
means = [sum(row[name] for row in rows) / len(rows) for name in ENDS]
print(f"{len(rows)} tasks, P_S {means[0]:.1f}, P_T {means[1]:.1f}", file=sys.stderr)
for method in methods:
    mean = sum(row[method] for row in rows) / len(rows)
    line = f"{method:28} {mean:5.1f}  PGR {pgr(method, rows):6.1f} {interval(lambda t: pgr(method, t))}"
    if method != "products":
        less = pgr(method, rows) - pgr("products", rows)
        better = sum(row[method] > row["products"] for row in rows)
        worse = sum(row[method] < row["products"] for row in rows)
        line += f"  less products {less:+.1f} {interval(lambda t: pgr(method, t) - pgr('products', t))}, {better} better, {worse} worse"
    print(line, file=sys.stderr)
