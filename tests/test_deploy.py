"""What docker-compose.yml, the Dockerfile and deploy/ name must exist: settings, commands, metrics, topics, files. No Docker needed."""

import json
import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from prometheus_client import CollectorRegistry

from model.settings import Settings
from trainer.metrics import Metrics as TrainerMetrics
from trainer.settings import TrainerSettings
from worker.metrics import Metrics as WorkerMetrics
from worker.settings import WorkerSettings

ROOT = Path(__file__).parents[1]
COMPOSE = yaml.safe_load((ROOT / "docker-compose.yml").read_text())
OURS = {name: service for name, service in COMPOSE["services"].items() if service["image"] == "streamscore"}
KUBERNETES = list(yaml.safe_load_all((ROOT / "deploy/kubernetes/streamscore.yaml").read_text()))
CONTAINERS = [c for d in KUBERNETES if d["kind"] == "StatefulSet" for c in d["spec"]["template"]["spec"]["containers"]]
DASHBOARD = json.loads((ROOT / "deploy/grafana/dashboards/streamscore.json").read_text())
ALERTS = yaml.safe_load((ROOT / "deploy/prometheus/alerts.yml").read_text())
PROGRAMS: dict[str, type[Settings]] = {"worker": WorkerSettings, "trainer": TrainerSettings}

SAMPLES = {"counter": ("_total",), "gauge": ("",), "histogram": ("_bucket", "_sum", "_count")}
PROMETHEUS_OWN = {"up", "ALERTS"}
UNWATCHED = {  # for somebody who looks for something particular
    "streamscore_stream_clock_timestamp_seconds",
    "streamscore_trainer_log_bytes",
    "streamscore_trainer_log_files",
    "streamscore_trainer_rows_total",
    "streamscore_trainer_window_end_timestamp_seconds",
    "streamscore_trainer_window_events",
}


def kubernetes_environments() -> Iterator[tuple[str, dict[str, str]]]:
    """(program, environment) of each container, as Kubernetes would put it together."""
    values = {d["metadata"]["name"]: d.get("data") or d.get("stringData") for d in KUBERNETES if d["kind"] in ("ConfigMap", "Secret")}
    for container in CONTAINERS:
        environment = {e["name"]: e["value"] for e in container.get("env", [])}
        for source in container["envFrom"]:
            environment.update(values[next(iter(source.values()))["name"]])
        yield container["args"][0], environment


ENVIRONMENTS = [
    *(
        (service["command"][0], {k: str(v) for k, v in service["environment"].items()})
        for service in OURS.values()
        if "environment" in service
    ),
    *kubernetes_environments(),
]


@pytest.mark.parametrize(("program", "environment"), ENVIRONMENTS)
def test_every_variable_is_a_setting_of_its_program(program: str, environment: dict[str, str]) -> None:
    assert PROGRAMS[program].read(environ=environment)  # refuses names that it does not know, and impossible values
    assert all(name.startswith("STREAMSCORE_") for name in environment)  # others would be ignored without a word
    strangers = {f"STREAMSCORE_{other.upper()}_" for other in PROGRAMS if other != program}
    assert not [name for name in environment if name.startswith(tuple(strangers))]


@pytest.mark.parametrize("service", OURS)
def test_every_command_is_one_that_the_image_has(service: str) -> None:
    module, *arguments = OURS[service]["command"]
    shown = subprocess.run([sys.executable, "-m", module, *arguments, "--help"], cwd=ROOT, capture_output=True, text=True)
    assert shown.returncode == 0, shown.stderr
    options = {argument for argument in arguments if argument.startswith("--")}
    assert options <= set(re.findall(r"--[a-z-]+", shown.stdout))  # --help wins over an option that does not exist


def test_kubernetes_runs_the_same_commands() -> None:
    assert {tuple(c["args"]) for c in CONTAINERS} == {tuple(OURS[name]["command"]) for name in PROGRAMS}


def test_ports_are_those_of_the_settings() -> None:
    ports = {name: kind.model_fields["metrics_port"].default for name, kind in PROGRAMS.items()}
    scraped = {j["job_name"]: j for j in yaml.safe_load((ROOT / "deploy/prometheus/prometheus.yml").read_text())["scrape_configs"]}
    assert scraped["worker"]["dns_sd_configs"] == [{"names": ["worker"], "type": "A", "port": ports["worker"], "refresh_interval": "10s"}]
    assert scraped["trainer"]["static_configs"] == [{"targets": [f"trainer:{ports['trainer']}"]}]
    for name, port in ports.items():
        assert f":{port}/healthz" in OURS[name]["healthcheck"]["test"][-1]
    for container in CONTAINERS:
        assert container["ports"] == [{"name": "metrics", "containerPort": ports[container["name"]]}]


def test_topics_are_those_of_the_settings() -> None:
    script = COMPOSE["services"]["topics"]["command"][-1]
    partitions = {topic: int(count) for topic, count in re.findall(r"--topic (\S+) --partitions (\d+)", script)}
    settings = WorkerSettings.read(environ={})
    assert partitions.keys() == {*settings.event_topics, settings.score_topic, settings.dead_letter_topic}
    scores = partitions[settings.score_topic]
    assert {partitions[topic] for topic in settings.event_topics} == {scores}  # a score keeps the partition number of its event
    largest = int(re.findall(r"--topic dead-letters .* max\.message\.bytes=(\d+)", script)[0])
    assert largest > 1048588 + settings.max_event_bytes  # Kafka's default, which `events` has: a dead letter is a whole record and more
    assert {"--topic", *settings.event_topics} <= set(OURS["shop"]["command"])


def test_services_wait_for_what_they_need_and_are_only_on_this_machine() -> None:
    services = COMPOSE["services"]
    for name in OURS:
        assert services[name]["depends_on"]["topics"] == {"condition": "service_completed_successfully"}
    for service in services.values():
        needed = service.get("depends_on", {})
        assert all("healthcheck" in services[n] for n in needed if isinstance(needed, dict) and needed[n]["condition"] == "service_healthy")
        assert all(port.startswith("127.0.0.1:") for port in service.get("ports", []))
        for volume in service.get("volumes", []):
            source = volume.split(":")[0]
            assert source in COMPOSE["volumes"] or (ROOT / source).is_dir()
    assert services["worker"]["volumes"] == ["registry:/data/registry:ro"]
    redis = services["redis"]["command"]
    assert redis[redis.index("--maxmemory-policy") + 1] == "noeviction"


def test_the_image_is_built_from_files_that_exist() -> None:
    allowed = [line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")]
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    folders = {package.split(".")[0] for package in project["tool"]["setuptools"]["packages"]}
    needed = {*folders, project["project"]["readme"], "pyproject.toml"}
    assert set(allowed) == needed
    assert [path for path in allowed if not (ROOT / path).exists()] == []
    copied = re.findall(r"^COPY (?!--from)(\S+) \S+$", (ROOT / "Dockerfile").read_text(), re.MULTILINE)
    assert copied == ["pyproject.toml", "."]


def test_docker_compose_agrees_where_it_is_installed() -> None:
    assert {"kafka", "topics", "redis", "worker", "trainer", "shop", "prometheus", "grafana"} == COMPOSE["services"].keys()
    has_plugin = shutil.which("docker") and subprocess.run(["docker", "compose", "version"], capture_output=True).returncode == 0
    if has_plugin:
        checked = subprocess.run(["docker", "compose", "config", "--quiet"], cwd=ROOT, capture_output=True, text=True)
        assert checked.returncode == 0, checked.stderr


# -- what is watched --------------------------------------------------------------------------------------------------------------------


def exported(registry: CollectorRegistry) -> set[str]:
    """Names of the series that Prometheus gets from a program."""
    return {family.name + suffix for family in registry.collect() for suffix in SAMPLES[family.type]}


EXPORTED = exported(WorkerMetrics().registry) | exported(TrainerMetrics().registry)


def queries() -> Iterator[tuple[str, str]]:
    """(where, PromQL) of every alert, panel, variable and annotation."""
    for group in ALERTS["groups"]:
        for rule in group["rules"]:
            yield f"alert {rule['alert']}", rule["expr"]
    for panel in DASHBOARD["panels"]:
        for target in panel.get("targets", ()):
            yield f"panel {panel['title']}", target["expr"]
    for annotation in DASHBOARD["annotations"]["list"]:
        yield f"annotation {annotation['name']}", annotation["expr"]
    for variable in DASHBOARD["templating"]["list"]:
        if variable["type"] == "query":
            yield f"variable {variable['name']}", variable["query"]["query"]


QUERIES = list(queries())


@pytest.mark.parametrize(("where", "query"), QUERIES)
def test_queries_name_only_what_the_programs_export(where: str, query: str) -> None:
    named = set(re.findall(r"\bstreamscore_\w+|\bup\b|\bALERTS\b", query))
    assert named, where
    assert named <= EXPORTED | PROMETHEUS_OWN
    assert balanced(query)


def balanced(query: str) -> bool:
    """Whether brackets outside strings are closed in order: a slip that Grafana shows only as an empty panel."""
    closing, open_ = {")": "(", "]": "[", "}": "{"}, []
    for character in re.sub(r'"[^"]*"', "", query):
        if character in closing.values():
            open_.append(character)
        elif character in closing and (not open_ or open_.pop() != closing[character]):
            return False
    return not open_ and query.count('"') % 2 == 0


def test_alerts_say_what_is_wrong_and_what_to_do() -> None:
    rules = [rule for group in ALERTS["groups"] for rule in group["rules"]]
    assert len({rule["alert"] for rule in rules}) == len(rules)
    for rule in rules:
        assert rule["labels"]["severity"] in ("warning", "critical")
        assert rule["annotations"].keys() == {"summary", "description"}


def test_the_memory_alert_knows_the_memory_of_compose() -> None:
    redis = COMPOSE["services"]["redis"]["command"]
    (rule,) = (r for g in ALERTS["groups"] for r in g["rules"] if r["alert"] == "RedisNearlyFull")
    assert redis[redis.index("--maxmemory") + 1] == "1gb"
    assert rule["expr"].endswith("> 0.85 * 1024 ^ 3")


def test_everything_that_is_exported_is_watched() -> None:
    """A metric that no panel and no alert shows is one that nobody will look at, or that has been forgotten here."""
    text = " ".join(query for _, query in QUERIES)
    families = {re.sub(r"_(bucket|sum|count)$", "", name) for name in EXPORTED}
    assert {name for name in families if not re.search(rf"\b{name}(_bucket|_sum|_count)?\b", text)} == UNWATCHED


def test_the_dashboard_is_one_that_grafana_lays_out() -> None:
    panels: list[dict[str, Any]] = DASHBOARD["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    taken: set[tuple[int, int]] = set()
    for panel in panels:
        grid = panel["gridPos"]
        cells = {(x, y) for x in range(grid["x"], grid["x"] + grid["w"]) for y in range(grid["y"], grid["y"] + grid["h"])}
        assert grid["x"] + grid["w"] <= 24, panel["title"]
        assert not cells & taken, f"{panel['title']} lies on another panel"
        taken |= cells


def test_grafana_and_prometheus_find_their_files() -> None:
    provisioning = ROOT / "deploy/grafana/provisioning"
    (source,) = yaml.safe_load((provisioning / "datasources/prometheus.yml").read_text())["datasources"]
    assert source["url"] == "http://prometheus:9090"
    variable = next(v for v in DASHBOARD["templating"]["list"] if v["type"] == "datasource")
    assert variable["current"]["value"] == source["uid"]
    (provider,) = yaml.safe_load((provisioning / "dashboards/streamscore.yml").read_text())["providers"]
    grafana = COMPOSE["services"]["grafana"]
    mounts = dict(volume.split(":")[1::-1] for volume in grafana["volumes"])
    assert mounts[provider["options"]["path"]] == "./deploy/grafana/dashboards"
    assert mounts["/etc/grafana/provisioning"] == "./deploy/grafana/provisioning"
    assert grafana["environment"]["GF_DASHBOARDS_DEFAULT_HOME_DASHBOARD_PATH"] == provider["options"]["path"] + "/streamscore.json"
    prometheus = yaml.safe_load((ROOT / "deploy/prometheus/prometheus.yml").read_text())
    assert [(ROOT / "deploy/prometheus" / name).name for name in prometheus["rule_files"]] == ["alerts.yml"]
