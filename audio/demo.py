"""Go on with a piece of music, or tell what is heard in files.

sinuous demo audio --clip song.flac --prompt-seconds 2 --seconds 10 --out longer.wav
sinuous demo audio --classify one.wav two.mp3

Without a clip the model goes on from a bundled one that it was not trained on. The file has the prompt, as the model
heard it, and what the model made of it; the figure beside it shows both. Ctrl-C leaves what there is as a whole file.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from sinuous.audio import demo_classify, demo_music


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--clip", type=Path, metavar="PATH", help="a sound of yours to go on from")
    parser.add_argument("--start", type=float, default=0.0, metavar="S", help="where in the clip the prompt begins")
    parser.add_argument("--prompt-seconds", type=float, default=2.0, metavar="S", help="of the clip; 0 for no prompt")
    parser.add_argument("--seconds", type=float, default=10.0, metavar="S", help="to make")
    parser.add_argument("--temperature", type=float, default=1.0, help="0 takes the most probable sample each time")
    parser.add_argument("--top-p", type=float, metavar="P", help="draw from the likeliest samples that have so much")
    parser.add_argument("--seed", type=int, default=0, help="of the draws; another seed, another piece")
    parser.add_argument(
        "--model",
        metavar="NAME.TAG",
        help=f"weights, a folder, or the name of a model, which then is untrained (default: {demo_music.MODEL}, or "
        f"{demo_classify.MODEL} with --classify)",
    )
    parser.add_argument("--codec", metavar="NAME", help="of the model, where its weights do not say it: mu_law")
    parser.add_argument("--rate", type=int, metavar="HZ", help="samples per second, likewise")
    parser.add_argument("--out", type=Path, default=demo_music.OUT, metavar="WAV", help="for prompt and continuation")
    parser.add_argument("--classify", nargs="+", type=Path, metavar="PATH", help="files whose classes are told")


def run(options: argparse.Namespace) -> None:
    """Make sound or classify it, and print the names of the files that were written.

    Raises:
        ValueError, OSError: for what cannot be read, done or written.
    """
    part = demo_music if options.classify is None else demo_classify
    for path in part.run(options):
        print(path)
