"""Two hosts on one machine: each a network, its processes and a Ray folder of its own, with a real link between them.

Needs root and the right to make namespaces. A host lives as long as its first process; killing that one kills all.
"""

import contextlib
import os
import shutil
import signal
import subprocess
import tempfile
from pathlib import Path
from typing import Self

from tests.jobs.launch import REPOSITORY
from tests.processes import wait_until

_SUBNET = "10.251.77"
_NOBODY = "02:00:00:00:00:99"
_FIRST_PROCESS = (
    'mkdir -p /tmp/ray && mount --bind "$0" /tmp/ray && ip link set lo up && touch "$0/up"; sleep inf & wait'
)


class Host:
    """A machine of its own, as far as its processes can see; the file system but for /tmp/ray is shared."""

    def __init__(self, address: str) -> None:
        self.address = address
        self._folder = Path(tempfile.mkdtemp(prefix="ew-host-"))
        namespaces = ["unshare", "--kill-child", "--net", "--mount", "--pid", "--fork", "--mount-proc"]
        self._unshare = subprocess.Popen(
            [*namespaces, "sh", "-c", _FIRST_PROCESS, str(self._folder)], stderr=subprocess.DEVNULL
        )
        wait_until((self._folder / "up").exists, "the first process of a host")
        children = Path(f"/proc/{self._unshare.pid}/task/{self._unshare.pid}/children")
        self.pid = int(children.read_text())

    @property
    def prefix(self) -> list[str]:
        """The beginning of a command line that runs on this host."""
        return ["nsenter", "-t", str(self.pid), "--net", "--mount", "--pid", f"--wd={REPOSITORY}", "--"]

    def run(self, *command: str) -> None:
        subprocess.run([*self.prefix, *command], check=True, capture_output=True)

    def close(self) -> None:
        """Kills every process of the host."""
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, signal.SIGKILL)
        self._unshare.wait()
        shutil.rmtree(self._folder, ignore_errors=True)


class TwoHosts:
    """`aggregator` and `trainer`, with a link that may be cut."""

    def __init__(self) -> None:
        self.aggregator, self.trainer = Host(f"{_SUBNET}.1"), Host(f"{_SUBNET}.2")
        try:
            one = ["ew-link-a", "netns", str(self.aggregator.pid), "type", "veth"]
            other = ["peer", "name", "ew-link-t", "netns", str(self.trainer.pid)]
            subprocess.run(["ip", "link", "add", *one, *other], check=True, capture_output=True)
            for host, _, link in self._ends():
                host.run("ip", "address", "add", f"{host.address}/24", "dev", link)
                host.run("ip", "link", "set", link, "up")
        except BaseException:
            self.close()
            raise

    def cut(self) -> None:
        """Packets vanish, in both directions, and nobody is told: they go to a machine that is not there."""
        for host, peer, link in self._ends():
            host.run("ip", "neighbour", "replace", peer.address, "lladdr", _NOBODY, "dev", link, "nud", "permanent")

    def heal(self) -> None:
        for host, peer, link in self._ends():
            host.run("ip", "neighbour", "del", peer.address, "dev", link)

    def _ends(self) -> list[tuple[Host, Host, str]]:
        """Host, the other one, and the host's end of the link."""
        return [(self.aggregator, self.trainer, "ew-link-a"), (self.trainer, self.aggregator, "ew-link-t")]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self.aggregator.close()
        self.trainer.close()
