"""Files made to harm whoever reads them: refused by name in a child with little memory and little time."""

import json
import pickle
import struct
import subprocess
import sys
import textwrap
import zipfile
from pathlib import Path

import numpy as np
import pytest

MEMORY, SECONDS = 2**30, 20  # of the child, beyond what its imports took; of the processor, for one file

CHILD = """
import json, os, resource, signal, sys
import numpy as np
from omnax import hub
from omnax.hub.files.readers import open_tensors

used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, used + MEMORY))

def late(*_):
    raise TimeoutError("too slow")

signal.signal(signal.SIGPROF, late)
for path in sys.argv[1:]:
    signal.setitimer(signal.ITIMER_PROF, SECONDS)
    try:
        if os.path.isdir(path):
            hub.load(path)
        file = open_tensors(path)
        for name in file:
            file.read(name)
        result = f"read {len(file)}"
    except BaseException as error:
        result = f"{type(error).__name__}: {error}"
    signal.setitimer(signal.ITIMER_PROF, 0)
    print(json.dumps([path, result]), flush=True)
"""


def torch_zip(path: Path, program: bytes, **options: int) -> Path:
    with zipfile.ZipFile(path, "w", **options) as archive:
        archive.writestr("a/data.pkl", program)
    return path


def short(text: str) -> bytes:
    return b"X" + struct.pack("<I", len(text)) + text.encode()


def named(module: str, name: str) -> bytes:
    return f"c{module}\n{name}\n".encode()


def nested(inner: bytes, depth: int) -> bytes:
    """{"a": x, "b": x} of {"a": y, "b": y} of ...: 2^depth paths from a few bytes."""
    program = inner + b"q\x00"
    for _ in range(depth):
        program += b"}(" + short("a") + b"h\x00" + short("b") + b"h\x00uq\x00"
    return program


def tuples(depth: int) -> bytes:
    """(x, x) of (y, y) of ...: hashing or printing it takes 2^depth steps."""
    return b"Nq\x00" + b"0h\x00h\x00\x86q\x00" * depth


TENSOR = (
    named("torch._utils", "_rebuild_tensor_v2")
    + b"("
    + (b"(" + short("storage") + named("torch", "FloatStorage") + short("0") + short("cpu") + b"K\x01tQ")
)
PICKLES = {
    # BUILD on what a name stands for: with `functools.partial` there the state of a C object was replaced.
    "build on a name": named("torch._utils", "_rebuild_tensor_v2") + b"(NNNNtb",
    "build on a class": named("argparse", "Namespace") + b"}" + short("x") + b"K\x01sb",
    "build on a number": b"K\x01}b",
    "append to a name": named("torch", "Size") + b"K\x01a",
    "append to a dict": b"}K\x01a",
    "items of a list": b"]K\x01K\x01s",
    "items of a tensor's name": named("torch", "FloatStorage") + b"K\x01K\x01s",
    "call of a number": b"K\x01)R",
    "call of a list": named("torch._utils", "_rebuild_tensor_v2") + b"]R",
    "instance by OBJ": b"(" + named("argparse", "Namespace") + b"o",
    "instance by INST": b"(iargparse\nNamespace\n",
    "extension": b"\x82\x01",
    "memo index": b"Nr\xff\xff\xff\xff",
    "memo index by text": b"Np99999999999999999999\n",
    "unknown memo": b"h\x07",
    "long string": b"X\xff\xff\xff\xff",
    "longer string": b"\x8d" + b"\xff" * 7 + b"\x7f",
    "long bytes": b"\x8e" + b"\xff" * 6 + b"\x00\x00",
    "long frame": b"\x95" + b"\xff" * 7 + b"\x7f",
    "long number": b"\x8b\xff\xff\xff\x7f",
    "many digits": b"L" + b"9" * 9000 + b"L\n",
    "no value": b"",
    "empty stack": b"0",
    "nested dicts": nested(b"N", 40),
    "nested dicts around a tensor": nested(TENSOR + b"K\x00))\x89}tR", 40),
    "endless dict": b"}q\x00" + short("a") + b"h\x00s",
    "hash of tuples": b"}" + tuples(40) + b"Ns" + short("a") + b"Ns",
    "name of tuples": tuples(40) + short("x") + b"\x93",
    "long names": short("k" * 900_000) + b"q\x000}q\x01" + b"h\x00}q\x02s" * 3,
    "expanded": TENSOR + b"K\x00(\x8a\x05\x00\x00\x00\x00\x01K\x01t(K\x00K\x00t\x89}tR",
    "many dimensions": TENSOR + b"K\x00(" + b"K\x01" * 9999 + b"t(" + b"K\x01" * 9999 + b"t\x89}tR",
    "no dimensions": TENSOR + b"K\x00NN\x89}tR",
    "texts as dimensions": TENSOR + b"K\x00(" + short("9") + b"t(" + short("9") + b"t\x89}tR",
    "another rebuilder": named("torch._tensor", "_rebuild_from_type_v2") + b"(" + named("os", "system") + b"NNNtR",
    "storage without a key": b"(" + short("storage") + named("torch", "FloatStorage") + b"]NNtQ",
    "many instructions": b"N0" * 1_000_001 + b"N",
}


def headers() -> dict[str, bytes]:
    entry = {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}
    odd = {
        "text shape": {"a": entry | {"shape": ["a", 10**10]}},
        "float shape": {"a": entry | {"shape": [1.0]}},
        "negative shape": {"a": entry | {"shape": [-1, -1]}},
        "shape of a dict": {"a": entry | {"shape": {"x": 1}}},
        "empty and huge": {"a": entry | {"shape": [0, 2**62], "data_offsets": [0, 0]}},
        "many lengths": {"a": entry | {"shape": [2**40] * 5000}},
        "text offsets": {"a": entry | {"data_offsets": "04"}},
        "list as entry": {"a": [1]},
        "list as dtype": {"a": entry | {"dtype": []}},
        "list": [entry],
    }
    texts = {name: json.dumps(document).encode() for name, document in odd.items()}
    return texts | {"deep": b'{"a":' * 200_000, "digits": b'{"a":' + b"9" * 9000 + b"}", "nothing": b"{"}


def documents() -> dict[str, str]:
    indices = {f"shard {name!r}": json.dumps({"weight_map": {"a": name}}) for name in ("..", ".", "", "/etc", "a/../b")}
    return indices | {
        "itself": json.dumps({"weight_map": {"a": "itself.index.json"}}),
        "list map": json.dumps({"weight_map": ["a"]}),
        "number": json.dumps({"weight_map": {"a": 1}}),
        "no map": "{}",
        "list": "[]",
        "null": "null",
        "empty": "",
        "deep": "[" * 200_000,
        "no text": "\x00\udcff",
    }


VIT = {"model_type": "vit", "architectures": ["ViTModel"], "hidden_size": 8, "num_attention_heads": 2}
CONFIGS = {
    "config list": "[1]",
    "config null": "null",
    "config empty": "",
    "config deep": '{"a":' * 200_000,
    "config text as a number": json.dumps(VIT | {"hidden_size": "8"}),
    "config list as a number": json.dumps(VIT | {"hidden_size": [8]}),
    "config huge width": json.dumps(VIT | {"hidden_size": 10**9, "intermediate_size": 10**9}),
    "config huge image": json.dumps(VIT | {"image_size": 10**9, "patch_size": 1}),
    "config no heads": json.dumps(VIT | {"num_attention_heads": 0}),
    "config many layers": json.dumps(VIT | {"num_hidden_layers": 3_000_000}),
    "config many layers of text": json.dumps({"model_type": "clip", "text_config": {"num_hidden_layers": 3_000_000}}),
    "config text as a section": json.dumps({"model_type": "clip", "text_config": "a", "vision_config": []}),
    "config model type of a list": json.dumps({"model_type": ["vit"]}),
    "config long number": '{"model_type": "vit", "hidden_size": ' + "9" * 9000 + "}",
}


def directories(folder: Path) -> list[Path]:
    """Checkpoints of one small tensor beside a config that is made to harm."""
    header = json.dumps({"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}).encode()
    for name, text in CONFIGS.items():
        (folder / name).mkdir()
        (folder / name / "config.json").write_text(text)
        (folder / name / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + bytes(4))
    return [folder / name for name in CONFIGS]


def make(folder: Path) -> list[Path]:
    paths = [torch_zip(folder / f"{name}.pth", b"\x80\x02" + program + b".") for name, program in PICKLES.items()]
    # The same pickles in the older format, whose instructions read from the file itself.
    magic = (0x1950A86A20F9469CFC6C, 1001, {"little_endian": True})
    head = b"".join(pickle.dumps(value, protocol=2) for value in magic)
    for name, program in PICKLES.items():
        (folder / f"{name}.legacy").write_bytes(head + b"\x80\x02" + program + b"." + pickle.dumps([], protocol=2))
        paths.append(folder / f"{name}.legacy")
    for name, text in headers().items():
        (folder / f"{name}.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + bytes(4))
        paths.append(folder / f"{name}.safetensors")
    for name, text in documents().items():
        paths.append(folder / f"{name.replace('/', '_')}.index.json")
        paths[-1].write_bytes(text.encode("utf-8", "surrogateescape"))
    bomb = torch_zip(folder / "bomb.pth", bytes(2**29), compression=zipfile.ZIP_DEFLATED, compresslevel=9)
    with zipfile.ZipFile(folder / "bomb.npz", "w", zipfile.ZIP_DEFLATED) as archive:
        for i in range(2):
            with archive.open(f"{i}.npy", "w", force_zip64=True) as member:
                np.lib.format.write_array_header_1_0(
                    member, {"descr": "<f4", "fortran_order": False, "shape": (2**27,)}
                )
                for _ in range(32):
                    member.write(bytes(2**24))
    with zipfile.ZipFile(folder / "deep header.npz", "w") as archive:
        archive.writestr("a.npy", b"\x93NUMPY\x01\x00" + struct.pack("<H", 9000) + b"(" * 9000)
    return [*paths, *directories(folder), bomb, folder / "bomb.npz", folder / "deep header.npz"]


@pytest.fixture(scope="module")
def results(tmp_path_factory) -> dict[str, str]:
    """File name -> what reading it gave in the child."""
    folder = tmp_path_factory.mktemp("hostile")
    paths = make(folder)
    code = textwrap.dedent(CHILD).replace("MEMORY", str(MEMORY)).replace("SECONDS", str(SECONDS))
    child = subprocess.run([sys.executable, "-c", code, *map(str, paths)], capture_output=True, text=True, timeout=600)
    lines = [json.loads(line) for line in child.stdout.splitlines()]
    assert len(lines) == len(paths), (paths[len(lines)], child.returncode, child.stderr[-2000:])
    return {Path(path).name: result.replace(path, Path(path).name) for path, result in lines}


def test_every_hostile_file_is_refused_by_name_or_empty(results):
    for name, result in results.items():
        assert len(result) < 2000, name
        if not result.startswith("read 0"):
            assert result.startswith(("TensorFileError: ", "ValueError: ")), (name, result)
            assert name in result, (name, result)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("build on a name.pth", "its pickle sets attributes of Name"),
        ("append to a name.pth", "its pickle appends to Name, which is no list"),
        ("items of a list.legacy", "its pickle sets 2 / 2 items of list"),
        ("call of a number.pth", "its pickle calls int, which is no object that it named"),
        ("instance by OBJ.pth", "its pickle has the instruction OBJ, which no tensor file needs"),
        ("nested dicts.pth", "objects from"),
        ("endless dict.pth", "objects from"),
        ("long names.legacy", "a name in it has more than 1000 characters"),
        ("many dimensions.pth", "a tensor has 9999 dimensions"),
        ("another rebuilder.pth", "names the Python object os.system"),
        ("many instructions.pth", "its pickle has more than 2000000 instructions"),
        ("shard '..'.index.json", "points to shard '..', expected the name of a file beside it"),
        ("itself.index.json", "points to shard 'itself.index.json'"),
        ("text shape.safetensors", "tensor 'a' has shape"),
        ("bomb.pth", "would expand to 536870912 bytes"),
        ("bomb.npz", "which no weights do"),
    ],
)
def test_the_message_says_what_is_wrong(results, name, message):
    assert message in results[name]


def test_plain_keys_beside_a_hostile_one_are_read(results):
    assert results["hash of tuples.pth"] == "read 0"
