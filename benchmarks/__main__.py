"""Speed of each script's hot part against a baseline: the original's method without its bugs, on
random weights of real sizes.

    python -m benchmarks
    python -m benchmarks beam_base rescore --repeats 3 --device cuda

Both must return equal results; then they run alternately in this process. The table lists the
speedup of ours over the baseline ("plain"; median and range of the pairs), the share of the
machine's limit and what that is, and the peak memory of both above the weights. Limits are the
arithmetic, the memory that is read, the calls of as many operations of torch as ours makes (the
work of small models), and Pillow's decoding of JPEGs. After the table,
each part has a line of JSON. Without a PART, benchmarks/RESULTS.md is written, too.
"""

import argparse
import datetime
import json
import os
import platform
import sys
from pathlib import Path

import torch
import transformers

from antarctic.errors import InputError
from antarctic.files import write_lines
from antarctic.runtime import run
from benchmarks import captions, entries, pictures, training
from benchmarks.measure import compare
from utils import choose_device

PARTS = entries.PARTS | pictures.PARTS | training.PARTS | captions.PARTS
RESULTS = Path(__file__).parent / "RESULTS.md"
LINE = "{:22}{:>13}{:>18}{:>14}{:>19}{:>9}{:>8}{:>10}{:>9}{:>7}"
KEYS = ("ratio", "low", "high", "of_limit", "limit", "peak_mb", "equal")
HEAD = ("part", "times faster", "range", "of the limit", "which is", "peak MB", "plain", "seconds",
        "plain", "equal")


def parse():
    parser = argparse.ArgumentParser("python -m benchmarks", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", metavar="PART",
                        help=f"parts to measure (default: all): {', '.join(PARTS)}")
    parser.add_argument("--small", action="store_true",
                        help="small models and few texts, to check that everything runs")
    parser.add_argument("--repeats", type=int, default=3,
                        help="pairs of runs for each part (default %(default)s)")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads (default %(default)s)")
    parser.add_argument("--device", default="cpu", help="cpu, cuda or cuda:N (default %(default)s)")
    return parser.parse_args()


def cells(name, result):
    """The table's row of a part, a list of texts. result: of compare, or {"equal": None, "reason":
    why the part was not measured}."""
    if "ratio" not in result:
        return [name, *["-"] * (len(HEAD) - 2), result.get("reason", "no")]
    figures = ("{ratio:.2f}", "{low:.2f} to {high:.2f}", "{of_limit:.0%}", "{limit}",
               "{peak_mb:,.0f}", "{plain_peak_mb:,.0f}", "{seconds:.3f}", "{plain_seconds:.3f}",
               "yes")
    return [name, *(figure.format(**result) for figure in figures)]


def machine(args, device):
    """One line with the machine, the versions and the settings of the results."""
    name = platform.processor() or platform.machine()
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    elif Path("/proc/cpuinfo").is_file():
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        names = (line.split(":")[1].strip() for line in lines if line.startswith("model name"))
        name = next(names, name)
    return (f"{name}, threads: {args.threads}, float32 (bfloat16 in *_bf16), torch "
            f"{torch.__version__}, transformers {transformers.__version__}, "
            f"{datetime.date.today()}, repeats: {args.repeats}{', --small' * args.small}")


def main():
    args = parse()
    unknown = [part for part in args.parts if part not in PARTS]
    if unknown:
        raise InputError(f"there is no part {unknown[0]}; the parts are {', '.join(PARTS)}")
    if args.repeats < 1 or args.threads < 1:
        raise InputError(f"--repeats and --threads must be at least 1, not {args.repeats} and "
                         f"{args.threads}")
    device = choose_device(args.device)
    torch.set_num_threads(args.threads)
    os.environ["TOKENIZERS_PARALLELISM"] = "true" if args.threads > 1 else "false"
    results, setup = {}, machine(args, device)
    print(setup + "\n" + LINE.format(*HEAD))
    for name in args.parts or PARTS:
        try:
            results[name] = compare(PARTS[name](args.small, device), args.repeats, device)
        except ModuleNotFoundError as error:
            results[name] = {"equal": None, "reason": f"needs {error.name}"}
        print(LINE.format(*cells(name, results[name])), flush=True)
    if not args.parts and not args.small:
        table = [HEAD, ["---"] * len(HEAD), *(cells(*item) for item in results.items())]
        rows = [f"| {' | '.join(row)} |" for row in table]
        write_lines(RESULTS, [f"`python -m benchmarks`: {setup}", "", *rows])
    for name, result in results.items():
        print(json.dumps({"part": name} | {key: result.get(key) for key in KEYS}))
    if any(result["equal"] is False for result in results.values()):
        sys.exit(1)


if __name__ == "__main__":
    run(main)
