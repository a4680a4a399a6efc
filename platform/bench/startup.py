"""What a person waits for at the command line."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from kvlab.platform.bench.line import Line, middle, seconds

HELP_REPEATS = 7
PLAN_REPEATS = 3
SEEDS = 100
RATES = 50
WORKFLOW = f"""version: 1
name: many
seeds: [{", ".join(map(str, range(SEEDS)))}]
model: {{preset: nano}}
data: {{source: python, tokenizer: {{bpe: 2048}}, sequence_length: 256}}
jobs:
  base:
    matrix: {{train.learning_rate: [{", ".join(f"{1e-4 * (i + 1):.6f}" for i in range(RATES))}]}}
    train: {{method: full_attention, tokens: 100k}}
  quality: {{evaluate: {{of: base}}}}
"""


def run() -> list[Line]:
    """Time `kvlab --help`, and `kvlab plan` of 10,000 jobs in a fresh home."""
    kvlab = Path(sys.executable).with_name("kvlab")
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "many.yaml"
        file.write_text(WORKFLOW)
        environment = {**os.environ, "KVLAB_HOME": str(Path(folder) / "home")}

        def call(*arguments: str) -> str:
            done = subprocess.run(
                [kvlab, *arguments],
                env=environment,
                check=True,
                capture_output=True,
                text=True,
            )
            return done.stdout

        call("--help")
        helps = [seconds(lambda: call("--help")) for _ in range(HELP_REPEATS)]
        planned = len(json.loads(call("plan", "--json", str(file)))["jobs"])
        plans = [seconds(lambda: call("plan", "--json", str(file))) for _ in range(PLAN_REPEATS)]
    wanted = 2 * SEEDS * RATES
    return [
        Line("kvlab --help", "s", middle(helps), better="less", limit=0.5),
        Line(
            f"kvlab plan of {wanted:,} jobs",
            "s",
            middle(plans),
            better="less",
            limit=3.0,
            void="" if planned >= wanted else f"{planned} jobs were planned, not {wanted}",
            detail={"samples": plans},
        ),
    ]
