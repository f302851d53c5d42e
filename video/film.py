"""Films opened with PyAV: the list of their pictures, made from their packets, and decoding from any of them.

A film is here the first stream of moving pictures in a file; a cover picture, as music has it, is none. A picture is
known by its stamp: the time at which its packet says that it is shown, in units of the stream. Headers are asked for
neither counts nor rates.
"""

from __future__ import annotations

import errno
import functools
import itertools
import os
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any, NamedTuple, cast

import numpy as np
from numpy.typing import NDArray

Source = str | os.PathLike[str]
Pixels = NDArray[np.uint8]

GRACE = 1e-6
"""Seconds by which a picture may be shown late, so that times that were rounded in a file still find theirs."""

NOT_FILMS = {"tty", "concat", "hls", "hls,applehttp", "applehttp", "dash", "imf", "lavfi"}
"""Readers of FFmpeg that make pictures of text, or follow names of other files in it."""

LEAST_CUT = 0.25
"""Seconds that must lack before a film counts as cut; headers are not exact."""

WITH_LENGTH = ("mov", "matroska", "flv")
"""Containers whose header says how long all their streams are, so that one that was cut is known."""


class Turn(NamedTuple):
    """How stored pictures are made upright: their axes swapped, then mirrored left to right and top to bottom."""

    swap: bool
    mirror_x: bool
    mirror_y: bool

    @property
    def degrees(self) -> int:
        """The rotation in it, clockwise: 0, 90, 180 or 270."""
        if self.swap:
            return 90 if self.mirror_x else 270
        return 180 if self.mirror_y else 0

    def apply(self, picture: Pixels) -> Pixels:
        """Picture `[H, W, 3]` as stored, upright."""
        if self.swap:
            picture = picture.swapaxes(0, 1)
        return picture[:: -1 if self.mirror_y else 1, :: -1 if self.mirror_x else 1]


@dataclass(frozen=True)
class PictureList:
    """The pictures of a film in the order in which they are shown.

    Attributes:
        stamps: of each picture, int64.
        times: in seconds from the first picture, float64.
        end: when the last one has been shown, in seconds.
        places: of packets in the file, by their stamps; empty where stamps do not tell packets apart, and the film can
            only be read from its start.
        decoded: when the packets of key pictures are decoded, by their stamps.
        keys: stamps of the pictures with which decoding can begin, int64.
        counted: packets do not say when their pictures are shown; a stamp is then the number of a picture.
        height, width: of stored pictures.
        turn: makes them upright.
        pixel_aspect: width of a stored pixel over its height.
        codec: name of the codec.
        damage: where packets could not be read, or None.
    """

    stamps: NDArray[np.int64]
    times: NDArray[np.float64]
    end: float
    places: dict[int, int]
    decoded: dict[int, int]
    keys: NDArray[np.int64]
    counted: bool
    height: int
    width: int
    turn: Turn
    pixel_aspect: float
    codec: str
    damage: str | None

    def at(self, time: float) -> int:
        """Number of the picture that is shown at `time`: the last one that is not later."""
        return max(0, int(np.searchsorted(self.times, time + GRACE, side="right")) - 1)

    def keys_before(self, stamp: int) -> list[int]:
        """Stamps of the pictures up to `stamp` with which decoding can begin, the last one first; without the very
        first, for which the start of the file will do."""
        keys: list[int] = self.keys[1 : int(np.searchsorted(self.keys, stamp, side="right"))].tolist()
        return keys[::-1]


def list_pictures(path: Source) -> PictureList:
    """The pictures of the film in a file; all packets are read, and the first picture is decoded.

    Raises:
        ValueError: if the file is no film, or none of its pictures can be decoded.
        FileNotFoundError: if there is no such file.
    """
    name = os.fspath(path)
    if os.path.isdir(name):
        raise ValueError(f"{name} is a folder and no film; give the path of one file")
    try:
        about = os.stat(name)
    except FileNotFoundError as error:
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), name) from error
    return _list_pictures(os.path.realpath(name), name, about.st_mtime_ns, about.st_size)


@functools.lru_cache(maxsize=256)
def _list_pictures(place: str, name: str, modified: int, size: int) -> PictureList:
    """As `list_pictures`, kept until the file changes: the arguments that are not read are those that say so."""
    with Film(place, name, warn=False) as film:
        return film.scan()


class _Packet(NamedTuple):
    """Of one picture: when it is shown and decoded and for how long, in units of the stream; whether decoding can begin
    with it; whether it is decoded for others alone."""

    pts: int | None
    dts: int | None
    duration: int
    key: bool
    hidden: bool


class Film:
    """An open film; `with Film(path) as film` closes it.

    Args:
        path: of the file.
        name: of the file in messages; the path if absent.
        warn: of damage when it is met; `damage` says it in either case.

    Raises:
        ValueError: if the file is no film.
    """

    def __init__(self, path: Source, name: str | None = None, *, warn: bool = True) -> None:
        self.path, self.name, self.warn = os.path.abspath(path), os.fspath(path) if name is None else name, warn
        self.damage: str | None = None
        self.origin = 0
        self.places: dict[int, int] = {}
        self.spoilt: int | None = None  # place of the last packet with damage, until a key picture behind it
        self.av = _pyav()
        self._open()

    def _open(self) -> None:
        readers = ",".join(sorted(self.av.formats_available - NOT_FILMS))
        try:
            # "file:" keeps a name with a colon from being read as an address.
            self.container = self.av.open(
                f"file:{self.path}", options={"format_whitelist": readers}, metadata_errors="replace"
            )
        except PermissionError as error:
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), self.name) from error
        except self.av.FFmpegError as error:
            raise ValueError(
                f"{self.name} is no film, or its header is damaged; give a file with moving pictures"
            ) from error
        try:
            self.stream = self._choose()
        except Exception:
            self.container.close()
            raise
        self.codec, self.spoilt = self.stream.codec_context, None

    def _choose(self) -> Any:
        covers = 0
        for stream in self.container.streams.video:
            if stream.disposition & self.av.stream.Disposition.attached_pic:
                covers += 1
            elif stream.codec_context is not None:
                return stream
        counts = {"sound": len(self.container.streams.audio), "a cover picture": covers}
        kinds = " and ".join(kind for kind, count in counts.items() if count)
        raise ValueError(f"{self.name} holds {kinds or 'data'} and no film; give a file with moving pictures")

    def __enter__(self) -> Film:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.container.close()

    def scan(self) -> PictureList:
        """List the pictures; see `list_pictures`."""
        packets: list[_Packet] = []
        first: Any = None
        ends = 0.0
        for packet in self._packets(None):
            if packet is not None:
                stamp = packet.dts if packet.pts is None else packet.pts
                ends = max(ends, float(((stamp or 0) + (packet.duration or 0)) * packet.time_base))
                if packet.stream.index != self.stream.index:
                    continue
                duration = packet.duration or 0
                packets.append(_Packet(packet.pts, packet.dts, duration, packet.is_keyframe, packet.is_discard))
            if first is None:
                first = next(iter(self._decode(packet)), None)
        if first is None:
            raise ValueError(f"no picture of {self.name} can be decoded; the file is damaged or holds other data")
        promised = (self.container.duration or 0) / self.av.time_base
        if self.damage is None and self.container.format.name.startswith(WITH_LENGTH) and promised - ends > LEAST_CUT:
            self.damage = f"and ends at {ends:.2f} s of the {promised:.2f} s that its header promises"
        return self._listed(packets, first)

    def _listed(self, packets: Sequence[_Packet], first: Any) -> PictureList:
        shown = [packet for packet in packets if not packet.hidden] or list(packets)
        places: dict[int, int] = {}
        counted = any(packet.pts is None for packet in packets)
        if counted:  # pictures come out in the order in which they are shown, at the times at which packets are decoded
            clock = np.array(sorted(packet.dts for packet in shown if packet.dts is not None), np.int64)
            if len(clock) < len(shown):
                clock = np.cumsum([0, *(packet.duration for packet in shown[:-1])])
            stamps, last = np.arange(len(shown)), shown[-1].duration
        else:
            stamp_of = {packet: cast("int", packet.pts) for packet in shown}
            least = min(stamp_of.values()) if first.pts is None else first.pts
            shown = sorted((packet for packet in shown if stamp_of[packet] >= least), key=lambda p: stamp_of[p])
            stamps = clock = np.array([packet.pts for packet in shown], np.int64)
            last = shown[-1].duration
            places = {cast("int", packet.pts): place for place, packet in enumerate(packets)}
            if len(places) < len(packets):
                places = {}
        if not last and len(clock) > 1:
            last = int(np.median(np.diff(clock)))
        unit = self.stream.time_base
        aspect = self.stream.sample_aspect_ratio
        return PictureList(
            stamps=stamps,
            times=(clock - clock[0]) * unit.numerator / unit.denominator,
            end=float((int(clock[-1] - clock[0]) + last) * unit.numerator / unit.denominator),
            places=places,
            decoded={p.pts: p.pts if p.dts is None else p.dts for p in packets if p.key and p.pts is not None},
            keys=np.array(sorted(p.pts for p in packets if p.key and p.pts is not None and places), np.int64),
            counted=counted,
            height=first.height,
            width=first.width,
            turn=_turn(first),
            pixel_aspect=float(aspect) if aspect else 1.0,
            codec=self.codec.name,
            damage=self.damage,
        )

    def pictures(self, listed: PictureList, stamp: int) -> Iterator[tuple[int, Any]]:
        """Stamps and decoded pictures in the order in which they are shown, from the last that is sound and not later
        than `stamp`, or one before it, on.

        Decoding begins with a key picture. Where one turns out to be none, or is damaged, an earlier one is tried."""
        self.origin = 0 if listed.counted else int(listed.stamps[0])
        self.places = listed.places
        keys = listed.keys_before(stamp)
        for key in keys:
            packets = self._seek(listed, key)
            if packets is None:
                break
            frames = self._stamped(listed, packets)
            first = next((found for found in frames if found[0] >= key), None)
            if first is not None and first[0] == key and first[1].key_frame:
                yield first
                yield from frames
                return
        if keys:
            self.container.close()
            self._open()
        yield from self._stamped(listed, self._packets(self.stream))

    def _seek(self, listed: PictureList, key: int) -> Iterator[Any] | None:
        """Packets from that of `key` on. Containers seek by the time of showing or of decoding, and stop anywhere ahead
        of it or behind: None if none stops ahead."""
        place = listed.places[key]
        for target in (key, 2 * listed.decoded[key] - key):
            try:
                self.container.seek(target, stream=self.stream)
            except self.av.FFmpegError:
                continue
            packets, self.spoilt = self._packets(self.stream), None
            for packet in packets:
                if packet is None or listed.places.get(packet.pts, place + 1) > place:
                    break
                if packet.pts == key:
                    return itertools.chain([packet], packets)
        return None

    def _stamped(self, listed: PictureList, packets: Iterator[Any]) -> Iterator[tuple[int, Any]]:
        number = 0
        for packet in packets:
            for frame in self._decode(packet):
                stamp = number if listed.counted else frame.dts if frame.pts is None else frame.pts
                number += 1
                if stamp is not None:
                    yield int(stamp), frame

    def _packets(self, stream: Any) -> Iterator[Any]:
        """Packets of a stream, or of all, from where the file stands, and a None behind them; damage ends them."""
        packets = self.container.demux() if stream is None else self.container.demux(stream)
        time = 0.0
        while True:
            try:
                packet = next(packets)
            except (StopIteration, EOFError):
                break
            except self.av.FFmpegError as error:
                self._note(time, f"nothing can be read behind it: {error.strerror}")
                break
            if packet.size:
                time = self._time(packet)
                yield packet
        yield None

    def _decode(self, packet: Any) -> list[Any]:
        """Sound pictures that a packet completes, or with None those that are still inside the decoder.

        What a decoder makes up where data is damaged may be what lay in memory: such a picture is left out, and those
        that are decoded after it, up to the next key picture."""
        if packet is not None and packet.is_corrupt:
            self._spoil(packet, "a packet is incomplete")
        try:
            frames: list[Any] = self.codec.decode(packet)
        except self.av.FFmpegError as error:
            self._spoil(packet, str(error.strerror))
            return []
        sound = []
        for frame in frames:
            if frame.is_corrupt:
                self._spoil(frame, "a part of a picture is lost")
            place = self.places.get(frame.pts)
            if self.spoilt is None or (place is not None and place < self.spoilt):
                sound.append(frame)
            elif frame.key_frame and not frame.is_corrupt and (place is None or place > self.spoilt):
                self.spoilt = None
                sound.append(frame)
        return sound

    def _spoil(self, part: Any, what: str) -> None:
        self._note(self._time(part), what)
        self.spoilt = -1 if part is None else self.places.get(part.pts, -1)

    def _time(self, part: Any) -> float:
        stamp = None if part is None else part.pts if part.pts is not None else part.dts
        return 0.0 if stamp is None else float((stamp - self.origin) * self.stream.time_base)

    def _note(self, time: float, what: str) -> None:
        if self.damage is None:
            self.damage = f"at {time:.2f} s ({what})"
            if self.warn:
                warn_of_damage(self.name, self.damage)


def _turn(frame: Any) -> Turn:
    """As the display matrix of a picture says, right angles and mirrors alone; turns between go to the nearest."""
    data = frame.side_data.get("DISPLAYMATRIX")
    if data is None:
        return Turn(False, False, False)
    x_x, y_x, _, x_y, y_y, *_ = np.frombuffer(bytes(data), np.int32).tolist()  # of stored x, then y, to upright x and y
    if abs(y_x) > abs(x_x):
        return Turn(True, x_y < 0, y_x < 0)
    return Turn(False, x_x < 0, y_y < 0)


def _pyav() -> Any:
    try:
        import av
    except ModuleNotFoundError as error:
        message = "films are read with PyAV, which is not installed: pip install 'sinuous[video]'"
        raise ModuleNotFoundError(message, name="av") from error
    return av


def warn_of_damage(name: str, damage: str) -> None:
    """Warn once for a reading."""
    text = f"{name} is damaged {damage}; the pictures that can be decoded are used"
    warnings.warn(text, UserWarning, stacklevel=2)
