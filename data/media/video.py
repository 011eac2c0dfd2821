"""Video and sound files through PyAV, frame by frame: memory does not grow with the length.

PyAV (the `media` extra) bundles FFmpeg's libraries; no binary is called.
"""

import contextlib
import dataclasses
import math
from collections.abc import Callable, Generator, Iterable, Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np

from ...storage.paths import as_path, is_local
from ...storage.writing import staged
from .. import checksums
from .lengths import check_length

# Containers whose header says how long the file lasts; others are estimated from what is there, or from a bit rate.
_DECLARING = {"avi", "flv", "matroska,webm", "mov,mp4,m4a,3gp,3g2,mj2"}
_HIGHEST_RATE = 240  # frames per second that cameras make
_AAC_RATES = {8000, 11025, 12000, 16000, 22050, 24000, 32000, 44100, 48000}


def _av() -> Any:
    try:
        import av
    except ImportError as error:
        raise ValueError("reading and writing video needs PyAV: pip install 'omnax[media]'") from error
    return av


@dataclasses.dataclass(frozen=True)
class Video:
    """A readable video: `fps` is its average rate, `size` (rows, columns) of its frames as shown."""

    path: Path
    fps: Fraction
    size: tuple[int, int]
    num_frames: int = 0  # as the file declares, by its duration where it has no count; 0 where it has neither

    def frames(self, fps: Fraction | int | None = None) -> Iterator[np.ndarray]:
        """RGB frames [X, Y, 3] uint8, upright, at a constant rate (default: the video's own `fps`).

        Frames are placed by their time stamps: where the rate varies, a slot without a frame of its own repeats the
        one before, and of several in one slot the last counts. A damaged stream is a ValueError naming the frame.
        """
        slot, shown, rate = 0, None, fps or self.fps
        for time, frame in _decode_video(self.path):
            due = round(time * rate)
            while shown is not None and slot < due:
                yield shown
                slot += 1
            shown = frame
        if shown is not None:
            yield shown


def open_video(path: str | Path) -> Video:
    """Looks at a video file without decoding it all; ValueError for what is missing, damaged or has no pictures."""
    path = as_path(path)
    with _opened(path) as container:
        if not container.streams.video:
            raise ValueError(f"{path} holds no pictures, only {[stream.type for stream in container.streams]}")
        rate = _average_rate(container)
        declared = _declared_frames(container, rate)
    with contextlib.closing(_decode_video(path)) as frames:
        first = next(frames, None)
    if first is None:
        raise ValueError(f"{path} is damaged: no frame of its video can be decoded")
    return Video(path, rate, first[1].shape[:2], declared)


def declared_frames(path: str | Path) -> int:
    """Frames at the constant rate of `open_video` that the file says it has, without decoding them."""
    with _opened(as_path(path)) as container:
        return _declared_frames(container, _average_rate(container))


def sound_delay(path: str | Path) -> float:
    """Seconds from the first picture of a video to the first sample of its sound; negative where the sound is first."""
    with _opened(as_path(path)) as container:
        starts = [(s[0].start_time or 0) * s[0].time_base for s in (container.streams.audio, container.streams.video)]
    return float(starts[0] - starts[1])


def _average_rate(container: Any) -> Fraction:
    """As declared, or counted where the file gives no rate or the ticks of its clock (recordings of browsers)."""
    stream = container.streams.video[0]
    if stream.average_rate and stream.average_rate <= _HIGHEST_RATE:
        return Fraction(stream.average_rate)
    times = [packet.pts * packet.time_base for packet in container.demux(stream) if packet.pts is not None]
    seconds = max(times, default=Fraction(0)) - min(times, default=Fraction(0))
    return ((len(times) - 1) / seconds).limit_denominator(1001) if seconds else Fraction(25)


def _declared_frames(container: Any, rate: Fraction | None) -> int:
    stream = container.streams.video[0]
    if stream.frames or not rate:
        return stream.frames
    seconds = stream.duration * stream.time_base if stream.duration else Fraction(container.duration or 0, 10**6)
    return round(seconds * rate)


def _decode_video(path: Path) -> Generator[tuple[Fraction, np.ndarray]]:
    """(seconds since the first frame, upright RGB frame) in the order of presentation.

    Frames of another size than the first are resized to it; without time stamps they follow at the average rate.
    """
    count, start, declared, time, size = 0, None, 0, Fraction(0), {}
    where = lambda: f"after {count} frames" + f", expected {declared}" * (declared > 0)  # noqa: E731
    with _opened(path) as container, _damage_named(path, where):
        stream = container.streams.video[0]
        declared = _declared_frames(container, stream.average_rate)
        stream.thread_type = "AUTO"
        for packet in _packets(path, container, stream):
            for frame in packet.decode():
                if frame.pts is not None:
                    time = frame.pts * (frame.time_base or stream.time_base)
                elif count:
                    time += 1 / (stream.average_rate or Fraction(25))
                start = time if start is None else start
                size = size or {"width": frame.width, "height": frame.height}
                count += 1
                yield time - start, np.rot90(frame.to_ndarray(format="rgb24", **size), round(frame.rotation / 90))


def _packets(path: Path, container: Any, stream: Any) -> Iterator[Any]:
    """The packets of a stream; ValueError where the file ends before its header says.

    The header's length is that of the longest stream, so the packets of all count. Files are not exact to the frame:
    the last one's duration may be unknown (up to the longest step between frames), and a twentieth, at most a second,
    is let pass.
    """
    end, last, longest = Fraction(0), None, Fraction(0)
    for packet in container.demux():
        stamp = packet.dts if packet.pts is None else packet.pts
        if stamp is not None:
            end = max(end, (stamp + (packet.duration or 0)) * packet.time_base)
        if packet.stream.index == stream.index:
            if packet.dts is not None:
                time = packet.dts * packet.time_base
                longest, last = max(longest, time - last if last is not None else longest), time
            yield packet
    if container.format.name in _DECLARING and container.duration:
        expected = Fraction(container.duration, 10**6)
        if end + longest + min(1, expected / 20) < expected:
            raise ValueError(f"{path} is damaged: it ends after {float(end):.2f} s, expected {float(expected):.2f} s")


def decode_audio(path: Path) -> tuple[int, Iterator[np.ndarray]]:
    """The rate in Hz of the first audio stream and its blocks, float32 [channels, samples] in [-1, 1]."""
    with _opened(path) as container:
        return _sound(container, path).rate, _audio_blocks(path)


def _sound(container: Any, path: Path) -> Any:
    if not container.streams.audio:
        raise ValueError(f"{path} holds no sound, only {[stream.type for stream in container.streams]}")
    stream = container.streams.audio[0]
    if stream.codec_context is None:
        raise ValueError(f"{path} is damaged: its header names no sound that can be decoded")
    return stream


def _audio_blocks(path: Path) -> Iterator[np.ndarray]:
    to_float = _av().AudioResampler(format="fltp")
    for frame in _audio_frames(path):
        with _damage_named(path, lambda: "its header says of the sound what no sound can be"):
            converted = to_float.resample(frame)
        yield from (part.to_ndarray() for part in converted)


def _audio_frames(path: Path) -> Iterator[Any]:
    count = 0
    with _opened(path) as container, _damage_named(path, lambda: f"after {count} samples"):
        for packet in _packets(path, container, _sound(container, path)):
            for frame in packet.decode():
                count += frame.samples
                yield frame


def write_video(
    path: str | Path, frames: Iterable[np.ndarray], fps: Fraction, *, audio: str | Path | None = None
) -> int:
    """Writes RGB frames [X, Y, 3] uint8 as H.264 in MP4 with the sound of the media file `audio` (AAC).

    Frames are taken one at a time and their number is returned. Odd sizes lose their last row or column (4:2:0 pictures
    have even ones). Sound begins with its first sample, whatever its time stamps say. `path` appears only when the file
    is complete; ValueError where it cannot be written.
    """
    path = as_path(path)
    with _writing(path), staged(path) as stage, _av().open(str(stage), "w", format="mp4") as container:
        # RGB becomes YUV by BT.601 here; where a file does not say so, players take large pictures for BT.709.
        options = {"crf": "16", "colorspace": "smpte170m"}
        video = container.add_stream("libx264", rate=fps, options=options, pix_fmt="yuv420p")
        sound = _encoded_sound(container, as_path(audio)) if audio else iter(())
        count = 0
        for count, frame in enumerate(frames, 1):
            rows, columns = (size - size % 2 for size in frame.shape[:2])
            if not rows or not columns:
                raise ValueError(f"frames for {path} have {frame.shape[:2]} pixels, expected (2, 2) or more")
            if count == 1:
                video.height, video.width = rows, columns
            picture = _av().VideoFrame.from_ndarray(np.ascontiguousarray(frame[:rows, :columns]), format="rgb24")
            picture.pts, picture.time_base = count - 1, 1 / fps
            container.mux(video.encode(picture))
            _mux_until(container, sound, count / fps)  # in step, so that neither waits in memory for the other
        if not count:
            raise ValueError(f"there are no frames to write to {path}")
        container.mux(video.encode(None))
        _mux_until(container, sound, math.inf)
    return count


@contextlib.contextmanager
def _writing(path: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, _av().error.FFmpegError) as error:
        raise ValueError(f"{path} cannot be written: {error.strerror}") from error


def _encoded_sound(container: Any, path: Path) -> Iterator[tuple[float, Any]]:
    """(time in seconds, packets) of a file's sound, coded for a new stream of the container."""
    with _opened(path) as source:
        rate, channels = _sound(source, path).rate, _sound(source, path).channels
    layout = "mono" if channels == 1 else "stereo"
    stream = container.add_stream("aac", rate=rate if rate in _AAC_RATES else 48_000, layout=layout)
    stream.bit_rate = 192_000

    def packets() -> Iterator[tuple[float, Any]]:
        count = 0
        for frame in _audio_frames(path):
            frame.pts, frame.time_base = count, Fraction(1, rate)
            count += frame.samples
            yield count / rate, stream.encode(frame)
        yield math.inf, stream.encode(None)

    return packets()


def _mux_until(container: Any, sound: Iterator[tuple[float, Any]], seconds: Fraction | float) -> None:
    for time, packets in sound:
        container.mux(packets)
        if time >= seconds:
            return


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[Any]:
    if not path.is_file():
        raise ValueError(f"there is no file {path}")
    check_length(path)
    try:
        checksums.check_file(path)
    except OSError as error:
        raise ValueError(f"{path} is damaged: {error.strerror}") from error
    with contextlib.ExitStack() as stack:
        file = str(path) if is_local(path) else stack.enter_context(path.open("rb"))
        with _damage_named(path, lambda: "it cannot be opened as a media file"):
            container = _av().open(file)
        yield stack.enter_context(container)


@contextlib.contextmanager
def _damage_named(path: Path, where: Callable[[], str]) -> Iterator[None]:
    try:
        yield
    except _av().error.FFmpegError as error:
        raise ValueError(f"{path} is damaged: {where()} ({error.strerror})") from error
