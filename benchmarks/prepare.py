"""How fast and in how much memory texts become tokens, with one process and with two.

    python benchmarks/prepare.py [--megabytes 200] [--tokenizers byte,bpe,large] [--limit-megabytes 400]

Writes lines of JSON with documents of a few hundred words each, made from the words of Python's help texts, and
prepares them by `flax-decoder prepare`, under a limit on the address space of each process: that of an interpreter that
has imported the same modules, plus `--limit-megabytes`. "large" is a byte-level BPE of 50,000 tokens in a
tokenizer.json.
`encode_batch` is the `tokenizers` library by itself, on one core.
"""

import argparse
import json
import os
import random
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import tokenizers

from flax_decoder.data.formats.texts import built_in_text
from flax_decoder.data.tokenizer import make_tokenizer
from flax_decoder.training.hardware import describe_cpu

IMPORTS = "import flax_decoder.cli, flax_decoder.data.corpus, tokenizers; print(open('/proc/self/status').read())"


def write_texts(path: Path, megabytes: int) -> None:
    """Documents of a few hundred words, one a line; words are drawn as often as they occur, some are made up."""
    generator = random.Random(0)
    words = built_in_text().split()
    size = 0
    with path.open("w") as file:
        while size < megabytes * 1_000_000:
            text = " ".join(generator.choices(words, k=generator.randint(50, 400)))
            text += f" {generator.getrandbits(60):x}\n"
            size += file.write(json.dumps({"text": text}) + "\n")


def address_space() -> int:
    """Bytes of an interpreter that has imported what `prepare` does."""
    status = subprocess.run([sys.executable, "-c", IMPORTS], capture_output=True, text=True, check=True).stdout
    return 1000 * int(status.split("VmPeak:")[1].split()[0])


def main() -> None:
    """Measures and prints a table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--megabytes", type=int, default=200)
    parser.add_argument("--tokenizers", default="byte,bpe,large")
    parser.add_argument("--limit-megabytes", type=int, default=400)
    options = parser.parse_args()
    limit = address_space() + options.limit_megabytes * 1_000_000
    print(f"{describe_cpu()}; limit {limit / 1e6:,.0f} MB of addresses per process")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        texts = folder / "texts.jsonl"
        write_texts(texts, options.megabytes)
        large = folder / "large.json"
        if "large" in options.tokenizers:
            large.write_text(make_tokenizer("bpe", built_in_text() * 3, 50_000).to_json())
            one_core(large, texts)
        for kind in options.tokenizers.split(","):
            seconds = []
            for processes in (1, 2):
                out = folder / "corpus"
                command = [sys.executable, "-m", "flax_decoder", "prepare", str(texts), "--out", str(out)]
                command += ["--data.tokenizer", str(large) if kind == "large" else kind, "--processes", str(processes)]
                start = time.perf_counter()
                subprocess.run(
                    command,
                    check=True,
                    stdout=subprocess.DEVNULL,
                    stderr=subprocess.DEVNULL,
                    preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_AS, (limit, limit)),
                    env={**os.environ, "TOKENIZERS_PARALLELISM": "false"},
                )
                seconds.append(time.perf_counter() - start)
                peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1000
                shutil.rmtree(out)
                print(
                    f"{kind:6} {processes} process{'es' * (processes > 1)}: {options.megabytes / seconds[-1]:7.1f} MB/s"
                )
            print(f"{kind:6} two over one: {seconds[0] / seconds[1]:.2f}; largest resident size so far {peak:,.0f} MB")


def one_core(path: Path, texts: Path) -> None:
    """The library's own speed, on the first documents."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    with texts.open() as file:
        documents = [json.loads(next(file))["text"] for _ in range(2000)]
    library = tokenizers.Tokenizer.from_file(str(path))
    start = time.perf_counter()
    library.encode_batch(documents)
    size = sum(map(len, documents))
    print(f"encode_batch, one core: {size / (time.perf_counter() - start) / 1e6:.2f} MB/s")


if __name__ == "__main__":
    main()
