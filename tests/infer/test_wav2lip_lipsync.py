"""The lipsync command on files: a photograph that moves, sound of other lengths, missing faces, bad input."""

import wave
from fractions import Fraction

import jax
import numpy as np
import pytest
from omnax import hub
from omnax.data import audio, video
from omnax.data.talking_faces import FaceClips
from omnax.hub import wav2lip as formats
from omnax.infer import face_detection, lipsync, prepare_faces
from omnax.infer.__main__ import main
from omnax.models.wav2lip import Generator, Wav2LipConfig, initial_values
from skimage.data import astronaut

FPS = Fraction(25)
BOX = ["--box", "20", "90", "30", "90"]  # top, bottom, left, right


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """A narrow generator with random weights, in the published format."""
    config = Wav2LipConfig(width_mult=0.0625)
    params, statistics = formats.split(initial_values(jax.random.key(0), formats.abstract("generator", config)))
    path = tmp_path_factory.mktemp("weights") / "wav2lip.pth"
    hub.save(hub.Bundle(Generator(config), params, config, variables={"batch_stats": statistics}), path, "torch")
    return str(path)


@pytest.fixture(scope="module")
def speech(tmp_path_factory):
    """0.8 s of sound at 22050 Hz: 20 frames."""
    return write_tone(tmp_path_factory.mktemp("sound") / "speech.wav", 0.8)


@pytest.fixture(scope="module")
def face(tmp_path_factory):
    """Twenty frames around the astronaut's face, drifting to the right."""
    path = tmp_path_factory.mktemp("face") / "face.video.mp4"
    photograph = astronaut()
    video.write_video(path, (photograph[30:210, 130 + i : 320 + i] for i in range(20)), FPS)
    return str(path)


def write_tone(path, seconds, rate=22_050):
    samples = 0.4 * np.sin(2 * np.pi * 300 * np.arange(int(seconds * rate)) / rate)
    audio.write_wav(path, samples, rate)
    return str(path)


def run(*arguments):
    return main(["lipsync", *map(str, arguments)])


def noise_video(path, count, size=(96, 112)):
    rng = np.random.default_rng(0)
    video.write_video(path, (rng.integers(0, 255, (*size, 3), dtype=np.uint8) for _ in range(count)), FPS)
    return str(path)


def test_video_in_video_out(weights, face, speech, tmp_path, capsys):
    """Faces are found; frames, rate and sound are those of the inputs; outside the box nothing changes."""
    out = tmp_path / "result.mp4"
    assert run("--weights", weights, "--face", face, "--audio", speech, "--out", out, "--batch-size", 8) == 0
    result, source = video.open_video(out), video.open_video(face)
    assert (result.fps, result.size, result.num_frames) == (source.fps, source.size, 20)
    heard, spoken = audio.load_audio(out), audio.load_audio(speech)
    assert abs(len(heard) - len(spoken)) <= 1600
    np.testing.assert_allclose(heard[3000:9000], spoken[3000:9000], atol=0.03)
    before, after = (np.stack(list(v.frames())).astype(float) for v in (source, result))
    assert np.abs(before - after)[:, 32:140, 51:130].mean() > 20  # random weights: the face is gone
    assert np.abs(before - after)[:, 160:].mean() < 4
    printed = capsys.readouterr().out
    assert "20 frames in" in printed and "peak memory" in printed and str(out) in printed


def test_generated_faces_are_the_models(weights, tmp_path):
    """What is pasted equals the network on the crop of each frame with its own mel window, batches or not."""
    frames = np.random.default_rng(0).integers(0, 255, (5, 120, 130, 3), dtype=np.uint8)
    footage = lipsync.Footage("frames", FPS, 5, False, lambda: iter(frames))
    mel = np.random.default_rng(1).uniform(-4, 4, (80, 60)).astype(np.float32)
    starts = audio.window_starts(60, 25, 7)  # two frames more than the footage has: it begins again
    generate, size, batch_size = lipsync.load_generator(weights, 8)
    box = (10, 106, 20, 116)  # 96 x 96: no resizing
    got = list(lipsync.sync_lips(footage, [box], mel, starts, generate, size, batch_size))
    bundle = hub.load(weights)
    for i in (0, 6):
        crop = frames[i % 5][10:106, 20:116, ::-1] / np.float32(255)
        masked = np.where(np.arange(96)[:, None, None] < 48, crop, 0)
        window = mel[None, :, starts[i] : starts[i] + 16, None]
        picture = np.concatenate([masked, crop], -1)[None].astype(np.float32)
        expected = bundle.model.apply({"params": bundle.params} | bundle.variables, window, picture)
        difference = got[i][10:106, 20:116, ::-1] - np.asarray(expected[0]) * 255
        assert difference.max() < 0.01 and difference.min() > -1.01  # pixels are cut, not rounded
        outside = got[i].copy()
        outside[10:106, 20:116] = frames[i % 5][10:106, 20:116]
        np.testing.assert_array_equal(outside, frames[i % 5])


def test_sound_decides_the_length(weights, tmp_path):
    """Longer sound repeats the video, shorter cuts it, a picture stands still; `--published-length` ends early."""
    face = noise_video(tmp_path / "noise.mp4", 10)
    long, short = (write_tone(tmp_path / f"{seconds}.wav", seconds) for seconds in (0.88, 0.24))
    picture = tmp_path / "still.png"
    picture.write_bytes(lipsync_picture())
    for source, sound, extra, frames in (
        (face, long, [], 22),
        (face, long, ["--published-length"], 19),
        (face, short, [], 6),
        (picture, short, ["--fps", "50"], 12),
        (face, short, ["--static", "--rotate"], 6),
    ):
        out = tmp_path / "result.mp4"
        command = ["--weights", weights, "--face", source, "--audio", sound, "--out", out, "--batch-size", 8]
        assert run(*command, *BOX, *extra) == 0
        assert video.open_video(out).num_frames == frames


def lipsync_picture():
    from omnax.data.images import encode_png

    return encode_png(np.random.default_rng(0).integers(0, 255, (96, 112, 3), dtype=np.uint8))


def test_frames_without_a_face(weights, speech, tmp_path, monkeypatch, capsys):
    """Named in the error; kept as they are or bridged on request."""
    face = noise_video(tmp_path / "noise.mp4", 20)
    missing = {3, 7, 8, 9}

    def detector(*_, **__):
        frames = iter(range(20))
        return lambda batch: [None if next(frames) in missing else (20, 80, 30, 90) for _ in batch]

    monkeypatch.setattr(lipsync, "make_detector", detector)
    command = ["--weights", weights, "--face", face, "--audio", speech, "--out", tmp_path / "out.mp4"]
    assert run(*command) == 1
    assert "no face in 3, 7-9 of 20 frames; give --box" in capsys.readouterr().err
    assert not (tmp_path / "out.mp4").exists()
    assert run(*command, "--missing-face", "keep_frame", "--batch-size", 8) == 0
    changed = changes(face, tmp_path / "out.mp4")
    assert set(np.flatnonzero(changed < 0.5 * changed.max())) == missing
    missing |= set(range(20))
    assert run(*command, "--missing-face", "keep_frame") == 1
    assert "no face in 0-19 of 20 frames" in capsys.readouterr().err


def changes(before, after):
    pair = zip(video.open_video(before).frames(), video.open_video(after).frames(), strict=True)
    return np.array([np.abs(a.astype(float) - b).mean() for a, b in pair])


@pytest.mark.parametrize(
    "change,message",
    [
        ({"--audio": "empty.wav"}, "holds an audio stream without a single sample"),
        ({"--audio": "missing.wav"}, "there is no file"),
        ({"--audio": "tiny.wav"}, "expected at least 16 (0.2 s)"),
        ({"--face": "broken.mp4"}, "broken.mp4 is damaged"),
        ({"--face": "broken.png"}, "not a readable image"),
        ({"--face": "tiny.wav"}, "holds no pictures"),
        ({"--box": ["0", "97", "0", "5"]}, "box (0, 97, 0, 5) (top, bottom, left, right) is not inside"),
        ({"--crop": ["50", "40", "0", "-1"]}, "crop (50, 40, 0, -1) leaves nothing of frames of 96 x 112 pixels"),
    ],
)  # fmt: skip
def test_bad_input(change, message, weights, speech, tmp_path, capsys):
    with wave.open(str(tmp_path / "empty.wav"), "wb") as file:
        file.setparams((1, 2, 16_000, 0, "NONE", ""))
    write_tone(tmp_path / "tiny.wav", 0.1)
    (tmp_path / "broken.mp4").write_bytes(b"no video at all" * 100)
    (tmp_path / "broken.png").write_bytes(b"no picture")
    settings = {"--weights": weights, "--face": noise_video(tmp_path / "noise.mp4", 10), "--audio": speech}
    settings |= {"--box": BOX[1:], "--out": tmp_path / "out.mp4"}
    for key, value in change.items():
        settings[key] = value if isinstance(value, list) else tmp_path / value
    flat = [word for key, value in settings.items() for word in (key, *(value if isinstance(value, list) else [value]))]
    assert run(*flat) == 1
    error = capsys.readouterr().err
    assert error.startswith("ValueError: ") and message in error
    assert not (tmp_path / "out.mp4").exists()


def test_prepare_faces_goes_on_where_it_stopped(face, speech, tmp_path, monkeypatch, capsys):
    """A folder with one good and one broken video: a data set of the good one; the second run finds no face again."""
    (tmp_path / "videos" / "a").mkdir(parents=True)
    frames = list(video.open_video(face).frames())
    for name in ("0", "1"):
        video.write_video(tmp_path / "videos" / "a" / f"{name}.mp4", frames, FPS, audio=speech)
    (tmp_path / "videos" / "a" / "broken.mp4").write_bytes(b"nothing")
    seen = []

    def detector(*_, **__):
        return lambda batch: [seen.append(1) or (20, 80, 30, 90) for _ in batch]

    monkeypatch.setattr(prepare_faces, "make_detector", detector)
    command = ["prepare-faces", "--videos", str(tmp_path / "videos"), "--out", str(tmp_path / "out")]
    assert main(command) == 0
    printed = capsys.readouterr().out
    assert "2 of 3 videos are clips" in printed and "broken.mp4: " in printed
    assert len(FaceClips(tmp_path / "out", "train")) == 1 and len(seen) == 40
    assert main(command) == 0 and len(seen) == 40
    assert main([*command[:-1], str(tmp_path / "other"), "--lists", str(tmp_path)]) == 1
    assert "ValueError" in capsys.readouterr().err


def test_smoothing_by_hand():
    """Means of five boxes from each frame on, cut to whole pixels; the last four take the last five."""
    boxes = [(i, i + 10, 2 * i, 50) for i in range(7)]
    smoothed = face_detection.smooth(boxes)
    assert smoothed[:3] == [(2, 12, 4, 50), (3, 13, 6, 50), (4, 14, 8, 50)]
    # rows 2 … 6 when it is the turn of 3: 4 (smoothed), 3, 4, 5, 6 -> 22 / 5
    assert smoothed[3] == (4, 14, 8, 50)
    assert face_detection.smooth(boxes[:1]) == boxes[:1]


def test_boxes_by_hand():
    assert face_detection.pad((5, 90, 3, 60), (10, 20, 2, 0), (100, 61)) == (0, 100, 1, 60)
    gaps = [None, (0, 10, 0, 10), None, None, (3, 16, 0, 10), None]
    assert [box[:2] for box in face_detection.fill_gaps(gaps)] == [(0, 10), (0, 10), (1, 12), (2, 14), (3, 16), (3, 16)]
    with pytest.raises(ValueError, match="no face in any frame"):
        face_detection.fill_gaps([None, None])
