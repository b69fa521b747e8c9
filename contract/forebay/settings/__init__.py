"""All settings, and the only reader of the environment.

In rising order: defaults, a YAML file (`--config` or FOREBAY_CONFIG), environment variables, flags.
A variable names its setting with two underscores between levels: FOREBAY_GRPC__PORT is `grpc.port`.
FOREBAY_HOME, FOREBAY_GRPC_PORT and FOREBAY_HTTP_PORT are short names. An unknown key, in the file
or in the environment, stops the start as a wrong value does, with a line that names it. Lists are
given as YAML in variables: FOREBAY_MODELS__PROVIDERS='[cuda, cpu]'. Variables that Kubernetes makes
for a service named forebay (FOREBAY_SERVICE_HOST, FOREBAY_PORT=tcp://...) are nobody's settings and
are passed over.
"""

from forebay.settings.sections import (
    AuthSettings,
    BatchSettings,
    ClientSettings,
    FileSettings,
    GenerationSettings,
    GrpcSettings,
    HttpSettings,
    KnowledgeSettings,
    ModelSettings,
    ObservabilitySettings,
    PortSettings,
    ResponseSettings,
    RetrievalSettings,
    Settings,
    SettingsError,
    StorageSettings,
    is_loopback,
)
from forebay.settings.sources import Loaded, load_settings

__all__ = [
    "AuthSettings",
    "BatchSettings",
    "ClientSettings",
    "FileSettings",
    "GenerationSettings",
    "GrpcSettings",
    "HttpSettings",
    "KnowledgeSettings",
    "Loaded",
    "ModelSettings",
    "ObservabilitySettings",
    "PortSettings",
    "ResponseSettings",
    "RetrievalSettings",
    "Settings",
    "SettingsError",
    "StorageSettings",
    "is_loopback",
    "load_settings",
]
