"""The commands that speak to a cluster instead of doing the work here: submit, jobs, logs, stop,
doctor, watch-spot, and plan, which only thinks of one."""

import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from cluster.spot import METADATA
from cluster.submissions import ADDRESS_VARIABLE, DEFAULT_ADDRESS
from jobs.arguments import AsJson, ConfigPath, Guard, Load, Overrides

Address = Annotated[
    str,
    typer.Option(metavar="URL", envvar=ADDRESS_VARIABLE, help="The cluster's dashboard, such as http://HEAD:8265."),
]
JobId = Annotated[str, typer.Argument(metavar="ID", help="As `raystill jobs` shows it.")]


def add_cluster_commands(app: typer.Typer, guard: Guard, load: Load) -> None:
    """Adds these commands to the program."""

    @app.command()
    def submit(
        config: ConfigPath,
        overrides: Overrides = None,
        address: Address = DEFAULT_ADDRESS,
        job_id: Annotated[
            str | None, typer.Option("--id", metavar="ID", help="Instead of one made of run, config and command.")
        ] = None,
        command: Annotated[str, typer.Option(help="The raystill command to run there.")] = "run",
        detach: Annotated[bool, typer.Option("--detach", help="Do not wait for it, do not show its log.")] = False,
        image_has_raystill: Annotated[
            bool, typer.Option("--image-has-raystill", help="The nodes have raystill installed: send the config alone.")
        ] = False,
        pip: Annotated[
            Path | None, typer.Option(metavar="FILE", help="Requirements that every node installs first.")
        ] = None,
    ) -> None:
        """Run a config on a cluster, and follow it. Saying it again follows the job while it runs, and afterwards
        begins it anew, passing over what is finished; with --id, a job that has succeeded is only reported."""

        def work() -> None:
            from cluster.submissions import Submissions
            from jobs.submit import how_it_ended
            from jobs.submit import submit as submit_job

            loaded = load(config, overrides)
            cluster = Submissions(address)
            done = submit_job(loaded, command, cluster, _say, job_id, image_has_raystill, pip)
            job = done.job
            if job.has_ended and not done.is_new:
                _say(f"{how_it_ended(job)}; its log: raystill logs {job.id}{_at(address)}")
                if detach:
                    typer.echo(job.id)
                return
            if not done.is_new:
                _say(f"job {job.id} is {job.status.lower()} already")
            if detach:
                typer.echo(job.id)
                _say(f"follow: raystill logs {job.id} --follow{_at(address)}")
                _say(f"stop:   raystill stop {job.id}{_at(address)}")
                return
            _follow(cluster, job.id, address)

        guard(work, False)

    @app.command()
    def jobs(address: Address = DEFAULT_ADDRESS, as_json: AsJson = False) -> None:
        """List the jobs of a cluster."""

        def work() -> None:
            from rich.console import Console

            from cluster.submissions import Submissions
            from jobs.submit import jobs_table

            found = Submissions(address).all()
            if as_json:
                typer.echo(json.dumps([{**vars(job), "message": job.message[-1000:]} for job in found], sort_keys=True))
            elif found:
                Console().print(jobs_table(found))
            else:
                _say(f"cluster {address} has had no jobs")

        guard(work, as_json)

    @app.command()
    def logs(
        job_id: JobId,
        address: Address = DEFAULT_ADDRESS,
        follow: Annotated[bool, typer.Option("--follow", help="Until it has ended; ends with its exit code.")] = False,
    ) -> None:
        """Show what a job of a cluster wrote."""

        def work() -> None:
            from cluster.submissions import Submissions

            cluster = Submissions(address)
            _known(cluster, job_id)
            if follow:
                _follow(cluster, job_id, address)
            else:
                typer.echo(cluster.logs(job_id), nl=False)

        guard(work, False)

    @app.command()
    def stop(job_id: JobId, address: Address = DEFAULT_ADDRESS) -> None:
        """Stop a job of a cluster, and wait until it has stopped. The same `submit` goes on from its checkpoints."""

        def work() -> None:
            from cluster.submissions import Submissions
            from jobs.submit import how_it_ended

            cluster = Submissions(address)
            if _known(cluster, job_id).has_ended:
                _say(f"{how_it_ended(_known(cluster, job_id))}; there is nothing to stop")
            else:
                _say(how_it_ended(cluster.stop(job_id)))

        guard(work, False)

    @app.command()
    def doctor(
        config: Annotated[
            Path | None, typer.Argument(metavar="[CONFIG]", help="Look at what this run needs too.")
        ] = None,
        overrides: Overrides = None,
        address: Annotated[
            str | None, typer.Option(metavar="URL", help="A cluster's dashboard: look at it and at its nodes.")
        ] = None,
        as_json: AsJson = False,
    ) -> None:
        """Look at versions, storage, MLflow, clocks, disks and the cluster. Ends with 1 if anything fails."""

        def work() -> None:
            from rich.console import Console

            from cluster.connection import ClusterConfig, connect, in_a_job
            from jobs.doctor import examine, examine_from_inside, line_of

            loaded = None if config is None else load(config, overrides)
            if address is None and in_a_job():
                with connect(loaded.cluster if loaded is not None else ClusterConfig()):
                    typer.echo(json.dumps(examine_from_inside(loaded)))
                return
            checks = examine(loaded, address)
            failed = sum(check.status == "failure" for check in checks)
            if as_json:
                typer.echo(json.dumps({"checks": [check.as_json() for check in checks], "failures": failed}))
            else:
                console = Console(highlight=False)
                for check in checks:
                    console.print(line_of(check), soft_wrap=True)
                typer.echo(f"{len(checks)} checks, {failed} failures")
            if failed:
                raise SystemExit(1)

        guard(work, as_json)

    @app.command("watch-spot")
    def watch_spot(
        address: Annotated[
            str | None, typer.Option(metavar="HOST:PORT", help="The cluster; default: the one that this machine is in.")
        ] = None,
        node_id: Annotated[str | None, typer.Option(metavar="ID", help="Ray's id of this machine's node.")] = None,
        rebalance_s: Annotated[
            int,
            typer.Option(min=0, help="Seconds to leave in on a rebalance recommendation; 0: stay."),
        ] = 600,
        metadata: Annotated[str, typer.Option(metavar="URL", help="EC2's metadata service.")] = METADATA,
    ) -> None:
        """Drain this machine's node when EC2 announces its end. Runs beside Ray on every spot machine."""

        def work() -> None:
            from cluster.spot import InstanceMetadata, drain_node, this_node, watch

            cluster, node = (address, node_id) if address and node_id else this_node(address)
            node = node_id or node

            def drain(reason: str, remaining_s: int) -> None:
                _say(f"{reason}: draining node {node}, {remaining_s} s left")
                drain_node(str(cluster), str(node), reason, remaining_s)

            watch(InstanceMetadata(metadata), drain, rebalance_s=rebalance_s)

        guard(work, False)

    @app.command()
    def plan(
        config: ConfigPath,
        overrides: Overrides = None,
        teacher_card: Annotated[str, typer.Option(metavar="CARD", help="What a teacher replica runs on.")] = "h100",
        student_card: Annotated[str, typer.Option(metavar="CARD", help="What a student worker runs on.")] = "h100",
        students: Annotated[
            int | None, typer.Option(min=1, help="Cards that train the student; default train.num_workers.")
        ] = None,
        tokens: Annotated[float | None, typer.Option(min=1, help="Tokens to read; default train.steps.")] = None,
        teacher_utilisation: Annotated[
            float, typer.Option(min=0.01, max=1, help="Share of the card's bf16 peak.")
        ] = 0.5,
        student_utilisation: Annotated[
            float, typer.Option(min=0.01, max=1, help="Share of the card's bf16 peak.")
        ] = 0.4,
        network_gbps: Annotated[float, typer.Option(min=0.1, help="Between nodes, each way, in Gbit/s.")] = 100,
        price: Annotated[
            list[str] | None, typer.Option(metavar="CARD=USD", help="Price of a card and hour; may be given again.")
        ] = None,
        as_json: AsJson = False,
    ) -> None:
        """Say on paper how many cards it takes, for how long and how much, and what will not go. Starts nothing."""

        def work() -> None:
            from rich.console import Console

            from cluster.config import validate
            from jobs.plan import PlanOptions
            from jobs.plan import plan as planned
            from jobs.planning.cards import read_prices
            from jobs.planning.table import show_plan

            asked = {
                "teacher_card": teacher_card,
                "student_card": student_card,
                "students": students,
                "tokens": tokens,
                "teacher_utilisation": teacher_utilisation,
                "student_utilisation": student_utilisation,
                "network_gbps": network_gbps,
                "prices": read_prices(price or []),
            }
            options = validate(PlanOptions, asked, "options")
            found = planned(load(config, overrides), options)
            if as_json:
                typer.echo(json.dumps(found, sort_keys=True))
            else:
                show_plan(found, Console())

        guard(work, as_json)


def _follow(cluster: Any, job_id: str, address: str) -> None:
    """Shows a job's log as it is written, and ends with the job's exit code; Ctrl-C leaves the job alone."""
    from cluster.interrupts import exit_code as interrupted
    from jobs.submit import exit_code, how_it_ended

    def write(text: str) -> None:
        sys.stdout.write(text)
        sys.stdout.flush()

    try:
        job = cluster.follow(job_id, write, _say)
    except KeyboardInterrupt:
        _say(f"detached: job {job_id} goes on; stop it with: raystill stop {job_id}{_at(address)}")
        raise SystemExit(interrupted()) from None
    _say(how_it_ended(job))
    if code := exit_code(job):
        raise SystemExit(code)


def _known(cluster: Any, job_id: str) -> Any:
    from cluster.errors import ConfigError

    job = cluster.find(job_id)
    if job is None:
        raise ConfigError(f"job {job_id}: cluster {cluster.address} has none of this id; see `raystill jobs`")
    return job


def _at(address: str) -> str:
    return "" if address == DEFAULT_ADDRESS else f" --address {address}"


def _say(text: str) -> None:
    typer.echo(f"raystill: {text}", err=True)
