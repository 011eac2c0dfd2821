"""The lipsync command on files: a photograph that moves, sound of other lengths, missing faces, bad input."""

import argparse
import wave
from fractions import Fraction
from pathlib import Path

import cv2
import jax
import numpy as np
import pytest
from omnax import hub
from omnax.data.drawn.talking_faces import FaceClips
from omnax.data.media import audio, video
from omnax.hub.families import wav2lip as formats
from omnax.infer import face_detection, lipsync, prepare_faces
from omnax.infer.__main__ import main
from omnax.models.wav2lip import Wav2LipConfig, initial_values
from PIL import ExifTags, Image
from skimage.data import astronaut

FPS = Fraction(25)
BOX = ["--box", "20", "90", "30", "90"]  # top, bottom, left, right


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """A narrow generator with random weights, in the published format, and beside it an expert of zeros."""
    zeros = lambda leaf: np.zeros(leaf.shape, leaf.dtype)  # noqa: E731
    config, folder = Wav2LipConfig(width_mult=0.0625), tmp_path_factory.mktemp("weights")
    for name in ("generator", "expert"):
        shapes = formats.abstract(name, config)
        values = initial_values(jax.random.key(0), shapes) if name == "generator" else jax.tree.map(zeros, shapes)
        params, statistics = formats.split(values)
        model, variables = formats.NETWORKS[name].model(config), {"batch_stats": statistics}
        hub.save(hub.Bundle(model, params, config, variables=variables), folder / f"{name}.pth", "torch")
    return str(folder / "generator.pth")


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
    apply = jax.jit(bundle.model.apply)
    for i in (0, 6):
        crop = frames[i % 5][10:106, 20:116, ::-1] / np.float32(255)
        masked = np.where(np.arange(96)[:, None, None] < 48, crop, 0)
        window = mel[None, :, starts[i] : starts[i] + 16, None]
        picture = np.concatenate([masked, crop], -1)[None].astype(np.float32)
        expected = apply({"params": bundle.params} | bundle.variables, window, picture)
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
    from omnax.data.images.decode import encode_png

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
    assert run(*command, "--pads", "0", "-60", "0", "0", "--missing-face", "interpolate") == 1
    error = capsys.readouterr().err
    assert "pads (0, -60, 0, 0) (top, bottom, left, right) leave nothing of a face's box (20, 80, 30, 90)" in error
    assert run(*command, "--missing-face", "keep_frame", "--batch-size", 8) == 0
    changed = changes(face, tmp_path / "out.mp4")
    assert set(np.flatnonzero(changed < 0.5 * changed.max())) == missing
    missing |= set(range(20))
    assert run(*command, "--missing-face", "keep_frame") == 1
    assert "no face in 0-19 of 20 frames" in capsys.readouterr().err


def test_a_turned_photograph_stands_upright(tmp_path):
    """Telephones store how they were held (EXIF), and OpenCV's imread, which the published command uses, obeys."""
    lying = Image.fromarray(np.random.default_rng(0).integers(0, 255, (24, 32, 3), dtype=np.uint8))
    exif = lying.getexif()
    exif[ExifTags.Base.Orientation] = 6
    lying.save(tmp_path / "portrait.png", exif=exif)
    footage = lipsync.open_footage(tmp_path / "portrait.png", lipsync.Options())
    expected = cv2.imread(str(tmp_path / "portrait.png"))[..., ::-1]
    assert expected.shape == (32, 24, 3)
    np.testing.assert_array_equal(next(footage.frames()), expected)


def test_frames_whose_sound_is_quiet_stay(weights, tmp_path):
    """`--quiet-below`: frames that hear nothing above the level in their 0.2 s are those of the video."""
    face, sound, out = noise_video(tmp_path / "noise.mp4", 20), tmp_path / "half.wav", tmp_path / "out.mp4"
    tone = 0.4 * np.sin(np.arange(12_800) / 3)
    audio.write_wav(sound, np.where(np.arange(12_800) < 8960, 1e-4 * tone, tone))  # 0.56 s: 14 frames
    command = ["--weights", weights, "--face", face, "--audio", sound, "--out", out, "--batch-size", 8, *BOX]
    assert run(*command, "--quiet-below", "-50") == 0
    changed = changes(face, out)
    assert set(np.flatnonzero(changed < 0.5 * changed.max())) == set(range(10))  # the next hears the tone begin


def test_feathered_edges_by_hand():
    """Weights of the face: 1/3 at the edge, 2/3 beside it, 1 further in."""
    frame, face = np.zeros((9, 9, 3), np.uint8), np.full((7, 6, 3), 90, np.uint8)
    pasted = lipsync.paste(frame, face, (1, 8, 2, 8), feather=2)
    assert pasted[4, :, 0].tolist() == [0, 0, 30, 60, 90, 90, 60, 30, 0]
    assert pasted[:, 4, 0].tolist() == [0, 30, 60, 90, 90, 90, 60, 30, 0]
    assert pasted[1, 3].tolist() == [30] * 3
    hard = lipsync.paste(frame, face, (1, 8, 2, 8))
    assert (hard[1:8, 2:8] == 90).all() and hard.sum() == 3 * 90 * 42


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
        ({"--box": ["9", "5", "0", "5"]}, "box (9, 5, 0, 5) (top, bottom, left, right) is not inside"),
        ({"--audio": "cut.wav"}, "cut.wav is damaged: it has 5000 bytes, expected 35324 as its header says"),
        ({"--audio": "noise.mp4"}, "noise.mp4 holds no sound, only ['video']"),
        ({"--weights": "expert.pth"}, "expert.pth holds a SyncNet, expected the generator of Wav2Lip"),
        ({"--box": None, "--detector": "expert.pth"}, "expert.pth holds a SyncNet, expected the face detector S3FD"),
        ({"--out": "out.avi"}, "out.avi, expected a name that ends in .mp4"),
        ({"--out": "noise.mp4"}, "noise.mp4, which is an input; expected another file"),
        ({"--out": "tiny.wav/out.mp4"}, "tiny.wav/out.mp4: File exists"),
        ({"--batch-size": ["0"]}, "batch_size is 0, expected 1 or more"),
        ({"--resize-factor": ["0"]}, "resize_factor is 0, expected 1 or more"),
        ({"--resize-factor": ["99"]}, "resize_factor 99 leaves nothing of frames of 96 x 112 pixels"),
    ],
)  # fmt: skip
def test_bad_input(change, message, weights, speech, tmp_path, capsys):
    with wave.open(str(tmp_path / "empty.wav"), "wb") as file:
        file.setparams((1, 2, 16_000, 0, "NONE", ""))
    write_tone(tmp_path / "tiny.wav", 0.1)
    (tmp_path / "cut.wav").write_bytes(Path(speech).read_bytes()[:5000])
    for file in Path(weights).parent.iterdir():
        (tmp_path / file.name).symlink_to(file)
    (tmp_path / "broken.mp4").write_bytes(b"no video at all" * 100)
    (tmp_path / "broken.png").write_bytes(b"no picture")
    settings = {"--weights": weights, "--face": noise_video(tmp_path / "noise.mp4", 10), "--audio": speech}
    settings |= {"--box": BOX[1:], "--out": tmp_path / "out.mp4"}
    for key, value in change.items():
        settings[key] = tmp_path / value if isinstance(value, str) else value
    given = {key: value if isinstance(value, list) else [value] for key, value in settings.items() if value}
    assert run(*(word for key, values in given.items() for word in (key, *values))) == 1
    error = capsys.readouterr().err
    assert error.startswith("ValueError: ") and message in error
    assert not (tmp_path / "out.mp4").exists() and not list(tmp_path.glob(".*"))


def test_prepare_faces_goes_on_where_it_stopped(face, speech, tmp_path, monkeypatch, capsys):
    """A broken video is left out; the second run does nothing again, and a stopped one leaves no old data set."""
    (tmp_path / "videos" / "a").mkdir(parents=True)
    frames = list(video.open_video(face).frames())
    for name in ("0", "1"):
        video.write_video(tmp_path / "videos" / "a" / f"{name}.mp4", frames, FPS, audio=speech)
    (tmp_path / "videos" / "a" / "broken.mp4").write_bytes(b"nothing")
    seen = []

    def detector(*_, **__):
        return lambda batch: [seen.append(1) or (20, 80, 30, 90) for _ in batch]

    def interrupt(folder):
        raise KeyboardInterrupt

    monkeypatch.setattr(prepare_faces, "make_detector", detector)
    command = ["prepare-faces", "--videos", str(tmp_path / "videos"), "--out", str(tmp_path / "out")]
    assert main(command) == 0
    printed = capsys.readouterr().out
    assert "2 of 3 videos are clips" in printed and "broken.mp4: is damaged" in printed
    places = {path.stem: path.parent for path in (tmp_path / "out" / "clips").rglob("*.npz")}
    assert sorted(places) == ["0.mp4", "1.mp4"] and len(seen) == 40
    packed = tmp_path / "out" / "tfds" / "face_crops" / "1.0.0" / "dataset_info.json"
    before = packed.stat().st_mtime_ns
    assert main(command) == 0 and len(seen) == 40 and packed.stat().st_mtime_ns == before
    video.write_video(tmp_path / "videos" / "a" / "-.mp4", frames, FPS, audio=speech)  # the first
    seen.clear()
    with monkeypatch.context() as stopped:  # after the clip was written, before it was packed
        stopped.setattr(prepare_faces, "pack", interrupt)
        with pytest.raises(KeyboardInterrupt):
            main(command)
    assert len(seen) == 20
    assert main(command) == 0 and len(seen) == 20
    found = {path.stem: path.parent for path in (tmp_path / "out" / "clips").rglob("*.npz")}
    assert (
        sorted(found) == ["-.mp4", "0.mp4", "1.mp4"] and places.items() <= found.items()
    )  # a new video moves no other
    clips = FaceClips(tmp_path / "out", "train")
    names = [clips[i]["name"] for i in range(len(clips))]
    assert names == sorted(f"train/a/{name}" for name, place in found.items() if "train" in place.parts)
    assert main([*command[:-1], str(tmp_path / "other"), "--lists", str(tmp_path)]) == 1
    assert "ValueError" in capsys.readouterr().err


def test_published_settings():
    """Every argument of the published inference.py is there under a name of its own, with its default."""
    parser = argparse.ArgumentParser()
    lipsync.add_arguments(parser)
    settings = vars(parser.parse_args(["--weights", "w", "--face", "f", "--audio", "a"]))
    published = {"static": False, "fps": 25, "pads": (0, 10, 0, 0), "detector_batch_size": 16, "batch_size": 128}
    published |= {"resize_factor": 1, "crop": (0, -1, 0, -1), "box": None, "rotate": False, "no_smooth": False}
    assert published.items() <= settings.items()
    for rate in ("0", "-1", "1/0", "fast"):
        with pytest.raises(SystemExit):
            parser.parse_args(["--weights", "w", "--face", "f", "--audio", "a", "--fps", rate])


def test_smoothing_by_hand():
    """Means of five boxes from each frame on, cut to whole pixels; the last four take the last five."""
    boxes = [(i, i + 10, 2 * i, 50) for i in range(7)]
    smoothed = face_detection.smooth(boxes)
    assert smoothed[:3] == [(2, 12, 4, 50), (3, 13, 6, 50), (4, 14, 8, 50)]
    # rows 2 … 6 when it is the turn of 3: 4 (smoothed), 3, 4, 5, 6 -> 22 / 5
    assert smoothed[3] == (4, 14, 8, 50)
    assert face_detection.smooth(boxes[:1]) == boxes[:1]
    # Of three boxes Python's slice [3 - 5:] takes the last two, every time: (1 + 2) / 2, then (1 + 2) / 2, (1 + 2) / 2.
    assert [box[0] for box in face_detection.smooth(boxes[:3])] == [1, 1, 1]
    assert [box[0] for box in face_detection.smooth(boxes[:3], window=1)] == [0, 1, 2]


def test_boxes_by_hand():
    assert face_detection.pad((5, 90, 3, 60), (10, 20, 2, 0), (100, 61)) == (0, 100, 1, 60)
    gaps = [None, (0, 10, 0, 10), None, None, (3, 16, 0, 10), None]
    assert [box[:2] for box in face_detection.fill_gaps(gaps)] == [(0, 10), (0, 10), (1, 12), (2, 14), (3, 16), (3, 16)]
    outside = np.array([-9.0, 3, -1, 20])
    assert face_detection._whole_pixels(outside, (40, 40)) is None
    assert face_detection._whole_pixels(outside + np.array([0, 0, 99, 99]), (40, 50)) == (3, 40, 0, 50)
    with pytest.raises(ValueError, match="no face in any frame"):
        face_detection.fill_gaps([None, None])
