"""rayjob.yaml: no Kubernetes here, so what can be checked without one."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import yaml

from flipkd.cli import main

pytest.importorskip("ray")

ROOT = Path(__file__).parent.parent
PATH = ROOT / "rayjob.yaml"


@pytest.fixture(scope="module")
def job() -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load(PATH.read_text())
    return found


@pytest.fixture(scope="module")
def options(job: dict[str, Any]) -> dict[str, Any]:
    """The entrypoint's options, parsed by the command itself."""
    program, name, *arguments = shlex.split(job["spec"]["entrypoint"])
    assert program == "flipkd-batch"
    parsed: dict[str, Any] = main.commands[name].make_context(name, arguments).params
    return parsed


def groups(job: dict[str, Any]) -> list[dict[str, Any]]:
    cluster = job["spec"]["rayClusterSpec"]
    return [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]


def start_options(group: dict[str, Any]) -> dict[str, Any]:
    """A group's ``rayStartParams``, parsed by Ray's own command as KubeRay hands them to it."""
    from ray.scripts.scripts import start

    given = group["rayStartParams"].items()
    assert all(isinstance(value, str) for _, value in given)  # KubeRay's type is map[string]string
    arguments = [f"--{key}" if value == "true" else f"--{key}={value}" for key, value in given]
    parsed: dict[str, Any] = start.make_context("start", arguments).params
    return parsed


def test_it_is_a_ray_job_that_ends(job: dict[str, Any]) -> None:
    assert (job["apiVersion"], job["kind"]) == ("ray.io/v1", "RayJob")
    spec = job["spec"]
    assert spec["submissionMode"] == "K8sJobMode"
    assert spec["shutdownAfterJobFinishes"]
    assert spec["activeDeadlineSeconds"] > 0


def test_the_cluster_asks_for_a_token_and_none_stands_in_the_file(job: dict[str, Any]) -> None:
    assert job["spec"]["rayClusterSpec"]["authOptions"] == {"mode": "token"}
    assert "AUTH_TOKEN" not in PATH.read_text()


def test_the_job_fills_the_workers_and_none_waits_for_room(job: dict[str, Any], options: dict[str, Any]) -> None:
    head, *workers = groups(job)
    assert options["ray"] == "auto"
    assert start_options(head)["num_cpus"] == 0
    cpus = 0
    for group in workers:
        # flipkd counts the cluster's CPUs and GPUs when it starts: none of them may come later.
        assert group["replicas"] == group["minReplicas"] == group["maxReplicas"] > 0
        (container,) = group["template"]["spec"]["containers"]
        own = start_options(group)["num_cpus"]
        assert own == int(container["resources"]["requests"]["cpu"])
        assert own % options["threads"] == 0
        cpus += own * group["replicas"]
    assert options["workers"] * options["threads"] == cpus


def test_all_pods_are_alike_in_image_user_and_volume(job: dict[str, Any], options: dict[str, Any]) -> None:
    version = job["spec"]["rayClusterSpec"]["rayVersion"]
    assert f"ray=={version}" in (ROOT / "constraints.txt").read_text().splitlines()
    images = set()
    for group in groups(job):
        pod = group["template"]["spec"]
        assert pod["securityContext"]["runAsNonRoot"]
        (container,) = pod["containers"]
        images.add(container["image"])
        assert container["resources"]["requests"] == container["resources"]["limits"]
        (mount,) = container["volumeMounts"]
        assert mount["name"] in {volume["name"] for volume in pod["volumes"]}
        for name in ("encoder", "cache"):
            assert Path(options[name]).is_relative_to(mount["mountPath"])
    (image,) = images
    assert image.endswith(f"ray{version}")
    assert "/" not in image  # no registry but the reader's


def test_there_is_no_host_in_it() -> None:
    hosts = re.findall(r"\b[\w-]+(?:\.[\w-]+)*\.(?:com|org|net|io|dev)\b", PATH.read_text())
    assert set(hosts) <= {"ray.io", "nvidia.com"}  # names of APIs, not of machines
    assert not re.findall(r"\d+\.\d+\.\d+\.\d+", PATH.read_text())


def test_the_guide_builds_the_image_that_the_file_names(job: dict[str, Any]) -> None:
    guide = (ROOT / "docs" / "ray.md").read_text()
    image = groups(job)[0]["template"]["spec"]["containers"][0]["image"]
    version = job["spec"]["rayClusterSpec"]["rayVersion"]
    assert guide.count(f"REGISTRY/{image}") == 2
    assert f"FROM rayproject/ray:{version}-py311" in guide


def test_options_that_the_guide_explains_are_options_of_score() -> None:
    guide = (ROOT / "docs" / "ray.md").read_text()
    known = {flag for parameter in main.commands["score"].params for flag in parameter.opts}
    assert set(re.findall(r"`(--[a-z-]+)", guide)) <= known
