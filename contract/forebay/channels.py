"""Channels to a gRPC server, as the settings have them: in the clear, or by TLS."""

from __future__ import annotations

from pathlib import Path

import grpc

from forebay.settings import ClientSettings, SettingsError


def credentials(settings: ClientSettings) -> grpc.ChannelCredentials:
    """What a channel by TLS needs.

    Raises:
        SettingsError: a file cannot be read; it names the setting.
    """
    return grpc.ssl_channel_credentials(
        root_certificates=_read("tls_ca", settings.tls_ca),
        private_key=_read("tls_key", settings.tls_key),
        certificate_chain=_read("tls_certificate", settings.tls_certificate),
    )


def options(settings: ClientSettings) -> list[tuple[str, str]]:
    """What else its channel needs."""
    return [("grpc.ssl_target_name_override", settings.tls_name)] if settings.tls_name else []


def _read(name: str, path: Path | None) -> bytes | None:
    if path is None:
        return None
    try:
        return path.read_bytes()
    except OSError as e:
        raise SettingsError(f"client.{name} is {str(path)!r}: {e.strerror}") from None
