"""Importing is quick and help needs no torch. Times are the best of three, with room for a busy machine."""

import subprocess
import sys
import time
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"
SCRIPTS = sorted(EXAMPLES.glob("train_*.py"))
HEAVY = ("torch", "accelerate", "diffusers", "transformers", "datasets", "peft", "numpy")

# The requirements are 0.3 s and 1.5 s on an idle machine; a bare interpreter, measured beside them, is subtracted.
IMPORT_LIMIT = 0.3
HELP_LIMIT = 1.5


def best_seconds(*arguments: str) -> float:
    times = []
    for _ in range(3):
        start = time.perf_counter()
        subprocess.run([sys.executable, *arguments], check=True, stdout=subprocess.DEVNULL)
        times.append(time.perf_counter() - start)
    return min(times)


def heavy_modules_after(code: str) -> str:
    watch = f"import atexit, sys\natexit.register(lambda: print('HEAVY', [m for m in {HEAVY!r} if m in sys.modules]))\n"
    result = subprocess.run([sys.executable, "-c", watch + code], check=True, capture_output=True, text=True)
    return result.stdout.splitlines()[-1]


def test_import_is_quick():
    assert best_seconds("-c", "import fv_distill") - best_seconds("-c", "pass") < IMPORT_LIMIT


def test_import_needs_nothing_heavy():
    code = "import fv_distill\nfrom fv_distill import callbacks, config, data, estimate, evaluation, export, losses\n"
    code += "from fv_distill import methods, models, report, rollouts, schedules, training\n"
    assert heavy_modules_after(code) == "HEAVY []"


@pytest.mark.parametrize(
    "words",
    [[], ["train"], ["export"], ["push"], ["convert-wan"], ["estimate"], ["evaluate"], ["report"], ["demo"]],
    ids=lambda words: " ".join(words) or "fv-distill",
)
def test_help_is_quick_and_needs_nothing_heavy(words):
    assert heavy_modules_after(f"from fv_distill.cli import main\nmain({[*words, '--help']!r})") == "HEAVY []"
    assert best_seconds("-m", "fv_distill", *words, "--help") < HELP_LIMIT


def test_pushing_needs_nothing_heavy():
    assert heavy_modules_after("import fv_distill.export.hub") == "HEAVY []"


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.name)
def test_help_of_an_example_is_quick_and_needs_nothing_heavy(script):
    code = f"import runpy\nsys.argv = [{str(script)!r}, '--help']\nrunpy.run_path({str(script)!r}, run_name='__main__')"
    assert heavy_modules_after(code) == "HEAVY []"
    assert best_seconds(str(script), "--help") < HELP_LIMIT


def test_there_are_examples():
    assert SCRIPTS
