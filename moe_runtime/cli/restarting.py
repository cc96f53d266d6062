"""``moe-runtime restart``: gives a runtime other processes, and says which."""

from __future__ import annotations

from moe_runtime.cli.consoles import stdout_console
from moe_runtime.errors import StartError
from moe_runtime.launch.runtime import restart


def restart_and_report(name: str, *, experts: bool, routers: bool, ray_address: str | None) -> None:
    """Restart the runtime of a name, one process after the other.

    Raises:
        PlacementError: If the cluster has no room for one host beside those that run.
        StartError: If there is nothing to restart, or something did not start; the runtime serves.
    """
    if not experts and not routers:
        raise StartError("expected --experts-only or --routers-only, found both: nothing would be restarted")
    console = stdout_console()
    with console.status(f"Restarting {name}"):
        outcome = restart(name, experts=experts, routers=routers, ray_address=ray_address)
    for host in outcome.hosts:
        console.print(f"restarted {host}", markup=False, soft_wrap=True)
    hosts, num_routers = len(outcome.hosts), outcome.num_routers
    console.print(f"restarted {name}: expert hosts {hosts}, routers {num_routers}", markup=False)
