#!/usr/bin/env bash
# A folder on S3 that could not be listed is left out of a glob, without a word.
#
# `glob` of s3fs 2026.9.0 (fsspec 2026.9.0) lists folder by folder through fsspec's `AsyncFileSystem._walk`, whose
# `on_error` is "omit" where nobody sets it: it takes every OSError of a listing for an empty folder, and s3fs makes OSErrors
# of all answers: 403, 500, 503 "slow down". The same folders give fewer files, and no error. `find` without a depth lists
# all at once and raises. Sources use a file system of their own for this (imagen_core/far/listing.py).
#
# A server on 127.0.0.1 lists a bucket with `a/0.tar` and `b/1.tar`; it refuses to list `b/`. Prints what glob finds, and
# fails if it is not what was seen on 2026-11-29: one file, no error.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check s3fs==2026.9.0 fsspec==2026.9.0
AWS_DEFAULT_REGION=us-east-1 AWS_EC2_METADATA_DISABLED=true "$folder/venv/bin/python" - <<'PYTHON'
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, urlsplit

import s3fs

FOLDERS = "<CommonPrefixes><Prefix>a/</Prefix></CommonPrefixes><CommonPrefixes><Prefix>b/</Prefix></CommonPrefixes>"
FILE = "<Contents><Key>a/0.tar</Key><Size>1</Size><LastModified>2026-01-01T00:00:00Z</LastModified></Contents>"
DENIED = "<Error><Code>AccessDenied</Code><Message>Access Denied</Message></Error>"


class Bucket(BaseHTTPRequestHandler):
    def do_GET(self):
        prefix = parse_qs(urlsplit(self.path).query).get("prefix", [""])[0]
        if prefix.startswith("b"):
            status, content = 403, DENIED
        else:
            listed = FOLDERS if not prefix else FILE
            status, content = 200, f"<ListBucketResult><IsTruncated>false</IsTruncated>{listed}</ListBucketResult>"
        self.send_response(status)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content.encode())

    do_HEAD = do_GET

    def log_message(self, *_):
        pass


server = ThreadingHTTPServer(("127.0.0.1", 0), Bucket)
threading.Thread(target=server.serve_forever, daemon=True).start()
s3 = s3fs.S3FileSystem(anon=True, endpoint_url=f"http://127.0.0.1:{server.server_port}", use_listings_cache=False)
try:
    s3.ls("bucket/b")
    sys.exit("listing bucket/b worked")
except PermissionError as error:
    print(f"ls bucket/b: PermissionError: {error}")
found = s3.glob("bucket/*/*.tar")
print(f"glob bucket/*/*.tar: {found}")
if found != ["bucket/a/0.tar"]:
    sys.exit("not what was seen on 2026-11-29")
PYTHON
