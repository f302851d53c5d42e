"""Questions on a film of any length: it is read once, frame by frame, and every question goes on from what was read.

    state ← prefill(<|user|> frames of a group, state)              for each group of frames, as they come
    answer_q = generate(question_q <|endoftext|> <|assistant|>, state)

Of the film, the state alone is kept, whose size does not depend on the film's length.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from sinuous.core.checks import described
from sinuous.core.generation import Sampling, generate
from sinuous.core.modes import evaluating
from sinuous.core.ragged import select_rows
from sinuous.core.sequence_model import SequenceModel
from sinuous.core.stack import State
from sinuous.video.io import clip_info, stream_frames
from sinuous.video.text_tokens import END_OF_TEXT, USER, Script, Tokens, load_tokens

MOST_TOKENS = 128
"""Tokens after which an answer ends by itself."""


class Watched(NamedTuple):
    """What is left of the part of a film that has been read.

    Attributes:
        frames: how many.
        time: of the last one, in seconds.
        state: of the language model, of one row.
    """

    frames: int
    time: float
    state: State


def watch(model: Any, frames: Iterable[tuple[Tensor, float]], tokens: Tokens, system: str = "") -> Iterator[Watched]:
    """Read frames as they come, in groups of `model.frame_group`.

    Args:
        model: a `VideoMa2mba`; in evaluation mode for the time of each group.
        frames: uint8 `[3, H, W]` with their times, as `stream_frames` gives them.
        tokens: of the text.
        system: a text ahead of the film.

    Yields:
        What is left after each group.

    Raises:
        ValueError: if there is no frame.
    """
    script = Script(tokens, model.frame_id, model.tokens_per_frame)
    script.read(system + USER)
    state, count, time = None, 0, 0.0
    device = next(model.parameters()).device
    waiting: list[Tensor] = []

    def read() -> State:
        script.watch(len(waiting))
        ids, group = torch.tensor([script.ids], device=device), torch.stack(waiting)[None]
        script.ids.clear()
        waiting.clear()
        with torch.inference_mode(), evaluating(model):
            _, after = model.prefill(ids, group, state, last_only=True)
        return tuple(after)

    for pixels, time in frames:
        waiting.append(pixels)
        count += 1
        if len(waiting) == model.frame_group:
            state = read()
            yield Watched(count, time, state)
    if waiting:
        state = read()
        yield Watched(count, time, state)
    if not count:
        raise ValueError("there is no frame to read (got an empty film); give a longer one, or more frames per second")


def answer(
    model: Any,
    path: Any,
    questions: str | Sequence[str],
    tokenizer_file: Any = None,
    *,
    fps: float | None = 1.0,
    start: float = 0.0,
    stop: float | None = None,
    sampling: Sampling | None = None,
    system: str = "",
    end_of_text: str = END_OF_TEXT,
    progress: bool = False,
) -> list[str]:
    """Answers to questions on a film, each by itself, on one reading of it.

    Args:
        model: a `VideoMa2mba`.
        path: of the film.
        questions: one, or several.
        tokenizer_file: the `tokenizer.json` that the model was trained with; bytes, if absent.
        fps: frames per second that are read; `None` for every one.
        start, stop: the part of the film, in seconds, as in `read_frames`.
        sampling: how tokens are chosen; the most probable ones, 128 at most, if absent. The token `end_of_text` ends
            an answer in any case.
        system: a text ahead of the film.
        end_of_text: the tokenizer's token behind a text.
        progress: show on stderr how far the film is read.

    Returns:
        An answer for each question.

    Raises:
        ValueError: if there is no question, the tokenizer is another model's, or the file is no film.
        FileNotFoundError: if there is no such film or tokenizer.
    """
    asked = _checked(questions)
    tokens = load_tokens(tokenizer_file, model.vocab_size, end_of_text)
    rules = Sampling(max_new_tokens=MOST_TOKENS) if sampling is None else sampling
    if not isinstance(rules, Sampling):
        raise ValueError(f"sampling must be a Sampling (got {described(rules)}); give Sampling(temperature=0.7)")
    frames = stream_frames(path, fps=fps, start=start, stop=stop, size=model.reading.sides)
    if progress:
        frames = _shown(frames, path, fps, start, stop)
    for watched in watch(model, frames, tokens, system):
        state = watched.state
    prompts = []
    for question in asked:
        script = Script(tokens, model.frame_id, model.tokens_per_frame)
        script.ask(question)
        prompts.append(script.ids)
    rules = replace(rules, stop_tokens=(*rules.stop_tokens, tokens.end))
    found = generate(cast("SequenceModel", _After(model.language, state)), prompts, rules)
    return [tokens.decode(ids.tolist()) for ids in found.tokens]


class _After(nn.Module):
    """A language model whose sequences all begin with what has been read."""

    def __init__(self, language: SequenceModel, state: State) -> None:
        super().__init__()
        self.language, self.state, self.vocab_size = language, state, language.vocab_size

    def prefill(self, x: Tensor, state: State | None = None, **options: Any) -> tuple[Tensor, State]:
        state = select_rows(self.state, [0] * len(x)) if state is None else state
        return self.language.prefill(x, state, **options)

    def step(self, x_t: Tensor, state: State, **options: Any) -> tuple[Tensor, State]:
        return self.language.step(x_t, state, **options)


def _checked(questions: Any) -> list[str]:
    asked = [questions] if isinstance(questions, str) else questions
    if not isinstance(asked, Sequence) or not asked or not all(isinstance(q, str) and q.strip() for q in asked):
        raise ValueError(f"questions must be one text or several (got {described(questions)}); ask at least one")
    return list(asked)


def _shown(
    frames: Iterator[tuple[Tensor, float]], path: Any, fps: float | None, start: float, stop: float | None
) -> Iterator[tuple[Tensor, float]]:
    from rich.console import Console
    from rich.progress import track

    info = clip_info(path)
    seconds = min(info.duration, stop or info.duration) - start
    total = max(1, round(seconds * (info.fps if fps is None else fps)))
    label = f"reading {Path(path).name}"
    yield from track(frames, label, total=total, transient=True, console=Console(stderr=True))
