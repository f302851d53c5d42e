"""Make the clip of `sinuous demo video`: 256 frames of the test split, by a seed of their own, without loss.

python tools/make_needle_sample.py
"""

from __future__ import annotations

import functools
import json
from pathlib import Path

from sinuous.video.datasets import NeedleInVideo
from sinuous.video.writing import write_frames
from sinuous.vision.datasets import fashion_mnist

FOLDER = Path(__file__).parents[1] / "video" / "samples"
FRAMES, FPS, SEED = 256, 8, 1


def main() -> None:
    clips = NeedleInVideo("test", FRAMES, pictures=functools.partial(fashion_mnist, source="bundled"), seed=SEED)
    index = next(i for i in range(100) if clips.needle(i).frames[0] > 40 and clips.needle(i).frames[1] > 200)
    clip, label = clips[index]
    needle = clips.needle(index)
    FOLDER.mkdir(exist_ok=True)
    times = (number / FPS for number in range(FRAMES))
    write_frames(FOLDER / "needle.mkv", clip[0].numpy(), times, codec="ffv1", pixel_format="gray", group=FRAMES)
    facts = {
        "index": index,
        "seed": SEED,
        "frames": needle.frames,
        "kinds": needle.kinds,
        "answer": clips.classes[label],
    }
    (FOLDER / "needle.json").write_text(json.dumps(facts, indent=2) + "\n")


if __name__ == "__main__":
    main()
