"""Reading and writing video: frames and sound there and back, variable rate, damage."""

import resource
import wave
from fractions import Fraction

import av
import numpy as np
import pytest
from omnax.data.media import audio, video

FPS = Fraction(25)


def picture(i, shape=(48, 64, 3)):
    """A flat grey that tells the frame's number; H.264 keeps it within a level or two."""
    return np.full(shape, 20 + 5 * i, np.uint8)


def numbers(frames):
    return [round((float(frame.mean()) - 20) / 5) for frame in frames]


@pytest.fixture
def tone(tmp_path):
    """One second of two channels at 44.1 kHz."""
    path = tmp_path / "tone.wav"
    wave_form = 0.5 * np.sin(2 * np.pi * 440 * np.arange(44_100) / 44_100)
    with wave.open(str(path), "wb") as file:
        file.setparams((2, 2, 44_100, 0, "NONE", ""))
        file.writeframes((np.stack([wave_form, wave_form], 1) * 32767).astype("<i2").tobytes())
    return path


def test_frames_and_sound_come_back(tmp_path, tone):
    path = tmp_path / "out" / "video.mp4"
    assert video.write_video(path, map(picture, range(25)), FPS, audio=tone) == 25
    opened = video.open_video(path)
    assert (opened.fps, opened.size) == (25, (48, 64))
    assert numbers(opened.frames()) == list(range(25))
    heard, original = audio.load_audio(path), audio.load_audio(tone)
    assert abs(len(heard) - len(original)) <= 1024  # AAC pads to whole blocks
    np.testing.assert_allclose(heard[2000:14_000], original[2000:14_000], atol=0.02)
    assert [entry.name for entry in path.parent.iterdir()] == ["video.mp4"]


def test_colours_come_back(tmp_path):
    """The file names the matrix it was made with (6: BT.601), so that no player has to guess by its size."""
    flat = np.broadcast_to(np.array([200, 40, 90], np.uint8), (48, 64, 3))
    video.write_video(tmp_path / "flat.mp4", [flat] * 2, FPS)
    for frame in video.open_video(tmp_path / "flat.mp4").frames():
        np.testing.assert_allclose(frame.astype(int), flat, atol=3)
    with av.open(str(tmp_path / "flat.mp4")) as container:
        assert next(container.decode(video=0)).colorspace == 6


def test_odd_sizes_lose_a_row(tmp_path):
    video.write_video(tmp_path / "odd.mp4", [picture(1, (49, 65, 3))], Fraction(30000, 1001))
    opened = video.open_video(tmp_path / "odd.mp4")
    assert opened.size == (48, 64)
    assert float(opened.fps) == pytest.approx(29.97, abs=0.001)


def test_variable_rate_is_read_at_the_average_rate(tmp_path):
    """Frames at 0, 40, 80, 200, 240, … ms: the gap repeats the frame before it, so that sound stays in step."""
    path = tmp_path / "variable.mkv"
    times = [0, 1, 2, 5, 6, 7, 8, 9]  # in 1/25 s
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=25)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        for i, time in enumerate(times):
            frame = av.VideoFrame.from_ndarray(picture(i), format="rgb24")
            frame.pts, frame.time_base = time, Fraction(1, 25)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    opened = video.Video(path, FPS, (48, 64))
    assert numbers(opened.frames()) == [0, 1, 2, 2, 2, 3, 4, 5, 6, 7]


@pytest.mark.parametrize("declared", [True, False])
def test_a_rate_that_is_a_clock_is_counted(tmp_path, declared):
    """Recordings of browsers declare no rate, or the thousand ticks of their clock: 50 frames in 2.45 s are 20 / s."""
    path = tmp_path / "recording.mkv"
    write_noise(path, 0, times=[50 * i + i % 3 for i in range(49)] + [2450], rate=1000)
    data = path.read_bytes()
    default = b"\x23\xe3\x83\x83" + (10**6).to_bytes(3, "big")  # a frame's duration: name, length, nanoseconds
    assert data.count(default) == 1
    if not declared:
        path.write_bytes(data.replace(default, b"\xec\x85" + bytes(5)))  # five bytes of nothing
    opened = video.open_video(path)
    assert opened.fps == 20 and opened.num_frames in (49, 50)
    assert len(list(opened.frames())) == 50


def test_damaged_files_are_named(tmp_path, tone):
    path = tmp_path / "whole.mp4"
    video.write_video(path, map(picture, range(25)), FPS)
    data = path.read_bytes()
    (tmp_path / "cut.mp4").write_bytes(data[: len(data) // 2])
    (tmp_path / "empty.mp4").write_bytes(b"")
    for name in ("cut.mp4", "empty.mp4"):
        with pytest.raises(ValueError, match=rf"{name} is damaged: it cannot be opened"):
            video.open_video(tmp_path / name)
    with pytest.raises(ValueError, match=r"there is no file .*missing\.mp4"):
        video.open_video(tmp_path / "missing.mp4")
    with pytest.raises(ValueError, match=r"tone\.wav holds no pictures, only \['audio'\]"):
        video.open_video(tone)
    with pytest.raises(ValueError, match=r"whole\.mp4 holds no sound, only \['video'\]"):
        audio.load_audio(path)


def write_noise(path, seconds, sound=0.0, times=None, codec="mpeg4", rate=25, **options):
    """A video whose frames do not compress, with `sound` seconds of a tone; `times` in units of 1 / `rate` seconds."""
    rng = np.random.default_rng(0)
    with av.open(str(path), "w", options=options) as container:
        stream = container.add_stream(codec, rate=rate)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        audio_stream = container.add_stream("aac", rate=16_000, layout="mono") if sound else None
        for time in times or range(int(25 * seconds)):
            frame = av.VideoFrame.from_ndarray(rng.integers(0, 255, (48, 64, 3), dtype=np.uint8), format="rgb24")
            frame.pts, frame.time_base = time, Fraction(1, rate)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
        for start in range(0, int(16_000 * sound), 1024):
            tone = 0.1 * np.sin(np.arange(start, start + 1024, dtype=np.float32))[None]
            block = av.AudioFrame.from_ndarray(tone.astype(np.float32), format="fltp", layout="mono")
            block.rate, block.pts = 16_000, start
            container.mux(audio_stream.encode(block))
        if audio_stream:
            container.mux(audio_stream.encode(None))


@pytest.mark.parametrize("seconds", [1, 5])
@pytest.mark.parametrize("name,options", [("a.mp4", {"movflags": "faststart"}), ("a.mkv", {})])
def test_a_video_cut_short_is_named(tmp_path, name, options, seconds):
    """With its index or its length at the front a cut file opens well, and then ends early."""
    path = tmp_path / name
    write_noise(path, seconds, **options)
    assert len(list(video.open_video(path).frames())) == 25 * seconds
    data = path.read_bytes()
    for share in (0.3, 0.8):
        path.write_bytes(data[: int(share * len(data))])
        with pytest.raises(ValueError, match=rf"{name} is damaged: it ends after [\d.]+ s, expected {seconds}\."):
            list(video.open_video(path).frames())


@pytest.mark.parametrize("name,codec", [("a.avi", "mpeg4"), ("a.flv", "flv")])
def test_a_cut_video_without_its_index_is_named(tmp_path, name, codec):
    path = tmp_path / name
    write_noise(path, 4, codec=codec)
    assert len(list(video.open_video(path).frames())) == 100
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2])
    with pytest.raises(ValueError, match=rf"{name} is damaged: it (has \d+ bytes|ends after [\d.]+ s), expected"):
        list(video.open_video(path).frames())


def test_cut_sound_is_named(tmp_path, tone):
    """By one sample already; lengths that programs leave when they write into a pipe are no lengths."""
    data = tone.read_bytes()
    tone.write_bytes(data[:-4])
    with pytest.raises(ValueError, match=r"tone\.wav is damaged: it has 176440 bytes, expected 176444 as its header"):
        audio.load_audio(tone)
    for length in (0, 0x7FFFF000, 0xFFFFFFFF):
        unknown = length.to_bytes(4, "little")
        tone.write_bytes(data[:4] + unknown + data[8:40] + unknown + data[44:])
        assert len(audio.load_audio(tone)) == 16_000
    for name, codec in (("tone.mp3", "libmp3lame"), ("tone.flac", "flac")):
        path = tmp_path / name
        with av.open(str(path), "w") as container, av.open(str(tone)) as source:
            stream = container.add_stream(codec, rate=44_100, layout="stereo")
            for frame in source.decode(audio=0):
                container.mux(stream.encode(frame))
            container.mux(stream.encode(None))
        assert len(audio.load_audio(path)) == pytest.approx(16_000, abs=1000)
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
        with pytest.raises(ValueError, match=f"{name} is damaged"):
            audio.load_audio(path)


def test_sound_begins_with_its_first_sample(tmp_path, tone):
    """Time stamps that begin later (broadcasts, edited files) are not carried over: mels know nothing of them."""
    late = tmp_path / "late.mka"
    with av.open(str(late), "w") as container, av.open(str(tone)) as source:
        stream = container.add_stream("pcm_s16le", rate=44_100, layout="stereo")
        for frame in source.decode(audio=0):
            frame.pts += 22_050
            container.mux(stream.encode(frame))
    video.write_video(tmp_path / "video.mp4", map(picture, range(25)), FPS, audio=late)
    with av.open(str(tmp_path / "video.mp4")) as container:
        assert container.streams.audio[0].start_time == 0
        assert [float(s.duration * s.time_base) for s in container.streams] == pytest.approx([1, 1], abs=1e-3)


def test_frames_without_time_stamps_or_of_another_size(tmp_path):
    """A raw H.264 stream has no time stamps; two of them in a row change the size on the way."""
    streams = []
    for shape in ((48, 64, 3), (96, 128, 3)):
        path = tmp_path / "raw.h264"
        with av.open(str(path), "w") as container:
            stream = container.add_stream("libx264", rate=25, options={"bf": "0"}, pix_fmt="yuv420p")
            stream.height, stream.width = shape[:2]
            for i in range(5):
                container.mux(stream.encode(av.VideoFrame.from_ndarray(picture(i, shape), format="rgb24")))
            container.mux(stream.encode(None))
        streams.append(path.read_bytes())
    path.write_bytes(b"".join(streams))
    frames = list(video.open_video(path).frames())
    assert numbers(frames) == [0, 1, 2, 3, 4] * 2 and {frame.shape for frame in frames} == {(48, 64, 3)}


def test_frames_are_upright(tmp_path):
    """Telephones store portraits lying on their side, with a matrix that turns them by a quarter."""
    lying = np.zeros((48, 64, 3), np.uint8)
    lying[:, :32] = 200
    path = tmp_path / "portrait.mp4"
    video.write_video(path, [lying] * 3, FPS)
    plain, quarter = (np.array(m, ">i4").tobytes() for m in (
        [1 << 16, 0, 0, 0, 1 << 16, 0, 0, 0, 1 << 30], [0, 1 << 16, 0, -1 << 16, 0, 0, 0, 0, 1 << 30]))  # fmt: skip
    head, tail = path.read_bytes().split(b"tkhd")
    path.write_bytes(head + b"tkhd" + tail.replace(plain, quarter, 1))
    opened = video.open_video(path)
    frame = next(opened.frames())
    assert opened.size == frame.shape[:2] == (64, 48)
    assert frame[:30].min() > 150 and frame[34:].max() < 50


@pytest.mark.parametrize("name", ["whole.mp4", "whole.mkv"])
def test_whole_files_are_not_called_damaged(tmp_path, name):
    """Sound that outlasts the pictures or ends before them, and a last frame that is shown for long."""
    path = tmp_path / name
    for sound in (0.5, 3.0):
        write_noise(path, 1, sound=sound)
        assert len(list(video.open_video(path).frames())) == 25
        assert len(audio.load_audio(path)) == pytest.approx(16_000 * sound, abs=2048)
    write_noise(path, 1, times=[0, 50, 100])
    assert len(list(video.open_video(path).frames(FPS))) == 101


def test_nothing_is_left_of_a_video_that_failed(tmp_path):
    def frames():
        yield picture(0)
        raise RuntimeError("the generator failed")

    with pytest.raises(RuntimeError):
        video.write_video(tmp_path / "result.mp4", frames(), FPS)
    with pytest.raises(ValueError, match=r"result\.mp4 have \(1, 8\) pixels, expected \(2, 2\) or more"):
        video.write_video(tmp_path / "result.mp4", [picture(0, (1, 8, 3))], FPS)
    with pytest.raises(ValueError, match=r"no frames to write to .*result\.mp4"):
        video.write_video(tmp_path / "result.mp4", [], FPS)
    assert not list(tmp_path.iterdir())


def test_a_video_that_cannot_be_written(tmp_path):
    """A folder that is a file; a disk that is full (here: a limit on the size of files)."""
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(ValueError, match=r"out\.mp4 cannot be written: (Not a directory|File exists)"):
        video.write_video(tmp_path / "file" / "out.mp4", [picture(0)], FPS)
    noise = np.random.default_rng(0).integers(0, 255, (10, 96, 96, 3), dtype=np.uint8)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, before[1]))
    try:
        with pytest.raises(ValueError, match=r"out\.mp4 cannot be written: File too large"):
            video.write_video(tmp_path / "out.mp4", noise, FPS)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_sound_without_samples(tmp_path):
    path = tmp_path / "nothing.wav"
    with wave.open(str(path), "wb") as file:
        file.setparams((1, 2, 16_000, 0, "NONE", ""))
    with pytest.raises(ValueError, match=r"nothing\.wav"):
        audio.load_audio(path)
