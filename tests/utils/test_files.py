"""Laws of files that are written: regular ones are replaced whole, all else is written into and stays what it is."""

from __future__ import annotations

import os
import stat
import tempfile
import threading
from pathlib import Path

import pytest

from prunetune.errors import ConfigError, RunFolderError
from prunetune.utils.files import check_writable, expand_path, write_text


def test_regular_file_is_replaced_whole(tmp_path: Path) -> None:
    file = tmp_path / "a.json"
    write_text(file, "old")
    with pytest.raises(UnicodeEncodeError):
        write_text(file, "half of a pair: \ud800")
    assert file.read_text() == "old"
    assert list(tmp_path.iterdir()) == [file]  # nothing partial is left


@pytest.mark.parametrize("target", ["there.json", "not there yet.json"])
def test_link_stays_and_its_target_is_written(target: str, tmp_path: Path) -> None:
    link = tmp_path / "link.json"
    (tmp_path / "there.json").write_text("old, and longer than the new text")
    link.symlink_to(target)
    check_writable(link, "--json")
    write_text(link, "new")
    assert link.is_symlink()
    assert (tmp_path / target).read_text() == "new"


def test_pipe_stays_and_its_reader_gets_the_text(tmp_path: Path) -> None:
    pipe, received = tmp_path / "pipe", []
    os.mkfifo(pipe)
    reader = threading.Thread(target=lambda: received.append(pipe.read_text()), daemon=True)
    reader.start()
    check_writable(pipe, "--out")
    write_text(pipe, "new")
    reader.join(20)
    assert received == ["new"]
    assert stat.S_ISFIFO(pipe.stat().st_mode)


def test_pipe_whose_reader_ends_is_refused_in_one_line(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    reader = threading.Thread(target=lambda: pipe.open().close(), daemon=True)
    reader.start()
    with pytest.raises(RunFolderError, match=r"^[^\n]*pipe: its reader ended before all was written[^\n]*$"):
        write_text(pipe, "more than a pipe holds " * 100_000)


def test_device_stays_a_device() -> None:
    main, terminal = os.openpty()
    device = Path(os.ttyname(terminal))
    try:
        check_writable(device, "--junit")
        write_text(device, "new\n")
        assert os.read(main, 100).split() == [b"new"]
        assert stat.S_ISCHR(device.stat().st_mode)
    finally:
        os.close(main)
        os.close(terminal)


def test_open_descriptors_are_written_into() -> None:
    reading, writing = os.pipe()
    with tempfile.TemporaryFile("w+") as file:
        for descriptor in (writing, file.fileno()):
            check_writable(Path(f"/dev/fd/{descriptor}"), "--json")
            write_text(Path(f"/dev/fd/{descriptor}"), "new")
        assert os.read(reading, 100) == b"new"
        assert file.read() == "new"
    os.close(reading)
    os.close(writing)


@pytest.mark.parametrize("name", ["folder", "none/a.json", "dangling", "a" * 250])
def test_places_that_cannot_be_written_are_refused_before_work(name: str, tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "dangling").symlink_to("none/b.json")
    with pytest.raises(ConfigError, match=r"--out|so long a name"):
        check_writable(tmp_path / name, "--out")


@pytest.mark.parametrize("name", ["~nosuchuser/x", "a" * 300, "a/" * 3000, "a\0b", "\ud800"])
def test_names_that_no_file_can_have_are_refused_in_one_line(name: str) -> None:
    with pytest.raises(ConfigError, match=r"no such user|so long a name|such a name") as refused:
        expand_path(name)
    assert len(str(refused.value)) < 200


def test_home_folder_is_expanded(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert expand_path("~/a") == tmp_path / "a"
    assert expand_path(Path("a/~/b")) == Path("a/~/b")
