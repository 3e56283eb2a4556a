"""Folders: pictures are found by what they are, whatever they are called; what is left out is said."""

import io
import os
import socket
import time
from pathlib import Path

import pytest
from PIL import Image

from aliprod import InputError, enrolment, prediction
from aliprod.folders import photographs


def encoded(form: str = "JPEG") -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (20, 10), "red").save(file, form)
    return file.getvalue()


def put(folder: Path, *names: str, content: bytes = encoded()) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)


def names(folder: Path) -> list[str]:
    return [os.path.relpath(file, folder) for file in photographs(folder)[0]]


def test_pictures_are_taken_whatever_they_are_called(tmp_path):
    called = ["a.jpg", "b.jfif", "c.jpe", "d.pjpeg", "e", "f.JPG", "g.jpg.bak", "h/i.j/k.txt", "ü b.x"]
    put(tmp_path, *called)
    forms = ["PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF", "JPEG2000", "PPM"]
    for form in forms:
        put(tmp_path, f"z {form}", content=encoded(form))
    put(tmp_path, "IMG_1.HEIC", content=b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(99))  # its answer says what it is
    assert photographs(tmp_path)[1] == ""
    assert names(tmp_path) == sorted([*called, *(f"z {form}" for form in forms), "IMG_1.HEIC"])


def test_what_is_named_as_a_picture_and_is_none_gets_its_answer(tmp_path):
    put(tmp_path, "a.jpg", "b.png", content=b"404 not found")
    assert names(tmp_path) == ["a.jpg", "b.png"]


def test_what_is_left_out_is_said_with_the_reason(tmp_path):
    put(tmp_path, "x.jpg", ".ipynb_checkpoints/x-checkpoint.jpg", "@eaDir/x.jpg/t.jpg", "b/__MACOSX/x.jpg", "b/y.jpg")
    put(tmp_path, "._x.jpg", "Thumbs.db", "#recycle/x.jpg", "lost+found/1")
    put(tmp_path, "notes.txt", "c.csv", "d.pdf", "film.mp4", content=b"some text")
    put(tmp_path, "empty", content=b"")
    (tmp_path / "003/deeper").mkdir(parents=True)
    os.mkfifo(tmp_path / "pipe.jpg")
    (tmp_path / "gone.jpg").symlink_to("nowhere")
    files, said = photographs(tmp_path)
    assert [os.path.relpath(file, tmp_path) for file in files] == ["b/y.jpg", "x.jpg"]
    assert said == (
        f"15 left out of {tmp_path}: 1 a pipe or a device (pipe.jpg), "
        "7 hidden (#recycle, ._x.jpg, .ipynb_checkpoints ...), 1 linked to nothing (gone.jpg), "
        "5 not an image (c.csv, d.pdf, empty ...), 1 without photographs (003)"
    )


def test_a_hidden_folder_that_is_named_itself_is_looked_into(tmp_path):
    put(tmp_path / ".cache" / "@eaDir", "x.jpg")
    assert names(tmp_path / ".cache" / "@eaDir") == ["x.jpg"]


def test_links_are_followed_but_not_in_circles(tmp_path):
    put(tmp_path / "elsewhere", "x.jpg", "deep/y.jpg")
    put(tmp_path / "here", "z.jpg")
    (tmp_path / "here" / "linked").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "here" / "file.jpg").symlink_to(tmp_path / "elsewhere" / "x.jpg")
    (tmp_path / "here" / "up").symlink_to(tmp_path / "here")
    (tmp_path / "elsewhere" / "deep" / "back").symlink_to(tmp_path / "here")
    (tmp_path / "here" / "self").symlink_to("self")
    files, said = photographs(tmp_path / "here")
    found = [os.path.relpath(file, tmp_path / "here") for file in files]
    assert found == ["file.jpg", "linked/deep/y.jpg", "linked/x.jpg", "z.jpg"]
    assert "1 cannot be read: Too many levels of symbolic links (self)" in said
    assert "2 linked in a circle (linked/deep/back, up)" in said
    (tmp_path / "root").symlink_to(tmp_path / "here")
    assert names(tmp_path / "root") == found


def test_sockets_and_names_that_are_no_text_do_not_end_it(tmp_path):
    put(tmp_path, "x.jpg")
    (tmp_path / os.fsdecode(b"caf\xe9.jpg")).write_bytes(encoded())
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(tmp_path / "s"))
        files, said = photographs(tmp_path)
    assert [os.fsencode(Path(file).name) for file in files] == [b"caf\xe9.jpg", b"x.jpg"]
    assert said.encode() and "1 a pipe or a device (s)" in said


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_subfolder_that_cannot_be_read_is_said(tmp_path):
    put(tmp_path, "x.jpg", "closed/y.jpg")
    put(tmp_path, "secret")
    (tmp_path / "closed").chmod(0)
    (tmp_path / "secret").chmod(0)
    try:
        files, said = photographs(tmp_path)
    finally:
        (tmp_path / "closed").chmod(0o700)
    assert [Path(file).name for file in files] == ["x.jpg"]
    assert said == f"2 left out of {tmp_path}: 2 cannot be read: Permission denied (closed, secret)"


def test_predict_and_enroll_and_withdraw_take_the_same_and_say_what_not(tmp_path, capsys):
    put(tmp_path, "901/x", "901/y.jfif", ".git/z.jpg", "902/notes.txt")
    (tmp_path / "902" / "notes.txt").write_text("none yet")
    (tmp_path / "903").mkdir()
    files = [f"{tmp_path}/901/x", f"{tmp_path}/901/y.jfif"]
    assert prediction.image_files(str(tmp_path)) == files
    line = capsys.readouterr().out
    assert line.count("\n") == 1 and "2 without photographs (902, 903)" in line and "1 hidden (.git)" in line
    listed = enrolment.listed(f"{tmp_path}/")
    assert listed["file"].tolist() == files and set(listed["class_id"]) == {"901"}
    assert capsys.readouterr().out == line
    assert enrolment.listed(str(tmp_path / "901"), "7")["file"].tolist() == files
    assert capsys.readouterr().out == ""


def test_a_folder_without_pictures_is_refused_with_what_it_holds(tmp_path):
    put(tmp_path, "notes.txt", content=b"text")
    with pytest.raises(InputError, match=r"no images there; 1 left out of .*: 1 not an image \(notes.txt\)$"):
        prediction.image_files(str(tmp_path))


@pytest.mark.slow
def test_a_hundred_thousand_files_are_listed_in_seconds(tmp_path):
    for number in range(100_000):
        (tmp_path / f"{number}{'.jpg' if number % 2 else ''}").write_bytes(b"\xff\xd8\xff")
    start = time.monotonic()
    assert len(photographs(tmp_path)[0]) == 100_000
    assert time.monotonic() - start < 60
