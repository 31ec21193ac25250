#!/usr/bin/env bash
# A condition on an upload to S3 that s3fs keeps for small files and drops for large ones.
#
# S3 replaces an object only if it is still the one that was seen, if the request says `If-Match: ETAG`; the call that ends
# an upload in parts takes that too. s3fs 2026.9.0 (aiobotocore 3.10.0) passes `IfMatch=` of `put_file` on where it sends the
# file with one request. From twice `chunksize` on (100 MB by default) it sends parts, hands the argument to the call
# that begins the upload only, and filters it out there, as that call does not know it. So no request has the condition,
# and a file that another process has written meanwhile is replaced without an error. `mode="create"` keeps its
# condition in both cases, and so does `IfMatch` in `s3_additional_kwargs` of the file system, which is how
# pipeline/storage/objects.py replaces large files.
#
# Counts the conditions that a server on this machine gets; fails if they are not those seen on 2026-11-29.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check s3fs==2026.9.0 fsspec==2026.9.0 aiobotocore==3.10.0
HOME="$folder" AWS_ACCESS_KEY_ID=key AWS_SECRET_ACCESS_KEY=secret AWS_EC2_METADATA_DISABLED=true \
    "$folder/venv/bin/python" - "$folder" <<'PYTHON'
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

import s3fs

CHUNK = 5 * 2**20
seen = []


class S3(BaseHTTPRequestHandler):
    """Answers uploads as S3 does, and keeps the names of the calls that came with a condition."""

    protocol_version = "HTTP/1.1"

    def _answer(self, body=b""):
        self.send_response(200)
        self.send_header("ETag", '"00000000000000000000000000000000"')
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def _handle(self):
        self._read()
        query = parse_qs(urlsplit(self.path).query, keep_blank_values=True)
        call = "CreateMultipartUpload" if "uploads" in query else "PutObject"
        if "uploadId" in query:
            call = "UploadPart" if "partNumber" in query else "CompleteMultipartUpload"
        if condition := self.headers.get("If-Match") or self.headers.get("If-None-Match"):
            seen.append(f"{call}({condition.strip(chr(34))})")
        if call == "CreateMultipartUpload":
            self._answer(b"<InitiateMultipartUploadResult><UploadId>1</UploadId></InitiateMultipartUploadResult>")
        elif call == "CompleteMultipartUpload":
            self._answer(b"<CompleteMultipartUploadResult><ETag>1</ETag></CompleteMultipartUploadResult>")
        else:
            self._answer()

    do_PUT = do_POST = _handle

    def _read(self):
        if self.headers.get("Transfer-Encoding") != "chunked":
            self.rfile.read(int(self.headers.get("Content-Length") or 0))
            return
        while size := int(self.rfile.readline().split(b";")[0], 16):
            self.rfile.read(size + 2)
        while self.rfile.readline().strip():
            pass

    def log_message(self, *_):
        pass


server = ThreadingHTTPServer(("127.0.0.1", 0), S3)
threading.Thread(target=server.serve_forever, daemon=True).start()
endpoint = f"http://127.0.0.1:{server.server_port}"
folder = Path(sys.argv[1])
sizes = {"small": CHUNK, "large": 2 * CHUNK + 1}
found = {}
for size, length in sizes.items():
    (folder / size).write_bytes(bytes(length))
    for how, options, default in (
        ("IfMatch=", {"IfMatch": "etag"}, {}),
        ('mode="create"', {"mode": "create"}, {}),
        ("s3_additional_kwargs", {}, {"IfMatch": "etag"}),
    ):
        filesystem = s3fs.S3FileSystem(
            endpoint_url=endpoint, s3_additional_kwargs=default, skip_instance_cache=True, use_listings_cache=False
        )
        seen.clear()
        filesystem.put_file(str(folder / size), "bucket/file", chunksize=CHUNK, **options)
        found[size, how] = " ".join(seen) or "no condition"
        print(f"{size} file, {how}: {found[size, how]}")
expected = {
    ("small", "IfMatch="): "PutObject(etag)",
    ("small", 'mode="create"'): "PutObject(*)",
    ("small", "s3_additional_kwargs"): "PutObject(etag)",
    ("large", "IfMatch="): "no condition",
    ("large", 'mode="create"'): "CompleteMultipartUpload(*)",
    ("large", "s3_additional_kwargs"): "CompleteMultipartUpload(etag)",
}
if found != expected:
    sys.exit("not what was seen on 2026-11-29")
PYTHON
