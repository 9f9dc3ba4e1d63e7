"""Tars from strangers: windows without unpacking, what is refused, what gzip may cost."""

import gzip
import io
import os
import tarfile
from pathlib import Path

import pytest
import torch

from graftwerk.checkpoints import archive
from graftwerk.checkpoints.archive import open_files, open_folder, open_tar
from graftwerk.errors import UserError


def make(path: Path, *members: tuple[tarfile.TarInfo, bytes], mode: str = "w") -> Path:
    with tarfile.open(path, mode) as tar:
        for info, content in members:
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


def plain(name: str, content: bytes = b"content") -> tuple[tarfile.TarInfo, bytes]:
    return tarfile.TarInfo(name), content


@pytest.fixture
def temporary(tmp_path: Path, monkeypatch) -> Path:
    folder = tmp_path / "temporary"
    folder.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(folder))
    return folder


def test_a_member_of_a_plain_tar_is_read_where_it_lies(tmp_path, temporary):
    data = os.urandom(10_000)
    path = make(tmp_path / "a.tar", plain("./first"), plain("./in/second", data))
    with open_tar(path) as files:
        assert set(files.members) == {"first", "in/second"}
        with files.open("in/second") as window:
            assert window.seek(-100, os.SEEK_END) == 9_900
            assert window.read(200) == data[-100:]
            assert window.seek(50) == 50
            assert window.read(7) == data[50:57]
            assert window.tell() == 57
            assert window.seek(3, os.SEEK_CUR) == 60
            assert window.readall() == data[60:]
        assert bytes(files.map("in/second").tolist()) == data
        assert files.read("first", 7) == b"content"
        assert os.listdir(temporary) == [], "nothing is unpacked"


def test_a_map_outlives_what_opened_it(tmp_path):
    path = make(tmp_path / "a.tar", plain("x", b"\x01\x02\x03"))
    with open_tar(path) as files:
        view = files.map("x")
    assert view.tolist() == [1, 2, 3]


def test_pages_that_are_released_are_read_again(tmp_path):
    data = os.urandom(1 << 20)
    (tmp_path / "x").write_bytes(data)
    with open_files([tmp_path / "x"]) as files:
        view = files.map("x")
        assert bytes(view[:5].tolist()) == data[:5]
        files.release(view)
        assert bytes(view.numpy()) == data


def test_gzip_is_unpacked_beside_and_removed(tmp_path, temporary):
    path = make(tmp_path / "a.nemo", plain("./x", b"1234"), mode="w:gz")
    with open_tar(path) as files:
        assert files.read("x", 4) == b"1234"
        assert len(os.listdir(temporary)) == 1
    assert os.listdir(temporary) == []


def member(name: str, type: bytes, link: str = "") -> tuple[tarfile.TarInfo, bytes]:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = type, link
    return info, b""


@pytest.mark.parametrize(
    ("bad", "why"),
    [
        (plain("../up"), "leads out"),
        (plain("./a/../../up"), "leads out"),
        (plain("/absolute"), "absolute path"),
        (member("link", tarfile.SYMTYPE, "/etc"), "is a link"),
        (member("link", tarfile.LNKTYPE, "x"), "is a link"),
        (member("pipe", tarfile.FIFOTYPE), "no regular file"),
        (member("disk", tarfile.BLKTYPE), "no regular file"),
        (member("tty", tarfile.CHRTYPE), "no regular file"),
        (plain("./x"), "there twice"),
    ],
)
@pytest.mark.parametrize("mode", ["w", "w:gz"])
def test_a_hostile_member_is_refused_by_name(tmp_path, temporary, bad, why, mode):
    path = make(tmp_path / "a.nemo", plain("x"), bad, mode=mode)
    with pytest.raises(UserError, match=rf"{bad[0].name!r}.*{why}"):
        open_tar(path)
    assert os.listdir(temporary) == []
    assert sorted(os.listdir(tmp_path)) == ["a.nemo", "temporary"]


def test_gzip_that_grows_beyond_reason_is_refused_while_it_is_counted(tmp_path, temporary):
    path = tmp_path / "bomb.nemo"
    path.write_bytes(gzip.compress(bytes(1 << 22)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(archive, "GZIP_FLOOR", 1 << 20)
        with pytest.raises(UserError, match="unpack to more than 1048576"):
            open_tar(path)
    assert os.listdir(temporary) == []


def test_gzip_that_the_disk_does_not_hold_is_refused(tmp_path, temporary, monkeypatch):
    path = make(tmp_path / "a.nemo", plain("x", os.urandom(1 << 16)), mode="w:gz")
    monkeypatch.setattr(archive, "free_space", lambda folder: 1000)
    with pytest.raises(UserError, match=r"not enough disk space .* 1000 bytes .* TMPDIR"):
        open_tar(path)
    assert os.listdir(temporary) == []


@pytest.mark.parametrize("size", [1 << 30, 1 << 40, 1 << 62])
def test_sizes_that_a_header_claims_cost_nothing(tmp_path, size):
    info = tarfile.TarInfo("x")
    info.size = size
    (tmp_path / "a.tar").write_bytes(info.tobuf(tarfile.GNU_FORMAT) + bytes(1024))
    with pytest.raises(UserError, match=r"past the end|no tar"):
        open_tar(tmp_path / "a.tar")
    info.type = tarfile.XHDTYPE
    (tmp_path / "b.tar").write_bytes(info.tobuf(tarfile.GNU_FORMAT) + bytes(1 << 22))
    with pytest.raises(UserError, match="no tar that can be read"):
        open_tar(tmp_path / "b.tar")


def test_what_is_too_large_or_missing_is_named(tmp_path):
    path = make(tmp_path / "a.tar", plain("x", bytes(100)))
    with open_tar(path) as files:
        with pytest.raises(UserError, match="x has 100 bytes; at most 99"):
            files.read("x", 99)
        with pytest.raises(UserError, match="y is missing"):
            files.map("y")
    with pytest.raises(UserError, match="'z' is missing"):
        open_files([tmp_path / "z"])


@pytest.mark.parametrize("content", [b"", b"\x1f\x8b", b"noise" * 500])
def test_what_is_no_tar_is_refused(tmp_path, content):
    (tmp_path / "a.nemo").write_bytes(content)
    with pytest.raises(UserError, match=r"a.nemo.* read"):
        open_tar(tmp_path / "a.nemo")


def test_a_folder_has_its_files_under_their_paths(tmp_path):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "x").write_bytes(b"\x07")
    (tmp_path / "empty").touch()
    with open_folder(tmp_path) as files:
        assert set(files.members) == {"in/x", "empty"}
        assert torch.equal(files.map("in/x"), torch.tensor([7], dtype=torch.uint8))
        assert len(files.map("empty")) == 0
