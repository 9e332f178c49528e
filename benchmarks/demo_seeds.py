"""REDI against SFT and against the alpha 0 control on the embedded demo, over seeds.

    python -m benchmarks.demo_seeds [--seeds 0 1 2] [--output_dir runs/demo-seeds]

Every seed has its own problems, teacher and initial weights. Both stage-2 runs of a seed start from the same stage 1
and are scored on the same held-out problems; differences are paired by problem. About a minute a seed.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np

from redi_train.demo import paired_difference, pass_at_1

ALPHAS = (0.8, 0.0)


def correct_samples(folder: Path) -> np.ndarray:
    """(problems, samples) bool of a finished stage."""
    return np.array(json.loads((folder / "results.json").read_text(encoding="utf-8"))["correct"], dtype=bool)


def run_seed(root: Path, seed: int) -> dict[float, Path]:
    """Train one seed; returns the folder of each alpha, in which `sft` and `redi` are."""
    folders = {alpha: root / f"seed{seed}-alpha{alpha:g}" for alpha in ALPHAS}
    for alpha, folder in folders.items():
        stage_1 = folders[ALPHAS[0]] / "sft"
        if stage_1.exists() and not folder.exists():
            shutil.copytree(stage_1, folder / "sft")
        options = ["--stage", "redi", "--seed", str(seed), "--alpha", str(alpha), "--output_dir", str(folder)]
        subprocess.run([sys.executable, "-m", "redi_train", *options], check=True)
    return folders


def difference(after: np.ndarray, before: np.ndarray) -> str:
    mean, standard_error = paired_difference(after, before)
    return f"{mean:+.3f} ± {standard_error:.3f} ({mean / standard_error:.1f} s.e.)"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--output_dir", type=Path, default=Path("runs/demo-seeds"))
    arguments = parser.parse_args()
    lines = [
        "| seed | SFT | alpha 0 | alpha 0.8 | alpha 0.8 - SFT | alpha 0.8 - alpha 0 |",
        "|--:|--:|--:|--:|--:|--:|",
    ]
    for seed in arguments.seeds:
        folders = run_seed(arguments.output_dir, seed)
        sft = correct_samples(folders[0.8] / "sft")
        redi, control = (correct_samples(folders[alpha] / "redi") for alpha in ALPHAS)
        scores = " | ".join("{:.3f} ± {:.3f}".format(*pass_at_1(correct)) for correct in (sft, control, redi))
        lines.append(f"| {seed} | {scores} | {difference(redi, sft)} | {difference(redi, control)} |")
    print("\n" + "\n".join(lines))


if __name__ == "__main__":
    main()
