"""What Video-Ma2mba is taught: frames with captions, films told scene by scene, and questions on a film.

A lesson is a list of parts, `(kind, value)`, in the order in which the model reads them: `("watch", number of
frames)`, `("read", text)`, `("ask", question)`, `("say", text)` and `("say on", text)`, of which the last two are
learned; an end of text stands behind what is said, and none behind what is said on.

`NeedleLessons` makes all three kinds from `NeedleInVideo`; `FilmLessons` reads a folder of yours.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from sinuous.core.checks import check_choice, check_sizes
from sinuous.core.data import check_split, folder_of
from sinuous.video.text_tokens import USER

Part = tuple[str, Any]

KINDS = ("captions", "scenes", "questions")
SCENE = 2
"""Frames of a scene of a film that is told."""

VIDEO, IMAGE = "<video>", "<image>"
"""Stand for the film in a conversation's text, which needs no words for it here."""


class NeedleLessons(Dataset[tuple[Tensor, list[Part]]]):
    """Lessons on clips in which two items are hidden: `(frames uint8 [N, 3, H, W], parts)`.

    Args:
        split: `train`, `val` or `test`.
        kind: `captions`, a frame and its item; `scenes`, a clip and after every two frames the items in them;
            `questions`, a clip and which item came first and last.
        needles: `needles(split, num_frames, …)` makes the clips, as `NeedleInVideo` does.
        num_frames: N, of a clip; a caption has one of its frames.
        img_size: height and width of a frame.
        length: number of lessons.

    Raises:
        ValueError: for an unknown split or kind.
    """

    def __init__(
        self,
        split: str,
        *,
        kind: str,
        needles: Callable[..., Any],
        num_frames: int,
        img_size: int,
        length: int | None = None,
    ) -> None:
        check_choice("kind", kind, KINDS)
        self.kind = kind
        frames = max(num_frames, 2)  # of which a caption has one
        self.needles = needles(check_split(split), frames, img_size=img_size, length=length)

    def __len__(self) -> int:
        return len(self.needles)

    def __getitem__(self, index: int) -> tuple[Tensor, list[Part]]:
        clip, _ = self.needles[index]
        needle = self.needles.needle(index)
        frames = clip[0, :, None].expand(-1, 3, -1, -1)
        if self.kind == "captions":
            which = index % 2
            return frames[needle.frames[which]][None], [("watch", 1), ("say", needle.kinds[which])]
        if self.kind == "questions":
            parts: list[Part] = [("read", USER), ("watch", len(frames))]
            for number, (word, kind) in enumerate(zip(("first", "last"), needle.kinds, strict=True)):
                parts += [("read", USER)] * (number > 0) + [("ask", f"Which item came {word}?"), ("say", kind)]
            return frames, parts
        told: list[Part] = []
        for start in range(0, len(frames), SCENE):
            stop = min(start + SCENE, len(frames))
            pairs = zip(needle.frames, needle.kinds, strict=True)
            seen = [kind for frame, kind in pairs if start <= frame < stop]
            told += [("watch", stop - start), ("say on", (", ".join(seen) or "nothing") + ". ")]
        return frames, told


class FilmLessons(Dataset[tuple[Tensor, list[Part]]]):
    """Lessons of a folder: `train.json`, `val.json`, `test.json`, each a list of entries in the layout of LLaVA's sets.

        {"video": "films/a.mp4", "conversations": [{"from": "human", "value": "<video>\\nWhat happens?"},
                                                   {"from": "gpt", "value": "A dog runs."}, …]}
        {"video": "films/a.mp4", "scenes": [{"start": 0.0, "stop": 12.5, "caption": "A street."}, …]}

    Names of films are relative to the folder; `image` with a picture stands for `video`. Scenes are told one after
    another, behind their frames; a caption is a conversation without a question.

    Args:
        split: `train`, `val` or `test`.
        root: the folder.
        num_frames: frames of a film; with scenes, of each scene; with `fps`, the most of them.
        img_size: height and width of a frame.
        fps: frames per second; evenly `num_frames` in all, if absent.
        length: only so many entries.

    Raises:
        FileNotFoundError: if there is no such folder or file.
        ValueError: if the file is not such a list.
    """

    def __init__(
        self,
        split: str,
        *,
        root: str | os.PathLike[str],
        num_frames: int,
        img_size: int,
        fps: float | None = None,
        length: int | None = None,
    ) -> None:
        check_sizes(num_frames=num_frames)
        self.folder = folder_of(root)
        self.path = self.folder / f"{check_split(split)}.json"
        if not self.path.is_file():
            raise FileNotFoundError(f"{self.folder} has no {self.path.name}; write the lessons of the split into it")
        try:
            entries = json.loads(self.path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"{self.path} is not JSON ({error}); correct it") from error
        if not isinstance(entries, list) or not entries:
            raise ValueError(f"{self.path} must be a list of entries, each a dictionary; correct it")
        self.entries = entries[:length]
        self.num_frames, self.img_size, self.fps = num_frames, img_size, fps

    def __len__(self) -> int:
        return len(self.entries)

    def __getitem__(self, index: int) -> tuple[Tensor, list[Part]]:
        entry = self.entries[index]
        try:
            film = self.folder / (entry["video"] if "video" in entry else entry["image"])
            if "scenes" in entry:
                return self._told(film, entry["scenes"])
            return self._asked(film, entry["conversations"])
        except (KeyError, TypeError, AttributeError, IndexError) as error:
            raise ValueError(
                f"entry {index} of {self.path} must have video (or image), and conversations or scenes "
                f"({type(error).__name__}: {error}); correct it"
            ) from error

    def _frames(self, film: Path, start: float = 0.0, stop: float | None = None) -> Tensor:
        from sinuous.video.io import read_frames

        wanted: dict[str, Any] = {"num_frames": self.num_frames} if self.fps is None else {"fps": self.fps}
        return read_frames(film, start=start, stop=stop, size=self.img_size, **wanted)[0][: self.num_frames]

    def _told(self, film: Path, scenes: Sequence[dict[str, Any]]) -> tuple[Tensor, list[Part]]:
        parts: list[Part] = []
        frames = []
        for scene in scenes:
            frames.append(self._frames(film, float(scene["start"]), float(scene["stop"])))
            parts += [("watch", len(frames[-1])), ("say on", scene["caption"].strip() + " ")]
        return torch.cat(frames), parts

    def _asked(self, film: Path, turns: Sequence[dict[str, str]]) -> tuple[Tensor, list[Part]]:
        frames = self._frames(film)
        parts: list[Part] = [("watch", len(frames))]
        for number, turn in enumerate(turns):
            text = turn["value"].replace(VIDEO, "").replace(IMAGE, "").strip()
            if turn["from"] in ("gpt", "assistant"):
                parts.append(("say", text))
            elif number == 0:
                parts = [("read", USER), *parts, ("ask", text)]
            else:
                parts += [("read", USER), ("ask", text)]
        return frames, parts
