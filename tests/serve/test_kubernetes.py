"""The manifest fits the server: its arguments, its paths, its metrics."""

import re
from pathlib import Path

import pytest

yaml = pytest.importorskip("yaml")

ROOT = Path(__file__).parents[2]
OBJECTS = {item["kind"]: item for item in yaml.safe_load_all((ROOT / "launch/kubernetes.yaml").read_text())}


def test_the_manifest_fits_the_server(monkeypatch, tmp_path):
    from mm_jax.cli import serve

    pod = OBJECTS["Deployment"]["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    help_text = (ROOT / "mm_jax/cli/serve.py").read_text()
    for name in (word for word in container["args"] if word.startswith("--")):
        assert f'"{name}"' in help_text
    # everything is understood: what is missing is only the model
    with pytest.raises(Exception, match="/model"):
        serve.main(container["args"])
    arguments = dict(zip(container["args"][1::2], container["args"][2::2], strict=True))
    assert int(arguments["--port"]) == container["ports"][0]["containerPort"]
    assert float(arguments["--drain"]) < pod["terminationGracePeriodSeconds"]
    paths = set(re.findall(r'Route\("([^"]+)"', (ROOT / "mm_jax/serve/app.py").read_text()))
    probes = [container[f"{kind}Probe"]["httpGet"]["path"] for kind in ("startup", "readiness", "liveness")]
    annotations = OBJECTS["Deployment"]["spec"]["template"]["metadata"]["annotations"]
    assert {*probes, annotations["prometheus.io/path"]} <= paths
    metric = OBJECTS["HorizontalPodAutoscaler"]["spec"]["metrics"][0]["pods"]["metric"]["name"]
    assert f'("{metric.removeprefix("mm_jax_")}", "' in (ROOT / "mm_jax/serve/metrics.py").read_text()
    labels = OBJECTS["Deployment"]["spec"]["template"]["metadata"]["labels"]
    assert OBJECTS["Service"]["spec"]["selector"].items() <= labels.items()
