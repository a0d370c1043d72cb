"""The manifest for GKE agrees with what types.py knows, with the mesh it asks for, and with the exit statuses."""

import math
import pathlib

import pytest

from experiments.tpu import flags, types
from experiments.tpu.supervise import AGAIN, STOPS

yaml = pytest.importorskip("yaml")


def test_the_counts_of_the_manifest_agree():
    path = pathlib.Path(types.__file__).with_name("jobset.yaml")
    jobset = yaml.safe_load(path.read_text())
    assert (jobset["apiVersion"], jobset["kind"]) == ("jobset.x-k8s.io/v1alpha2", "JobSet")
    (job,) = jobset["spec"]["replicatedJobs"]
    spec = job["template"]["spec"]
    pod = spec["template"]["spec"]
    (container,) = pod["containers"]
    selector = pod["nodeSelector"]
    (generation,) = (
        name
        for name, row in types.GENERATIONS.items()
        if row.gke_accelerator == selector["cloud.google.com/gke-tpu-accelerator"]
    )
    shape = selector["cloud.google.com/gke-tpu-topology"]
    chips = math.prod(map(int, shape.split("x")))
    known = types.find(f"{generation}-{chips * types.GENERATIONS[generation].cores}")
    per_host = container["resources"]["limits"]["google.com/tpu"]
    assert container["resources"]["requests"]["google.com/tpu"] == per_host
    assert shape == known.topology
    assert spec["parallelism"] == spec["completions"] == known.hosts == types.hosts(shape, per_host)
    assert job["replicas"] == 1 and spec["backoffLimit"] == 0 and pod["restartPolicy"] == "Never"
    # The arguments are those of a run that would be accepted on such a slice.
    arguments = [word for word in container["args"] if not word.startswith("--workdir=")]
    flags.check_arguments(arguments, known)
    (mount,) = container["volumeMounts"]
    (workdir,) = set(container["args"]) - set(arguments)
    assert workdir.startswith(f"--workdir={mount['mountPath']}/")
    assert mount["name"] == pod["volumes"][0]["name"]
    (rule,) = spec["podFailurePolicy"]["rules"]
    assert rule["action"] == "FailJob" and rule["onExitCodes"]["containerName"] == container["name"]
    assert sorted(rule["onExitCodes"]["values"]) == sorted(STOPS) and not set(STOPS) & set(AGAIN)
    assert jobset["spec"]["failurePolicy"]["rules"][0]["onJobFailureReasons"] == ["PodFailurePolicy"]
