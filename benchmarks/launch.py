"""How long one command line takes to become a job script, against importing Hydra alone.

    python3 benchmarks/launch.py [ROUNDS]

Both are started in turn, so that a busy machine slows both. The ratio of the medians should be at
most 3.4 (the published launcher: 0.58 s against 0.13 s, that is 4.5).
"""

import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LIMIT = 3.4


def timed(argv: list[str], folder: str) -> tuple[float, float]:
    """Wall-clock and processor seconds of one run."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    started = time.perf_counter()
    subprocess.run(argv, cwd=folder, check=True, capture_output=True)
    wall = time.perf_counter() - started
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return wall, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def main() -> int:
    rounds = int(sys.argv[1]) if len(sys.argv) > 1 else 15
    with tempfile.TemporaryDirectory() as folder:
        commands = {
            "import hydra, omegaconf": [sys.executable, "-c", "import hydra, omegaconf"],
            "stages=adapter_learning dry_run=True": [
                sys.executable,
                str(ROOT / "main.py"),
                "stages=adapter_learning",
                "dry_run=True",
                f"data_dir={folder}/data",
                f"base_results_dir={folder}/results",
            ],
        }
        times: dict[str, list[tuple[float, float]]] = {name: [] for name in commands}
        for number in range(rounds + 1):
            for name, argv in commands.items():
                taken = timed(argv, folder)
                if number:  # the first round fills caches
                    times[name].append(taken)
    medians = {
        name: [statistics.median(column) for column in zip(*taken, strict=True)]
        for name, taken in times.items()
    }
    for name, (wall, cpu) in medians.items():
        print(f"{name:<40}{wall:7.3f} s wall{cpu:9.3f} s processor")
    (base, base_cpu), (ours, ours_cpu) = medians.values()
    print(f"{'ratio':<40}{ours / base:7.2f}{ours_cpu / base_cpu:16.2f}")
    return 0 if ours <= LIMIT * base else 1


if __name__ == "__main__":
    sys.exit(main())
