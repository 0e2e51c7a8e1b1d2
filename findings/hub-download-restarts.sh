#!/usr/bin/env bash
# huggingface_hub 2.4.0 (without xet): a download that was interrupted begins the file again.
# Guess: it goes on with what is there, as `hf download` says of an interrupted one, and as the .incomplete files of old suggest.
# Seen 2026-11-28: within one call it goes on by Range, after whole chunks of 10 MB; the next call asks for byte 0 again, and what was
#   there is deleted. Complete files are kept.
source "$(dirname "$0")/environment"
packages huggingface_hub==2.4.0
check <<'PY'
import os
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

DATA, asked, cut = os.urandom(25 << 20), [], [True]


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *arguments):
        pass

    def do_HEAD(self):
        self.do_GET()

    def do_GET(self):
        where = self.headers.get("Range", "bytes=0-")
        start = int(where[6:-1])
        self.send_response(206 if start else 200)
        for name, value in (("ETag", '"1"'), ("X-Repo-Commit", "1" * 40), ("Content-Length", len(DATA) - start)):
            self.send_header(name, str(value))
        self.send_header("Content-Range", f"bytes {start}-{len(DATA) - 1}/{len(DATA)}")
        self.end_headers()
        if self.command == "GET":
            asked.append(start)
            self.wfile.write(DATA[start : 15 << 20 if cut[0] else len(DATA)])
            self.close_connection = cut[0]


server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
threading.Thread(target=server.serve_forever, daemon=True).start()
os.environ |= {"HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}", "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1"}
import time

import huggingface_hub

time.sleep = lambda seconds: None
for _ in range(2):
    try:
        path = huggingface_hub.hf_hub_download("owner/name", "model.bin", cache_dir="cache")
    except Exception as error:
        print("interrupted:", type(error).__name__, "bytes kept:", sum(f.stat().st_size for f in Path("cache").rglob("*incomplete")))
        asked.append("again")
        cut[0] = False
print("first bytes asked for:", asked)
again = asked[asked.index("again") + 1 :]
assert again == [0] and Path(path).read_bytes() == DATA
assert 10 << 20 in asked
PY
