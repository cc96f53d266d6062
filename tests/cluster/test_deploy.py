"""``deploy`` and ``teardown`` from a machine that is no node: once, again, otherwise, killed midway, and away."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from cluster.host import Host
from cluster.ray_cluster import RayCluster
from cluster.shipped import (
    LAYER,
    NAME,
    NUM_EXPERTS,
    NUM_TOKENS,
    ROUTER_PORT,
    TITLES,
    Submission,
    expected_outputs,
    hashes,
    traces,
    traces_when_ended,
)
from moe_runtime.launch.bundle import collect_bundle

UNDER_WAY_WITHIN_S = 120.0


@pytest.fixture(scope="module")
def submission(ray_cluster: RayCluster) -> Submission:
    """The configuration on the operator's machine, and nothing of it anywhere else."""
    submission = Submission(ray_cluster)
    submission.write()
    submission.before = {host.name: traces(host) for host in submission.nodes}
    return submission


@pytest.fixture(scope="module")
def deployed(submission: Submission) -> Iterator[Submission]:
    """The configuration as it serves."""
    with submission.cluster.timed("deploy"):
        submission.text = submission.deploy().stdout
    with submission.cluster.timed("first answer"):
        submission.call()
    yield submission
    if actors(submission) != {host: before.pids for host, before in submission.before.items()}:
        submission.teardown()


def replicas(deployed: Submission) -> list[tuple[int, str]]:
    """Each expert's id, and the address of a host that serves it."""
    experts = deployed.statuses()[0]["description"]["layers"][LAYER]["experts"]
    return [(e["expert_id"], replica["node"].partition("/")[0]) for e in experts for replica in e["replicas"]]


def has_router(deployed: Submission, host: Host) -> bool:
    return f"{host.address}:{ROUTER_PORT}" in deployed.addresses


def test_the_routers_addresses_are_printed_and_each_router_shows_ready_experts(deployed: Submission) -> None:
    hosts = {address.removesuffix(f":{ROUTER_PORT}") for address in deployed.addresses}
    assert len(hosts) == 2
    assert hosts < {host.address for host in deployed.nodes}
    for router in deployed.statuses():
        experts = router["description"]["layers"][LAYER]["experts"]
        assert [[replica["state"] for replica in expert["replicas"]] for expert in experts] == [
            ["ready"],
            ["ready"],
            ["ready"] * 2,
        ]


def test_experts_are_spread_over_all_hosts_and_replicas_are_apart(deployed: Submission) -> None:
    placed = replicas(deployed)
    assert sorted(Counter(host for _, host in placed).values()) == [1, 1, 2]
    assert len({host for expert_id, host in placed if expert_id == 2}) == 2


def test_a_client_of_a_machine_that_is_no_node_gets_what_the_weight_files_compute(deployed: Submission) -> None:
    outputs = deployed.call()
    assert outputs.shape == (NUM_TOKENS, 10)
    np.testing.assert_allclose(outputs, expected_outputs(deployed), rtol=1e-4, atol=1e-5)


def test_each_host_fetched_the_files_of_its_own_experts_and_gates_and_no_others(deployed: Submission) -> None:
    head, *workers = deployed.nodes
    fetched = deployed.served_by_depot(collect_bundle(deployed.folder / "config.yaml").id)
    placed = replicas(deployed)
    for worker in workers:
        needed = [deployed.expert_files[expert_id] for expert_id, host in placed if host == worker.address]
        needed += [deployed.gate_file] if has_router(deployed, worker) else []
        assert cached(worker) == fetched.get(worker.address, {}) == hashes(needed)
    # It has the bundle itself.
    assert not cached(head)
    assert head.address not in fetched


def cached(host: Host) -> dict[str, int]:
    """sha256 and size of the weight files of a host's cache, whose names are their hashes."""
    files = sorted((host.folder / "root/.moe_runtime/weights").glob("*.safetensors"))
    assert list(hashes(files)) == [file.stem for file in files]
    return hashes(files)


def actors(submission: Submission) -> dict[str, frozenset[int]]:
    return {host.name: traces(host).pids for host in submission.nodes}


def test_deploying_again_says_that_it_runs_and_leaves_it_alone(deployed: Submission) -> None:
    before = actors(deployed)
    with deployed.cluster.timed("deploy again"):
        again = deployed.deploy()
    assert again.stdout.splitlines()[2] == "digits runs already, from the same files"
    assert again.stdout.splitlines()[-4:] == deployed.text.splitlines()[-4:]
    assert actors(deployed) == before


def test_another_configuration_under_its_name_is_refused_and_upgrade_is_named(deployed: Submission) -> None:
    before = actors(deployed)
    refused = deployed.deploy(deployed.write_config("other.yaml", seed=1), check=False)
    assert refused.returncode == 1
    assert refused.stderr.startswith("error: runtime digits: expected nothing or deployment ")
    assert "`moe-runtime upgrade` rolls to another configuration" in refused.stderr
    assert len(refused.stderr.splitlines()) == 1
    assert actors(deployed) == before


def test_an_upgrade_under_load_brings_new_weights_and_loses_no_request(deployed: Submission) -> None:
    old, before = expected_outputs(deployed), kinds_of_actors(deployed)
    with deployed.calling() as answers:
        deployed.write_expert(0, seed=50)
        with deployed.cluster.timed("upgrade"):
            printed = deployed.upgrade()
        new = expected_outputs(deployed)
        np.testing.assert_allclose(deployed.call(), new, rtol=1e-4, atol=1e-5)
    assert "replaced  digits/feed_forward-0/0\n" in printed
    assert printed.endswith("upgraded: 3 expert hosts kept, 2 routers\n")
    # Each answer is of one configuration as a whole.
    is_old = [np.allclose(answer, old, rtol=1e-4, atol=1e-5) for answer in answers]
    is_new = [np.allclose(answer, new, rtol=1e-4, atol=1e-5) for answer in answers]
    assert all(one or other for one, other in zip(is_old, is_new, strict=True))
    assert is_old[0]
    # The depot of the old files has ended, too.
    assert kinds_of_actors(deployed) == before


def give_plug_in(host: Host, version: str) -> None:
    info = host.folder / "root" / "plug-ins" / f"picky_expert-{version}.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: picky-expert\nVersion: {version}\n")


def test_nodes_that_lack_a_plug_in_or_have_another_version_are_named(submission: Submission) -> None:
    head, old, _bare = submission.nodes
    give_plug_in(head, "2.0")
    give_plug_in(old, "1.0")
    config = submission.write_config("picky.yaml", name="picky", plug_ins=["picky-expert"])
    refused = submission.deploy(config, check=False)
    assert refused.returncode == 1
    lines = [line.partition(";")[0] for line in refused.stderr.splitlines()]
    expected = [(submission.nodes[1], "1.0"), (submission.nodes[2], "none")]
    assert [line.partition("/")[0] for line in lines] == [f"error: node {host.address}" for host, _ in expected]
    assert [line.partition(": expected ")[2] for line in lines] == [
        f"picky-expert 2.0, found {found}" for _, found in expected
    ]
    assert submission.teardown("picky").splitlines()[-1].startswith("picky: it did not run; removed 1 bundle, ")


def test_teardown_leaves_nothing_on_any_host(deployed: Submission) -> None:
    with deployed.cluster.timed("teardown"):
        text = deployed.teardown()
    assert "tore down digits: every request was answered; removed 3 bundles, " in text
    assert {h.name: traces_when_ended(h, deployed.before[h.name]) for h in deployed.nodes} == deployed.before
    assert deployed.teardown() == "digits: nothing to tear down\n"


def kill_as_soon_as(submission: Submission, is_there: Callable[[Submission], bool]) -> None:
    """Deploy, and kill the submitting process when the cluster has come to some point."""
    with submission.start_deploying() as deployer:
        give_up_at = time.monotonic() + UNDER_WAY_WITHIN_S
        while not is_there(submission):
            assert deployer.poll() is None, "it ended before"
            assert time.monotonic() < give_up_at
            time.sleep(0.02)
        deployer.kill()


def has_bundle(submission: Submission) -> bool:
    return any(Path(submission.cluster.head.folder, "root/.moe_runtime/bundles").glob("*/files"))


def has_controller(submission: Submission) -> bool:
    return "ControllerActor" in kinds_of_actors(submission)


def kinds_of_actors(submission: Submission) -> Counter[str]:
    """How many processes there are of each class of actors, on all nodes together."""
    titles = (words for host in submission.nodes for words in host.pids().values() if words.startswith(TITLES))
    return Counter(title.removeprefix("ray::").split()[0].partition(".")[0] for title in titles)


def test_a_deployment_that_is_killed_twice_on_its_way_serves_when_repeated(submission: Submission) -> None:
    kill_as_soon_as(submission, has_bundle)
    kill_as_soon_as(submission, has_controller)
    submission.text = submission.deploy().stdout
    try:
        np.testing.assert_allclose(submission.call(), expected_outputs(submission), rtol=1e-4, atol=1e-5)
        # As many as were asked for: nothing is left of the attempts before.
        assert kinds_of_actors(submission) == {
            "ControllerActor": 1,
            "Depot": 1,
            "ExpertActor": NUM_EXPERTS + 1,
            "RouterActor": 2,
        }
    finally:
        submission.teardown(NAME)
    assert {h.name: traces_when_ended(h, submission.before[h.name]) for h in submission.nodes} == submission.before
