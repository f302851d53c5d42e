"""Video-Ma2mba: frames stand among text, cells give the gradients of the whole, parts load published files."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch import Tensor

import sinuous
from sinuous.core.checkpointing import plan_memory
from sinuous.core.checkpoints import save_safetensors
from sinuous.core.generation import Sampling, generate
from sinuous.core.sequence_model import SequenceModel
from sinuous.video.ma2mba import VideoMa2mba, load_parts

FRAME = 256
HYBRID = ("mamba", "softmax_attention")


def build(dtype: torch.dtype = torch.float64, **options: Any) -> VideoMa2mba:
    torch.manual_seed(0)
    model: Any = sinuous.create_model("test_video_ma2mba", **options).to(dtype)
    return model


def batch(rows: tuple[str, ...] = ("ab[]c[]d", "[][]efgh"), frames: int = 2, seed: int = 1) -> tuple[Tensor, Tensor]:
    """Ids of texts in which [] stands for a frame, and frames of 64 pixels."""
    generator = torch.Generator().manual_seed(seed)
    pieces = [re.split(r"(\[\])", row) for row in rows]
    ids = [[i for piece in row for i in ([FRAME] * 4 if piece == "[]" else list(piece.encode()))] for row in pieces]
    pixels = torch.randint(256, (len(rows), frames, 3, 64, 64), dtype=torch.uint8, generator=generator)
    return torch.tensor(ids), pixels


def gradients(model: VideoMa2mba, ids: Tensor, targets: Tensor, frames: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    model.loss(ids, targets, frames).backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize(
    ("size", "language", "projector"),
    [("0_7b", 368_346_624, 2_099_200), ("1_8b", 1_343_757_312, 6_295_552), ("3_1b", 2_702_599_680, 9_180_160)],
)
def test_sizes_are_those_of_the_paper(size: str, language: int, projector: int) -> None:
    with torch.device("meta"):
        model: Any = sinuous.create_model(f"video_ma2mba_{size}")
    assert sum(p.numel() for p in model.language.parameters()) == language
    assert sum(p.numel() for p in model.projector.parameters()) == projector
    assert model.tokens_per_frame == 144
    assert model.reading.name == "vit_large_patch14_clip_quickgelu_336"
    assert model.reading.block == 22
    assert len(model.vision.blocks) == 23
    assert model.reading.mean == timm.data.OPENAI_CLIP_MEAN
    assert model.reading.std == timm.data.OPENAI_CLIP_STD


def test_a_row_is_what_it_is_alone_wherever_its_frames_stand() -> None:
    model = build().eval()
    ids, frames = batch()
    with torch.no_grad():
        both = model(ids, frames)
        for row in range(2):
            torch.testing.assert_close(model(ids[row, None], frames[row, None])[0], both[row], rtol=0, atol=1e-11)
        swapped = model(ids, frames.flip(1))
    first = ids[0].tolist().index(FRAME)
    before = slice(0, first)  # does not see the frame
    torch.testing.assert_close(swapped[0, before], both[0, before], rtol=0, atol=1e-12)
    assert (swapped[0, first] - both[0, first]).abs().max() > 1e-6


def test_a_frame_is_read_where_it_stands() -> None:
    model = build().eval()
    ids, frames = batch()
    x = model.embed(ids, frames)
    tokens = model.encode(frames.flatten(0, 1)).view(2, 8, -1)
    assert torch.equal(x[ids == FRAME].view(2, 8, -1), tokens)
    assert torch.equal(x[ids != FRAME], model.language.embedding(ids[ids != FRAME]))


def test_features_are_pooled_from_the_last_block_but_one() -> None:
    model = build().eval()
    _, frames = batch()
    whole = timm.create_model("test_vit", img_size=64, num_classes=0).double().eval()
    missing = model.vision.load_state_dict(whole.state_dict(), strict=False)
    assert not missing.missing_keys
    x = (frames[0].double() / 255 - 0.5) / 0.5
    maps = whole.forward_intermediates(x, indices=[-2], intermediates_only=True)[0]
    pooled = torch.nn.functional.avg_pool2d(maps, 2)
    found = model.reading.features(model.vision, frames[0])
    torch.testing.assert_close(found, pooled.flatten(2).mT, rtol=0, atol=1e-12)


@pytest.mark.parametrize("pattern", ["mamba2", HYBRID])
@pytest.mark.parametrize("sizes", [{"layers": 1}, {"layers": 2, "steps": 5}])
def test_cells_give_the_gradients_of_the_whole(pattern: Any, sizes: dict[str, int]) -> None:
    model = build(pattern=pattern)
    ids, frames = batch()
    targets = ids.roll(-1, 1).where(ids.roll(-1, 1) != FRAME, -100)
    whole = gradients(model, ids, targets, frames)
    model.set_grad_checkpointing(**sizes)
    cells = gradients(model, ids, targets, frames)
    assert cells.keys() == whole.keys()
    assert any(name.startswith("vision.blocks.0") for name in cells)
    for name, grad in whole.items():
        torch.testing.assert_close(cells[name], grad, rtol=1e-10, atol=1e-12, msg=name)


def test_groups_of_frames_are_all_of_them_at_once() -> None:
    model = build()
    ids, frames = batch(("a[][][]b",), 3)
    targets = torch.where(ids == FRAME, -100, ids)
    whole = gradients(model, ids, targets, frames)
    logits = model(ids, frames)
    for size in (1, 2):
        model.frame_group = size
        torch.testing.assert_close(model(ids, frames), logits, rtol=0, atol=1e-12)
        for name, grad in gradients(model, ids, targets, frames).items():
            torch.testing.assert_close(grad, whole[name], rtol=1e-10, atol=1e-12, msg=name)


def test_parts_that_are_frozen_get_no_gradient_and_the_others_theirs() -> None:
    model = build()
    ids, frames = batch()
    targets = torch.where(ids == FRAME, -100, ids)
    whole = gradients(model, ids, targets, frames)
    model.train_only("projector")
    model.set_grad_checkpointing(layers=1, steps=4)
    alone = gradients(model, ids, targets, frames)
    assert alone.keys() == {name for name in whole if name.startswith("projector.")}
    for name, grad in alone.items():
        torch.testing.assert_close(grad, whole[name], rtol=1e-10, atol=1e-12, msg=name)
    model.train_only("vision", "language", vision_lr=1e-5)
    assert {name.partition(".")[0] for name in gradients(model, ids, targets, frames)} == {"vision", "language"}
    assert set(model.learning_rates().values()) == {1e-5}
    with pytest.raises(ValueError, match="parts must be one of 'vision', 'projector', 'language'"):
        model.train_only("head")


def test_pieces_and_steps_are_the_whole() -> None:
    model = build(pattern=HYBRID).eval()
    ids, frames = batch(("ab[]c[]d[]ef", "[]efg[]h[]ij"), 3)
    with torch.no_grad():
        whole = model(ids, frames)
        state, logits = None, []
        cuts, begun = [0], 0
        for stop in range(1, ids.shape[1] + 1):  # cut where every row has read whole frames, as many as the other
            counts = (ids[:, :stop] == FRAME).sum(1)
            if bool((counts % 4 == 0).all()) and int(counts[0]) == int(counts[1]):
                cuts.append(stop)
        for start, stop in itertools.pairwise(cuts):
            part = ids[:, start:stop]
            count = int((part == FRAME).sum(1)[0]) // 4
            if count == 0 and stop - start == 1 and state is not None:
                y, state = model.step(part[:, 0], state)
                y = y[:, None]
            else:
                y, state = model.prefill(part, frames[:, begun : begun + count], state)
            begun += count
            logits.append(y)
    assert len(cuts) > 3
    torch.testing.assert_close(torch.cat(logits, 1), whole, rtol=0, atol=1e-11)
    assert model.prefill(ids, frames, last_only=True)[0].shape == (2, 1, 256)


def test_text_alone_is_read_by_the_language_model() -> None:
    model = build().eval()
    ids = torch.randint(256, (2, 9))
    assert torch.equal(model(ids), model.language(ids))
    assert torch.equal(model(ids, torch.empty(2, 0, 3, 64, 64)), model.language(ids))


def test_pixels_are_bytes_or_floats() -> None:
    model = build().eval()
    ids, frames = batch()
    torch.testing.assert_close(model(ids, frames), model(ids, frames.double() / 255), rtol=0, atol=1e-12)


def test_half_precision() -> None:
    ids, frames = batch()
    targets = torch.where(ids == FRAME, -100, ids)
    model = build(torch.float32)
    model.set_grad_checkpointing(layers=1, steps=8)
    exact = model.loss(ids, targets, frames)
    with torch.autocast("cpu", torch.bfloat16):
        loss = model.loss(ids, targets, frames)
    loss.backward()
    torch.testing.assert_close(loss, exact, rtol=0.02, atol=0)
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    assert model.bfloat16()(ids, frames).dtype == torch.bfloat16


IDS, FRAMES = batch()


@pytest.mark.parametrize(
    ("call", "sentence"),
    [
        (lambda m: m(IDS, FRAMES[:, :1]), r"frame_id=256 4 times, 4 for each of the 1 frames \(got 8 times in row 0\)"),
        (lambda m: m(IDS), r"256 0 times, 4 for each of the 0 frames \(got 8 times in row 0\)"),
        (lambda m: m(IDS[:, :-5], FRAMES), r"256 8 times.*\(got 4 times in row 0\)"),
        (lambda m: m(IDS, FRAMES[0]), r"\[2, N, 3, 64, 64\] \(got \[2, 3, 64, 64\]\); add the axis of the batch"),
        (lambda m: m(IDS, FRAMES[..., :32]), r"\(got \[2, 2, 3, 64, 32\]\); read them with size=64"),
        (lambda m: m(IDS, FRAMES[:1]), r"as many films as there are rows of ids, 2 \(got 1\)"),
        (lambda m: m(IDS, FRAMES.long()), r"uint8 from 0 to 255, or floats from 0 to 1 \(got torch.int64\)"),
        (lambda m: m(IDS, FRAMES.float()), r"must lie from 0 to 1 \(got 0 to 255\)"),
        (lambda m: m(IDS.float(), FRAMES), r"ids must be int64 \[B, T\] \(got a tensor of torch.float32"),
        (lambda m: m(IDS + 2, None), r"ids must lie between 0 and 255 \(got 99 to 258\)"),
        (lambda m: m.loss(IDS, IDS, FRAMES), r"targets must lie between 0 and 255, or be ignore_index -100 \(got 256"),
        (
            lambda m: generate(m, [1, 2, 3], prefill_chunk=2),
            r"frames must be a tensor .* give sinuous.core.generation the model's language",
        ),
        (lambda _: build(vision="test_vitt"), r"vision must be one of timm's models \(got 'test_vitt'\); did you mean"),
        (lambda _: build(img_size=60), r"img_size must be a multiple of 16, the patch of test_vit \(got 60\); give 64"),
        (lambda _: build(vision_block=9), r"indices must be vision_block from -6 to 5.*\(got \[9\]"),
        (lambda _: build(causal=False), r"causal must be True"),
        (lambda _: build(pooled=0), r"pooled must be at least 1 \(got 0\)"),
    ],
)
def test_mishaps_are_told(call: Callable[[Any], Any], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        call(build(torch.float32))


def of_state_spaces(language: SequenceModel) -> dict[str, Tensor]:
    state = {f"backbone.{name}": tensor.clone() for name, tensor in language.state_dict().items()}
    return {**state, "lm_head.weight": state["backbone.embedding.weight"]}


def test_files_of_state_spaces_load_into_the_language_model(tmp_path: Path) -> None:
    source = SequenceModel(256, 64, 2, "mamba2", pad_vocab_multiple=16)
    torch.save(of_state_spaces(source), tmp_path / "pytorch_model.bin")
    with pytest.warns(UserWarning, match="are of a language model: vision and projector keep the weights"):
        model: Any = sinuous.create_model("test_video_ma2mba", checkpoint_path=tmp_path / "pytorch_model.bin")
    ids = torch.randint(256, (1, 9))
    assert torch.equal(model(ids), source(ids))
    other = build(torch.float32)
    kept = other.projector[0].weight.clone()
    load_parts(other, language=tmp_path / "pytorch_model.bin")
    assert torch.equal(other(ids), source(ids))
    assert torch.equal(other.projector[0].weight, kept)
    save_safetensors(model.state_dict(), tmp_path / "own.safetensors")
    again: Any = sinuous.create_model("test_video_ma2mba", checkpoint_path=tmp_path / "own.safetensors")
    frames = FRAMES.float() / 255
    assert torch.equal(again(IDS, frames), model(IDS, frames))
    with pytest.raises(ValueError, match=r"the checkpoint is for another SequenceModel: embedding\.weight has shape"):
        load_parts(build(dim=32), language=tmp_path / "pytorch_model.bin")


def test_files_of_models_of_pictures_load_into_vision(tmp_path: Path) -> None:
    whole = timm.create_model("test_vit", img_size=64, num_classes=7)
    save_safetensors(whole.state_dict(), tmp_path / "vit.safetensors")
    model = build(torch.float32)
    load_parts(model, vision=tmp_path / "vit.safetensors")
    for name, tensor in model.vision.state_dict().items():
        assert torch.equal(tensor, whole.state_dict()[name]), name
    save_safetensors(model.language.state_dict(), tmp_path / "text.safetensors")
    with pytest.raises(ValueError, match="is not one of this VisionTransformer: it lacks cls_token"):
        load_parts(model, vision=tmp_path / "text.safetensors")


@pytest.mark.parametrize(("vision", "tokens"), [("resnet18", 4), ("test_convnext", 1)])
def test_other_models_of_pictures_are_one_word(vision: str, tokens: int) -> None:
    options = {"vision_block": -2} if vision == "resnet18" else {"vision_block": -1}
    model = build(torch.float32, vision=vision, **options).eval()
    assert model.tokens_per_frame == tokens
    ids = torch.tensor([[1, *[FRAME] * tokens, 2]])
    assert model(ids, FRAMES[:1, :1]).shape == (1, tokens + 2, 256)


def test_memory_is_planned_with_the_head_of_the_language_model() -> None:
    model = build(torch.float32)
    plan = plan_memory(model, 2, 4096)
    plan.apply(model)
    assert model.language.layers.grad_checkpointing
    of_language = plan_memory(model.language, 2, 4096, strategy="layer").terms["one cell"]
    assert plan_memory(model, 2, 4096, strategy="layer").terms["one cell"] == of_language


@pytest.fixture
def film(tmp_path: Path) -> Path:
    pytest.importorskip("av")
    from made_films import make_clip

    return make_clip(tmp_path / "film.mp4", codec="mpeg4", count=19, rate=1)


SHORT = Sampling(max_new_tokens=6)


def test_two_questions_have_the_answers_that_they_have_alone(film: Path) -> None:
    model = build()
    questions = ["What is it?", "A question that is longer than the film: which square moves, and where to?"]
    both = model.answer(film, questions, sampling=SHORT)
    assert both == [model.answer(film, question, sampling=SHORT)[0] for question in questions]
    assert model.training


def test_an_answer_goes_on_from_all_frames(film: Path) -> None:
    from sinuous.video import read_frames
    from sinuous.video.answering import watch
    from sinuous.video.text_tokens import ASSISTANT, USER, ByteTokens

    model = build(pattern=HYBRID).eval()
    pixels, times = read_frames(film, fps=1, size=64)
    assert len(pixels) == 19
    *_, last = watch(model, zip(pixels, times.tolist(), strict=True), ByteTokens())
    assert (last.frames, last.time) == (19, 18.0)
    opening = torch.tensor([[*USER.encode(), *[FRAME] * 76]])
    question = [*b"Why?", 0, *ASSISTANT.encode()]
    ids = torch.cat([opening, torch.tensor([question])], 1)
    logits, state = model.prefill(ids, pixels[None], last_only=True)
    expected = []
    for _ in range(SHORT.max_new_tokens):
        token = int(logits.flatten().argmax())
        if token == 0:
            break
        expected.append(token)
        logits, state = model.step(torch.tensor([token]), state)
    assert model.answer(film, "Why?", sampling=SHORT) == [bytes(expected).decode(errors="replace")]


def test_a_film_shorter_than_a_group(film: Path) -> None:
    model = build(torch.float32)
    assert len(model.answer(film, ["a", "b", "c"], start=5, stop=7, sampling=SHORT)) == 3


@pytest.mark.parametrize(
    ("given", "error", "sentence"),
    [
        ({"questions": []}, ValueError, r"questions must be one text or several \(got \[\] of type list\)"),
        ({"questions": ["a", " "]}, ValueError, "ask at least one"),
        ({"tokenizer_file": "no.json"}, FileNotFoundError, "there is no tokenizer no.json"),
        ({"path": "no.mp4"}, FileNotFoundError, r"no\.mp4"),
        ({"start": 90.0}, ValueError, "ends at 19.00 s"),
        ({"sampling": {"temperature": 1.0}}, ValueError, "sampling must be a Sampling"),
    ],
)
def test_mishaps_of_questions_are_told(film: Path, given: dict[str, Any], error: type, sentence: str) -> None:
    options = {"path": film, "questions": "Why?", **given}
    with pytest.raises(error, match=sentence):
        build(torch.float32).answer(**options)


def test_an_empty_film_and_another_vocabulary_are_told(film: Path) -> None:
    from sinuous.video.answering import watch
    from sinuous.video.text_tokens import ByteTokens

    with pytest.raises(ValueError, match="there is no frame to read"):
        list(watch(build(), [], ByteTokens()))
    with pytest.raises(ValueError, match="without tokenizer_file, text is bytes, 256 tokens, and the model has 300"):
        build(vocab_size=300).answer(film, "Why?")


def test_a_tokenizer_of_a_file(film: Path, tmp_path: Path) -> None:
    tokenizers = pytest.importorskip("tokenizers")
    from sinuous.video.text_tokens import END_OF_TEXT

    words = {END_OF_TEXT: 0, "<|user|>": 1, "<|assistant|>": 2, "[UNK]": 3, "why": 4, "dog": 5, "what": 6}

    def save(name: str, vocabulary: dict[str, int]) -> Path:
        made = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="[UNK]"))
        made.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
        made.save(str(tmp_path / name))
        return tmp_path / name

    file = save("tokenizer.json", words)
    model = build(vocab_size=len(words))
    (text,) = model.answer(film, "why", file, sampling=SHORT)
    assert set(text.split()) <= set(words)
    with pytest.raises(ValueError, match=r"tokenizer.json, 7 tokens, and the model has 6"):
        build(vocab_size=6).answer(film, "why", file)
    bare = save("bare.json", {"a": 0, "[UNK]": 1})
    with pytest.raises(ValueError, match=r"has no token '<\|endoftext\|>'; name its own by end_of_text"):
        model.answer(film, "why", bare)
    (tmp_path / "text.json").write_text("[]")
    with pytest.raises(ValueError, match=r"text\.json is no tokenizer"):
        model.answer(film, "why", tmp_path / "text.json")


def pictures(count: int) -> Iterator[tuple[Tensor, float]]:
    for number in range(count):
        yield torch.full((3, 64, 64), number % 256, dtype=torch.uint8), float(number)


def test_memory_of_reading_is_flat() -> None:
    from sinuous.core.live_memory import peak_memory
    from sinuous.video.answering import watch
    from sinuous.video.text_tokens import ByteTokens

    model = build(torch.float32)
    peaks = [
        peak_memory(lambda n=count: [None for _ in watch(model, pictures(n), ByteTokens())]) for count in (16, 256)
    ]
    assert peaks[1] <= 1.01 * peaks[0]
    growing = build(torch.float32, pattern="softmax_attention")
    more = peak_memory(lambda: [None for _ in watch(growing, pictures(256), ByteTokens())])
    assert more > 1.5 * peaks[1]  # the measure sees what grows


def test_the_measurement_of_memory_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("av")
    from sinuous.apps import cli

    page = tmp_path / "memory.md"
    assert cli.main(["bench", "film_memory", "--minutes", "1", "--every", "16", "--markdown", str(page)]) == 0
    assert "resident memory lies between" in capsys.readouterr().out
    frames = [line.split("|")[1].strip() for line in page.read_text().splitlines() if line.startswith("|")]
    assert frames == ["frames", "---", "8", "24", "40", "56", "60"]


def test_tokens_of_frames_stand_in_their_order_between_the_text() -> None:
    model = sinuous.create_model("test_video_ma2mba").eval()
    n = model.tokens_per_frame
    rows = [[5, *[model.frame_id] * n, 6, *[model.frame_id] * n, 7], [*[model.frame_id] * (2 * n), 8, 9, 3]]
    ids, frames = torch.tensor(rows), torch.rand(2, 2, 3, 64, 64)
    with torch.no_grad():
        x = model.embed(ids, frames)
        for row in range(2):
            seen = ids[row] == model.frame_id
            assert torch.equal(x[row][seen], model.encode(frames[row]).flatten(0, 1))
            assert torch.equal(x[row][~seen], model.language.look_up(ids[row][~seen]))
