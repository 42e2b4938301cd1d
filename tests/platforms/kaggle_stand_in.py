"""Stands in for Kaggle's API on this machine, where the real client looks with
KAGGLE_API_ENVIRONMENT=LOCALHOST (http://localhost), and runs a command beside it. Answers what a push and an
upload need.

    unshare --user --map-root-user --net python kaggle_stand_in.py CALLS.json COMMAND...

In a network of its own, so that port 80 is free to take and nothing outside can be reached. CALLS.json
receives a list of [method, request as sent].
"""

from __future__ import annotations

import http.server
import json
import subprocess
import sys
import threading
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))
from tests.platforms.inside import bring_loopback_up

ANSWERS = {
    "SaveKernel": {"ref": "/someone/kernel", "url": "http://localhost/kernel", "versionNumber": 1},
    "GetKernelSessionStatus": {"status": "COMPLETE"},
    "StartBlobUpload": {"token": "token", "createUrl": "http://localhost/upload"},
    "CreateDataset": {"ref": "someone/set", "url": "http://localhost/set", "status": "ok"},
}
CALLS: list = []


class Handler(http.server.BaseHTTPRequestHandler):
    """Notes each call and answers it by its method's name."""

    def do_POST(self):
        name = self.path.rsplit("/", 1)[-1]
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        CALLS.append([name, json.loads(body or b"{}")])
        self._answer(200 if name in ANSWERS else 404, ANSWERS.get(name, {"code": 404, "message": name}))

    def do_PUT(self):
        CALLS.append(["upload", len(self.rfile.read(int(self.headers["Content-Length"])))])
        self._answer(200, {})

    def _answer(self, status, content):
        body = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_):
        pass


def main() -> int:
    """Serve, run the command, write down the calls; returns the command's exit status."""
    bring_loopback_up()
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 80), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    status = subprocess.run(sys.argv[2:]).returncode
    Path(sys.argv[1]).write_text(json.dumps(CALLS))
    return status


if __name__ == "__main__":
    sys.exit(main())
