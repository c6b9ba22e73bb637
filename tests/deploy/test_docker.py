"""Dockerfiles and compose files, as far as they can be judged without a docker engine."""

from __future__ import annotations

import ast
import os
import re
import shutil
import subprocess
import tomllib
from pathlib import Path
from typing import Any

import pytest
import redis
import yaml

from orchestratord.redis_server import NoRedisServerError, find_server
from orchestratord.settings import Settings as OrchestratorSettings
from tests.deploy.dockerfiles import Dockerfile, exec_form
from tests.deploy.units import ROOT, UNITS, Unit
from tests.support.redis_server import free_port, wait_until
from worker.settings import SHARED
from worker.settings import Settings as WorkerSettings

DOCKER = ROOT / "deploy" / "docker"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
PACKAGES = set(PROJECT["tool"]["hatch"]["build"]["targets"]["wheel"]["packages"])
DOCKERFILES = sorted(DOCKER.glob("*.Dockerfile"))
COMPOSE = ["deploy/compose.yml", "deploy/compose.gpu.yml", "docker-compose.test.yml"]
FOR_TESTS = {"pool-host.Dockerfile", "tests.Dockerfile"}

VARIABLES = (
    {f"LLORCH_{name.upper()}" for name in OrchestratorSettings.model_fields}
    | {f"LLORCH_WORKER_{name.upper()}" for name in WorkerSettings.model_fields}
    | {variable for variable, _ in SHARED.values()}
    | {"LLORCH_MODELS"}
)
# Of the compose specification, what these files use.
TOP_KEYS = {"name", "services", "volumes", "networks"}
SERVICE_KEYS = set(
    "build cap_drop command depends_on deploy entrypoint environment healthcheck hostname image init logging "
    "network_mode networks ports read_only restart security_opt stop_grace_period tmpfs ulimits user volumes".split()
)


def pinned(image: str) -> bool:
    name, colon, tag = image.rpartition(":")
    return bool(name and colon) and tag != "latest" and any(char.isdigit() for char in tag) and "$" not in image


@pytest.mark.parametrize("path", DOCKERFILES, ids=lambda path: path.name)
def test_a_dockerfile_copies_what_is_there_and_all_that_is_needed(path: Path) -> None:
    dockerfile = Dockerfile(path)
    names = {stage.name for stage in dockerfile.stages}
    copied: set[str] = set()
    for stage in dockerfile.stages:
        assert pinned(stage.image), stage.image
        for text in stage.all("COPY"):
            *words, _target = text.split()
            if words[0].startswith("--from="):
                assert words[0].removeprefix("--from=") in names
                continue
            assert all((ROOT / word).exists() for word in words), text
            copied |= set(words)
        for text in stage.all("RUN"):
            done = subprocess.run(["sh", "-n", "-c", text], capture_output=True, text=True, timeout=20)
            assert done.returncode == 0, (text, done.stderr)
    needed = {PROJECT["project"]["readme"], *PROJECT["project"]["license-files"], "pyproject.toml", "constraints.txt"}
    assert copied >= PACKAGES | needed, "the wheel can't be built from what is copied"


@pytest.mark.parametrize("path", DOCKERFILES, ids=lambda path: path.name)
def test_an_image_starts_what_it_has_as_nobody_special(path: Path) -> None:
    dockerfile = Dockerfile(path)
    last = dockerfile.last
    (entry,) = last.all("ENTRYPOINT")
    program = exec_form(entry)[0]
    assert program in {*PROJECT["project"]["scripts"], "python", "/bin/sh"}, program
    assert (program in PROJECT["project"]["scripts"]) == (path.name not in FOR_TESTS)
    extras = {extra for stage in dockerfile.stages for text in stage.all("RUN")
              for found in re.findall(r"(?:\.|whl\))\[([a-z,]+)\]", text) for extra in found.split(",")}  # fmt: skip
    assert extras and extras <= set(PROJECT["project"]["optional-dependencies"])
    assert {name for name in last.environment if name.startswith("LLORCH_")} <= VARIABLES
    if path.name in FOR_TESTS:
        return
    assert last.all("USER") == ["10001"], "a program that nobody need trust with more"
    assert last.all("STOPSIGNAL") == ["SIGTERM"]
    (probe,) = last.all("HEALTHCHECK")
    argv = exec_form(probe)
    assert argv[:2] == ["python", "-c"]
    ast.parse(argv[2])
    assert f":{last.all('EXPOSE')[0]}/" in argv[2], "the probe asks the port that is exposed"


def test_flash_attn_comes_after_torch_and_outside_of_build_isolation() -> None:
    runs = Dockerfile(DOCKER / "worker-cuda.Dockerfile").stages[0].all("RUN")
    torch = next(index for index, text in enumerate(runs) if "^torch==" in text)
    flash = next(index for index, text in enumerate(runs) if "[cuda]" in text)
    assert torch < flash and "--no-build-isolation" in runs[flash]
    assert "[cuda]" not in "".join(runs[:flash])


def load(*files: str) -> dict[str, Any]:
    """A compose file, with merges applied; several: the later ones over the first, as far as services go."""
    whole: dict[str, Any] = {}
    for file in files:
        document = yaml.safe_load((ROOT / file).read_text())
        for name, service in document.pop("services").items():
            base = whole.setdefault("services", {}).setdefault(name, {})
            environment = {**base.get("environment", {}), **service.get("environment", {})}
            base.update({**service, "environment": environment})
        whole.update(document)
    return whole


@pytest.mark.parametrize(
    "files",
    [["deploy/compose.yml"], ["deploy/compose.yml", "deploy/compose.gpu.yml"], ["docker-compose.test.yml"]],
    ids=["compose", "gpu", "test"],
)
def test_a_compose_file_holds_together(files: list[str]) -> None:
    document = load(*files)
    assert {key for key in document if not key.startswith("x-")} <= TOP_KEYS
    services = document["services"]
    for name, service in services.items():
        assert set(service) <= SERVICE_KEYS, name
        assert ("build" in service) or pinned(service["image"]), name
        if "build" in service:
            assert set(service["build"]) == {"context", "dockerfile"}
            context = ((ROOT / files[0]).parent / service["build"]["context"]).resolve()
            assert context == ROOT and (context / service["build"]["dockerfile"]).is_file(), name
        assert set(service.get("networks", [])) <= set(document["networks"]), name
        for volume in service.get("volumes", []):
            source = volume.split(":")[0]
            known = (ROOT / files[0]).parent.joinpath(source).is_dir() if source.startswith(".") else source
            assert known is True or known in document["volumes"], volume
        variables = {key for key in service["environment"] if key.startswith("LLORCH_")}
        assert variables <= VARIABLES, variables - VARIABLES
        dependencies = service.get("depends_on", {})
        for other in dependencies:
            assert other in services, f"{name} depends on {other}"
            condition = dependencies[other]["condition"] if isinstance(dependencies, dict) else "service_started"
            assert condition != "service_healthy" or has_probe(services[other]), f"{other} has no health check"


def has_probe(service: dict[str, Any]) -> bool:
    if "healthcheck" in service:
        return True
    return "build" in service and bool(Dockerfile(ROOT / service["build"]["dockerfile"]).last.all("HEALTHCHECK"))


def seconds(text: str) -> float:
    return float(text.removesuffix("s"))


@pytest.mark.parametrize("file", ["deploy/compose.yml", "docker-compose.test.yml"])
def test_docker_waits_for_a_graceful_stop(file: str) -> None:
    units = {"orchestratord": "orchestratord.service", "llorch-worker": "llorch-worker@.service"}
    stop = {program: float(Unit(UNITS / unit).value("TimeoutStopSec")) for program, unit in units.items()}
    for service in load(file)["services"].values():
        if "build" not in service:
            continue
        program = exec_form(Dockerfile(ROOT / service["build"]["dockerfile"]).last.all("ENTRYPOINT")[0])[0]
        if program in stop:
            assert seconds(service["stop_grace_period"]) >= stop[program]


def test_nothing_starts_without_keys_and_no_secret_stands_in_a_file_for_use() -> None:
    text = (ROOT / "deploy/compose.yml").read_text()
    for name in ("LLORCH_API_KEYS", "LLORCH_WORKER_KEY", "ORCHESTRATORD_PASSWORD", "OPERATOR_PASSWORD"):
        assert f"${{{name}:?" in text, "refused while it is unset"
        assert name in (ROOT / "deploy/README.md").read_text()
    ports = load("deploy/compose.yml")["services"]["orchestratord"]["ports"]
    assert ports == ["${LLORCH_PUBLISH:-127.0.0.1:8080}:8080"], "open to the network only when asked"
    assert not any("ports" in service for service in load("docker-compose.test.yml")["services"].values())


def test_the_tests_find_every_variable_that_they_read() -> None:
    given = set(load("docker-compose.test.yml")["services"]["tests"]["environment"])
    read = set(
        re.findall(r"\"(TOPOLOGY_[A-Z_]+)\"|'(TOPOLOGY_[A-Z_]+)'", (ROOT / "tests/deploy/test_topology.py").read_text())
    )
    assert {name for pair in read for name in pair if name} == given


@pytest.mark.parametrize("file", ["deploy/compose.yml", "docker-compose.test.yml"])
def test_redis_starts_with_the_command_of_the_compose_file(file: str, tmp_path: Path) -> None:
    try:
        server = find_server()
    except NoRedisServerError as error:
        if os.environ.get("CI") == "true":
            raise
        pytest.skip(str(error))  # outside CI alone: a laptop may be of a kind that has no wheel of the server
    service = load(file)["services"]["redis"]
    (command,) = service["command"]
    for there, here in (
        ("/samples", str(ROOT / "deploy/redis")),
        ("/run/llorch", str(tmp_path)),
        ("/data", str(tmp_path)),
        ("valkey-server", server),
        ("$$", "$"),
    ):
        command = command.replace(there, here)
    port = free_port()
    env = {"PATH": os.environ["PATH"], "REDIS_MAXMEMORY": "256mb"} | {
        name: "some-password-01" for name in service["environment"] if name.endswith("PASSWORD")
    }
    process = subprocess.Popen([*service["entrypoint"], f"{command} --port {port}"], env=env, stdout=subprocess.PIPE)
    try:
        with redis.Redis(port=port, username="orchestratord", password="some-password-01") as client:

            def answers() -> bool:
                assert process.poll() is None, process.stdout and process.stdout.read()
                try:
                    return bool(client.ping())
                except redis.ConnectionError:
                    return False

            wait_until(answers, "the server answers")
    finally:
        process.kill()
        process.communicate(timeout=10)


def test_docker_compose_agrees_where_it_is_installed() -> None:
    docker = shutil.which("docker")
    if docker is None or subprocess.run([docker, "compose", "version"], capture_output=True, timeout=30).returncode:
        # A second opinion: the files are checked against the compose schema in any case.
        pytest.skip("docker compose is not installed")
    env = {**os.environ} | dict.fromkeys(
        ("LLORCH_API_KEYS", "LLORCH_WORKER_KEY", "ORCHESTRATORD_PASSWORD", "OPERATOR_PASSWORD"), "set"
    )
    for files in (
        ["deploy/compose.yml"],
        ["deploy/compose.yml", "deploy/compose.gpu.yml"],
        ["docker-compose.test.yml"],
    ):
        flags = [part for file in files for part in ("-f", file)]
        command = [docker, "compose", *flags, "config", "--quiet"]
        done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, done.stderr
