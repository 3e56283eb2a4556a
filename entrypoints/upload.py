"""Puts a data folder, or a file, into an S3 store."""

from pathlib import Path

from entrypoints.command import command
from tracking import storage


def main(source: Path, to: str) -> None:
    """source: a folder or a file; to: the s3:// address that it shall have."""
    done = storage.upload(source, to)
    print(f"{to}: {done.files} files uploaded, {done.size / 1e6:.1f} MB; {done.skipped} were there already")


if __name__ == "__main__":
    command(main)
