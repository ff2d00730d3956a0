"""A private git server: git's own HTTP backend behind TLS on loopback, that wants a token and remembers who asked."""

from __future__ import annotations

import base64
import contextlib
import datetime
import http.server
import ipaddress
import ssl
import subprocess
import threading
from collections.abc import Generator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from tests.support.git_repos import ENVIRONMENT


@dataclass
class GitServer:
    """A running server. `moved` says where a path has gone."""

    host: str
    certificate: Path
    folders: Mapping[str, Path]
    """For each token, the folder whose repositories it opens; `""` is for those who bring none."""
    moved: dict[str, str] = field(default_factory=dict[str, str])
    seen: list[tuple[str, str | None]] = field(default_factory=list[tuple[str, str | None]])
    """Each request's path and Authorization header."""

    def address(self, path: str) -> str:
        return f"https://{self.host}/{path}"

    def trusted_by(self, home: Path) -> Path:
        """A home folder whose git trusts this server; git's configuration there may be added to."""
        home.mkdir(exist_ok=True)
        with (home / ".gitconfig").open("a") as config:
            config.write(f'[http "https://{self.host}/"]\n\tsslCAInfo = {self.certificate}\n')
        return home


def basic(token: str) -> str:
    """The header in which git shows a token."""
    return "Basic " + base64.b64encode(f"x-access-token:{token}".encode()).decode()


@contextlib.contextmanager
def git_server(folder: Path, folders: Mapping[str, Path]) -> Generator[GitServer]:
    """Serve the repositories of `folders`, by token. The certificate is put into `folder`."""
    certificate, key = _certificate(folder)
    found = GitServer("", certificate, folders)

    class Handler(http.server.BaseHTTPRequestHandler):
        timeout = 20

        def do_GET(self) -> None:
            given = self.headers.get("Authorization")
            found.seen.append((self.path, given))
            path, _, query = self.path.partition("?")
            for old, new in found.moved.items():
                if path.startswith(old):
                    self.send_response(302)
                    self.send_header("Location", new + self.path.removeprefix(old))
                    self.send_header("Content-Length", "0")
                    self.end_headers()
                    return
            root = next((root for token, root in folders.items() if given == (basic(token) if token else None)), None)
            if root is None:
                self.send_response(401)
                self.send_header("WWW-Authenticate", 'Basic realm="x"')
                self.send_header("Content-Length", "0")
                self.end_headers()
                return
            env = {
                "PATH": ENVIRONMENT["PATH"],
                "GIT_PROJECT_ROOT": str(root),
                "GIT_HTTP_EXPORT_ALL": "1",
                "PATH_INFO": path,
                "QUERY_STRING": query,
                "REQUEST_METHOD": self.command,
                "CONTENT_TYPE": self.headers.get("Content-Type") or "",
                "HTTP_CONTENT_ENCODING": self.headers.get("Content-Encoding") or "",
                "GIT_PROTOCOL": self.headers.get("Git-Protocol") or "",
            }
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            out = subprocess.run(["git", "http-backend"], input=body, env=env, capture_output=True).stdout
            head, _, content = out.partition(b"\r\n\r\n")
            fields = dict(line.split(": ", 1) for line in head.decode().split("\r\n"))
            self.send_response(int(fields.pop("Status", "200").split()[0]))
            for name, value in fields.items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        do_POST = do_GET

        def log_message(self, format: str, *args: object) -> None:
            pass

    class Server(http.server.ThreadingHTTPServer):
        def handle_error(self, request: object, client_address: object) -> None:
            """A client that goes away in the middle is no news."""

    with Server(("127.0.0.1", 0), Handler) as httpd:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(certificate, key)
        # The handshake is the connection's own thread's: it holds up nobody else.
        httpd.socket = context.wrap_socket(httpd.socket, server_side=True, do_handshake_on_connect=False)
        found.host = f"127.0.0.1:{httpd.server_port}"
        thread = threading.Thread(target=httpd.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield found
        finally:
            httpd.shutdown()
            thread.join()


def _certificate(folder: Path) -> tuple[Path, Path]:
    folder.mkdir(exist_ok=True)
    secret = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "127.0.0.1")])
    now = datetime.datetime.now(datetime.UTC)
    made = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(secret.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(secret, hashes.SHA256())
    )
    certificate, key = folder / "certificate.pem", folder / "key.pem"
    certificate.write_bytes(made.public_bytes(serialization.Encoding.PEM))
    key.write_bytes(
        secret.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )
    )
    return certificate, key
