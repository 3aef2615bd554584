"""The part of the Hub's HTTP API that uploading a model and loading it again needs, on this machine.

Small files come inside the commit, large ones through LFS, as on the real one.
"""

import base64
import hashlib
import json
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

COMMIT = "0" * 40


class Hub(ThreadingHTTPServer):
    """Repositories in memory.

    Attributes:
        repositories: name → path → content.
        objects: what was put through LFS, by its SHA-256.
    """

    def __init__(self):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.repositories: dict[str, dict[str, bytes]] = {}
        self.objects: dict[str, bytes] = {}

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_port}"


@contextmanager
def hub():
    """A running `Hub`."""
    server = Hub()
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


class _Handler(BaseHTTPRequestHandler):
    server: Hub
    protocol_version = "HTTP/1.1"

    def do_POST(self):
        path, body = self.path.partition("?")[0].strip("/"), self._body()
        if path == "api/repos/create":
            asked = json.loads(body)
            name = f"{asked.get('organization') or 'me'}/{asked['name']}"
            self.server.repositories.setdefault(name, {})
            self._answer({"url": f"{self.server.url}/{name}", "id": name})
        elif path == "api/validate-yaml":
            self._answer({"errors": [], "warnings": []})
        elif "/preupload/" in path:
            self._answer({"files": [_mode(file) for file in json.loads(body)["files"]]})
        elif path.endswith(".git/info/lfs/objects/batch"):
            objects = [self._upload_address(entry) for entry in json.loads(body)["objects"]]
            self._answer({"transfer": "basic", "objects": objects})
        elif "/commit/" in path:
            name = path.removeprefix("api/models/").partition("/commit/")[0]
            for line in body.splitlines():
                self._apply(self.server.repositories[name], json.loads(line))
            address = f"{self.server.url}/{name}/commit/{COMMIT}"
            self._answer({"commitUrl": address, "commitOid": COMMIT, "success": True})
        else:
            self._answer({"error": path}, 404)

    def do_PUT(self):
        content, oid = self._body(), self.path.rpartition("/")[2]
        assert hashlib.sha256(content).hexdigest() == oid
        self.server.objects[oid] = content
        self._answer({})

    def do_GET(self):
        if self.path.startswith("/api/models/"):
            self._describe(*self.path.partition("?")[0].split("/")[3:6])
            return
        name, found, rest = self.path.partition("?")[0].strip("/").partition("/resolve/")
        content = self.server.repositories.get(name, {}).get(rest.partition("/")[2]) if found else None
        if content is None:
            self._answer({"error": self.path}, 404, {"X-Error-Code": "EntryNotFound"})
            return
        tag = hashlib.sha256(content).hexdigest()
        self._answer(content, 200, {"ETag": f'"{tag}"', "X-Repo-Commit": COMMIT})

    def do_HEAD(self):
        self.do_GET()

    def log_message(self, *args):
        pass

    def _body(self):
        return self.rfile.read(int(self.headers.get("Content-Length", 0)))

    def _describe(self, owner, repository, what="revision"):
        files = self.server.repositories.get(f"{owner}/{repository}")
        if files is None:
            self._answer({"error": self.path}, 404, {"X-Error-Code": "RepoNotFound"})
        elif what == "tree":
            self._answer([{"type": "file", "path": f, "size": len(c), "oid": f} for f, c in files.items()])
        else:
            siblings = [{"rfilename": name} for name in files]
            self._answer({"id": f"{owner}/{repository}", "sha": COMMIT, "siblings": siblings})

    def _upload_address(self, entry):
        upload = {"href": f"{self.server.url}/objects/{entry['oid']}"}
        return {"oid": entry["oid"], "size": entry["size"], "actions": {"upload": upload}}

    def _apply(self, files, line):
        value = line["value"]
        if line["key"] == "file":
            files[value["path"]] = base64.b64decode(value["content"])
        elif line["key"] == "lfsFile":
            files[value["path"]] = self.server.objects[value["oid"]]

    def _answer(self, content, status=200, headers=None):
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for key, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)


def _mode(file):
    large = file["path"].endswith(".safetensors")
    return {"path": file["path"], "uploadMode": "lfs" if large else "regular", "shouldIgnore": False}
