"""The photographs in a folder, found by what the files are, and how many others were left out and why."""

import os
from collections import defaultdict
from pathlib import Path

from aliprod import InputError, formats, images

# Beside whatever begins with a dot: what systems, network disks and archives put into folders by themselves.
HIDDEN = {
    "@eadir", "@recycle", "@recently-snapshot", "#recycle", "#snapshot", "__macosx", "lost+found", "$recycle.bin",
    "system volume information", "__pycache__", "thumbs.db", "ehthumbs.db", "desktop.ini", "icon\r",
}  # fmt: skip
EXAMPLES = 3  # named of each kind that is left out


def photographs(folder: str | Path) -> tuple[list[str], str]:
    """Every picture in a folder, at any depth, in the order of their paths; and a line on what was left out, or "".

    A picture is a file that is named as one or begins as one, be its format read or not. Hidden files and folders are
    left out. Links are followed, though not in circles. InputError if the folder cannot be read.
    """
    root, files = Path(folder), []
    left_out: dict[str, list[Path]] = defaultdict(list)
    inside: list[Path] = []  # folders
    waiting: list[tuple[Path, frozenset]] = [(root, frozenset())]  # each with the folders above it
    while waiting:
        path, above = waiting.pop()
        try:
            about, entries = path.stat(), list(os.scandir(path))
        except OSError as error:
            if path == root:
                raise InputError(f"{folder}: {error.strerror}") from None
            left_out[f"cannot be read: {error.strerror}"].append(path)
            continue

        if (about.st_dev, about.st_ino) in above:
            left_out["linked in a circle"].append(path)
            continue
        inside.append(path)
        for entry in entries:
            what = _what(entry)
            if what == "folder":
                waiting.append((path / entry.name, above | {(about.st_dev, about.st_ino)}))
            elif what == "picture":
                files.append(path / entry.name)
            else:
                left_out[what].append(path / entry.name)

    full = {root}.union(*(file.parents for file in files))
    left_out["without photographs"] = [path for path in inside if path not in full and path.parent in full]
    return sorted(map(str, files)), _line(root, left_out)


def _what(entry: os.DirEntry[str]) -> str:
    """Whether it is a "folder", a "picture" or, in a few words, what else."""
    try:
        if entry.name.startswith(".") or entry.name.lower() in HIDDEN:
            return "hidden"
        if entry.is_dir():
            return "folder"
        if not entry.is_file():
            return "linked to nothing" if entry.is_symlink() else "a pipe or a device"
        if Path(entry.name).suffix.lower() in formats.SUFFIXES:  # if it is none after all, its answer says so
            return "picture"
        with images.opened(entry.path) as file:
            return "picture" if formats.is_picture(file.read(formats.HEAD)) else "not an image"
    except OSError as error:
        return f"cannot be read: {error.strerror}"


def _line(root: Path, left_out: dict[str, list[Path]]) -> str:
    parts = []
    for what, paths in sorted(left_out.items()):
        names = [str(path.relative_to(root)).encode(errors="backslashreplace").decode() for path in sorted(paths)]
        if names:
            parts.append(
                f"{len(names)} {what} ({', '.join(names[:EXAMPLES])}{' ...' if len(names) > EXAMPLES else ''})"
            )
    count = sum(map(len, left_out.values()))
    return f"{count} left out of {root}: {', '.join(parts)}" if parts else ""
