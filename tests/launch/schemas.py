"""The fields that public schemas of manifests require and know, as far as the manifests here use them.

JobSet: the schema in jobset.x-k8s.io_jobsets.yaml of https://github.com/kubernetes-sigs/jobset, v1alpha2. SkyPilot:
`get_task_schema` and `get_resources_schema` of sky/utils/schemas.py, 0.14.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Object:
    """required, optional: field -> its type, another `Object`, a list of one, or a tuple of allowed values."""

    required: dict[str, Any] = field(default_factory=dict)
    optional: dict[str, Any] = field(default_factory=dict)


TEXTS = {str: str}  # any keys

CONTAINER = Object(
    {"name": str},
    {
        "image": str,
        "command": [str],
        "ports": [Object({"containerPort": int})],
        "resources": Object({}, {"limits": {str: (int, str)}}),
        "volumeMounts": [Object({"name": str, "mountPath": str}, {"subPath": str})],
    },
)
VOLUME = Object(
    {"name": str},
    {"emptyDir": Object(), "csi": Object({"driver": str}, {"volumeAttributes": TEXTS})},
)
POD = Object(
    {"containers": [CONTAINER]},
    {
        "restartPolicy": str,
        "serviceAccountName": str,
        "terminationGracePeriodSeconds": int,
        "hostNetwork": bool,
        "dnsPolicy": str,
        "nodeSelector": TEXTS,
        "volumes": [VOLUME],
    },
)
POD_FAILURE = Object(
    {"action": ("FailIndex", "FailJob", "Ignore", "Count")},
    {
        "onExitCodes": Object({"operator": ("In", "NotIn"), "values": [int]}, {"containerName": str}),
        "onPodConditions": [Object({"type": str}, {"status": str})],
    },
)
JOB = Object(
    {"template": Object({}, {"metadata": Object({}, {"labels": TEXTS, "annotations": TEXTS}), "spec": POD})},
    {
        "parallelism": int,
        "completions": int,
        "completionMode": ("Indexed", "NonIndexed"),
        "backoffLimit": int,
        "podFailurePolicy": Object({"rules": [POD_FAILURE]}),
    },
)
FAILURE = Object(
    {
        "name": str,
        "action": (
            "FailJobSet", "RestartJobSet", "RestartJobSetAndIgnoreMaxRestarts", "RestartJob",
            "RestartJobAndIgnoreMaxRestarts",
        ),
    },
    {"onJobFailureReasons": [("BackoffLimitExceeded", "DeadlineExceeded", "FailedIndexes", "MaxFailedIndexesExceeded",
                              "PodFailurePolicy")]},
)  # fmt: skip
JOBSET = Object(
    {"apiVersion": ("jobset.x-k8s.io/v1alpha2",), "kind": ("JobSet",)},
    {
        "metadata": Object({"name": str}, {"namespace": str, "labels": TEXTS, "annotations": TEXTS}),
        "spec": Object(
            {},
            {
                "failurePolicy": Object({}, {"maxRestarts": int, "rules": [FAILURE]}),
                "replicatedJobs": [
                    Object({"name": str, "template": Object({}, {"spec": JOB})}, {"replicas": int})
                ],
            },
        ),
    },
)
SKYPILOT = Object(
    {},
    {
        "name": str,
        "workdir": str,
        "num_nodes": int,
        "resources": Object(
            {},
            {
                "accelerators": str,
                "use_spot": bool,
                "disk_size": int,
                "job_recovery": Object({}, {"recover_on_exit_codes": [int]}),
            },
        ),
        "envs": TEXTS,
        "file_mounts": {str: Object({}, {"name": str, "mode": ("MOUNT", "COPY", "MOUNT_CACHED")})},
        "setup": str,
        "run": str,
    },
)


def problems(schema: Any, value: Any, path: str = "") -> list[str]:
    """What does not fit, each with its place."""
    if isinstance(schema, Object):
        if not isinstance(value, dict):
            return [f"{path}: not an object"]
        known = schema.required | schema.optional
        found = [f"{path}.{name}: missing" for name in schema.required if name not in value]
        found += [f"{path}.{name}: unknown" for name in value if name not in known]
        return found + [p for k in value if k in known for p in problems(known[k], value[k], f"{path}.{k}")]
    if isinstance(schema, dict):
        ((_, inner),) = schema.items()
        return [p for k, v in value.items() for p in problems(inner, v, f"{path}.{k}")]
    if isinstance(schema, list):
        if not isinstance(value, list):
            return [f"{path}: not a list"]
        return [p for k, v in enumerate(value) for p in problems(schema[0], v, f"{path}[{k}]")]
    if isinstance(schema, tuple):
        types = tuple(one for one in schema if isinstance(one, type))
        return [] if value in schema or isinstance(value, types) else [f"{path}: {value!r}"]
    exact = isinstance(value, schema) and not (schema is int and isinstance(value, bool))
    return [] if exact else [f"{path}: {value!r} is no {schema.__name__}"]
