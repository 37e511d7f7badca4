"""HTTPS, and certificates that change while the server runs."""

from __future__ import annotations

import shutil
import ssl
import subprocess
from pathlib import Path

import httpx
import pytest

from jaxserve_server.tls import CertificateWatch

pytestmark = pytest.mark.skipif(shutil.which("openssl") is None, reason="no openssl to make certificates with")


def make_certificate(folder: Path, name: str) -> tuple[str, str]:
    """(certificate, key) files of a new self-signed pair for 127.0.0.1."""
    certificate, key = folder / f"{name}.pem", folder / f"{name}.key"
    subprocess.run(
        [
            *("openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"),
            *("-days", "2", "-subj", f"/CN={name}", "-addext", "subjectAltName=IP:127.0.0.1"),
            *("-keyout", str(key), "-out", str(certificate)),
        ],
        check=True,
        capture_output=True,
    )
    return str(certificate), str(key)


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    return make_certificate(tmp_path_factory.mktemp("tls"), "first")


def served(context: ssl.SSLContext, trusted: str) -> bytes | None:
    """The certificate that a client which trusts `trusted` is shown; None if it refuses."""
    client = ssl.create_default_context(cafile=trusted)
    to_client, to_server = ssl.MemoryBIO(), ssl.MemoryBIO()
    ends = (
        context.wrap_bio(to_server, to_client, server_side=True),
        client.wrap_bio(to_client, to_server, server_hostname="127.0.0.1"),
    )
    for _ in range(4):
        for end in reversed(ends):
            try:
                end.do_handshake()
            except ssl.SSLWantReadError:
                continue
            except ssl.SSLCertVerificationError:
                return None
    return ends[1].getpeercert(binary_form=True)


def test_https_is_served_and_plain_http_is_not(start_server, pair):
    certificate, key = pair
    server = start_server(server={"ssl_certfile": certificate, "ssl_keyfile": key})
    server.wait_for_line(f"ready: https://127.0.0.1:{server.port}")
    with httpx.Client(verify=ssl.create_default_context(cafile=certificate), trust_env=False) as client:
        url = f"https://127.0.0.1:{server.port}"
        assert client.get(url + "/ping").status_code == 200
        refused = client.post(url + "/v1/count", content=b"{}", headers={"content-encoding": "gzip"})
        assert refused.status_code == 415
        assert client.post(url + "/v1/count", json={"n": 2}).json() == [0, 1]
    with pytest.raises(httpx.HTTPError):
        server.ask("GET", "/ping")
    assert "Traceback" not in server.log


def test_a_new_certificate_is_taken_and_a_broken_one_is_not(tmp_path, pair):
    certificate, key = make_certificate(tmp_path, "live")
    old = Path(certificate).read_text()
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    watch = CertificateWatch(context, certificate, key)
    assert not watch.refresh()

    Path(certificate).write_text(Path(pair[0]).read_text())  # the key does not fit yet
    assert not watch.refresh()
    trusted = tmp_path / "old.pem"
    trusted.write_text(old)
    assert served(context, str(trusted)) == ssl.PEM_cert_to_DER_cert(old)

    Path(key).write_text(Path(pair[1]).read_text())
    assert watch.refresh()
    assert not watch.refresh()
    assert served(context, str(trusted)) is None
    assert served(context, pair[0]) == ssl.PEM_cert_to_DER_cert(Path(pair[0]).read_text())

    Path(key).unlink()
    assert not watch.refresh()
