"""Tensor files of every kind, read without the libraries that wrote them; damaged and hostile files are refused."""

import argparse
import collections
import io
import json
import os
import pickle
import random
import zipfile

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
from omnax.hub.files import torch_files
from omnax.hub.files.readers import open_tensors
from omnax.hub.files.writers import write_npz, write_safetensors, write_sharded
from oracles import torch

STATE = {
    "layer.weight": torch.randn(3, 4, generator=torch.Generator().manual_seed(0)),
    "strided": torch.arange(40.0).reshape(4, 10).t()[1:, ::2],
    "scalar": torch.tensor(3),
    "empty": torch.zeros(0, 3),
    "half": torch.arange(4.0).half(),
    "bfloat": torch.arange(4.0).bfloat16() / 3,
    "flag": torch.tensor([True, False]),
    "parameter": torch.nn.Parameter(torch.ones(2)),
    "double": torch.ones(2, dtype=torch.float64) / 3,
}


def assert_same(file, state):
    assert set(file) == set(state)
    for key, expected in state.items():
        got = file.read(key)
        assert file.shape(key) == got.shape == tuple(expected.shape)
        assert file.dtype(key) == got.dtype
        assert got.dtype.name == str(expected.dtype).removeprefix("torch.")
        assert got.flags["C_CONTIGUOUS"]
        assert got.tobytes() == expected.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
@pytest.mark.parametrize("wrap", ["plain", "state_dict", "model_ema", "nested"])
def test_torch_files(tmp_path, zipped, wrap):
    prefixed = {f"module.{key}": value for key, value in STATE.items()}
    content = {
        "plain": collections.OrderedDict(STATE),
        "state_dict": {"state_dict": prefixed, "epoch": 3, "args": argparse.Namespace(lr=0.1), "best": np.float64(0.5)},
        "model_ema": {"model": {"other": torch.zeros(1)}, "model_ema": STATE},
        "nested": {"model": {"module": {"state_dict": prefixed}}},
    }[wrap]
    torch.save(content, tmp_path / "weights.any", _use_new_zipfile_serialization=zipped)
    assert_same(open_tensors(tmp_path / "weights.any"), STATE)


def test_nested_dicts_become_dotted_names(tmp_path):
    torch.save({"image_proj": {"norm": {"weight": torch.ones(2)}}, "adapter": {1: torch.zeros(3)}}, tmp_path / "a.bin")
    file = open_tensors(tmp_path / "a.bin")
    assert {key: file.shape(key) for key in file} == {"image_proj.norm.weight": (2,), "adapter.1": (3,)}


def test_float8_and_shared_storage(tmp_path):
    base = torch.arange(12.0).reshape(3, 4)
    state = {"eight": base.to(torch.float8_e4m3fn), "whole": base, "row": base[1]}
    torch.save(state, tmp_path / "a.pt")
    assert_same(open_tensors(tmp_path / "a.pt"), state)


def test_torchscript_archive(tmp_path):
    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.model = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.Linear(2, 2))
            self.register_buffer("resolution", torch.tensor(224))
            self.sizes = [1, 2]

        def forward(self, x):
            return self.model(x)

    with pytest.warns(DeprecationWarning):  # torch's own, about TorchScript
        scripted = torch.jit.script(Model())
        torch.jit.save(scripted, tmp_path / "a.pt")
    assert_same(open_tensors(tmp_path / "a.pt"), scripted.state_dict())


def test_npz(tmp_path):
    bfloat = np.arange(6).astype(ml_dtypes.bfloat16)
    arrays = {"a/kernel": np.arange(6.0).reshape(2, 3), "a/fortran": np.asfortranarray(np.ones((2, 3), np.float32))}
    for save in (np.savez, np.savez_compressed):
        save(tmp_path / "a.npz", **arrays, **{"a/bf": bfloat})
        file = open_tensors(tmp_path / "a.npz")
        assert set(file) == {*arrays, "a/bf"}
        for key, value in arrays.items():
            np.testing.assert_array_equal(file.read(key), value)
            assert file.dtype(key) == value.dtype
        assert file.dtype("a/bf") == ml_dtypes.bfloat16
        assert file.read("a/bf").tobytes() == bfloat.tobytes()


def test_npz_with_pickled_objects_is_refused(tmp_path):
    np.savez(tmp_path / "a.npz", a=np.array([{}], dtype=object))
    with pytest.raises(ValueError, match=r"a\.npz.*'a\.npy' has dtype object"):
        open_tensors(tmp_path / "a.npz")


def test_safetensors_and_slices(tmp_path):
    state = {"a": np.arange(12, dtype=np.float32).reshape(3, 4), "b": np.ones((), np.int64), "c": np.zeros((0, 2))}
    safetensors.numpy.save_file(state, tmp_path / "a.safetensors", metadata={"format": "pt"})
    file = open_tensors(tmp_path / "a.safetensors")
    assert set(file) == set(state)
    for key, value in state.items():
        np.testing.assert_array_equal(file.read(key), value)
    view = file["a"].view()
    np.testing.assert_array_equal(view[1:, :2], state["a"][1:, :2])
    assert not view.flags.owndata and not view.flags.writeable, "a map of the file, not a copy"


def test_written_files_are_read_by_their_libraries(tmp_path):
    torch.save(STATE, tmp_path / "a.pt")
    tensors = open_tensors(tmp_path / "a.pt")
    write_safetensors(tmp_path / "a.safetensors", tensors)
    assert_same(open_tensors(tmp_path / "a.safetensors"), STATE)
    from safetensors.torch import load_file

    loaded = load_file(tmp_path / "a.safetensors")
    assert all(torch.equal(loaded[key], value) for key, value in STATE.items())
    write_npz(tmp_path / "a.npz", tensors)
    assert_same(open_tensors(tmp_path / "a.npz"), STATE)
    assert np.load(tmp_path / "a.npz")["bfloat"].dtype == np.dtype("V2")


def test_shards(tmp_path):
    torch.save(STATE, tmp_path / "a.pt")
    directory = tmp_path / "sharded"
    directory.mkdir()
    write_sharded(directory, open_tensors(tmp_path / "a.pt"), max_shard_size=100)
    names = sorted(path.name for path in directory.iterdir())
    assert names[0] == "model-00001-of-00003.safetensors" and names[-1] == "model.safetensors.index.json"
    assert_same(open_tensors(directory), STATE)
    index = json.loads((directory / names[-1]).read_text())
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in STATE.values())

    (directory / names[1]).unlink()
    with pytest.raises(ValueError, match=f"no such checkpoint file: .*{names[1]}"):
        open_tensors(directory)
    index["weight_map"]["scalar"] = "../../etc/passwd"
    (directory / names[-1]).write_text(json.dumps(index))
    with pytest.raises(ValueError, match=r"index\.json points to shard '\.\./\.\./etc/passwd'"):
        open_tensors(directory)


def test_a_flipped_bit_is_found_in_safetensors_that_were_written_here(tmp_path):
    """The format has no checksum, so they stand among its metadata: of the header, and of each tensor."""
    path = tmp_path / "a.safetensors"
    torch.save(STATE, tmp_path / "a.pt")
    write_safetensors(path, open_tensors(tmp_path / "a.pt"))
    whole = path.read_bytes()
    header, refused = 8 + int.from_bytes(whole[:8], "little"), 0
    for at in range(8, header, 7):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
        try:
            assert_same(open_tensors(path), STATE)  # the bit lay in the name of the checksums
        except ValueError as error:
            assert "a.safetensors" in str(error)
            refused += 1
    assert refused > 0.9 * len(range(8, header, 7))
    path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 128]))
    tensors = open_tensors(path)
    last = [*tensors][-1]
    _ = [tensors.read(name) for name in tensors if name != last]
    with pytest.raises(ValueError, match=rf"a\.safetensors is damaged: tensor '{last}' has CRC \w+, expected \w+"):
        _ = tensors[last].view()[:1]  # also where only a part is wanted
    with safetensors.safe_open(path, "np") as file:
        assert file.metadata()["format"] == "pt"


def test_an_index_that_lost_a_tensor_is_found(tmp_path):
    torch.save(STATE, tmp_path / "a.pt")
    write_sharded(tmp_path, open_tensors(tmp_path / "a.pt"), max_shard_size=100)
    path = tmp_path / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    del index["weight_map"]["scalar"]
    path.write_text(json.dumps(index))
    with pytest.raises(ValueError, match="is damaged, or was edited: its weight_map has another CRC"):
        open_tensors(path)


def test_directory_prefers_safetensors(tmp_path):
    torch.save({"a": torch.zeros(1)}, tmp_path / "pytorch_model.bin")
    assert open_tensors(tmp_path).read("a") == 0
    safetensors.numpy.save_file({"a": np.ones(1)}, tmp_path / "model.safetensors")
    assert open_tensors(tmp_path).read("a") == 1


def test_directory_with_one_file_of_any_name(tmp_path):
    (tmp_path / "README.md").write_text("hello")
    with pytest.raises(ValueError, match=r"holds no checkpoint, only \['README.md'\]"):
        open_tensors(tmp_path)
    torch.save({"a": torch.zeros(1)}, tmp_path / "b.ckpt")
    assert set(open_tensors(tmp_path)) == {"a"}
    torch.save({"a": torch.zeros(1)}, tmp_path / "c.ckpt")
    with pytest.raises(ValueError, match=r"several checkpoints \(\['b.ckpt', 'c.ckpt'\]\)"):
        open_tensors(tmp_path)


class Command:
    """Unpickling this runs a shell command."""

    def __init__(self, command):
        self.command = command

    def __reduce__(self):
        return os.system, (self.command,)


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
def test_nothing_in_a_pickle_is_executed(tmp_path, zipped):
    proof = tmp_path / "executed"
    content = {"weight": torch.ones(1), "evil": Command(f"touch {proof}")}
    torch.save(content, tmp_path / "a.pth", _use_new_zipfile_serialization=zipped)
    with pytest.raises(ValueError, match=r"a\.pth names the Python object posix\.system"):
        open_tensors(tmp_path / "a.pth")
    assert not proof.exists()


@pytest.mark.parametrize(
    "module, name",
    [
        ("builtins", "eval"),
        ("builtins", "getattr"),
        ("os", "system"),
        ("torch", "load"),
        ("torch.storage", "_load_from_bytes"),
        ("torch.nn.modules.linear", "Linear"),
        ("numpy", "load"),
        ("functools", "partial"),
        ("collections", "OrderedDict.fromkeys"),
        ("omnax.hub.torch_files", "os"),
    ],
)
def test_forbidden_names(tmp_path, module, name):
    payload = b"\x80\x04" + b"".join(b"\x8c" + bytes([len(x)]) + x.encode() for x in (module, name)) + b"\x93."
    with zipfile.ZipFile(tmp_path / "a.pth", "w") as archive:
        archive.writestr("a/data.pkl", payload)
    with pytest.raises(ValueError, match=f"names the Python object {module}.{name}"):
        open_tensors(tmp_path / "a.pth")


def test_pickles_cannot_change_the_reader(tmp_path):
    """BUILD on an allowed name sets attributes: they must land on something of this one call."""
    payload = b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n}X\x01\x00\x00\x00xK\x01sb."
    with zipfile.ZipFile(tmp_path / "a.pth", "w") as archive:
        archive.writestr("a/data.pkl", payload)
    with pytest.raises(ValueError, match="damaged"):
        open_tensors(tmp_path / "a.pth")
    assert not hasattr(torch_files._rebuild_tensor, "x")


def test_damaged_torch_files(tmp_path):
    path = tmp_path / "a.pth"
    torch.save(STATE, path)
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=rf"a\.pth is truncated or damaged: got {len(whole) // 2} bytes"):
        open_tensors(path)
    flipped = bytearray(whole)
    flipped[whole.index(STATE["layer.weight"].numpy().tobytes())] ^= 1
    path.write_bytes(flipped)
    with pytest.raises(ValueError, match=r"a\.pth is damaged: member '.*/data/0' has CRC \w+, expected \w+"):
        open_tensors(path).read("layer.weight")
    torch.save(STATE, path, _use_new_zipfile_serialization=False)
    whole = path.read_bytes()
    path.write_bytes(whole[:-1])  # storages are ordered by memory address: only the last byte is sure to be data
    with pytest.raises(ValueError, match=rf"is truncated: got {len(whole) - 1} bytes, expected at least {len(whole)}"):
        open_tensors(path)


def test_tensor_beyond_its_storage(tmp_path):
    buffer = io.BytesIO()
    torch.save({"a": torch.zeros(3, 4)}, buffer)
    with zipfile.ZipFile(buffer) as archive, zipfile.ZipFile(tmp_path / "a.pth", "w") as damaged:
        for name in archive.namelist():
            damaged.writestr(name, archive.read(name)[:-4] if name.endswith("data/0") else archive.read(name))
    with pytest.raises(ValueError, match=r"storage of tensor 'a' has 44 bytes, expected at least 48"):
        open_tensors(tmp_path / "a.pth")


def test_truncated_safetensors(tmp_path):
    path = tmp_path / "a.safetensors"
    safetensors.numpy.save_file({"a": np.ones(100, np.float32)}, path)
    whole = path.read_bytes()
    path.write_bytes(whole[:-10])
    with pytest.raises(
        ValueError, match=rf"a\.safetensors.*truncated.*got {len(whole) - 10} bytes, expected {len(whole)}"
    ):
        open_tensors(path)
    path.write_bytes(whole[:30])
    with pytest.raises(ValueError, match=r"a\.safetensors is truncated: got 30 bytes, expected a header"):
        open_tensors(path)


@pytest.mark.parametrize(
    "change, reason",
    [
        ({"dtype": "F7"}, "tensor 'a' has unknown dtype 'F7'"),
        ({"shape": [99]}, "tensor 'a' has bytes 0 to 400, expected 396 bytes"),
        ({"data_offsets": [4, 404]}, "tensor 'a' has bytes 4 to 404"),
    ],
)
def test_safetensors_with_a_wrong_header(tmp_path, change, reason):
    header = json.dumps({"a": {"dtype": "F32", "shape": [100], "data_offsets": [0, 400]} | change}).encode()
    (tmp_path / "a").write_bytes(len(header).to_bytes(8, "little") + header + bytes(400))
    with pytest.raises(ValueError, match=reason):
        open_tensors(tmp_path / "a")


@pytest.mark.parametrize(
    "content, reason",
    [
        (b"", "got 0 bytes"),
        (b"hello world, this is not a checkpoint", "is not a tensor file: got 37 bytes that start with b'hello world"),
        (b"version https://git-lfs.github.com/spec/v1\n", "a Git LFS pointer"),
        (pickle.dumps({"a": 1}), "is not a tensor file"),
    ],
    ids=["empty", "text", "lfs", "pickle"],
)
def test_unknown_files(tmp_path, content, reason):
    (tmp_path / "a.safetensors").write_bytes(content)
    with pytest.raises(ValueError, match=rf"a\.safetensors.*{reason}"):
        open_tensors(tmp_path / "a.safetensors")


def test_zip_without_tensors(tmp_path):
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.writestr("note.txt", "hello")
    with pytest.raises(ValueError, match=r"neither a torch file nor npz: it holds \['note.txt'\]"):
        open_tensors(tmp_path / "a.zip")


def test_unknown_key_names_the_nearest(tmp_path):
    safetensors.numpy.save_file({"layer.weight": np.ones(1)}, tmp_path / "a")
    with pytest.raises(ValueError, match=r"has no tensor 'layer\.wieght'; nearest: 'layer\.weight'"):
        open_tensors(tmp_path / "a").read("layer.wieght")


def test_random_damage_is_a_value_error_or_harmless(tmp_path):
    """Cuts, flipped bits and overwritten bytes anywhere: never another exception, and always the file's name."""
    rng = random.Random(0)
    torch.save(STATE, tmp_path / "zip")
    torch.save(STATE, tmp_path / "legacy", _use_new_zipfile_serialization=False)
    np.savez_compressed(tmp_path / "a.npz", a=np.arange(100.0))
    safetensors.numpy.save_file({"a": np.ones(3), "b": np.ones((2, 2))}, tmp_path / "safetensors")
    for name in ("zip", "legacy", "a.npz", "safetensors"):
        whole = (tmp_path / name).read_bytes()
        refused = 0
        for trial in range(150):
            data = bytearray(whole)
            at = rng.randrange(len(data))
            if trial % 3 == 0:
                del data[at:]
            elif trial % 3 == 1:
                data[at] ^= 1 << rng.randrange(8)
            else:
                data[at : at + 8] = rng.randbytes(8)
            (tmp_path / "damaged").write_bytes(data)
            try:
                file = open_tensors(tmp_path / "damaged")
                for key in file:
                    file.read(key)
            except ValueError as error:
                assert "damaged" in str(error)
                refused += 1
        assert refused >= 50, name  # at least every cut
