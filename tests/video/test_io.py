"""Films are read exactly: every picture at its time, whatever the order, the container or the damage."""

from __future__ import annotations

import gc
import os
import random
import warnings
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from made_films import make_clip, picture
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from sinuous.apps import cli
from sinuous.video import film as films
from sinuous.video.io import clip_info, read_frames, stream_frames

av = pytest.importorskip("av")

KINDS: dict[str, dict[str, Any]] = {
    "b_frames.mp4": {"options": {"bf": "3", "b_strategy": "0"}},
    "open_groups.mp4": {"options": {"bf": "3", "b_strategy": "0", "x264-params": "open-gop=1:scenecut=0"}},
    "refresh.mp4": {"options": {"x264-params": "intra-refresh=1:keyint=12"}},
    "matroska.mkv": {"options": {"bf": "2"}},
    "mpeg4.avi": {"codec": "mpeg4", "options": {"bf": "2"}},
    "stream.ts": {"options": {"bf": "2"}},
    "programme.mpg": {"codec": "mpeg2video", "options": {"bf": "2"}},
    "bare.h264": {"options": {"bf": "2"}},
    "vp8.webm": {"codec": "libvpx"},
    "moving.gif": {"codec": "gif", "pixel_format": "rgb8"},
}


def shown_at(pixels: Tensor, times: Tensor, moment: float) -> Tensor:
    """The last of all pictures that is not later than `moment`."""
    return pixels[int((times <= moment + 1e-6).nonzero()[-1])]


def decoded(path: Path) -> Tensor:
    """All pictures, as PyAV's own loop gives them."""
    with av.open(str(path)) as container:
        frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    return torch.from_numpy(np.stack(frames)).permute(0, 3, 1, 2)


@pytest.mark.parametrize("kind", KINDS)
def test_any_order_of_access_gives_what_full_decoding_gives(kind: str, tmp_path: Path) -> None:
    path = make_clip(tmp_path / kind, **KINDS[kind])
    pixels, times = read_frames(path)
    assert torch.equal(pixels, decoded(path))
    assert torch.allclose(times, torch.arange(48, dtype=torch.float64) / 24, atol=0.006)
    assert clip_info(path).num_frames == 48
    chance = random.Random(0)
    moments = [chance.uniform(0, 2) for _ in range(10)]
    together, found = read_frames(path, times=moments)
    assert found.tolist() == moments
    for moment, pixel in zip(moments, together, strict=True):
        assert torch.equal(pixel, shown_at(pixels, times, moment))
        assert torch.equal(read_frames(path, times=[moment])[0][0], pixel)
    late = [(pixel, time) for pixel, time in stream_frames(path, start=1.3)]
    assert [time for _, time in late] == [time for time in times.tolist() if time >= 1.3]
    assert all(torch.equal(pixel, shown_at(pixels, times, time)) for pixel, time in late)


@pytest.mark.parametrize("kind", ["b_frames.mp4", "open_groups.mp4", "matroska.mkv", "mpeg4.avi", "stream.ts"])
def test_a_late_picture_costs_one_group_of_pictures(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = make_clip(tmp_path / kind, count=120, **KINDS[kind])
    clip_info(path)
    packets = 0
    decode = films.Film._decode

    def counted(self: Any, packet: Any) -> list[Any]:
        nonlocal packets
        packets += packet is not None
        return decode(self, packet)

    monkeypatch.setattr(films.Film, "_decode", counted)
    read_frames(path, times=[4.7])
    assert packets <= 24
    packets = 0
    read_frames(path, num_frames=3)
    assert packets <= 3 * 24


def test_times_are_those_of_packets_where_the_rate_varies(tmp_path: Path) -> None:
    ticks = [0, 1, 2, 10, 11, 40, 41, 100]
    path = make_clip(tmp_path / "varying.mp4", ticks=ticks, rate=10)
    pixels, times = read_frames(path)
    assert times.tolist() == [tick / 10 for tick in ticks]
    at = [0.0, 0.1, 0.95, 1.0 - 5e-7, 1.0, 3.99, 9.99, 10.0]
    numbers = [0, 1, 2, 3, 3, 4, 6, 7]
    assert torch.equal(read_frames(path, times=at)[0], pixels[numbers])
    thirds, middles = read_frames(path, num_frames=3)
    info = clip_info(path)
    assert middles.tolist() == pytest.approx([info.duration * share for share in (1 / 6, 1 / 2, 5 / 6)])
    assert torch.equal(thirds, torch.stack([shown_at(pixels, times, time) for time in middles.tolist()]))
    assert info.fps == pytest.approx(8 / info.duration)


def test_pictures_repeat_where_there_are_fewer(tmp_path: Path) -> None:
    path = make_clip(tmp_path / "short.mp4", count=3)
    pixels, _ = read_frames(path, num_frames=6)
    assert torch.equal(pixels, read_frames(path)[0].repeat_interleave(2, 0))


def test_rates_stop_at_the_end_of_the_pictures_and_not_of_the_sound(tmp_path: Path) -> None:
    path = make_clip(tmp_path / "sound.mp4", count=24, sound=4.0)
    with av.open(str(path)) as container:
        assert container.duration / av.time_base > 3.5
    assert clip_info(path).duration == pytest.approx(1.0)
    assert read_frames(path, fps=10)[1].tolist() == [k / 10 for k in range(10)]
    assert read_frames(path, fps=24)[1].tolist() == [k / 24 for k in range(24)]
    assert read_frames(path, fps=10, start=0.25, stop=0.5)[1].tolist() == [0.25, 0.35, 0.45]
    assert [time for _, time in stream_frames(path, fps=2)] == [0.0, 0.5]
    assert read_frames(path, start=0.5, stop=0.75)[1].tolist() == [k / 24 for k in range(12, 18)]
    with pytest.raises(ValueError, match=r"sound\.mp4 ends at 1\.00 s, and times has 2"):
        read_frames(path, times=[0.5, 2.0])
    with pytest.raises(ValueError, match=r"sound\.mp4 ends at 1\.00 s, and start is 3"):
        stream_frames(path, start=3.0)


@pytest.mark.parametrize(("turn", "quarters"), [(0, 0), (90, 1), (180, 2), (-90, 3)])
def test_pictures_are_upright_and_sizes_are_after_the_turn(turn: int, quarters: int, tmp_path: Path) -> None:
    path = make_clip(tmp_path / "turned.mp4", count=3, rotation=turn, pixel_aspect=Fraction(4, 3))
    stored = decoded(path)
    pixels, _ = read_frames(path)
    assert torch.equal(pixels, stored.rot90(quarters, (2, 3)))  # counter-clockwise, as the file is told
    info = clip_info(path)
    assert (info.height, info.width) == tuple(pixels.shape[2:])
    assert info.rotation == -turn % 360
    assert info.pixel_aspect == pytest.approx(3 / 4 if quarters % 2 else 4 / 3)
    assert read_frames(path, size=(20, 30))[0].shape == (3, 3, 20, 30)
    assert read_frames(path, size=16)[0].shape == (3, 3, 16, 16)


def test_resizing_keeps_a_turned_picture_upright(tmp_path: Path) -> None:
    path = make_clip(tmp_path / "turned.mp4", count=2, rotation=90)
    small = read_frames(path, size=(32, 24))[0].float()
    large = read_frames(path)[0].float()
    shrunk = torch.nn.functional.interpolate(large, size=(32, 24), mode="area")
    assert (small - shrunk).abs().mean() < 0.5 * (small - shrunk.flip(2)).abs().mean()


def test_a_cover_picture_is_no_film(tmp_path: Path) -> None:
    song = make_clip(tmp_path / "sound.mp4", count=2, sound=1.0)
    covered, silent = tmp_path / "covered.mp4", tmp_path / "song.mp4"
    for target, with_film in ((covered, True), (silent, False)):
        with av.open(str(song)) as source, av.open(str(target), "w") as container:
            kept = [stream for stream in source.streams if with_film or stream.type == "audio"]
            copies = {stream.index: container.add_stream_from_template(stream) for stream in kept}
            cover = container.add_stream("mjpeg", rate=1)
            cover.height, cover.width, cover.pix_fmt = 16, 16, "yuvj420p"
            cover.disposition = av.stream.Disposition.attached_pic
            frame = av.VideoFrame.from_ndarray(picture(0, (16, 16)), format="rgb24")
            container.mux(cover.encode(frame))
            container.mux(cover.encode())
            for packet in source.demux(kept):
                if packet.size:
                    packet.stream = copies[packet.stream.index]
                    container.mux(packet)
    assert read_frames(covered)[0].shape == (2, 3, 48, 64)
    with pytest.raises(ValueError, match=r"song\.mp4 holds sound and a cover picture and no film"):
        read_frames(silent)


def test_metadata_may_have_any_encoding(tmp_path: Path) -> None:
    path = make_clip(tmp_path / "title.mkv", count=2, metadata={"title": "TITLETITLE"})
    path.write_bytes(path.read_bytes().replace(b"TITLETITLE", b"caf\xe9 \xff\xfe\x80 !"))
    assert len(read_frames(path)[0]) == 2


def damaged(path: Path, kept: float) -> Path:
    """A film cut inside the packet at `kept` of its number; with 1, the contents of its middle packet are others."""
    content = bytearray(path.read_bytes())
    with av.open(str(path)) as container:
        packets = [packet for packet in container.demux(video=0) if packet.size]
    packet = packets[int(len(packets) * (0.5 if kept == 1 else kept))]
    start, end = packet.pos + packet.size // 3, packet.pos + packet.size
    if kept == 1:
        content[start:end] = bytes((7 * byte + 13) % 256 for byte in content[start:end])
    bad = path.with_name(f"bad_{path.name}")
    bad.write_bytes(content if kept == 1 else content[:start])
    return bad


@pytest.mark.parametrize(
    ("name", "kept"),
    [("b_frames.mp4", 1), ("matroska.mkv", 1), ("matroska.mkv", 0.6), ("mpeg4.avi", 0.6)],
)
def test_what_can_be_decoded_of_a_damaged_film_is_read_with_a_warning(name: str, kept: float, tmp_path: Path) -> None:
    path = damaged(make_clip(tmp_path / name, count=72, **KINDS[name]), kept)
    with pytest.warns(UserWarning, match=rf"{path} is damaged .*\d\.\d\d s") as caught:
        pixels, times = read_frames(path)
    assert len(caught) == 1
    assert 10 < len(pixels) <= 72
    chance = random.Random(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for moment in [chance.uniform(0, float(times[-1])) for _ in range(12)]:
            assert torch.equal(read_frames(path, times=[moment])[0][0], shown_at(pixels, times, moment))
        moments = torch.linspace(0, float(times[-1]), 7).tolist()
        at_once = read_frames(path, times=moments)[0]
    assert torch.equal(at_once, torch.stack([shown_at(pixels, times, moment) for moment in moments]))


def test_what_is_no_film_is_one_sentence_with_its_name(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    whole = make_clip(tmp_path / "whole.mp4", count=24, sound=0.5)
    files = {"text.mp4": b"no film\n" * 50, "letter.txt": b"hello\n" * 200, "empty.mp4": b""}
    files["half.mp4"] = whole.read_bytes()[:60]
    files["list.mp4"] = b"ffconcat version 1.0\nfile whole.mp4\n"
    files["list.m3u8"] = b"#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\nwhole.mp4\n#EXT-X-ENDLIST\n"
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    with av.open(str(tmp_path / "sound.wav"), "w") as container:
        voice = container.add_stream("pcm_s16le", rate=8000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 800), np.int16), format="s16", layout="mono")
        frame.sample_rate = 8000
        container.mux(voice.encode(frame))
    for name in [*files, "sound.wav"]:
        with pytest.raises(ValueError, match=rf"{name} (is no film|holds)"):
            read_frames(tmp_path / name)
    with pytest.raises(ValueError, match=f"{tmp_path} is a folder"):
        clip_info(tmp_path)
    with pytest.raises(FileNotFoundError, match="absent"):
        stream_frames(tmp_path / "absent.mp4")
    undecodable = tmp_path / "undecodable.mp4"
    content = bytearray(whole.read_bytes())
    start = content.index(b"mdat") + 4
    content[start : len(content) - 3000] = bytes(len(content) - 3000 - start)
    undecodable.write_bytes(content)
    with pytest.raises(ValueError, match="undecodable"):
        read_frames(undecodable)
    assert cli.explain(ValueError("text.mp4 is no film")) == "text.mp4 is no film"


def test_wrong_options_are_named(tmp_path: Path) -> None:
    path = make_clip(tmp_path / "clip.mp4", count=4)
    with pytest.raises(ValueError, match="fps and num_frames"):
        read_frames(path, fps=1, num_frames=2)
    with pytest.raises(ValueError, match="leave out start"):
        read_frames(path, times=[0.0], start=0.1)
    with pytest.raises(ValueError, match="stop must be after start"):
        read_frames(path, start=0.1, stop=0.05)
    for wrong in (
        {"fps": 0},
        {"num_frames": 0},
        {"times": [-1.0]},
        {"times": "now"},
        {"size": 0},
        {"size": (1, 2, 3)},
    ):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            read_frames(path, **wrong)


def open_files() -> list[str]:
    return [os.path.realpath(f"/proc/self/fd/{number}") for number in os.listdir("/proc/self/fd")]


def test_files_are_closed_on_every_way_out(tmp_path: Path) -> None:
    path = make_clip(tmp_path / "clip.mp4", count=24)
    bad = tmp_path / "bad.mp4"
    bad.write_bytes(path.read_bytes()[:60])
    half_read = stream_frames(path)
    next(half_read)
    assert str(path) in open_files()
    half_read.close()
    never_read = stream_frames(path)
    dropped = stream_frames(path, fps=5)
    next(dropped)
    del dropped
    read_frames(path, num_frames=2)
    with pytest.raises(ValueError, match="no film"):
        read_frames(bad)
    with pytest.raises(ValueError, match="ends at"):
        read_frames(path, times=[50.0])
    gc.collect()
    assert not {str(path), str(bad)} & set(open_files())
    del never_read


class Moments(Dataset[Tensor]):
    def __init__(self, path: Path) -> None:
        self.path = path

    def __len__(self) -> int:
        return 8

    def __getitem__(self, index: int) -> Tensor:
        return read_frames(self.path, times=[index / 4])[0]


def test_forked_workers_read_what_the_first_process_reads(tmp_path: Path) -> None:
    path = make_clip(tmp_path / "clip.mp4")
    here = read_frames(path, times=[index / 4 for index in range(8)])[0]
    loader = DataLoader(Moments(path), batch_size=4, num_workers=2, multiprocessing_context="fork")
    assert torch.equal(torch.cat(list(loader)).squeeze(1), here)


def test_memory_of_a_stream_does_not_grow_with_the_film(tmp_path: Path) -> None:
    import tracemalloc

    path = make_clip(tmp_path / "long.mp4", count=400, options={"preset": "ultrafast"})
    clip_info(path)
    tracemalloc.start()
    for _ in stream_frames(path):
        pass
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 20 * 48 * 64 * 3
