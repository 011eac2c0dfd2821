"""The mel front end against librosa, on the inputs that break others: silence, very short, stereo at 44.1 kHz."""

import struct
import wave

import librosa
import numpy as np
import pytest
from omnax.data.media import audio, video


def speech_like(seconds, rate=16_000, seed=0):
    """A voiced sound whose pitch and loudness move, with a little noise."""
    rng = np.random.default_rng(seed)
    time = np.arange(int(seconds * rate)) / rate
    phase = 2 * np.pi * np.cumsum(120 + 30 * np.sin(2 * np.pi * 0.7 * time)) / rate
    loudness = 0.3 * (0.55 + 0.45 * np.sin(2 * np.pi * 3 * time))
    voice = sum(np.sin(h * phase) / h for h in range(1, 15))
    return (loudness * voice / 3 + 0.002 * rng.standard_normal(len(time))).astype(np.float32)


def librosa_mel(samples):
    """Wav2Lip's audio.py in librosa's terms."""
    emphasised = np.append(samples[:1].astype(np.float64), samples[1:] - 0.97 * samples[:-1].astype(np.float64))
    spectrum = np.abs(librosa.stft(emphasised, n_fft=800, hop_length=200, win_length=800, pad_mode="reflect"))
    basis = librosa.filters.mel(sr=16_000, n_fft=800, n_mels=80, fmin=55, fmax=7600)
    decibel = 20 * np.log10(np.maximum(1e-5, basis @ spectrum)) - 20
    return np.clip(8 * (decibel + 100) / 100 - 4, -4, 4)


@pytest.mark.parametrize(
    "samples",
    [
        speech_like(2.0),
        np.zeros(16_000, np.float32),
        *(speech_like(0.06)[:length] for length in (1, 2, 150, 399, 400, 401, 960)),
        np.tile(np.array([1, -1, -1, 1], np.float32), 2000),  # the loudest there is
        *(speech_like(27)[: 1024 * 200 * blocks + extra] for blocks, extra in ((1, -1), (1, 0), (2, 7))),
    ],
    ids=lambda samples: f"{len(samples)} samples",
)
@pytest.mark.filterwarnings("ignore:n_fft=800 is too large for input signal:UserWarning")  # librosa's, of short sound
def test_mel_equals_librosa(samples):
    got = audio.mel_spectrogram(samples)
    assert got.shape == (80, 1 + len(samples) // 200) and got.dtype == np.float32
    np.testing.assert_allclose(got, librosa_mel(samples), atol=1e-5)


def test_silence_is_the_lowest_value():
    assert (audio.mel_spectrogram(np.zeros(3200)) == -4).all()


@pytest.mark.filterwarnings("ignore:.*is deprecated and slated for removal:DeprecationWarning")  # audioread's imports
def test_stereo_at_44100_hz_equals_librosa(tmp_path):
    left, right = speech_like(1.3, 44_100), speech_like(1.3, 44_100, seed=1)[::-1]
    path = tmp_path / "stereo.wav"
    with wave.open(str(path), "wb") as file:
        file.setparams((2, 2, 44_100, 0, "NONE", ""))
        file.writeframes((np.stack([left, right], 1) * 32767).astype("<i2").tobytes())
    expected, _ = librosa.load(path, sr=16_000)
    got = audio.load_audio(path)
    np.testing.assert_allclose(got, expected, atol=1e-6)
    np.testing.assert_allclose(audio.mel_spectrogram(got), librosa_mel(expected), atol=1e-4)


def test_mel_matrix_is_librosas():
    expected = librosa.filters.mel(sr=16_000, n_fft=800, n_mels=80, fmin=55, fmax=7600)
    np.testing.assert_allclose(audio.mel_matrix(), expected, atol=1e-8)
    assert np.count_nonzero(audio.mel_matrix()) == 739


@pytest.mark.parametrize("fps", [23.976, 25.0, 29.97, 30.0, 60.0])
@pytest.mark.parametrize("frames", [16, 17, 81, 241])
def test_window_starts_are_those_of_the_published_loop(fps, frames):
    expected, i = [], 0
    while True:
        start = int(i * (80.0 / fps))
        if start + 16 > frames:
            expected.append(frames - 16)
            break
        expected.append(start)
        i += 1
    np.testing.assert_array_equal(audio.window_starts(frames, fps), expected)


def test_window_starts_for_a_given_number_of_frames():
    assert audio.window_starts(81, 25, 75).tolist()[-6:] == [65, 65, 65, 65, 65, 65]
    np.testing.assert_array_equal(audio.window_starts(81, 25, 10), audio.window_starts(81, 25)[:10])


def test_windows_hold_the_frames_from_their_start():
    mel = np.arange(80 * 40, dtype=np.float32).reshape(80, 40)
    windows = audio.mel_windows(mel, np.array([0, 3, 24]))
    assert windows.shape == (3, 80, 16, 1)
    np.testing.assert_array_equal(windows[1, :, :, 0], mel[:, 3:19])
    with pytest.raises(ValueError, match=r"from 0 … 25 do not fit into 40"):
        audio.mel_windows(mel, np.array([0, 25]))


@pytest.mark.parametrize(
    "samples,message",
    [
        (np.zeros(0), r"shape \(0,\), expected one channel"),
        (np.zeros((2, 9)), r"shape \(2, 9\), expected one channel"),
        (np.array([-32768, 32767], np.int16), r"audio holds int16, expected floating-point samples in \[-1, 1\]"),
        (np.array([0.0, np.nan]), "1 samples that are not finite"),
    ],
)
def test_bad_audio(samples, message):
    with pytest.raises(ValueError, match=message):
        audio.mel_spectrogram(samples)


@pytest.mark.parametrize("rate", [16_000, 44_100])
def test_samples_that_are_not_finite_are_named(tmp_path, rate):
    """Before resampling makes hundreds of one."""
    samples = np.zeros(rate, "<f4")
    samples[9000] = np.nan
    file_format = struct.pack("<4sIHHIIHH", b"fmt ", 16, 3, 1, rate, 4 * rate, 4, 32)  # 3: floats
    data = b"WAVE" + file_format + struct.pack("<4sI", b"data", 4 * rate) + samples.tobytes()
    (tmp_path / "nan.wav").write_bytes(struct.pack("<4sI", b"RIFF", len(data)) + data)
    with pytest.raises(ValueError, match=r"nan\.wav is damaged: sample 9000 is nan, expected a finite number"):
        audio.load_audio(tmp_path / "nan.wav")


@pytest.mark.parametrize("value", [0x00, 0x7F, 0xFF])
def test_a_damaged_header_is_an_error_that_names_the_file_or_changes_nothing_of_size(tmp_path, value):
    """Rates, channels and lengths of zero or of gigabytes: no crash, no hang, no more samples than there are bytes."""
    path = tmp_path / "a.wav"
    audio.write_wav(path, np.linspace(-1, 1, 4000))
    whole = path.read_bytes()
    for at in range(44):
        path.write_bytes(whole[:at] + bytes([value]) + whole[at + 1 :])
        try:
            _, blocks = video.decode_audio(path)
            assert sum(block.size for block in blocks) <= len(whole), at
        except ValueError as error:
            assert str(path) in str(error) and len(str(error)) < 2000, at
    for size in (0, 4, 12, 30, 43):
        path.write_bytes(whole[:size])
        with pytest.raises(ValueError, match=r"a\.wav"):
            audio.load_audio(path)


def test_loudness_of_windows():
    """A square wave of half the height is 6.02 dB below full scale; a window at the end has what is left of it."""
    samples = np.concatenate([np.zeros(3200), np.tile([0.5, -0.5], 1600), np.zeros(1600)]).astype(np.float32)
    levels = audio.window_levels(samples, np.array([0, 16, 24, 32, 48]))
    np.testing.assert_allclose(levels, [-np.inf, -6.0206, -9.0309, -np.inf, -np.inf], atol=1e-3)


def test_less_sound_than_one_window():
    with pytest.raises(ValueError, match=r"15 mel frames of 12.5 ms, expected at least 16 \(0.2 s\)"):
        audio.window_starts(15, 25)
    with pytest.raises(ValueError, match="fps is 0"):
        audio.window_starts(100, 0)
