"""Nodes of Ray on this machine: raylets beside each other, or each in a network namespace of its own.

Namespaces hang on a bridge. A node that is cut loses its packets silently, as behind a broken switch; a slow one gets
and sends a trickle, so that whatever it says waits for seconds. Both need root.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

NODE = "SOAK_HOST"  # environment: the index of the node that a process belongs to
CPUS = 1  # of a node
_STORE_BYTES = 200 * 2**20
# nothing of more than the queue's seconds ever arrives late: what does not fit is dropped, and sent again by TCP
_TRICKLE = ["tbf", "rate", "1mbit", "burst", "16kb", "latency", "3s"]


def raylets(count: int, tell: Callable[[Mapping[str, int]], None]) -> str:
    """A Ray of several nodes in this machine's network; returns its address and tells the raylets' processes."""
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "object_store_memory": _STORE_BYTES})
    nodes = [cluster.add_node(num_cpus=CPUS, object_store_memory=_STORE_BYTES) for _ in range(count)]
    tell({f"node-{i}": node.all_processes["raylet"][0].process.pid for i, node in enumerate(nodes)})
    return str(cluster.address)


class Network:
    """A bridge with `count` namespaces. `number` tells it from others on this machine, and is part of all addresses."""

    def __init__(self, number: int, count: int) -> None:
        self.number, self.count = number % 250, count
        self.bridge = f"soak{self.number}"

    @contextmanager
    def up(self) -> Iterator[None]:
        self._remove()
        try:
            _ip("link", "add", self.bridge, "type", "bridge")
            _ip("addr", "add", f"{self._address(0)}/24", "dev", self.bridge)
            _ip("link", "set", self.bridge, "up")
            for i in range(self.count):
                name = self._name(i)
                _ip("netns", "add", name)
                _ip("link", "add", name, "type", "veth", "peer", "name", "eth0", "netns", name)
                _ip("link", "set", name, "master", self.bridge, "up")
                _ip("-n", name, "addr", "add", f"{self._address(i + 1)}/24", "dev", "eth0")
                _ip("-n", name, "link", "set", "eth0", "up")
                _ip("-n", name, "link", "set", "lo", "up")
            yield
        finally:
            self._remove()

    def start_ray(self, folder: Path) -> str:
        """The head at the bridge, a node in every namespace; a node that ends is started anew. Returns the address."""
        from ray.cluster_utils import Cluster

        head = {"num_cpus": 0, "object_store_memory": _STORE_BYTES, "node_ip_address": self._address(0)}
        address = Cluster(initialize_head=True, head_node_args=head).address
        for i in range(self.count):
            own = folder / f"ray-{i}"  # sockets and logs, which Ray keeps at the same place on every node
            shutil.rmtree(own, ignore_errors=True)
            own.mkdir(parents=True)
            ray = (
                f"{Path(sys.executable).parent / 'ray'} start --address={address} --block --num-cpus={CPUS} "
                f"--node-ip-address={self._address(i + 1)} --object-store-memory={_STORE_BYTES}"
            )
            script = f"mount --bind {own} /tmp/ray && while true; do {ray}; sleep 1; done"
            subprocess.Popen(
                ["ip", "netns", "exec", self._name(i), "sh", "-c", script],
                env={**os.environ, NODE: str(i)},
                stdout=(own / "out").open("wb"),
                stderr=subprocess.STDOUT,
            )
        return str(address)

    def cut(self, node: int) -> None:
        _ip("link", "set", self._name(node), "nomaster")

    def join(self, node: int) -> None:
        _ip("link", "set", self._name(node), "master", self.bridge)

    def slow(self, node: int) -> None:
        _tc("add", "dev", self._name(node), "root", *_TRICKLE)
        _tc("add", "dev", "eth0", "root", *_TRICKLE, namespace=self._name(node))

    def quick(self, node: int) -> None:
        _tc("del", "dev", self._name(node), "root")
        _tc("del", "dev", "eth0", "root", namespace=self._name(node))

    def _name(self, node: int) -> str:
        return f"{self.bridge}-{node}"

    def _address(self, host: int) -> str:
        return f"10.199.{self.number}.{host + 1}"

    def _remove(self) -> None:
        """What is there of it; the links go with their namespaces."""
        for i in range(self.count):
            subprocess.run(["ip", "netns", "del", self._name(i)], capture_output=True)
            subprocess.run(["ip", "link", "del", self._name(i)], capture_output=True)
        subprocess.run(["ip", "link", "del", self.bridge], capture_output=True)


def networks_allowed() -> bool:
    """Whether this process may make namespaces, bridges and queues."""
    if not (shutil.which("ip") and shutil.which("tc")):
        return False
    network = Network(249, 1)
    try:
        with network.up():
            network.slow(0)
            network.quick(0)
    except subprocess.CalledProcessError:
        return False
    return True


def _ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True)


def _tc(*words: str, namespace: str | None = None) -> None:
    inside = ["-n", namespace] if namespace else []
    subprocess.run(["tc", *inside, "qdisc", *words], check=True, capture_output=True)
