"""The commands and their arguments; what they do loads when they are called, so that ``--help`` is quick."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from moe_runtime.cli.configuring import ConfigPath, plan, presets, validate
from moe_runtime.cli.connections import (
    CaOption,
    CertOption,
    Connection,
    InsecureOption,
    KeyOption,
    TlsOption,
    TokenFileOption,
)
from moe_runtime.cli.consoles import report_error, stdout_console
from moe_runtime.cli.log_wishes import LogWishes
from moe_runtime.cli.trials import bench, chaos, demo_chat, demo_digits, demo_routers
from moe_runtime.cli.upcycling import upcycle
from moe_runtime.errors import MoERuntimeError
from moe_runtime.logs import LogFormat, LogIdentity, LogSettings, install

DEFAULT_ADDRESS = "127.0.0.1:50051"


class _Commands(TyperGroup):
    """Commands whose errors of ours end in one line and exit code 1, and with ``--debug`` in a traceback."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except MoERuntimeError as exc:
            if ctx.params.get("debug"):
                raise
            report_error(exc)
            ctx.exit(1)


app = typer.Typer(
    cls=_Commands,
    help="Mixture-of-Experts layers whose experts are Ray actors of their own.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
demo_app = typer.Typer(help="Run a whole use of the runtime on real input.", no_args_is_help=True)
app.add_typer(demo_app, name="demo")
cluster_app = typer.Typer(help="The machines of a `ray up` file.", no_args_is_help=True)
app.add_typer(cluster_app, name="cluster")

ClusterFile = Annotated[
    Path | None, typer.Option("--cluster", metavar="FILE", help="The cluster of this `ray up` file, from anywhere.")
]
Install = Annotated[
    bool, typer.Option("--install", help="Install with pip what nodes lack: plug-ins, and the --wheel.")
]
Wheel = Annotated[
    Path | None, typer.Option("--wheel", metavar="PATH", help="A wheel of moe-runtime, for --install.", exists=True)
]
JoinedCluster = Annotated[
    str | None,
    typer.Option("--ray-address", metavar="ADDRESS", help="The Ray cluster that this machine is in; else RAY_ADDRESS."),
]


def _print_version(wanted: bool) -> None:
    if wanted:
        from moe_runtime import __version__

        typer.echo(f"moe-runtime {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    ctx: typer.Context,
    debug: Annotated[bool, typer.Option("--debug", help="Log in detail, and show tracebacks of errors.")] = False,
    log_format: Annotated[
        LogFormat | None,
        typer.Option(help="Lines for people, or JSON; for `serve`, of all its processes. [default: human]"),
    ] = None,
    _version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    ctx.obj = wishes = LogWishes(log_format, debug=debug)
    install(wishes.over(LogSettings()), LogIdentity("command"))


@app.command()
def serve(
    ctx: typer.Context,
    config: ConfigPath,
    *,
    address: Annotated[
        str | None, typer.Option(metavar="HOST:PORT", help="Instead of the file's router.address; port 0 is any.")
    ] = None,
    ray_address: Annotated[
        str | None,
        typer.Option(metavar="ADDRESS", help="The Ray cluster to join; else RAY_ADDRESS; else one is started."),
    ] = None,
    detach: Annotated[bool, typer.Option("--detach", help="Leave the runtime on the cluster, and return.")] = False,
    ray: Annotated[bool, typer.Option("--ray/--no-ray", help="Experts as Ray actors, or all in this process.")] = True,
) -> None:
    """Serve a configuration until SIGINT or SIGTERM; requests in flight are answered first."""
    from moe_runtime.cli.serving import Where, serve_until_stopped

    where = Where(address, ray_address, detach=detach, ray=ray)
    serve_until_stopped(config, where, wishes=ctx.find_object(LogWishes))


@app.command()
def stop(
    name: Annotated[str, typer.Argument(metavar="NAME", help="The runtime's name in its configuration.")] = "default",
    *,
    ray_address: Annotated[
        str | None, typer.Option(metavar="ADDRESS", help="The Ray cluster it runs on; else RAY_ADDRESS.")
    ] = None,
) -> None:
    """End a runtime that was served with --detach; requests in flight are answered first."""
    from moe_runtime.launch.runtime import attach

    answered = attach(name, ray_address=ray_address).close()
    outcome = "every request was answered" if answered else "some requests were not answered in time"
    stdout_console().print(f"stopped {name}: {outcome}", markup=False)


@app.command()
def restart(
    name: Annotated[str, typer.Argument(metavar="NAME", help="The runtime's name in its configuration.")] = "default",
    *,
    experts_only: Annotated[bool, typer.Option("--experts-only", help="Leave the routers alone.")] = False,
    routers_only: Annotated[bool, typer.Option("--routers-only", help="Leave the expert hosts alone.")] = False,
    ray_address: JoinedCluster = None,
) -> None:
    """Restart the processes of a runtime one after the other, without losing a request. May be repeated."""
    from moe_runtime.cli.restarting import restart_and_report

    restart_and_report(name, experts=not routers_only, routers=not experts_only, ray_address=ray_address)


@app.command()
def upgrade(
    config: ConfigPath,
    *,
    cluster: ClusterFile = None,
    ray_address: JoinedCluster = None,
    install: Install = False,
    wheel: Wheel = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the outcome as JSON.")] = False,
) -> None:
    """Roll the runtime of this name to another configuration without losing a request. May be repeated."""
    from moe_runtime.cli.deploying import Asked
    from moe_runtime.cli.upgrading import upgrade_and_report

    upgrade_and_report(Asked(config, cluster, ray_address, install=install, wheel=wheel), as_json=as_json)


@app.command()
def deploy(
    config: ConfigPath,
    *,
    cluster: ClusterFile = None,
    ray_address: JoinedCluster = None,
    install: Install = False,
    wheel: Wheel = None,
    nodes: Annotated[
        int, typer.Option(metavar="N", min=1, help="Wait for so many nodes; for all that the --cluster file lists.")
    ] = 1,
    as_json: Annotated[bool, typer.Option("--json", help="Print the outcome as JSON.")] = False,
) -> None:
    """Bring a configuration and its files to a cluster, and leave it serving there. May be repeated."""
    from moe_runtime.cli.deploying import Asked, deploy_and_report

    asked = Asked(config, cluster, ray_address, install=install, wheel=wheel, num_nodes=nodes)
    deploy_and_report(asked, as_json=as_json)


@app.command()
def teardown(
    name: Annotated[str, typer.Argument(metavar="NAME", help="The runtime's name in its configuration.")] = "default",
    *,
    cluster: ClusterFile = None,
    ray_address: JoinedCluster = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the outcome as JSON.")] = False,
) -> None:
    """End a deployed runtime, requests in flight first, and remove its files from every node. May be repeated."""
    from moe_runtime.cli.deploying import tear_down_and_report

    tear_down_and_report(name, cluster=cluster, ray_address=ray_address, as_json=as_json)


@cluster_app.command("down")
def cluster_down(
    cluster: Annotated[Path, typer.Argument(metavar="FILE", help="The cluster's `ray up` file.", show_default=False)],
    *,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
) -> None:
    """Stop Ray on every machine of a cluster, the workers that `ray down` forgets included. May be repeated."""
    if not yes:
        typer.confirm(f"Stop Ray, and every runtime, on all machines of {cluster}?", abort=True)
    from moe_runtime.cli.deploying import take_cluster_down

    take_cluster_down(cluster)


for _command in (validate, plan, presets):
    app.command()(_command)


@app.command()
def status(  # noqa: PLR0913  # each argument is an option
    address: Annotated[
        list[str] | None,
        typer.Option(metavar="HOST:PORT", help=f"A router's address; may be given again. [default: {DEFAULT_ADDRESS}]"),
    ] = None,
    name: Annotated[
        str | None,
        typer.Option("--name", metavar="NAME", help="Instead, what the controller of this runtime on a cluster says."),
    ] = None,
    ray_address: JoinedCluster = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")] = False,
    timeout_s: Annotated[float, typer.Option(min=0.1, help="How long to wait for each router.")] = 5.0,
    watch: Annotated[bool, typer.Option("--watch", help="Show it again and again, with rates, until Ctrl-C.")] = False,
    every_s: Annotated[
        float, typer.Option("--every", min=0.1, metavar="S", help="With --watch: seconds between.")
    ] = 2.0,
    token_file: TokenFileOption = None,
    tls: TlsOption = False,
    ca: CaOption = None,
    cert: CertOption = None,
    key: KeyOption = None,
    insecure: InsecureOption = False,
) -> None:
    """Show the layers, experts, routers and load of a running runtime."""
    connection = Connection(token_file, ca=ca, cert=cert, key=key, tls=tls, insecure=insecure)
    from moe_runtime.cli.status import show_routers, show_runtime

    if name is not None and (address or watch):
        raise typer.BadParameter("expected --name alone, found --address or --watch beside it")
    if watch and as_json:
        raise typer.BadParameter("expected --watch or --json, found both")
    addresses, console = tuple(address or [DEFAULT_ADDRESS]), stdout_console()
    if name is not None:
        show_runtime(name, ray_address=ray_address, as_json=as_json, console=console)
    elif watch:
        from moe_runtime.cli.watch import watch as watch_routers

        watch_routers(addresses, timeout_s=timeout_s, every_s=every_s, connection=connection, console=console)
    else:
        show_routers(addresses, timeout_s=timeout_s, connection=connection, as_json=as_json, console=console)


@app.command()
def certs(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="Where to; made if need be.", show_default=False)],
    *,
    hosts: Annotated[
        list[str] | None,
        typer.Option("--host", metavar="NAME", help="A name or address of the routers; may be given again."),
    ] = None,
    days: Annotated[int, typer.Option(min=1, max=3650, help="How long they are good for.")] = 365,
) -> None:
    """Make a CA for development, and certificates for routers and a client; nothing is overwritten."""
    from moe_runtime.cli.certs import make_and_explain

    make_and_explain(folder, hosts=hosts or (), days=days, console=stdout_console())


app.command()(bench)
app.command()(chaos)
app.command()(upcycle)
demo_app.command("chat")(demo_chat)
demo_app.command("digits")(demo_digits)
demo_app.command("routers")(demo_routers)
