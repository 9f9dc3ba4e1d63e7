"""Time and memory of loading a base: `python3 benchmarks/load.py FOLDER [--dtype bfloat16]`.

Each run is a process of its own, ours and `AutoModelForCausalLM.from_pretrained` in turn, and the
medians count. Time is from the call to the first logits of a few tokens, so that weights which are
only mapped have to be there. Memory is the peak of anonymous memory (RssAnon) above what the
imports hold, during the load alone and with the first forward pass, and the peak of all resident
memory (RSS, mapped files included), read every millisecond.

`--copies N` repeats the model's layers N times first, in a temporary folder: SmolLM2-135M becomes a
model of a gigabyte and more. Exit code 1 where ours is slower or its resident memory larger than
theirs, or where its anonymous memory is above 1.15 times the size of the parameters.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LIMIT = 1.15
TOKENS = [[1, 2, 3, 4, 5, 6, 7, 8]]


class Peak:
    """The highest RssAnon and RSS of this process while it is watched, in bytes; `every`: seconds
    between two looks.
    """

    def __init__(self, every: float = 0.001) -> None:
        self.every = every
        self.anonymous = self.resident = 0
        self.stopped = threading.Event()
        self.thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> "Peak":
        self.thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stopped.set()
        self.thread.join()

    def _watch(self) -> None:
        while not self.stopped.wait(self.every):
            self.look()

    def look(self) -> None:
        status = memory()
        self.anonymous = max(self.anonymous, status["RssAnon"])
        self.resident = max(self.resident, status["VmRSS"])


def memory() -> dict[str, int]:
    """The lines of /proc/self/status that count kilobytes, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    pairs = (line.split(":") for line in lines if line.endswith(" kB"))
    return {key: int(value.split()[0]) * 1024 for key, value in pairs}


def measure(who: str, folder: str, dtype_name: str) -> None:
    """One load in this process; prints figures as JSON."""
    import torch

    dtype, tokens = getattr(torch, dtype_name), torch.tensor(TOKENS)
    if who == "ours":
        sys.path.insert(0, str(ROOT / "src"))
        from graftwerk.checkpoints import huggingface, load_base  # noqa: F401  (imported first)
    else:
        from transformers import AutoModelForCausalLM, LlamaForCausalLM  # noqa: F401
    torch.nn.functional.linear(torch.zeros(8, 8), torch.zeros(8, 8))  # threads start
    before = memory()
    with Peak() as peak:
        start = time.perf_counter()
        if who == "ours":
            model = load_base(folder, dtype=dtype)
        else:
            model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
        peak.look()
        loaded, loading = time.perf_counter() - start, peak.anonymous
        with torch.inference_mode():
            model(tokens)
        first = time.perf_counter() - start
        peak.look()
    size = sum(parameter.nbytes for parameter in model.parameters())
    print(
        json.dumps(
            {
                "load_s": loaded,
                "first_logits_s": first,
                "anonymous": loading - before["RssAnon"],
                "anonymous_with_forward": peak.anonymous - before["RssAnon"],
                "resident": peak.resident - before["VmRSS"],
                "parameters": size,
            }
        )
    )


def deepen(folder: Path, copies: int, target: Path) -> None:
    """A model whose layers are those of `folder`, `copies` times over."""
    sys.path.insert(0, str(ROOT / "src"))
    from dataclasses import replace

    from graftwerk.checkpoints.base import open_checkpoint
    from graftwerk.checkpoints.huggingface import write_folder
    from graftwerk.checkpoints.tensors import read_parameter

    with open_checkpoint(folder) as base:
        layers = base.config.num_layers

        def read(name: str):
            head, _, rest = name.partition("decoder.layers.")
            if rest:
                number, _, leaf = rest.partition(".")
                name = f"{head}decoder.layers.{int(number) % layers}.{leaf}"
            return read_parameter(base.table[name], base.source)

        write_folder(replace(base.config, num_layers=layers * copies), read, target)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", type=Path, help="a Hugging Face folder of a decoder")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--copies", type=int, default=1, help="times that the layers are repeated")
    parser.add_argument("--repeat", type=int, default=5, help="runs, of which the median counts")
    parser.add_argument("--measure", choices=["ours", "theirs"], help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        measure(arguments.measure, str(arguments.folder), arguments.dtype)
        return 0
    with tempfile.TemporaryDirectory() as scratch:
        folder = arguments.folder
        if arguments.copies > 1:
            folder = Path(scratch) / "model"
            deepen(arguments.folder, arguments.copies, folder)
        runs: dict[str, list[dict[str, float]]] = {"ours": [], "theirs": []}
        for _ in range(arguments.repeat):
            for who, results in runs.items():
                command = [sys.executable, __file__, str(folder), "--measure", who]
                command += ["--dtype", arguments.dtype]
                output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
                results.append(json.loads(output.splitlines()[-1]))
    medians = {
        who: {key: statistics.median(run[key] for run in results) for key in results[0]}
        for who, results in runs.items()
    }
    ours, theirs = medians["ours"], medians["theirs"]
    print(f"{arguments.folder}, {arguments.dtype}: {ours['parameters'] / 1e9:.3f} GB of parameters")
    print(f"{'':24} {'graftwerk':>12} {'transformers':>12}")
    for key in ours:
        scale, unit = (1, "s") if key.endswith("_s") else (1e6, "MB")
        print(f"{key:24} {ours[key] / scale:9.2f} {unit:2} {theirs[key] / scale:9.2f} {unit:2}")
    judged = ("load_s", "first_logits_s", "resident")  # all memory, whichever way it is held
    worse = [key for key in judged if ours[key] > 1.02 * theirs[key]]
    ratio = ours["anonymous"] / ours["parameters"]
    print(f"anonymous memory of loading: {ratio:.2f} x the parameters (limit {LIMIT})")
    if worse:
        print(f"worse than transformers: {', '.join(worse)}")
    return 1 if worse or ratio > LIMIT else 0


if __name__ == "__main__":
    sys.exit(main())
