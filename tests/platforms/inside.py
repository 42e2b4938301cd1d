"""The front end of an emulated platform: serves what is online there, and runs notebooks in its kernels.

Run by `emulation.Emulated.run` inside the namespaces; prints a JSON line a step.
"""

from __future__ import annotations

import fcntl
import http.server
import json
import os
import signal
import socket
import ssl
import struct
import subprocess
import sys
import threading
import time
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError, DeadKernelError

NOTEBOOKS = Path(__file__).parents[2] / "notebooks"
SET_LOOPBACK_UP = 0x8914  # SIOCSIFFLAGS
UP_AND_RUNNING = 0x1 | 0x40


def bring_loopback_up() -> None:
    """A new network namespace has a loopback that is down."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as control:
        fcntl.ioctl(control, SET_LOOPBACK_UP, struct.pack("16sh14x", b"lo", UP_AND_RUNNING))


class ByHost(http.server.SimpleHTTPRequestHandler):
    """Serves `folder/<host>/<path>`."""

    folder = Path()

    def translate_path(self, path):
        host = self.headers["Host"].split(":")[0]
        self.directory = str(self.folder / host)
        return super().translate_path(path)

    def log_message(self, *_):
        pass


def serve(folder: Path) -> None:
    """Answer for every host that has a folder, at the port of HTTPS, until this process ends."""
    ByHost.folder = folder
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 443), ByHost)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(folder / "certificate.pem", folder / "key.pem")
    server.socket = context.wrap_socket(server.socket, server_side=True)
    threading.Thread(target=server.serve_forever, daemon=True).start()


def with_parameters(name: str, values: dict) -> nbformat.NotebookNode:
    """The notebook with these values set behind its parameters cell, as papermill sets them."""
    notebook = nbformat.read(NOTEBOOKS / f"{name}.ipynb", as_version=4)
    place = next(
        place for place, cell in enumerate(notebook.cells) if "parameters" in cell.metadata.get("tags", [])
    )
    lines = [f"{key} = {value!r}" for key, value in values.items()]
    notebook.cells.insert(place + 1, nbformat.v4.new_code_cell("\n".join(lines)))
    return notebook


def run_notebook(step: dict, settings: dict) -> dict:
    """Run all cells in a new kernel; with `kill`, SIGKILL the kernel once `kill_when` says so."""
    notebook = with_parameters(step["notebook"], step.get("parameters", {}))
    client = NotebookClient(
        notebook, kernel_name="python3", timeout=1500, resources={"metadata": {"path": settings["cwd"]}}
    )
    if step.get("setup_only"):
        notebook.cells = notebook.cells[: setup_place(notebook) + 1]
    if "kill" in step:
        threading.Thread(target=kill_when, args=(client, *step["kill"]), daemon=True).start()
    report = {"step": step["notebook"], "ended": "complete", "error": ""}
    try:
        client.execute()
    except DeadKernelError:
        report["ended"] = "killed"
    except CellExecutionError as error:
        report |= {"ended": "failed", "error": str(error)[-3000:]}
    nbformat.write(notebook, Path(settings["executed"]) / f"{Path(step['notebook']).name}.ipynb")
    return report | {"output": printed(notebook)}


def setup_place(notebook: nbformat.NotebookNode) -> int:
    """Position of the set-up cell."""
    return next(place for place, cell in enumerate(notebook.cells) if "colab_setup.sh" in cell.source)


def kill_when(client: NotebookClient, pattern: str, least: int) -> None:
    """Wait until a file that matches has come as far as `least`, then SIGKILL the kernel and its workers."""
    while True:
        reached = max(map(progress, Path("/").glob(pattern.lstrip("/"))), default=0)
        if reached >= least and client.km is not None and client.km.has_kernel:
            os.killpg(os.getpgid(client.km.provisioner.pid), signal.SIGKILL)
            return
        time.sleep(0.02)


def progress(path: Path) -> int:
    """Lines of a table, which may be replaced while we look; of a checkpoint the step in its name."""
    try:
        return int(path.name.split("-")[1]) if path.suffix == ".pt" else len(path.read_bytes().splitlines())
    except FileNotFoundError:
        return 0


def printed(notebook: nbformat.NotebookNode) -> str:
    """All that the cells wrote as plain text."""
    outputs = [item for cell in notebook.cells for item in cell.get("outputs", [])]
    return "".join(item.get("text", "") for item in outputs)


def main() -> None:
    """Run the plan named on the command line."""
    settings = json.loads(Path(sys.argv[1]).read_text())
    bring_loopback_up()
    if settings["served"]:
        serve(Path(settings["served"]))
    for step in settings["plan"]:
        if "command" in step:
            done = subprocess.run(step["command"], capture_output=True, text=True, cwd=settings["cwd"])
            report = {"step": "command", "ended": done.returncode, "output": done.stdout + done.stderr}
        else:
            report = run_notebook(step, settings)
        print(json.dumps(report), flush=True)
        if report["ended"] == "failed":
            break


if __name__ == "__main__":
    main()
