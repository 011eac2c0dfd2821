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


def test_a_video_cut_short_is_named(tmp_path):
    """With its index at the front a cut file opens well, and then ends early."""
    path = tmp_path / "front.mp4"
    rng = np.random.default_rng(0)
    with av.open(str(path), "w", options={"movflags": "faststart"}) as container:
        stream = container.add_stream("libx264", rate=25)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        for _ in range(100):
            noise = rng.integers(0, 255, (48, 64, 3), dtype=np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(noise, format="rgb24")))
        container.mux(stream.encode(None))
    assert len(list(video.open_video(path).frames())) == 100
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 3])
    with pytest.raises(ValueError, match=r"front\.mp4 is damaged: (it ends )?after \d+ frames"):
        list(video.open_video(path).frames())


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
