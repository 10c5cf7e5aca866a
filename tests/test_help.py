"""--help, and the refusal of wrong arguments, come at once: no heavy library is loaded for them."""

import json
import subprocess
import sys

import pytest
from conftest import ROOT

HEAVY = {"torch", "transformers", "numpy", "nltk", "PIL", "pycocoevalcap", "matplotlib", "faiss",
         "safetensors", "huggingface_hub", "gradio"}
WATCHED = """
import json, runpy, sys
script, report, *arguments = sys.argv[1:]
sys.argv = [script, *arguments]
sys.path.insert(0, script.rpartition("/")[0])
try:
    runpy.run_path(script, run_name="__main__")
finally:
    with open(report, "w") as file:
        json.dump(sorted({name.partition(".")[0] for name in sys.modules}), file)
"""


def start(tmp_path, script, *arguments):
    """(exit code, what was written to out, to err, names of the modules that were loaded)."""
    report = tmp_path / "modules.json"
    command = [sys.executable, "-c", WATCHED, ROOT / f"{script}.py", report, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    return done.returncode, done.stdout, done.stderr, set(json.loads(report.read_text()))


@pytest.mark.parametrize("script", ["compute_cache", "trainer", "sampler", "scorer", "stories",
                                    "app"])
def test_help_loads_no_heavy_library(tmp_path, script):
    code, out, _, modules = start(tmp_path, script, "--help")
    assert code == 0 and not modules & HEAVY
    ungrouped = out.partition("options:\n")[2].partition("\n\n")[0]
    assert "--help" in ungrouped and ungrouped.count("\n") == 0  # all others stand in groups


@pytest.mark.parametrize("script, arguments, named", [
    ("compute_cache", [], "exactly one of"),
    ("compute_cache", ["--entries", "none.txt", "--topk", "0"], "--topk"),
    ("compute_cache", ["--datadir", "none"], "none"),
    ("compute_cache", ["--add", "a dog"], "cache.txt"),
    ("trainer", ["--datadir", "none", "--lrate", "0"], "--lrate"),
    ("sampler", [], "exactly one of"),
    ("sampler", ["--images", "none.jpg", "--num_return_sequences", "4"], "--num_beams"),
    ("sampler", ["--images", "none.jpg"], "no cache here"),
    ("scorer", [], "exactly one of"),
    ("scorer", ["--preds", "none.txt", "--refs", "none.txt"], "none.txt"),
    ("app", ["--auth", "user"], "--auth"),
    ("app", [], "demo.sh"),
    ("stories", [], "exactly one of"),
    ("stories", ["--captions", "none.txt"], "none.txt"),
    ("stories", ["--caption", "a dog", "--top_p", "2"], "--top_p"),
])
@pytest.mark.slow
def test_wrong_arguments_are_refused_before_any_heavy_library_is_loaded(tmp_path, script,
                                                                        arguments, named):
    code, out, err, modules = start(tmp_path, script, *arguments)
    assert code == 2 and not out and named in err and err.count("\n") == 1
    assert not modules & HEAVY
