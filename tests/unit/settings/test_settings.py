"""Settings: order of sources, faults that are named, secrets that are not shown."""

from __future__ import annotations

from pathlib import Path

import pytest
from forebay.settings import SettingsError, load_settings

SECRET_URL = "postgresql+asyncpg://forebay:hunter2@db/forebay"


def write(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "forebay.yaml"
    path.write_text(text)
    return path


def test_sources_rise_from_file_to_environment_to_flags(tmp_path: Path) -> None:
    file = write(tmp_path, "grpc: {port: 1, drain_s: 1, max_message_bytes: 2048}\n")
    environ = {"FOREBAY_GRPC_PORT": "2", "FOREBAY_GRPC__DRAIN_S": "2", "HOME": "/x"}
    loaded = load_settings({"grpc.port": 3, "http.port": None}, file, environ)
    assert loaded.settings.grpc.port == 3
    assert loaded.settings.grpc.drain_s == 2.0
    assert loaded.settings.grpc.max_message_bytes == 2048
    assert loaded.settings.http.port == 8080
    explained = {name: (value, source) for name, value, source in loaded.explain()}
    assert explained["grpc.port"] == ("3", "--grpc-port")
    assert explained["grpc.drain_s"] == ("2.0", "FOREBAY_GRPC__DRAIN_S")
    assert explained["grpc.max_message_bytes"] == ("2048", str(file))
    assert explained["http.port"] == ("8080", "default")


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (b"grpc:\n  host: \xff\n", "can't decode byte 0xff"),
        (b"data: 2026-13-01\n", "month must be in 1..12"),
        (b"grpc:\n\tport: 1\n", "line 2, column 1: found character '\\t'"),
    ],
)
def test_a_file_that_cannot_be_read_is_a_line_that_names_it(
    tmp_path: Path, data: bytes, said: str
) -> None:
    file = tmp_path / "forebay.yaml"
    file.write_bytes(data)
    with pytest.raises(SettingsError) as caught:
        load_settings(config_file=file, environ={})
    assert str(caught.value).startswith(f"{file}: ")
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_fault_of_the_files_form_shows_no_password(tmp_path: Path) -> None:
    file = write(tmp_path, "storage:\n  redis: redis://:hunter2@db: 1\n")
    with pytest.raises(SettingsError, match="line 2, column 29") as caught:
        load_settings(config_file=file, environ={})
    assert "hunter2" not in str(caught.value)


def test_no_time_is_infinite() -> None:
    with pytest.raises(SettingsError, match=r"grpc\.drain_s is 'inf' .* should be a finite number"):
        load_settings(environ={"FOREBAY_GRPC__DRAIN_S": "inf"})


def test_the_file_may_be_named_by_a_variable(tmp_path: Path) -> None:
    file = write(tmp_path, "http: {port: 9}\n")
    assert load_settings(environ={"FOREBAY_CONFIG": str(file)}).settings.http.port == 9


def test_short_names() -> None:
    environ = {"FOREBAY_HOME": "/h", "FOREBAY_GRPC_PORT": "0", "FOREBAY_HTTP_PORT": "81"}
    s = load_settings(environ=environ).settings
    assert (str(s.home), s.grpc.port, s.http.port) == ("/h", 0, 81)
    assert s.models_root == Path("/h/models")
    assert s.database_url == "sqlite+aiosqlite:////h/forebay.db"


def test_defaults_are_loopback_and_under_the_home() -> None:
    s = load_settings(environ={}).settings
    assert s.home == Path("~/.forebay").expanduser()
    assert (s.grpc.host, s.grpc.port, s.http.port) == ("127.0.0.1", 50051, 8080)
    assert not s.keys_required


def test_paths_may_start_with_a_tilde() -> None:
    s = load_settings(environ={"FOREBAY_MODELS__ROOT": "~/m"}).settings
    assert s.models_root == Path("~/m").expanduser()


def test_text_stays_text_and_lists_are_yaml() -> None:
    environ = {
        "FOREBAY_HOME": "2026",
        "FOREBAY_GRPC__HOST": "[::1]",
        "FOREBAY_MODELS__PROVIDERS": "[cuda, cpu]",
        "FOREBAY_HTTP__CORS_ORIGINS": "https://a.example",
        "FOREBAY_AUTH__ALLOW_INSECURE_BIND": "true",
    }
    s = load_settings(environ=environ).settings
    assert s.home.name == "2026"
    assert s.grpc.host == "[::1]"
    assert s.models.providers == ["cuda", "cpu"]
    assert s.http.cors_origins == ["https://a.example"]
    assert s.auth.allow_insecure_bind is True


@pytest.mark.parametrize(
    ("environ", "words"),
    [
        ({"FOREBAY_GRPC_PORT": "70000"}, ["grpc.port", "70000", "FOREBAY_GRPC_PORT", "65535"]),
        ({"FOREBAY_GRPC_PORT": "x"}, ["grpc.port", "'x'", "integer"]),
        ({"FOREBAY_AUTH__REQUIRED": "no"}, ["auth.required", "'no'", "'always'"]),
        ({"FOREBAY_MODELS__PROVIDERS": "[tpu]"}, ["models.providers.0", "tpu", "'cuda'"]),
        ({"FOREBAY_GRPC__PROT": "1"}, ["FOREBAY_GRPC__PROT", "grpc.port"]),
        ({"FOREBAY_NONSENSE": "1"}, ["FOREBAY_NONSENSE"]),
        ({"FOREBAY_GRPC__TLS_KEY": "/k"}, ["FOREBAY_GRPC__TLS_KEY", "tls_certificate"]),
        ({"FOREBAY_GRPC__TLS_CLIENT_CA": "/c"}, ["tls_client_ca", "tls_key"]),
        ({"FOREBAY_HTTP__TLS_CERTIFICATE": "/k"}, ["FOREBAY_HTTP__TLS_CERTIFICATE", "tls_key"]),
        ({"FOREBAY_HTTP__TLS_CLIENT_CA": "/c"}, ["FOREBAY_HTTP__TLS_CLIENT_CA", "tls_key"]),
        ({"FOREBAY_CLIENT__TLS_KEY": "/k"}, ["FOREBAY_CLIENT__TLS_KEY", "tls_certificate"]),
    ],
)
def test_a_wrong_variable_is_named(environ: dict[str, str], words: list[str]) -> None:
    with pytest.raises(SettingsError) as e:
        load_settings(environ=environ)
    for word in words:
        assert word in str(e.value)
    assert "\n" not in str(e.value)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("grpc: {prot: 1}", ["grpc.prot", "grpc.port"]),
        ("nonsense: 1", ["nonsense"]),
        ("grpc: 5", ["grpc", "5"]),
        ("- a", ["mapping"]),
        ("grpc: {port: [", ["forebay.yaml"]),
        ("grpc: {port: }", ["grpc.port", "None"]),
    ],
)
def test_a_wrong_file_is_named(tmp_path: Path, text: str, words: list[str]) -> None:
    with pytest.raises(SettingsError) as e:
        load_settings(config_file=write(tmp_path, text), environ={"FOREBAY_GRPC__DRAIN_S": "1"})
    for word in [*words, "forebay.yaml"]:
        assert word in str(e.value)


def test_an_empty_section_is_no_fault(tmp_path: Path) -> None:
    loaded = load_settings(config_file=write(tmp_path, "grpc:\nhttp: {port: 1}\n"), environ={})
    assert loaded.settings.http.port == 1


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="absent"):
        load_settings(config_file=tmp_path / "absent.yaml", environ={})


def test_kubernetes_service_links_are_passed_over() -> None:
    environ = {
        "FOREBAY_SERVICE_HOST": "10.0.0.1",
        "FOREBAY_SERVICE_PORT_GRPC": "50051",
        "FOREBAY_PORT": "tcp://10.0.0.1:50051",
        "FOREBAY_PORT_50051_TCP_ADDR": "10.0.0.1",
        "FOREBAY_GRPC_PORT": "tcp://10.0.0.1:50051",
    }
    assert load_settings(environ=environ).settings.grpc.port == 50051


def test_secrets_are_never_shown(tmp_path: Path) -> None:
    environ = {"FOREBAY_STORAGE__DATABASE": SECRET_URL}
    loaded = load_settings(environ=environ)
    assert loaded.settings.database_url == SECRET_URL
    assert "hunter2" not in repr(loaded)
    assert "hunter2" not in str(loaded.explain())
    for text in (f"storage: '{SECRET_URL}'", f"storage: {{database: [{SECRET_URL!r}]}}"):
        with pytest.raises(SettingsError) as e:
            load_settings(config_file=write(tmp_path, text), environ={})
        assert "hunter2" not in str(e.value)
        assert "storage" in str(e.value)


def test_settings_are_frozen() -> None:
    s = load_settings(environ={}).settings
    with pytest.raises(ValueError, match="frozen"):
        s.grpc.port = 1


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "10.0.0.1", "db.example"])
def test_beyond_loopback_keys_are_needed(host: str) -> None:
    s = load_settings({"http.host": host}, environ={}).settings
    assert s.keys_required
    s.check_exposure()
    never = {"http.host": host, "auth.required": "never"}
    with pytest.raises(SettingsError, match=r"http\.host"):
        load_settings(never, environ={}).settings.check_exposure()
    load_settings({**never, "auth.allow_insecure_bind": True}, environ={}).settings.check_exposure()
    load_settings({**never, "http.enabled": False}, environ={}).settings.check_exposure()


@pytest.mark.parametrize(
    ("host", "address"),
    [
        ("127.0.0.1", "127.0.0.1:7"),
        ("::1", "[::1]:7"),
        ("[::1]", "[::1]:7"),
        ("unix:/tmp/s", "unix:/tmp/s"),
    ],
)
def test_clients_find_the_address_on_which_the_server_listens(host: str, address: str) -> None:
    settings = load_settings({"grpc.host": host, "grpc.port": 7}, environ={}).settings
    assert settings.grpc.address == address


@pytest.mark.parametrize("host", ["127.0.0.1", "127.1.2.3", "::1", "localhost", "unix:/tmp/s"])
def test_loopback_needs_no_keys(host: str) -> None:
    s = load_settings({"grpc.host": host}, environ={}).settings
    assert not s.keys_required
    s.check_exposure()


@pytest.mark.parametrize(
    "name",
    [
        "grpc.max_connection_age_s",
        "grpc.keepalive_s",
        "grpc.keepalive_timeout_s",
        "grpc.drain_s",
        "grpc.max_waiting_s",
        "grpc.receive_timeout_s",
        "grpc.tls_reload_s",
        "http.timeout_s",
        "http.idle_timeout_s",
        "http.tls_reload_s",
    ],
)
def test_times_that_no_transport_can_count_are_refused(name: str) -> None:
    """They ended the start without a word of the setting."""
    load_settings({name: 2e6}, environ={})
    for given in (2e6 + 1, 1e30):
        with pytest.raises(SettingsError, match=rf"{name}.*2000000"):
            load_settings({name: given}, environ={})


@pytest.mark.parametrize(
    ("text", "name", "near"),
    [
        ("grcp: {port: 1}", "grcp.port", "grpc.port"),
        ("htp: {port: 1}", "htp.port", "http.port"),
        ("modles: {root: /x}", "modles.root", "models.root"),
        ("grpc: {prot: 1}", "grpc.prot", "grpc.port"),
        ("grcp: 5", "grcp", "grpc"),
        ("log_level: DEBUG", "log_level", "observability.log_level"),
    ],
)
def test_an_unknown_section_or_field_is_answered_with_the_nearest(
    tmp_path: Path, text: str, name: str, near: str
) -> None:
    file = write(tmp_path, text)
    with pytest.raises(SettingsError) as caught:
        load_settings({}, file, {})
    said = f"{name} (from {file}) names no setting. Did you mean {near}"
    assert str(caught.value).startswith(said), caught.value


@pytest.mark.parametrize(
    ("variable", "near"),
    [
        ("FOREBAY_GRCP__PORT", "grpc.port"),
        ("FOREBAY_HTP_PORT", "http.port"),
        ("FOREBAY_LOG_LEVEL", "observability.log_level"),
        ("FOREBAY_GRPC", "grpc.port"),
    ],
)
def test_an_unknown_variable_is_answered_with_the_nearest(variable: str, near: str) -> None:
    with pytest.raises(SettingsError) as caught:
        load_settings({}, None, {variable: "1"})
    assert str(caught.value).startswith(f"{variable} names no setting. Did you mean {near}")
