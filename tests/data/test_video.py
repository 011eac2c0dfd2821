"""Reading and writing video: frames and sound there and back, variable rate, damage."""

import wave
from fractions import Fraction

import av
import numpy as np
import pytest
from omnax.data import audio, video

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


def write_noise(path, seconds, sound=0.0, times=None, **options):
    """A video whose frames do not compress, with `sound` seconds of a tone; `times` in 1/25 s."""
    rng = np.random.default_rng(0)
    with av.open(str(path), "w", options=options) as container:
        stream = container.add_stream("mpeg4", rate=25)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        audio_stream = container.add_stream("aac", rate=16_000, layout="mono") if sound else None
        for time in times or range(int(25 * seconds)):
            frame = av.VideoFrame.from_ndarray(rng.integers(0, 255, (48, 64, 3), dtype=np.uint8), format="rgb24")
            frame.pts, frame.time_base = time, Fraction(1, 25)
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
    with pytest.raises(ValueError, match=r"no frames to write to .*result\.mp4"):
        video.write_video(tmp_path / "result.mp4", [], FPS)
    assert not list(tmp_path.iterdir())


def test_sound_without_samples(tmp_path):
    path = tmp_path / "nothing.wav"
    with wave.open(str(path), "wb") as file:
        file.setparams((1, 2, 16_000, 0, "NONE", ""))
    with pytest.raises(ValueError, match=r"nothing\.wav"):
        audio.load_audio(path)
