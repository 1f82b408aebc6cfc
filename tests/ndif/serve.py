"""Start a whole NDIF server on this machine, hosting the demo model: ``python tests/ndif/serve.py``.

NDIF is a queue in Redis, results in an S3 store, models in Ray and a web API. All of them are started here
on free ports of the loopback interface, with logs in a temporary folder, and stopped with the script.

Needs, in the environment of the interpreter that runs it: this package, ``ndif[api,ray]==0.1.2`` and
``moto[server]`` (its S3 stands for the real one), and ``redis-server`` on the path. ndif says Python 3.12;
pip's --ignore-requires-python installs it on 3.11, where it runs too.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import socket
import string
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

HERE = Path(__file__).parent
SCRIPTS = Path(sys.executable).parent


def missing() -> str:
    """What is not installed that a server needs; empty where everything is."""
    modules = [name for name in ("ndif.services", "moto", "ray") if not _found(name)]
    return ", ".join(modules + ["redis-server"] * (shutil.which("redis-server") is None))


def _found(name: str) -> bool:
    try:
        return find_spec(name) is not None
    except ModuleNotFoundError:
        return False


@contextlib.contextmanager
def serving() -> Iterator[str]:
    """A running server that hosts the demo model: its address, for ``remote=``.

    Raises:
        RuntimeError: if a service does not come up or the model is not deployed, with the end of its log.
    """
    with tempfile.TemporaryDirectory(prefix="ndif-", ignore_cleanup_errors=True) as folder:
        server = Server(Path(folder))
        try:
            server.start()
            yield server.address
        finally:
            server.stop()


class Server:
    """The processes of one server.

    Args:
        folder: for logs and Ray's files.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.processes: list[subprocess.Popen[bytes]] = []
        names = ("redis", "s3", "gcs", "ray", "dashboard", "api", "objects", "agent", "listen", "metrics")
        self.port = dict(zip(names, free_ports(len(names)), strict=True))
        self.address = f"http://127.0.0.1:{self.port['api']}"
        self.env = {
            **os.environ,
            "PATH": f"{SCRIPTS}{os.pathsep}{os.environ['PATH']}",
            "PYTHONPATH": str(HERE),  # for the actor class; Ray's workers inherit it
            "NDIF_REDIS_URL": f"redis://127.0.0.1:{self.port['redis']}",
            "NDIF_RAY_ADDRESS": f"ray://127.0.0.1:{self.port['ray']}",
            "NDIF_OBJECT_STORE_URL": f"http://127.0.0.1:{self.port['s3']}",
            "NDIF_API_URL": self.address,
            "NDIF_API_PORT": str(self.port["api"]),
            "NDIF_SANDBOX_POOL_SIZE": "1",
            "GRPC_ENABLE_FORK_SUPPORT": "0",
            "RAY_ADDRESS": f"127.0.0.1:{self.port['gcs']}",
            "RAY_USAGE_STATS_ENABLED": "0",
            # Off a cluster Ray stays on the loopback interface; otherwise it takes the machine's own address.
            "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
            "HF_HUB_OFFLINE": "1",
        }

    def start(self) -> None:
        """Bring up Redis, the store, Ray with NDIF's controller, and the API; then deploy."""
        port = self.port
        self.spawn("redis-server", "--bind", "127.0.0.1", "--port", str(port["redis"]), "--save", "")
        self.spawn("moto_server", "-H", "127.0.0.1", "-p", str(port["s3"]))
        self.run("ray", "start", "--head", *self.ray_options())
        self.run(sys.executable, "-m", "ndif.services.ray.deployments.controller.controller")
        bind = f"127.0.0.1:{port['api']}"
        app = ("--config", "python:ndif.services.api.gunicorn_conf", "ndif.services.api.app:app")
        self.spawn("gunicorn", "--bind", bind, *app)
        self.wait_for("/status")
        models = string.Template((HERE / "models.yaml").read_text()).substitute(demo=demo_folder())
        (self.folder / "models.yaml").write_text(models)
        self.run("ndif", "deploy", "-f", str(self.folder / "models.yaml"))

    def ray_options(self) -> list[str]:
        """What ``ray start --head`` is told: loopback only, and one GPU, which NDIF asks for."""
        port = self.port
        memory = 4_000_000_000
        resources = {"head": 10, "cuda_memory_bytes": memory, "cpu_memory_bytes": memory}
        return [
            "--node-ip-address=127.0.0.1",
            "--dashboard-host=127.0.0.1",
            f"--port={port['gcs']}",
            f"--ray-client-server-port={port['ray']}",
            f"--dashboard-port={port['dashboard']}",
            f"--object-manager-port={port['objects']}",
            f"--dashboard-agent-grpc-port={port['agent']}",
            f"--dashboard-agent-listen-port={port['listen']}",
            f"--metrics-export-port={port['metrics']}",
            "--num-cpus=4",
            "--num-gpus=1",
            "--object-store-memory=200000000",
            f"--resources={json.dumps(resources)}",
            f"--temp-dir={self.folder / 'ray'}",
            "--disable-usage-stats",
        ]

    def spawn(self, *command: str) -> None:
        """Start a service that runs until `stop`."""
        log = (self.folder / f"{Path(command[0]).name}.log").open("wb")
        self.processes.append(subprocess.Popen(command, env=self.env, stdout=log, stderr=log, cwd=self.folder))

    def run(self, *command: str) -> None:
        """Run a command to its end."""
        done = subprocess.run(command, env=self.env, cwd=self.folder, capture_output=True, text=True, timeout=240)
        if done.returncode:
            raise RuntimeError(f"{' '.join(command)}:\n{done.stdout[-2000:]}{done.stderr[-2000:]}")

    def wait_for(self, path: str, seconds: float = 240) -> None:
        """Ask the API until it answers, which it does when its queue has found Ray."""
        end, problem = time.monotonic() + seconds, "no answer"
        while time.monotonic() < end:
            try:
                with urllib.request.urlopen(self.address + path, timeout=10):
                    return
            except OSError as error:
                problem = str(error)
            time.sleep(2)
        logs = [
            *self.folder.glob("*.log"),
            *self.folder.glob("ray/session_latest/logs/ray_client_server*.err"),
        ]
        ends = "".join(f"\n{log.name}: {log.read_text(errors='replace')[-3000:]}" for log in logs)
        raise RuntimeError(f"{path} of the API: {problem}{ends}")

    def stop(self) -> None:
        """End every process of this server, and no other."""
        ours = {process.pid for process in self.processes} | self.descendants()
        for number in (signal.SIGTERM, signal.SIGKILL):
            for pid in ours:
                with contextlib.suppress(OSError):
                    os.kill(pid, number)
            end = time.monotonic() + 10
            while any(Path(f"/proc/{pid}/cmdline").exists() for pid in ours) and time.monotonic() < end:
                for process in self.processes:
                    process.poll()
                time.sleep(0.2)
            ours |= self.descendants()

    def descendants(self) -> set[int]:
        """What this server started: Ray's processes are no children of this one, but inherit its settings."""
        mark = f"NDIF_API_URL={self.address}\0".encode()
        found, children = set(), []
        for process in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                pid, parent = int(process.name), (process / "stat").read_text().rsplit(")", 1)[1].split()[1]
                children.append((int(parent), pid))
                if mark in (process / "environ").read_bytes():
                    found.add(pid)
        # A process that has given itself a title, as Ray's workers do, has no settings to be seen.
        while more := {pid for parent, pid in children if parent in found} - found:
            found |= more
        return found


def free_ports(n: int) -> list[int]:
    """Ports of the loopback interface that nobody listens on."""
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(n)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]


def demo_folder() -> Path:
    """The demo model of the installed package."""
    from mamba_trace.model import DEMO

    return DEMO


if __name__ == "__main__":
    if lacks := missing():
        sys.exit(f"an NDIF server needs {lacks}; see the docstring of {__file__}")
    with serving() as address, contextlib.suppress(KeyboardInterrupt):
        print(f"serving {demo_folder()} at {address}; Ctrl-C stops it", flush=True)
        while True:
            time.sleep(3600)
