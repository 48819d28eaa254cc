"""A checkpoint from a stranger runs nothing, reads nothing outside itself, and costs no more than it weighs."""

from __future__ import annotations

import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import forging
import pytest
import torch
from hf_directories import make_checkpoint
from torch.distributed.checkpoint.metadata import MetadataIndex, TensorStorageMetadata

from mstar_mega import cli
from mstar_mega.checkpoint_tools.convert import hf_to_megatron, megatron_to_hf
from mstar_mega.checkpoint_tools.inspection import inspect
from mstar_mega.checkpoint_tools.verify import open_checkpoint
from mstar_mega.config import ModelConfig, ParallelConfig
from mstar_mega.training.checkpoint import load_latest
from mstar_mega.training.manifest import verify_checkpoint

pytestmark = pytest.mark.usefixtures("job_of_one")


@pytest.fixture(scope="module")
def pristine(job_of_one: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pristine")
    make_checkpoint(folder / "hf", "internvl2")
    hf_to_megatron(folder / "hf", folder / "there")
    return folder / "there"


@pytest.fixture
def checkpoint(pristine: Path, tmp_path: Path) -> Path:
    """A good checkpoint, the newest of its directory, to be made a bad one."""
    shutil.copytree(pristine, tmp_path / "stage" / "there")
    return tmp_path / "stage" / "there"


def load(checkpoint: Path) -> Any:
    return open_checkpoint(checkpoint, ParallelConfig(), ModelConfig(precision="float32"))


def resume(checkpoint: Path) -> Any:
    found = load_latest(checkpoint.parent, lambda: {"model": _template})
    if found is None:
        raise ValueError("skipped as damaged")


_template: dict[str, Any] = {}

WAYS: dict[str, Callable[[Path], Any]] = {
    "inspect": inspect,
    "convert": lambda checkpoint: megatron_to_hf(checkpoint, checkpoint.parent.parent / "out"),
    "load": load,
    "verify": verify_checkpoint,
    "resume": resume,
}
"""What every command that opens a checkpoint does with it: evaluate, generate and verify load."""


def refusal(way: str, checkpoint: Path) -> str:
    """The one line in which a way in refuses a checkpoint."""
    with pytest.raises(ValueError) as error:
        WAYS[way](checkpoint)
    assert "\n" not in str(error.value)
    return str(error.value)


def call(file: Path, module: str, name: str, rest: bytes = b".") -> bytes:
    return forging.named(module, name, b"\x8c" + bytes([len(str(file))]) + str(file).encode(), rest)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("module", ["metadata", "filesystem"])
def test_a_dotted_name_in_the_index_is_not_resolved(checkpoint: Path, tmp_path: Path, way: str, module: str) -> None:
    good = (checkpoint / ".metadata").read_bytes()
    where = f"torch.distributed.checkpoint.{module}"
    # With the good index behind it nothing looks wrong afterwards.
    forging.put_torch_index(checkpoint, call(tmp_path / "ran", where, "os.mkdir", b"0" + good))
    refusal(way, checkpoint)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("module", "name"),
    [
        ("os", "mkdir"), ("builtins", "eval"), ("builtins", "getattr"), ("torch", "os.mkdir"), ("pathlib", "os.mkdir"),
        ("torch.distributed.checkpoint.filesystem", "FileSystemWriter"),
        ("torch.distributed.checkpoint.filesystem", "_get_device_module"),
        ("torch.distributed.checkpoint.metadata", "dataclass"), ("torch.serialization", "load"),
        ("torch", "load"), ("torch.utils._pytree", "os.mkdir"),
    ],
)  # fmt: skip
def test_the_index_names_nothing_but_its_own_types(checkpoint: Path, tmp_path: Path, module: str, name: str) -> None:
    forging.put_torch_index(checkpoint, call(tmp_path / "ran", module, name))
    assert f"names {module}.{name}" in refusal("inspect", checkpoint)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("own_index", [True, False])
def test_a_layers_own_state_is_not_run(checkpoint: Path, tmp_path: Path, way: str, own_index: bool) -> None:
    forging.hide_in_own_state(checkpoint, forging.Marker(tmp_path / "ran"))
    if not own_index:
        forging.only_torch_index(checkpoint)
    if way == "load":
        assert "cannot be read" in refusal(way, checkpoint)
    else:  # the others do not read these pieces
        WAYS[way](checkpoint)
    assert not (tmp_path / "ran").exists()


def test_the_plain_state_is_not_run(checkpoint: Path, tmp_path: Path) -> None:
    torch.save(forging.Marker(tmp_path / "ran"), checkpoint / "common.pt")
    forging.seal(checkpoint)
    assert "common.pt" in refusal("load", checkpoint)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("way", WAYS)
def test_nothing_is_unpickled_before_its_checksum_is_compared(
    checkpoint: Path, way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    forging.only_torch_index(checkpoint)
    index = bytearray((checkpoint / ".metadata").read_bytes())
    index[len(index) // 2] ^= 1
    (checkpoint / ".metadata").write_bytes(index)

    def never(*_: Any, **__: Any) -> Any:
        raise RuntimeError("something was unpickled")

    monkeypatch.setattr(pickle, "Unpickler", never)
    monkeypatch.setattr(pickle, "load", never)
    monkeypatch.setattr(torch, "load", never)
    message = refusal(way, checkpoint)
    assert way == "resume" or "was altered" in message


def outside(checkpoint: Path, path: str) -> None:
    (checkpoint.parent / "elsewhere.distcp").write_bytes((checkpoint / "__0_0.distcp").read_bytes())
    index = pickle.loads((checkpoint / ".metadata").read_bytes())
    for place in index.storage_data.values():
        place.relative_path = path.format(checkpoint.parent)
    forging.put_torch_index(checkpoint, pickle.dumps(index))


@pytest.mark.parametrize("path", ["../elsewhere.distcp", "{}/elsewhere.distcp", "manifest.json", "none.distcp", ""])
def test_pieces_lie_in_files_that_the_manifest_lists(checkpoint: Path, path: str) -> None:
    outside(checkpoint, path)
    for way in WAYS:
        message = refusal(way, checkpoint)
        assert way == "resume" or "which the manifest does not list" in message


def test_a_manifest_lists_files(checkpoint: Path) -> None:
    body = json.loads((checkpoint / "manifest.json").read_text())
    del body["sha256"]
    digest = "0" * 64
    bad: tuple[Any, ...] = (
        {}, None, [], {"../x": [1, digest]}, {"/etc/passwd": [1, digest]}, {"__0_0.distcp": [-1, digest]},
        {"__0_0.distcp": ["9", digest]}, {"__0_0.distcp": [9, "x"]}, {"a": 1}, {"a\0b": [1, digest]},
    )  # fmt: skip
    for files in bad:
        forging.write_manifest(checkpoint, {**body, "files": files})
        for way in WAYS:
            message = refusal(way, checkpoint)
            assert way == "resume" or "manifest.json" in message


@pytest.mark.parametrize("name", ["__0_0.distcp", "common.pt", "metadata.json", "index.json"])
def test_what_is_read_is_listed(checkpoint: Path, name: str) -> None:
    """A file that no checksum speaks of is not read."""
    body = json.loads((checkpoint / "manifest.json").read_text())
    forging.seal(checkpoint, sorted(set(body["files"]) - {name, ".metadata"}))
    assert "the manifest" in refusal("load", checkpoint)


def change_index(checkpoint: Path, change: Callable[[Any], Any]) -> None:
    index = pickle.loads((checkpoint / ".metadata").read_bytes())
    change(index)
    forging.put_torch_index(checkpoint, pickle.dumps(index))


def resized(*size: int) -> Callable[[Any], Any]:
    def change(index: Any) -> None:
        for key, entry in index.state_dict_metadata.items():
            if key.startswith("language.decoder.layers.") and isinstance(entry, TensorStorageMetadata):
                entry.size = torch.Size([*size, *entry.size[len(size) :]])

    return change


def emptied(index: Any) -> None:
    """Ten million layers of no values each weigh nothing."""
    for key, entry in list(index.state_dict_metadata.items()):
        if key.startswith("language.decoder.layers.") and isinstance(entry, TensorStorageMetadata):
            entry.size, entry.chunks = torch.Size([10**7, 0]), []


def shared_place(index: Any) -> None:
    """Every piece in the same bytes: a small file that fills any memory."""
    place = max(index.storage_data.values(), key=lambda place: place.length)
    for where in index.storage_data:
        index.storage_data[where] = place


@pytest.mark.parametrize("change", [resized(10**7), resized(10**12), emptied, shared_place])
def test_an_index_cannot_announce_more_than_the_files_hold(checkpoint: Path, change: Callable[[Any], Any]) -> None:
    change_index(checkpoint, change)
    for way in WAYS:
        refusal(way, checkpoint)


@pytest.mark.parametrize(
    "content",
    [
        b"\x80\x04\x8e" + (2**40).to_bytes(8, "little") + b".",
        b"\x80\x04\x8d" + (2**60).to_bytes(8, "little") + b".",
        b"\x80\x04\x8b" + (2**31 - 1).to_bytes(4, "little") + b".",
        b"\x80\x04N" + b"r\xff\xff\xff\x7f" + b".",  # a place in the memo far beyond what stands there
        b"\x80\x04K\x01" + b"2" * 50 + b".",
        b"\x80\x04(" * 3, b"", b".", b"\x80\x04N.", b"\x80\x04}.",
        b"\x80\x04" + b"]" * 10**6 + b"a" * (10**6 - 1) + b".",
        b"cos\nmkdir\n(S'x'\ntR.", b"\x80\x02\x82\x01.", b"P1\n.", b"\x80\x05\x97.",
    ],
)  # fmt: skip
def test_a_pickle_that_is_no_index_is_refused_at_once(checkpoint: Path, content: bytes) -> None:
    forging.put_torch_index(checkpoint, content)
    assert ".metadata is refused" in refusal("inspect", checkpoint)


def spoiled(checkpoint: Path, where: tuple[str, ...], value: Any) -> None:
    own = json.loads((checkpoint / "index.json").read_text())
    node = own
    for key in where[:-1]:
        node = node[key]
    node[where[-1]] = value
    (checkpoint / "index.json").write_text(json.dumps(own))
    forging.seal(checkpoint)


@pytest.mark.parametrize("value", [None, 3, -1, 2**70, "x", [], {}, [None], {"a": {}}, 1.5, True, ["bfloat16"]])
@pytest.mark.parametrize(
    "where", [("tensors",), ("objects",), ("format",), ("tensors", "vision.class_embedding"),
              ("tensors", "vision.class_embedding", "dtype"), ("tensors", "vision.class_embedding", "size"),
              ("tensors", "vision.class_embedding", "pieces")],
)  # fmt: skip
def test_wrong_types_in_our_own_index(checkpoint: Path, where: tuple[str, ...], value: Any) -> None:
    spoiled(checkpoint, where, value)
    if where == ("objects",) and value == {}:
        return
    assert "index.json" in refusal("inspect", checkpoint)


def test_both_indices_say_the_same(checkpoint: Path) -> None:
    """Ours, and torch's through the narrow gate."""
    from mstar_mega.training.manifest import read_index

    ours = read_index(checkpoint)
    forging.only_torch_index(checkpoint)
    theirs = read_index(checkpoint)
    assert ours == theirs and len(ours.tensors) > 20 and ours.objects
    torchs = ours.to_torch()
    plain = pickle.loads((checkpoint / ".metadata").read_bytes())
    assert torchs.state_dict_metadata == plain.state_dict_metadata and torchs.storage_data == plain.storage_data
    assert MetadataIndex("vision.class_embedding", torch.Size([0, 0, 0])) in torchs.storage_data
    load(checkpoint)


def test_a_checkpoint_without_an_index_of_ours_still_loads(checkpoint: Path) -> None:
    forging.only_torch_index(checkpoint)
    model, _ = load(checkpoint)
    assert sum(parameter.numel() for parameter in model.parameters()) > 10_000
    assert inspect(checkpoint) and cli.main(["inspect", str(checkpoint)]) == 0


def test_a_compressed_piece_is_refused(checkpoint: Path) -> None:
    """torch would inflate it: a small file that fills any memory."""
    import io
    import zipfile

    shard = checkpoint / "__0_0.distcp"
    own = json.loads((checkpoint / "index.json").read_text())
    piece = own["tensors"]["vision.class_embedding"]["pieces"][0]["place"]
    content = shard.read_bytes()
    saved = zipfile.ZipFile(io.BytesIO(content[piece["start"] : piece["start"] + piece["length"]]))
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as packed:
        for name in saved.namelist():
            packed.writestr(name, saved.read(name))
    shard.write_bytes(content + buffer.getvalue())
    piece["start"], piece["length"] = len(content), len(buffer.getvalue())
    (checkpoint / "index.json").write_text(json.dumps(own))
    forging.seal(checkpoint)
    for way in ("convert", "load"):
        assert "compressed" in refusal(way, checkpoint)


def test_special_files_are_no_part_of_a_checkpoint(checkpoint: Path) -> None:
    import os

    manifest = checkpoint / "manifest.json"
    manifest.rename(checkpoint.parent / "kept.json")
    os.mkfifo(manifest)
    for way in WAYS:
        message = refusal(way, checkpoint)
        assert way == "resume" or "not a regular file" in message
    manifest.unlink()
    manifest.symlink_to("/dev/zero")
    for way in WAYS:
        message = refusal(way, checkpoint)
        assert way == "resume" or "not a regular file" in message
