"""Count how often the two frames that an answer of frame_reader_nano.needle rests on are those that hide an item.

python tools/decisive_frames.py
"""

from __future__ import annotations

import argparse

import torch
from rich.progress import track

from sinuous.video.datasets import NeedleInVideo
from sinuous.video.evidence import MODEL, decisive_frames, reader_of
from sinuous.vision.datasets import fashion_mnist


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=MODEL, help="a reader of films (default: %(default)s)")
    parser.add_argument("--clips", type=int, default=30, help="of the test split (default: %(default)s)")
    parser.add_argument("--frames", type=int, default=256, help="of each (default: %(default)s)")
    options = parser.parse_args()
    model = reader_of(options.model)
    clips = NeedleInVideo("test", options.frames, pictures=fashion_mnist)
    right = 0
    for index in track(range(options.clips), description="clips", transient=True):
        features = model.encode((clips[index][0][None].float() / 255 - 0.4) / 0.2)
        right += len({*decisive_frames(model, features)} & {*clips.needle(index).frames})
    print(f"{right} of {2 * options.clips} frames hide an item")


if __name__ == "__main__":
    main()
