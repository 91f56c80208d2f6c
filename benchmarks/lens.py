"""The lens page: build time, size, response time in a browser; and the pictures of the docs.

    pip install -e ".[browser]" && python benchmarks/lens.py [--json FILE]
    python benchmarks/lens.py --pictures docs/images --run runs/default [--prompt TEXT]

Build time: the command, including the start of Python, for a run of configs/default.toml, with an empty and a warm
compilation cache; `write_lens_page` for a model of 135 million parameters (30 layers, 9 heads, 3 key/value heads,
random weights), likewise; and the size of a page of 12 layers, 12 heads and 64 tokens. Response time: from a click or a
key to the second frame after it, in headless Chromium (found on the path or in CHROMIUM) at 1280 x 900.
"""

import argparse
import functools
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import jax
import numpy as np
from measuring import random_model, timed
from playwright.sync_api import Browser, Page, sync_playwright

import flax_decoder as fd

ROOT = Path(__file__).resolve().parent.parent
NUM_TOKENS = 64
LLAMA = {"model.positions": "rotary", "model.norm": "rmsnorm", "model.feed_forward": "swiglu"}
SIZES: dict[str, dict[str, Any]] = {
    "12 x 12 x 64": {
        "model.vocab_size": 50257,
        "model.num_layers": 12,
        "model.num_heads": 12,
        "model.embed_dim": 768,
        "model.context_length": 1024,
    },
    "135M": {
        "model.vocab_size": 49152,
        "model.num_layers": 30,
        "model.num_heads": 9,
        "model.num_kv_heads": 3,
        "model.embed_dim": 576,
        "model.mlp_dim": 1536,
        "model.context_length": 2048,
        **LLAMA,
    },
}
ROUNDS = 15
# Each alternates between two states.
ACTIONS = {
    "click on a head": "document.querySelectorAll('#heads [data-head]')[i % 2 ? 0 : 5].click()",
    "click on a token": "document.querySelector(`[data-token='${i % 2 ? 40 : 50}']`).click()",
    "key for the next head": "document.dispatchEvent(new KeyboardEvent('keydown', {key: i % 2 ? 'h' : 'H'}))",
    "click on a source": "document.querySelectorAll('.meeting .pick')[i % 2 ? 2 : 1].click()",
}
# Until the second frame after the action: the first one has then been painted.
MEASURE = """i => new Promise(done => {
    const start = performance.now();
    ACTION;
    requestAnimationFrame(() => requestAnimationFrame(() => done(performance.now() - start)));
})"""


def command_seconds(folder: Path) -> dict[str, float]:
    """Wall time of `flax-decoder lens` for a short run of the default config, with a cold and a warm cache."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "JAX_COMPILATION_CACHE_DIR": str(folder / "cache")}
    environment["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
    steps = ["--training.num-steps", "2", "--training.sample-tokens", "1"]

    def run(*arguments: str) -> float:
        command = [sys.executable, "-m", "flax_decoder", *arguments]
        execute = functools.partial(subprocess.run, command, cwd=folder, env=environment, capture_output=True)
        return timed(lambda: execute(check=True))[0]

    run("train", str(ROOT / "configs" / "default.toml"), *steps)
    prompt = "The value of an expression is what it is when it is evaluated. "[:NUM_TOKENS]
    page = ["lens", "runs/default", "--prompt", prompt, "--out", "default.html"]
    return {"first": run(*page), "again": min(run(*page) for _ in range(3))}


def page_seconds(settings: dict[str, Any], path: Path) -> dict[str, float]:
    """Time of `write_lens_page` for a model of random weights, with and without compiling."""
    model, params = random_model(settings)
    tokens_T = np.random.default_rng(0).integers(0, settings["model.vocab_size"], NUM_TOKENS)
    jax.block_until_ready(params)
    write = functools.partial(fd.write_lens_page, path, model, params, None, tokens_T)
    return {"first": timed(write)[0], "again": timed(write)[0]}


def answer_milliseconds(browser: Browser, path: Path) -> dict[str, float]:
    """Median response time to each kind of action, and the time to open the page."""
    page = browser.new_page(viewport={"width": 1280, "height": 900})
    results = {"open": 1000 * timed(lambda: open_page(page, path))[0]}
    page.evaluate(MEASURE.replace("ACTION", ""), 0)
    for name, action in ACTIONS.items():
        times = [page.evaluate(MEASURE.replace("ACTION", action), i) for i in range(ROUNDS)]
        results[name] = statistics.median(times)
        results[f"{name}, slowest"] = max(times)
    page.close()
    return results


def open_page(page: Page, path: Path) -> None:
    """Opens a page, and waits until its numbers are unpacked and displayed."""
    page.goto(path.absolute().as_uri())
    page.wait_for_selector("html[data-ready]", state="attached")


def measure(browser: Browser, folder: Path) -> dict[str, Any]:
    """All measurements, by name of the model."""
    results: dict[str, Any] = {"default": {"seconds": command_seconds(folder)}}
    for name, settings in SIZES.items():
        results[name] = {"seconds": page_seconds(settings, folder / f"{name}.html")}
    for name, result in results.items():
        path = folder / f"{name}.html"
        result |= {"bytes": path.stat().st_size, "milliseconds": answer_milliseconds(browser, path)}
    return results


def take_pictures(browser: Browser, run: Path, prompt: str, folder: Path) -> None:
    """Writes the pictures of the docs, each of one part of a run's page."""
    from flax_decoder.lens.history import read_history

    model, params, tokenizer = fd.load(run)
    assert tokenizer is not None
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as place:
        path = Path(place) / "lens.html"
        fd.write_lens_page(path, model, params, tokenizer, np.array(tokenizer.encode(prompt)), read_history(run))
        for name, width, height, part in (
            ("lens_top", 1280, 940, None),
            ("lens_phone", 360, 780, ".meeting"),
            ("lens_story", 1280, 900, "section[aria-labelledby=story-title]"),
            ("lens_why", 1280, 900, "section[aria-labelledby=why-title]"),
            ("lens_learning", 1280, 900, "section[aria-labelledby=learning-title]"),
        ):
            page = browser.new_page(viewport={"width": width, "height": height}, color_scheme="light")
            open_page(page, path)
            picture = folder / f"{name}.png"
            if part is None:
                page.screenshot(path=picture)
            else:
                margin = "1.5rem" if part.startswith("section") else "0"
                style = f".chooser {{ position: static !important; }} section {{ padding: {margin} !important; }}"
                page.add_style_tag(content=style)
                page.locator(part).first.screenshot(path=picture)
            print(picture, picture.stat().st_size)
            page.close()


def main() -> None:
    """Measures, or takes pictures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="also write the numbers to a file")
    parser.add_argument("--pictures", type=Path, metavar="FOLDER", help="write the pictures of the docs instead")
    parser.add_argument("--run", type=Path, default=Path("runs/default"), help="the run to take pictures of")
    parser.add_argument("--prompt", default="ROMEO: O, she doth teach the torches to burn bright! O, she doth")
    options = parser.parse_args()
    chromium = os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("chromium-browser")
    with sync_playwright() as playwright, tempfile.TemporaryDirectory() as folder:
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        if options.pictures is not None:
            take_pictures(browser, options.run, options.prompt, options.pictures)
            return
        results = measure(browser, Path(folder))
    for name, result in results.items():
        seconds = ", ".join(f"{key} {value:.1f} s" for key, value in result["seconds"].items())
        print(f"{name}: built {seconds}; {result['bytes']:,} bytes")
        for key, value in result["milliseconds"].items():
            print(f"    {key:32} {value:7.1f} ms")
    if options.json is not None:
        options.json.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
