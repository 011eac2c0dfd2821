"""Metrics on disk, speed, the progress display."""

import json
import types

import pytest
from omnax.train import metrics
from omnax.train.metrics import MetricWriter, ProgressBar, Speedometer, peak_flops, read_metrics


def test_lines_after_the_checkpoint_are_written_again(tmp_path):
    """A run killed while writing, resumed at step 2."""
    writer = MetricWriter(tmp_path, 0)
    for step in (1, 2, 3):
        writer.write(step, {"train/loss": step / 2, "train/bad": float("nan")})
    writer.close()
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "train/lo')
    writer = MetricWriter(tmp_path, 2)
    writer.write(3, {"train/loss": 9.0})
    writer.close()
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [(line["step"], line["train/loss"]) for line in lines] == [(1, 0.5), (2, 1.0), (3, 9.0)]
    assert lines[0]["train/bad"] is None  # JSON has no NaN
    assert list((tmp_path / "tensorboard").glob("events*"))


def test_a_broken_line_in_the_middle_is_an_error(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n{"st\n{"step": 3}\n')
    with pytest.raises(ValueError):
        read_metrics(tmp_path)


def test_speed(monkeypatch):
    """Ten steps in 5 s of batch 16 and 8e9 FLOP on 8 devices of 1 GFLOP/s."""
    monkeypatch.setattr(metrics, "peak_flops", lambda device: (1e9, "made up"))
    now = [100.0]
    monkeypatch.setattr(metrics.time, "perf_counter", lambda: now[0])
    speed = Speedometer(batch_size=16, flops_per_step=8e9)
    speed.reset(5)
    now[0] += 5
    expected = {"step_seconds": 0.5, "examples_per_second_per_device": 4.0, "mfu": 2.0}
    assert speed.read(15) == {f"speed/{name}": pytest.approx(value) for name, value in expected.items()}
    assert speed.read(15) == {}


@pytest.mark.parametrize(
    ("kind", "peak"),
    [("TPU v5 lite", 197e12), ("TPU v5p", 459e12), ("TPU v4", 275e12), ("NVIDIA H100 80GB HBM3", 989e12)],
)
def test_peak_of_known_devices(kind, peak):
    assert peak_flops(types.SimpleNamespace(device_kind=kind))[0] == peak


def test_peak_of_unknown_devices_is_measured():
    value, source = peak_flops(types.SimpleNamespace(device_kind="abacus"))
    assert value > 1e6 and "measured on this abacus" in source


def test_progress_without_a_terminal_is_plain_lines(capsys):
    bar = ProgressBar(total=10, done=4)
    bar.update(5, {"train/loss": 0.25, "train/grad_norm": 1.0, "speed/mfu": 0.5})
    bar.close()
    line = capsys.readouterr().err
    assert line.startswith("step 5/10  loss 0.25  mfu 0.5  about")
