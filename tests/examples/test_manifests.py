"""The files for real machines: Ray's own schema for its launcher, and the fields of KubeRay's v1 types, by hand."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from rayk.actors.runtime import EMBEDDED_SETTINGS

CLUSTER = {"rayVersion", "authOptions", "headGroupSpec", "workerGroupSpecs", "enableInTreeAutoscaling"}
HEAD, WORKERS = {"rayStartParams", "template"}, {"groupName", "replicas", "minReplicas", "maxReplicas"}
CONTAINER = {"name", "image", "env", "ports", "resources", "volumeMounts"}
POD = {"containers", "volumes", "terminationGracePeriodSeconds"}


@pytest.fixture(scope="module")
def ray_start() -> set[str]:
    """The options of `ray start`."""
    from ray.scripts.scripts import start

    return {name for option in start.params for name in option.opts}


def read(repo: Path, name: str) -> Any:
    return yaml.safe_load((repo / "examples" / "multinode" / name).read_text())


def check_cluster(spec: dict[str, Any], ray_start: set[str]) -> None:
    assert set(spec) <= CLUSTER and spec["authOptions"]["mode"] in ("token", "disabled")
    groups = [spec["headGroupSpec"], *spec["workerGroupSpecs"]]
    for number, group in enumerate(groups):
        assert HEAD <= set(group) <= HEAD | (WORKERS if number else set())
        params = group["rayStartParams"]
        assert {f"--{name}" for name in params} <= ray_start and all(isinstance(each, str) for each in params.values())
        pod = group["template"]["spec"]
        volumes = {volume["name"] for volume in pod.get("volumes", [])}
        [container] = pod["containers"]
        assert set(pod) <= POD and set(container) <= CONTAINER
        assert {mount["name"] for mount in container.get("volumeMounts", [])} == volumes
        assert (
            container["resources"]["requests"] == container["resources"]["limits"]
        )  # Ray counts what it is limited to
        assert {each["name"] for each in container["env"]} <= set(EMBEDDED_SETTINGS)
        assert all(isinstance(each["value"], str) for each in container["env"])
        if number:
            assert group["minReplicas"] <= group["replicas"] <= group["maxReplicas"]
            assert any(mount["mountPath"] == "/dev/shm" for mount in container["volumeMounts"])


def test_a_ray_cluster_for_kuberay(repo: Path, ray_start: set[str]) -> None:
    found = read(repo, "raycluster.yaml")
    assert (found["apiVersion"], found["kind"]) == ("ray.io/v1", "RayCluster")
    check_cluster(found["spec"], ray_start)


def test_a_ray_service_for_kuberay(repo: Path, ray_start: set[str]) -> None:
    found = read(repo, "rayservice.yaml")
    assert (found["apiVersion"], found["kind"]) == ("ray.io/v1", "RayService")
    assert set(found["spec"]) == {"serveConfigV2", "rayClusterConfig"}
    check_cluster(found["spec"]["rayClusterConfig"], ray_start)
    [app] = yaml.safe_load(found["spec"]["serveConfigV2"])["applications"]
    module, _, name = app["import_path"].partition(":")
    source = (repo / (module.replace(".", "/") + ".py")).read_text()
    assert f"\n{name} = deployment(" in source
    assert all(f'"{variable}"' in source for variable in app["runtime_env"]["env_vars"])


def test_a_cluster_for_rays_launcher(repo: Path, ray_start: set[str]) -> None:
    import jsonschema
    import ray.autoscaler

    found = read(repo, "cluster.yaml")
    jsonschema.validate(found, json.loads((Path(ray.autoscaler.__file__).parent / "ray-schema.json").read_text()))
    for name in ("head_start_ray_commands", "worker_start_ray_commands"):
        command = found[name][-1]
        assert set(re.findall(r" (--[a-z-]+)", command)) <= ray_start
        assert set(re.findall(r"(RAY_[a-z_]+)=", command)) <= set(EMBEDDED_SETTINGS)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(
            {**found, "head_start_commands": []},
            json.loads((Path(ray.autoscaler.__file__).parent / "ray-schema.json").read_text()),
        )


@pytest.mark.parametrize("name", ["wheel", "pip", "uv"])
def test_runtime_environments_of_jobs(repo: Path, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from ray.runtime_env import RuntimeEnv

    (tmp_path / "shipped" / "rayk").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    found = yaml.safe_load((repo / "examples" / "jobs" / f"{name}.yaml").read_text())
    RuntimeEnv(**found)
    text = (repo / "pyproject.toml").read_text()
    version = re.search(r'^version = "(.*)"', text, re.MULTILINE)
    assert version is not None
    assert name == "wheel" or f"rayk-{version[1]}-py3-none-any.whl" in found[name]["packages"][0]
    assert name == "wheel" or "--no-deps" in str(found[name])
