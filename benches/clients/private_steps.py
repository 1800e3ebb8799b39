"""Steps of plain and of private fine-tuning in turn: seconds, and processor time, which other work on a machine changes less.

    private_steps.py PROGRAM DIR WORLD [ROUNDS]      WORLD is of `gradtx world --world mixed`; writes DIR/steps.json

Both take (expected) 128 of 256 examples a step and one thread. Processor time of a step is a fiftieth of what 60 steps take more
than 10. The first step's seconds, which begin elsewhere, are left out.
"""

import json
import pathlib
import resource
import statistics
import subprocess
import sys

SETTINGS = ("finetune.tiny.loss_reduction=sequence", "finetune.tiny.global_batch_size=128", "privacy.accountant=rdp")


def finetune(program, world, out, steps, private):
    """Processor seconds, tokens, and seconds of every step but the first."""
    command = [program, "finetune", "--run", f"{out}-run", "--config", f"{world}/settings.toml", "--out", out,
               "--data", f"{world}/private/client-1/train.jsonl", "--threads", "1", "--quiet"]
    for setting in (*SETTINGS, f"finetune.tiny.max_steps={steps}"):
        command += ["--set", setting]
    if private:
        command += ["--dp-noise-multiplier", "2", "--dp-delta", "1e-3"]
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run(command, check=True, capture_output=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    lines = [[json.loads(line) for line in pathlib.Path(out, name).read_text().splitlines()]
             for name in ("metrics.jsonl", "throughput-steps.jsonl")]
    used = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return used, lines[0][-1]["tokens"], [line["seconds"] for line in lines[1][1:]]


def main():
    program, out, world = (str(pathlib.Path(path).resolve()) for path in sys.argv[1:4])
    pathlib.Path(out).mkdir(parents=True, exist_ok=True)
    rows = []
    for number in range(int(sys.argv[4]) if len(sys.argv) > 4 else 3):
        for private in (False, True):
            name = f"{out}/{number}-{'private' if private else 'plain'}"
            few = finetune(program, world, f"{name}-10", 10, private)
            many = finetune(program, world, f"{name}-60", 60, private)
            rows.append({
                "round": number,
                "private": private,
                "processor_seconds_of_a_step": round((many[0] - few[0]) / 50, 5),
                "processor_seconds_of_a_token": (many[0] - few[0]) / (many[1] - few[1]),
                "median_seconds_of_a_step": round(statistics.median(many[2]), 5),
            })
            print(json.dumps(rows[-1]), flush=True)
    pathlib.Path(out, "steps.json").write_text(json.dumps(rows, indent=1) + "\n")


main()
