"""A small disk that can be full: a tmpfs of its own below the store, which only root can mount."""

import os
import shutil
import subprocess
import tempfile
from pathlib import Path

SIZE_BYTES = 64 << 20


class Disk:
    """A file system at `folder`, where mounting is permitted; else a plain folder that cannot be filled."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        mount = ["mount", "-t", "tmpfs", "-o", f"size={SIZE_BYTES}", "eigenwatch-chaos", str(folder)]
        self.mounted = os.getuid() == 0 and subprocess.run(mount, capture_output=True).returncode == 0
        self._ballast = folder / ".ballast"

    def fill(self) -> None:
        """Until not one byte more can be written."""
        with self._ballast.open("ab") as ballast:
            free = os.statvfs(self.folder).f_bavail * os.statvfs(self.folder).f_frsize
            if free:
                os.posix_fallocate(ballast.fileno(), ballast.tell(), free)

    def free(self) -> None:
        self._ballast.unlink(missing_ok=True)

    def unmount(self) -> None:
        """What is on it stays in the plain folder."""
        if self.mounted:
            with tempfile.TemporaryDirectory(dir=self.folder.parent) as kept:
                shutil.copytree(self.folder, kept, dirs_exist_ok=True, ignore=shutil.ignore_patterns(".*"))
                self._unmount()
                shutil.copytree(kept, self.folder, dirs_exist_ok=True)

    def _unmount(self) -> None:
        subprocess.run(["umount", "--lazy", str(self.folder)], check=True, capture_output=True)
