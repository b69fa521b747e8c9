"""What deploy/ asks for is there: metrics of the real exposition, fields that Kubernetes knows."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml
from forebay.settings import GrpcSettings, Settings
from kubernetes_validate import latest_version, validate
from prometheus_client.parser import text_string_to_metric_families

from tests.unit.observability.test_metrics import filled

DEPLOY = Path(__file__).parents[3] / "deploy"
NAMES = re.compile(r"\b(?:forebay|process)_[a-z0-9_]+\b")
LABELS = re.compile(r"by \(([^)]*)\)")


def exposed() -> dict[str, set[str]]:
    """Labels by sample name."""
    out: dict[str, set[str]] = {}
    for family in text_string_to_metric_families(filled().exposition().decode()):
        for s in family.samples:
            out.setdefault(s.name, set()).update(s.labels)
    return out


def expressions() -> list[str]:
    found = []
    for file in (DEPLOY / "grafana").glob("*.json"):
        board = json.loads(file.read_text())
        found += [t["expr"] for p in board["panels"] for t in p["targets"]]
        found += [v["query"] for v in board["templating"]["list"] if v["type"] == "query"]
    for file in (DEPLOY / "prometheus").glob("*.yml"):
        for group in yaml.safe_load(file.read_text())["groups"]:
            found += [r["expr"] for r in group["rules"]]
    return found


def test_every_expression_asks_for_what_is_exposed() -> None:
    have = exposed()
    wanted = expressions()
    assert len(wanted) > 15
    for expression in wanted:
        names = NAMES.findall(expression)
        for name in names:
            assert name in have, f"{name} of {expression!r} is not exposed"
        labels = {x.strip() for group in LABELS.findall(expression) for x in group.split(",")}
        for name in names:
            assert labels <= have[name] | {"le", "instance"}, (expression, labels - have[name])


def promtool() -> str:
    found = os.environ.get("FOREBAY_TEST_PROMTOOL") or shutil.which("promtool")
    if not found:
        pytest.skip("no promtool: apt install prometheus")
    return found


def test_prometheus_takes_the_rules_and_they_fire() -> None:
    tool = promtool()
    rules = sorted(str(f) for f in (DEPLOY / "prometheus").glob("*.rules.yml"))
    cases = Path(__file__).with_name("rules.promtool.yml")
    for command in (["check", "rules", *rules], ["test", "rules", str(cases)]):
        done = subprocess.run([tool, *command], capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr


def manifests() -> list[dict]:
    """The base's resources, and those of the pool where kubectl can build it."""
    out = [
        d
        for f in sorted((DEPLOY / "kubernetes" / "base").glob("*.yaml"))
        for d in yaml.safe_load_all(f.read_text())
    ]
    if shutil.which("kubectl"):
        command = ["kubectl", "kustomize", str(DEPLOY / "kubernetes" / "pools" / "qwen")]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        out += list(yaml.safe_load_all(done.stdout))
    return [d for d in out if d["kind"] != "Kustomization"]


def test_kubernetes_knows_every_field_of_the_manifests() -> None:
    found = manifests()
    kinds = {d["kind"] for d in found}
    assert {"Deployment", "Service", "HorizontalPodAutoscaler", "PodDisruptionBudget"} <= kinds
    for document in found:
        validate(document, latest_version(), strict=True)


def test_the_autoscaler_and_the_services_point_at_the_pool() -> None:
    by_kind = {d["kind"]: d for d in manifests()}
    deployment, scaler = by_kind["Deployment"], by_kind["HorizontalPodAutoscaler"]
    assert scaler["spec"]["scaleTargetRef"]["name"] == deployment["metadata"]["name"]
    metric = scaler["spec"]["metrics"][0]["pods"]["metric"]["name"]
    assert metric in exposed()
    labels = deployment["spec"]["template"]["metadata"]["labels"]
    for document in manifests():
        if document["kind"] == "Service":
            wanted = document["spec"]["selector"]
            assert wanted.items() <= labels.items() or "forebay.dev/pool" not in wanted
    probe = deployment["spec"]["template"]["spec"]["containers"][0]["readinessProbe"]
    assert probe["httpGet"]["path"] == "/readyz"


def test_prometheus_shows_a_key_and_names_pods_as_the_adapter_asks() -> None:
    """Beyond loopback, where pods listen, /metrics is refused without one."""
    for file in ("kubernetes/prometheus-scrape.yaml", "compose/prometheus.yaml"):
        (job,) = yaml.safe_load((DEPLOY / file).read_text())["scrape_configs"]
        assert job["authorization"]["credentials_file"], file
    scrape = yaml.safe_load((DEPLOY / "kubernetes/prometheus-scrape.yaml").read_text())
    (job,) = scrape["scrape_configs"]
    (rule,) = yaml.safe_load((DEPLOY / "kubernetes/prometheus-adapter.yaml").read_text())["rules"][
        "custom"
    ]
    made = {r["target_label"] for r in job["relabel_configs"] if "target_label" in r}
    assert made == set(rule["resources"]["overrides"])
    (kept,) = (r["regex"] for r in job["relabel_configs"] if r.get("action") == "keep")
    pod = next(d for d in manifests() if d["kind"] == "Deployment")["spec"]["template"]
    name, port = kept.split(";")
    assert pod["metadata"]["labels"]["app.kubernetes.io/name"] == name
    assert port in {p["name"] for p in pod["spec"]["containers"][0]["ports"]}


def test_every_variable_is_a_setting() -> None:
    """With any value: a name that is none stops the start."""
    pod = next(d for d in manifests() if d["kind"] == "Deployment")["spec"]["template"]["spec"]
    names = {e["name"] for e in pod["containers"][0]["env"]}
    compose = yaml.safe_load((DEPLOY / "compose/compose.yaml").read_text())
    for service in compose["services"].values():
        names |= set(service.get("environment", ()))
    names = {n for n in names if n.startswith("FOREBAY_")}
    assert len(names) > 4
    for name in names:
        section, _, field = name.removeprefix("FOREBAY_").lower().partition("__")
        assert field in type(getattr(Settings(), section)).model_fields, name


def test_envoys_routes_lead_to_clusters_that_are_there() -> None:
    """Envoy itself was not at hand; this is no replacement for `envoy --mode validate`."""
    config = yaml.safe_load((DEPLOY / "envoy" / "envoy.yaml").read_text())["static_resources"]
    clusters = {c["name"] for c in config["clusters"]}
    text = json.dumps(config["listeners"])
    assert set(re.findall(r'"cluster": "([^"]+)"', text)) == clusters


def test_compose_mounts_files_that_are_there() -> None:
    folder = DEPLOY / "compose"
    services = yaml.safe_load((folder / "compose.yaml").read_text())["services"]
    for service in services.values():
        for volume in service.get("volumes", ()):
            source = volume.split(":")[0]
            if source.startswith("."):
                assert (folder / source).exists(), source
        for name in service.get("depends_on", ()):
            assert name in services


def test_one_replica_writes_models_and_none_into_a_folder_that_docker_made_as_root() -> None:
    compose = yaml.safe_load((DEPLOY / "compose/compose.yaml").read_text())
    mounts = {
        name: next(v for v in service["volumes"] if ":/data/models" in v)
        for name, service in compose["services"].items()
        if name.startswith("forebay-")
    }
    writers = [name for name, mount in mounts.items() if not mount.endswith(":ro")]
    assert len(mounts) == 2 and writers == ["forebay-0"]
    readers = compose["services"]["forebay-1"]
    assert readers["environment"]["FOREBAY_MODELS__STARTERS"] == "false"
    assert readers["environment"].items() >= compose["x-forebay"]["environment"].items()
    # A volume that is new takes over its owner from the image.
    assert {re.sub(r".*:-(\w+)}.*", r"\1", mount) for mount in mounts.values()} == {"models"}
    assert "models" in compose["volumes"]
    shared = {"files", "knowledge"}
    for name in mounts:
        volumes = compose["services"][name]["volumes"]
        assert {f"{v}:/data/{v}" for v in shared} <= set(volumes)
    for file in ("Dockerfile", "Dockerfile.gpu"):
        (made,) = re.findall(
            r"mkdir -p (.*) && chown -R forebay /data", (DEPLOY.parent / file).read_text()
        )
        assert set(made.split()) == {f"/data/{v}" for v in {"models", *shared}}


def test_nginx_bounds_no_upload_that_forebay_takes() -> None:
    text = (DEPLOY / "nginx/nginx.conf").read_text()
    assert re.search(r"client_max_body_size\s+0;", text)


def test_whoever_stops_a_replica_waits_for_gateway_and_server_to_drain() -> None:
    """One after the other, each for grpc.drain_s; what is killed before loses calls."""
    pod = yaml.safe_load((DEPLOY / "kubernetes/base/deployment.yaml").read_text())
    pod = pod["spec"]["template"]["spec"]
    container = pod["containers"][0]
    drain_s = float(
        next(e["value"] for e in container["env"] if e["name"] == "FOREBAY_GRPC__DRAIN_S")
    )
    waits_s = float(container["lifecycle"]["preStop"]["exec"]["command"][1])
    assert pod["terminationGracePeriodSeconds"] >= waits_s + 2 * drain_s
    compose = yaml.safe_load((DEPLOY / "compose/compose.yaml").read_text())
    grace_s = float(compose["x-forebay"]["stop_grace_period"].removesuffix("s"))
    assert grace_s >= 2 * GrpcSettings().drain_s
