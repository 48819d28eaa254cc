"""Groups on disk: exact round trips, damage of every kind named, and atomic files."""

from __future__ import annotations

import errno
import json
import math
import os
import random
import struct
from dataclasses import asdict
from pathlib import Path

import pytest

from mstar_mega.data.records import DamagedFileError, read_groups, write_groups
from mstar_mega.data.types import Group, ImageRef, Query, Response, Step
from mstar_mega.platform import files


def make_groups(count: int = 3) -> list[Group]:
    random_ = random.Random(0)
    groups = []
    for number in range(count):
        images = (ImageRef(f"image {number}.png", f"{number:016x}"),)
        query = Query(f"q{number}", "Größe?\u2028\r\n\x0b\x85 A. 1", images, "A", ("1", "2"), "compare")
        responses = [
            Response(
                index=index,
                tokens=[random_.randrange(9000) for _ in range(5)],
                text="one\n\ntwo\u2029",
                log_probs=[math.log(random_.random()) for _ in range(5)],
                truncated=index == 1,
                answer="A",
                correct=True,
                verdict="choice",
                steps=[Step(0, 3, "one\n\n", 0.1 + 0.2, 1 / 3), Step(3, 5, "two")],
                score=5e-324,
                selected=True,
            )
            for index in range(2)
        ]
        groups.append(Group(query, responses))
    return groups


def bits(value: float) -> bytes:
    return struct.pack("<d", value)


def test_groups_come_back_equal_and_their_floats_bit_for_bit(tmp_path: Path) -> None:
    groups = make_groups()
    write_groups(tmp_path / "new" / "a.jsonl", groups)
    back = read_groups(tmp_path / "new" / "a.jsonl")
    assert back == groups
    for old, new in zip(groups, back, strict=True):
        for before, after in zip(old.responses, new.responses, strict=True):
            assert [*map(bits, before.log_probs)] == [*map(bits, after.log_probs)]
    assert isinstance(back[0].query.images, tuple) and isinstance(back[0].query.images[0], ImageRef)


def test_a_line_is_what_asdict_gives(tmp_path: Path) -> None:
    groups = make_groups()
    write_groups(tmp_path / "a.jsonl", groups)
    lines = (tmp_path / "a.jsonl").read_bytes().split(b"\n")
    assert json.loads(lines[0])["format"] == "mstar-groups" and json.loads(lines[0])["groups"] == 3
    assert [json.loads(line) for line in lines[1:-1]] == json.loads(json.dumps([*map(asdict, groups)]))
    assert lines[-1] == b""


def test_no_groups_are_a_whole_file(tmp_path: Path) -> None:
    write_groups(tmp_path / "a.jsonl", [])
    assert read_groups(tmp_path / "a.jsonl") == []


def test_a_file_cut_at_any_byte_is_damaged(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    write_groups(path, make_groups(2))
    whole = path.read_bytes()
    for end in [*range(0, 160), *range(160, len(whole), 41), len(whole) - 1]:
        path.write_bytes(whole[:end])
        with pytest.raises(DamagedFileError, match=r"a\.jsonl"):
            read_groups(path)


def test_a_changed_bit_is_damage(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    write_groups(path, make_groups(2))
    whole = path.read_bytes()
    for position in range(whole.index(b"\n") + 1, len(whole), 53):
        path.write_bytes(whole[:position] + bytes([whole[position] ^ 1]) + whole[position + 1 :])
        with pytest.raises(DamagedFileError, match="checksum"):
            read_groups(path)
    path.write_bytes(whole + whole.splitlines(keepends=True)[-1])
    with pytest.raises(DamagedFileError, match="checksum"):
        read_groups(path)


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        (b'"version": 1', b'"version": 9', "version 9, this program reads version 1"),
        (b'"groups": 2', b'"groups": 3', "announces 3 groups, 2 are there"),
        (b'"groups": 2', b'"grupps": 2', "header: groups is missing"),
        (b"mstar-groups", b"mstar-things", "does not begin with a mstar-groups header"),
        (b"{", b"[", "does not begin with a mstar-groups header"),
    ],
)
def test_a_wrong_header_is_named(tmp_path: Path, old: bytes, new: bytes, said: str) -> None:
    path = tmp_path / "a.jsonl"
    write_groups(path, make_groups(2))
    path.write_bytes(path.read_bytes().replace(old, new, 1))
    with pytest.raises(DamagedFileError, match=said) as caught:
        read_groups(path)
    assert str(path) in str(caught.value)


def test_groups_of_another_shape_are_named(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    groups = make_groups(1)
    groups[0].responses[0].__dict__["mood"] = "good"
    write_groups(path, groups)
    with pytest.raises(DamagedFileError, match=r"a\.jsonl: a group is not as expected .*mood"):
        read_groups(path)


def test_a_missing_file_is_not_a_damaged_one(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        read_groups(tmp_path / "none.jsonl")


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_full_disk_keeps_the_earlier_file_and_says_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    path = tmp_path / "a.jsonl"
    write_groups(path, make_groups(1))

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, call, full)
        with pytest.raises(OSError, match=r"a\.jsonl: the disk is full .*same command again") as caught:
            write_groups(path, make_groups(3))
    assert caught.value.errno == errno.ENOSPC
    assert read_groups(path) == make_groups(1)
    assert os.listdir(tmp_path) == ["a.jsonl"]


def test_another_failure_is_raised_as_it_is(tmp_path: Path) -> None:
    (tmp_path / "plain").write_text("a file, not a directory")
    with pytest.raises(FileExistsError):
        files.write_text_atomic(tmp_path / "plain" / "a", "text")


def test_a_process_killed_while_writing_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    files.write_text_atomic(path, "old")
    child = os.fork()
    if child == 0:
        # Die where the new bytes are on disk but the rename has not happened.
        os.replace = lambda *_: os.kill(os.getpid(), 9)
        files.write_text_atomic(path, "new")
        os._exit(0)
    assert os.WIFSIGNALED(os.waitpid(child, 0)[1])
    assert path.read_text() == "old"
    files.write_text_atomic(path, "newer")
    assert path.read_text() == "newer"


def test_sha256_and_free_bytes(tmp_path: Path) -> None:
    files.write_bytes_atomic(tmp_path / "a", b"abc")
    assert files.sha256_file(tmp_path / "a") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    assert files.free_bytes(tmp_path / "not" / "there" / "yet") > 0
