"""The PEM files of a port's TLS: read at the start, and again when they are renewed."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from pathlib import Path

from forebay.settings import PortSettings, SettingsError

log = logging.getLogger("forebay.tls")

#: Certificate chain, key, authority of client certificates.
Pem = tuple[bytes, bytes, bytes | None]


class TlsFiles:
    """The files of a port.

    Args:
        section: the settings' name, for messages: `grpc` or `http`.
    """

    def __init__(self, section: str, settings: PortSettings) -> None:
        assert settings.tls_certificate is not None and settings.tls_key is not None
        self.certificate: Path = settings.tls_certificate
        self.key: Path = settings.tls_key
        self.client_ca: Path | None = settings.tls_client_ca
        self._section = section
        self._reload_s = settings.tls_reload_s
        self._seen: list[int] = []

    def read(self) -> Pem:
        """Their contents.

        Raises:
            SettingsError: a file cannot be read; it names the setting.
        """
        seen = self._stamps()  # before: what is written meanwhile is read again
        ca = self._read("tls_client_ca", self.client_ca) if self.client_ca else None
        pem = self._read("tls_certificate", self.certificate), self._read("tls_key", self.key), ca
        self._seen = seen
        return pem

    def follow(self, take: Callable[[Pem], None], ended: threading.Event) -> None:
        """Take renewed files without a restart. Blocks until the event is set.

        Args:
            take: uses them for new connections; raises OSError, ValueError or SettingsError where they
                are not what they should be, and keeps the old ones.
        """
        while not ended.wait(self._reload_s):
            if self._stamps() == self._seen:
                continue
            try:
                take(self.read())
            except (OSError, ValueError, SettingsError) as e:  # half written, say: try again
                self._seen = []
                log.warning("the new TLS files are not usable yet: %s", e)
                continue
            log.info("%s: TLS certificates reloaded", self._section)

    def _read(self, name: str, path: Path) -> bytes:
        try:
            return path.read_bytes()
        except OSError as e:
            raise SettingsError(f"{self._section}.{name} is {str(path)!r}: {e.strerror}") from None

    def _stamps(self) -> list[int]:
        every = (self.certificate, self.key, self.client_ca)
        try:
            return [p.stat().st_mtime_ns for p in every if p is not None]
        except OSError:
            return []


def tls_files(section: str, settings: PortSettings) -> TlsFiles | None:
    """The files of a port; None: it is in the clear."""
    return TlsFiles(section, settings) if settings.secure else None
