"""Windows of talking faces, drawn faces, and the preparation of real videos up to the TFDS data set."""

from fractions import Fraction

import av
import cv2
import numpy as np
import pytest
from omnax.data.drawn.talking_faces import (
    DrawnFaces,
    FaceClips,
    Repeated,
    Resized,
    correlation,
    openness,
    sample_pair,
    sample_window,
    window_positions,
)
from omnax.data.images.decode import CorruptExample
from omnax.data.images.resize import RESIZE
from omnax.data.media import audio, face_crops, video

DRAWN = DrawnFaces(2)


def numbered(ids, columns=400):
    """A clip whose frames hold their own number, and whose mel holds the column's."""
    ids = np.array(ids)
    frames = [np.full((2, 2, 3), i, np.uint8) for i in ids]
    mel = np.broadcast_to(np.arange(columns, dtype=np.float32), (80, columns))
    return {"frames": frames, "ids": ids, "mel": mel, "name": "numbered"}


def test_windows_do_not_cross_gaps():
    assert window_positions(np.array([0, 1, 2, 4, 5, 6, 7]), 3).tolist() == [0, 3, 4]
    assert window_positions(np.array([0, 2]), 3).tolist() == []


def test_window_of_the_published_trainer():
    """Frames f … f + 4 and sounds from int(80 f / 25), per frame one video frame earlier; the reference elsewhere."""
    clip = numbered([*range(40), *range(60, 100)])
    starts = set()
    for seed in range(60):
        window = sample_window(clip, np.random.default_rng(seed))
        target, reference = (window[name][:, 0, 0, 0] for name in ("target", "reference"))
        first = int(target[0])
        assert target.tolist() == list(range(first, first + 5)) and np.ptp(reference) == 4
        assert int(reference[0]) != first
        assert window["mel"][0, :, 0].tolist() == list(range(int(80 * first / 25), int(80 * first / 25) + 16))
        assert window["mels"][:, 0, 0, 0].tolist() == [int(80 * (first + k - 1) / 25) for k in range(5)]
        starts.add(first)
    assert min(starts) >= 1 and not starts & set(range(36, 60)) and len(starts) > 30
    late = numbered(range(100), columns=100)  # sound for the first 26 windows only
    assert all(sample_window(late, np.random.default_rng(s))["target"][0, 0, 0, 0] <= 26 for s in range(40))


def test_sixteen_frames_need_51_mel_frames():
    window = sample_window(numbered(range(60)), np.random.default_rng(0), length=16)
    assert window["target"].shape == (16, 2, 2, 3) and window["mel"].shape == (80, 51, 1)


def test_pairs_are_half_in_sync():
    clip = numbered(range(80))
    labels = []
    for seed in range(200):
        pair = sample_pair(clip, np.random.default_rng(seed))
        first = int(pair["frames"][0, 0, 0, 0])
        assert (int(80 * first / 25) == pair["mel"][0, 0, 0]) == bool(pair["label"])
        labels.append(pair["label"])
    assert 80 < sum(labels) < 120


@pytest.mark.parametrize("clip", [numbered(range(5)), numbered(range(0, 80, 2)), numbered(range(80), columns=10)])
def test_clips_without_two_windows_are_skipped(clip):
    with pytest.raises(CorruptExample, match="numbered: has no two windows of 5 frames with sound"):
        sample_window(clip, np.random.default_rng(0))


def test_drawn_mouths_follow_their_sound():
    for clip in (DRAWN[0], DRAWN[1]):
        assert clip["frames"].shape == (75, 96, 96, 3) and clip["mel"].shape == (80, 241)
        assert correlation(openness(clip["frames"]), clip["envelope"]) > 0.98
        loudness = clip["mel"].mean(0)[np.arange(75) * 80 // 25 + 2]
        assert correlation(loudness, clip["envelope"]) > 0.8
    np.testing.assert_array_equal(DRAWN[1]["frames"], DrawnFaces(5)[1]["frames"])
    assert not np.array_equal(DRAWN[0]["frames"], DRAWN[1]["frames"])
    with pytest.raises(ValueError, match="identities is 'two'"):
        DrawnFaces(1, identities="two")


def test_repeated_and_resized():
    clips = DRAWN
    assert [Repeated(clips, 3)[i]["name"] for i in (0, 2, 3)] == [clips[i]["name"] for i in (0, 0, 1)]
    frames = clips[0]["frames"]
    np.testing.assert_array_equal(Resized(frames, 96)[4], frames[4])
    mouth = RESIZE["cv2_bilinear"](frames[4][48:], (96, 96))
    np.testing.assert_array_equal(Resized(frames, 96, "mouth")[4], mouth)


@pytest.mark.parametrize(
    "shapes", [((131, 97), (96, 96)), ((40, 300), (96, 96)), ((96, 96), (201, 33)), ((1, 5), (7, 3))]
)
def test_cv2_bilinear_is_opencvs_bit_for_bit(shapes):

    image = np.random.default_rng(0).integers(0, 256, (*shapes[0], 3), dtype=np.uint8)
    np.testing.assert_array_equal(RESIZE["cv2_bilinear"](image, shapes[1]), cv2.resize(image, shapes[1][::-1]))
    with pytest.raises(ValueError, match="got float64"):
        RESIZE["cv2_bilinear"](np.zeros((4, 4, 3)), (2, 2))


@pytest.fixture(scope="module")
def videos(tmp_path_factory):
    """Two videos of a drawn face on a larger canvas at 25 frames per second."""
    folder = tmp_path_factory.mktemp("data") / "videos" / "speaker"
    for i, clip in enumerate(DRAWN[i] for i in range(2)):
        canvas = np.zeros((40, 120, 160, 3), np.uint8)
        canvas[:, 10:106, 20:116] = clip["frames"][:40, ..., ::-1]
        folder.mkdir(parents=True, exist_ok=True)
        sound = folder / f"{i}.wav"
        audio.write_wav(sound, clip["audio"][: 40 * 640])
        video.write_video(folder / f"{i}.mp4", canvas, Fraction(25), audio=sound)
    return folder.parent


def test_videos_become_clips(videos, tmp_path):
    """Crops are the detected boxes, frames without a face are left out, mels are the sound's; all through TFDS."""
    missing = {5, 20}

    def detect(frames, counter=iter(range(10**6))):  # noqa: B008  (one count over all calls)
        return [None if next(counter) % 40 in missing else (10, 106, 20, 116) for _ in frames]

    out = tmp_path / "prepared"
    for split, files in {"train": [videos / "speaker" / "0.mp4"], "test": [videos / "speaker" / "1.mp4"]}.items():
        for file in files:
            assert face_crops.prepare(file, out / "clips" / split / f"{file.stem}.npz", detect) == ""
    face_crops.FaceCrops(out).download_and_prepare()
    clips = FaceClips(out, "train")
    clip, original = clips[0], DRAWN[0]
    assert len(clips) == 1 and clip["name"] == "train/0"
    assert clip["ids"].tolist() == [i for i in range(40) if i not in missing]
    frame = clip["frames"][10].astype(float)
    assert frame.shape == (96, 96, 3)
    assert np.abs(frame - original["frames"][clip["ids"][10]]).mean() < 6  # H.264, then JPEG
    expected = audio.mel_spectrogram(audio.load_audio(videos / "speaker" / "0.mp4"))
    np.testing.assert_array_equal(clip["mel"], expected)
    window = sample_window(clip, np.random.default_rng(0))
    assert window["target"].shape == (5, 96, 96, 3)
    with pytest.raises(ValueError, match="holds no prepared clips of split 'val'"):
        FaceClips(out, "val")


@pytest.mark.parametrize("late", [0.25, -0.25])
def test_sound_is_heard_from_the_first_picture_on(videos, tmp_path, late):
    """Streams of a file may begin at different times; mel frame 20 is a quarter of a second after the first picture."""
    path = tmp_path / "shifted.mkv"
    with av.open(str(videos / "speaker" / "0.mp4")) as source, av.open(str(path), "w") as container:
        streams = {stream.index: container.add_stream_from_template(stream) for stream in source.streams}
        for packet in source.demux():
            if packet.dts is not None:
                shift = 1 + (late if packet.stream.type == "audio" else 0)
                packet.pts, packet.dts = (t + round(shift / packet.time_base) for t in (packet.pts, packet.dts))
                packet.stream = streams[packet.stream.index]
                container.mux(packet)
    assert face_crops.prepare(path, tmp_path / "clip.npz", lambda frames: [(10, 106, 20, 116)] * len(frames)) == ""
    got = np.load(tmp_path / "clip.npz")["mel"]
    expected = audio.mel_spectrogram(audio.load_audio(videos / "speaker" / "0.mp4"))
    begin, end = (max(0, round(80 * part)) for part in (-late, late))
    np.testing.assert_allclose(got[:, end + 4 : 100], expected[:, begin + 4 : begin + 100 - end], atol=0.2)


def test_videos_with_too_few_faces_are_left_out(videos, tmp_path):
    reason = face_crops.prepare(
        videos / "speaker" / "0.mp4", tmp_path / "clip.npz", lambda frames: [None] * len(frames)
    )
    assert reason == "a face in 0 frames only, expected 16 or more" and not (tmp_path / "clip.npz").exists()


def test_lists_of_videos(videos, tmp_path):
    found = face_crops.find_videos(videos)
    assert [path.name for path in found["test"]] == ["0.mp4"] and [path.name for path in found["train"]] == ["1.mp4"]
    lists = tmp_path / "lists"
    lists.mkdir()
    (lists / "train.txt").write_text("speaker/1 NF\n\n")
    (lists / "val.txt").write_text("speaker/0\n")
    found = face_crops.find_videos(videos, lists)
    assert found == {"train": [videos / "speaker" / "1.mp4"], "test": [videos / "speaker" / "0.mp4"]}
    (lists / "train.txt").write_text("speaker/7\n")
    with pytest.raises(ValueError, match=r"train\.txt lists 'speaker/7', of which there is no video"):
        face_crops.find_videos(videos, lists)
    with pytest.raises(ValueError, match="no videos in"):
        face_crops.find_videos(lists)
