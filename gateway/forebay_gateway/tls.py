"""TLS of a port on which the gateway itself listens."""

from __future__ import annotations

import ssl

from forebay.settings import SettingsError
from forebay.tls import Pem, TlsFiles


class Certificates:
    """The certificate in force: connections begin with the one that was taken last."""

    def __init__(self, files: TlsFiles) -> None:
        """Raises SettingsError: the files cannot be read, or are not what they should be."""
        self._files = files
        files.read()
        try:
            self._current = self._made()
            self.context = self._made()
        except ssl.SSLError as e:
            raise SettingsError(
                f"http.tls_certificate {str(files.certificate)!r}, http.tls_key {str(files.key)!r}"
                f" or http.tls_client_ca is not what it should be: {e}"
            ) from None
        # uvicorn's listener keeps the context that it was given. A changed half of it would serve
        # a certificate without its key, so each connection turns to the whole of the current one.
        self.context.sni_callback = self._turn

    def take(self, _: Pem) -> None:
        """Use renewed files. Raises OSError, and keeps the old ones."""
        self._current = self._made()

    def _turn(self, connection: ssl.SSLObject, _name: str | None, _context: object) -> None:
        connection.context = self._current

    def _made(self) -> ssl.SSLContext:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        # An empty password: OpenSSL would ask the terminal for that of a key that has one.
        context.load_cert_chain(self._files.certificate, self._files.key, lambda: "")
        context.set_alpn_protocols(["http/1.1"])
        if self._files.client_ca is not None:
            context.verify_mode = ssl.CERT_REQUIRED
            context.load_verify_locations(self._files.client_ca)
        return context
