from __future__ import annotations

import shlex
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

pytest.importorskip("ray")

PATH = Path(__file__).parent.parent / "cluster.yaml"


@pytest.fixture(scope="module")
def config() -> dict[str, Any]:
    """The file as `ray up` sees it: defaults filled in, checked against Ray's own schema."""
    from ray.autoscaler._private.util import prepare_config, validate_config

    prepared: dict[str, Any] = prepare_config(yaml.safe_load(PATH.read_text()))
    validate_config(prepared)
    return prepared


def start_options(commands: list[str]) -> dict[str, Any]:
    """The options of the `ray start` line, parsed by Ray's own command."""
    from ray.scripts.scripts import start

    (line,) = [command for command in commands if "ray start" in command]
    assert "RAY_AUTH_MODE=token ray start" in line
    arguments = shlex.split(line.split("ray start", 1)[1])
    parsed: dict[str, Any] = start.make_context("start", arguments).params
    return parsed


def test_the_head_takes_no_work_and_its_dashboard_listens_on_loopback(config: dict[str, Any]) -> None:
    head = start_options(config["head_start_ray_commands"])
    assert head["head"]
    assert (head["num_cpus"], head["num_gpus"]) == (0, 0)
    assert head["dashboard_host"] == "127.0.0.1"
    assert config["available_node_types"][config["head_node_type"]]["resources"]["CPU"] == 0


def test_every_node_starts_with_token_authentication_and_gets_the_token(config: dict[str, Any]) -> None:
    worker = start_options(config["worker_start_ray_commands"])
    assert worker["address"] == "$RAY_HEAD_IP:6379"
    assert config["file_mounts"]["~/.ray/auth_token"] == "~/.ray/auth_token"
    assert "auth_token" not in str(yaml.safe_load(PATH.read_text())["head_start_ray_commands"])  # no token in a command


def test_workers_are_spot_and_bounded_and_the_head_is_not(config: dict[str, Any]) -> None:
    types = config["available_node_types"]
    workers = [name for name in types if name != config["head_node_type"]]
    assert any(types[name]["node_config"]["InstanceType"].startswith("g") for name in workers)
    for name in workers:
        assert types[name]["node_config"]["InstanceMarketOptions"] == {"MarketType": "spot"}
        assert 0 <= types[name]["min_workers"] < types[name]["max_workers"] <= config["max_workers"]
    assert "InstanceMarketOptions" not in types[config["head_node_type"]]["node_config"]


def test_no_group_of_rays_making_that_is_open_to_the_world(config: dict[str, Any]) -> None:
    assert all(node["node_config"]["SecurityGroupIds"] for node in config["available_node_types"].values())
    assert "0.0.0.0" not in PATH.read_text()


def test_commands_are_shell(config: dict[str, Any]) -> None:
    names = ("setup_commands", "head_setup_commands", "head_start_ray_commands", "worker_start_ray_commands")
    for command in [command for name in names for command in config[name]]:
        subprocess.run(["bash", "-n", "-c", command], check=True)
