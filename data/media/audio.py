"""Speech as Wav2Lip takes it: 16 kHz mono, log-mel frames at 80 per second, one window of 16 per video frame.

Constants and order of operations are those of Rudrabha/Wav2Lip (audio.py, hparams.py), numerically librosa's. Runs on
the host in float64: the result feeds exact comparisons, and takes a millisecond per second of sound.
"""

import functools
import wave
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np

from ...storage.paths import as_path
from ...storage.writing import staged

SAMPLE_RATE = 16_000
MEL_RATE = 80  # mel frames per second
MEL_BINS = 80
WINDOW = 16  # mel frames the generator hears per video frame

_FFT = 800
_HOP = SAMPLE_RATE // MEL_RATE
_LOWEST, _HIGHEST = 55.0, 7600.0  # Hz
_PREEMPHASIS = 0.97
_REFERENCE_DB, _RANGE_DB, _MAX = 20.0, 100.0, 4.0
_BLOCK = 1024  # frames transformed at a time: bounds the memory of long recordings


def load_audio(path: str | Path, sample_rate: int = SAMPLE_RATE) -> np.ndarray:
    """The first audio stream of any media file as mono float32 [samples] in [-1, 1] at `sample_rate`.

    Channels are averaged, then resampled by libsoxr's HQ recipe, as `librosa.load` does. ValueError for a file that
    does not exist, is damaged, or holds no sound or samples that are not finite.
    """
    from .video import decode_audio  # PyAV is an optional dependency, needed only here

    rate, blocks = decode_audio(as_path(path))
    mono = list(_resampled(_mixed(blocks, path), rate, sample_rate))
    if not any(map(len, mono)):
        raise ValueError(f"{path} holds an audio stream without a single sample")
    return np.concatenate(mono)


def _mixed(blocks: Iterable[np.ndarray], path: str | Path) -> Iterator[np.ndarray]:
    """Blocks [channels, samples] as the means of their channels."""
    count = 0
    for block in blocks:
        mono = block.mean(axis=0)
        if not np.isfinite(mono).all():  # a resampler would spread them over hundreds
            first = count + int(np.argmin(np.isfinite(mono)))
            raise ValueError(f"{path} is damaged: sample {first} is {mono[first - count]}, expected a finite number")
        count += len(mono)
        yield mono


def write_wav(path: str | Path, audio: np.ndarray, rate: int = SAMPLE_RATE) -> None:
    """Writes mono samples in [-1, 1] as a 16-bit WAV file."""
    with staged(as_path(path)) as stage, wave.open(str(stage), "wb") as file:
        file.setparams((1, 2, rate, 0, "NONE", ""))
        file.writeframes(np.rint(32767 * np.clip(audio, -1, 1)).astype("<i2").tobytes())


def _resampled(blocks: Iterable[np.ndarray], rate: int, target: int) -> Iterator[np.ndarray]:
    """Blocks [samples] at `rate` as float32 blocks at `target` (both in Hz), ceil(samples * target / rate) in all."""
    if rate == target:
        yield from blocks
        return
    import soxr  # optional, like PyAV

    stream = soxr.ResampleStream(rate, target, 1, dtype="float32", quality="HQ")
    heard = made = 0
    for block in blocks:
        part = stream.resample_chunk(np.asarray(block, np.float32))
        heard, made = heard + len(block), made + len(part)
        yield part
    rest = stream.resample_chunk(np.empty(0, np.float32), last=True)
    length = -(-heard * target // rate) - made
    yield np.pad(rest[:length], (0, max(0, length - len(rest))))


def mel_spectrogram(audio: np.ndarray) -> np.ndarray:
    """Mono samples at 16 kHz -> log-mel [80, 1 + samples // 200] float32 in [-4, 4]; silence is -4.

    ValueError for no samples at all, for more than one channel, and for samples that are whole or not finite numbers.
    """
    audio = np.asarray(audio)
    if not np.issubdtype(audio.dtype, np.floating):
        raise ValueError(f"audio holds {audio.dtype}, expected floating-point samples in [-1, 1]")
    if audio.ndim != 1 or not len(audio):
        raise ValueError(f"audio has shape {audio.shape}, expected one channel [samples] with at least one sample")
    if not np.isfinite(audio).all():
        raise ValueError(f"audio holds {np.count_nonzero(~np.isfinite(audio))} samples that are not finite numbers")
    return np.concatenate([_log_mel(magnitude) for magnitude in _magnitudes(audio)], axis=1)


def _log_mel(magnitude: np.ndarray) -> np.ndarray:
    """|STFT| [401, frames] -> [80, frames] float32."""
    amplitude = mel_matrix().astype(np.float64) @ magnitude
    decibel = 20 * np.log10(np.maximum(1e-5, amplitude)) - _REFERENCE_DB
    scaled = 2 * _MAX * (decibel + _RANGE_DB) / _RANGE_DB - _MAX
    return np.clip(scaled, -_MAX, _MAX).astype(np.float32)


def _magnitudes(audio: np.ndarray) -> Iterator[np.ndarray]:
    """|STFT| of the emphasised sound in blocks [401, frames]: centred frames, reflected ends, periodic Hann window."""
    hann = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(_FFT) / _FFT)
    count = 1 + len(audio) // _HOP
    for start in range(0, count, _BLOCK):
        stop = min(start + _BLOCK, count)
        samples = _emphasised(audio, start * _HOP - _FFT // 2, (stop - 1) * _HOP + _FFT // 2)
        frames = np.lib.stride_tricks.sliding_window_view(samples, _FFT)[::_HOP]
        yield np.abs(np.fft.rfft(frames * hann)).T


def _emphasised(audio: np.ndarray, start: int, stop: int) -> np.ndarray:
    """Samples start … stop of the pre-emphasised sound in float64; beyond its ends it is reflected."""
    period = max(1, 2 * (len(audio) - 1))  # a single sample repeats
    index = np.arange(start, stop) % period
    index = np.minimum(index, period - index)
    before = np.where(index > 0, audio[np.maximum(index - 1, 0)], 0.0)
    return audio[index].astype(np.float64) - _PREEMPHASIS * before


@functools.cache
def mel_matrix() -> np.ndarray:
    """[80, 401] float32: triangles on Slaney's mel scale, each of unit area (`librosa.filters.mel`)."""
    corners = _mel_to_hz(np.linspace(_hz_to_mel(_LOWEST), _hz_to_mel(_HIGHEST), MEL_BINS + 2))
    bins = np.linspace(0, SAMPLE_RATE / 2, _FFT // 2 + 1)
    slopes = corners[:, None] - bins
    gaps = np.diff(corners)[:, None]
    triangles = np.maximum(0, np.minimum(-slopes[:-2] / gaps[:-1], slopes[2:] / gaps[1:]))
    return (triangles * (2 / (corners[2:] - corners[:-2]))[:, None]).astype(np.float32)


# Slaney's scale: linear, 3 mel per 200 Hz, up to 1 kHz = 15 mel; above it 27 mel for a factor of 6.4.
def _hz_to_mel(hz: float) -> float:
    return 3 * hz / 200 if hz < 1000 else 15 + 27 * float(np.log(hz / 1000) / np.log(6.4))


def _mel_to_hz(mel: np.ndarray) -> np.ndarray:
    return np.where(mel < 15, mel * 200 / 3, 1000 * np.exp((mel - 15) / 27 * np.log(6.4)))


def window_starts(num_mel_frames: int, fps: float, num_frames: int | None = None) -> np.ndarray:
    """First mel frame of each video frame's window [frames] int64: as many video frames as the sound fills.

    Video frame i starts at int(80 i / fps); where the window would run over the end, the last 16 mel frames make one
    final window (Rudrabha/Wav2Lip inference.py): 3 frames less than the sound lasts at 25 fps. With `num_frames`, there
    are so many: the final window serves all frames that are left. ValueError for less sound than one window (0.2 s).
    """
    if not fps > 0:
        raise ValueError(f"fps is {fps}, expected a positive number")
    if num_mel_frames < WINDOW:
        raise ValueError(f"the sound has {num_mel_frames} mel frames of 12.5 ms, expected at least {WINDOW} (0.2 s)")
    last = num_mel_frames - WINDOW
    step = MEL_RATE / fps
    count = int(last / step) + 2 if num_frames is None else num_frames
    starts = (np.arange(count) * step).astype(np.int64)
    return np.append(starts[starts <= last], last) if num_frames is None else np.minimum(starts, last)


def window_levels(audio: np.ndarray, starts: np.ndarray) -> np.ndarray:
    """Loudness of each mel window's sound [windows]: its root mean square in dB of full scale; -inf is silence.

    `audio` [samples] at 16 kHz; windows start at the mel frames `starts`.
    """
    parts = (audio[start * _HOP : (start + WINDOW) * _HOP] for start in starts)
    power = np.array([np.mean(np.square(part, dtype=np.float64)) if len(part) else 0.0 for part in parts])
    with np.errstate(divide="ignore"):
        return 10 * np.log10(power)


def mel_windows(mel: np.ndarray, starts: np.ndarray, length: int = WINDOW) -> np.ndarray:
    """[80, frames] -> the generator's input [windows, 80, length, 1]; every window must lie within the frames."""
    if len(starts) and (starts.min() < 0 or starts.max() + length > mel.shape[1]):
        raise ValueError(
            f"windows of {length} mel frames from {starts.min()} … {starts.max()} do not fit into {mel.shape[1]}"
        )
    windows = np.lib.stride_tricks.sliding_window_view(mel, length, axis=1)[:, starts]  # M W S
    return windows.transpose(1, 0, 2)[..., None]
