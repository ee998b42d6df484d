"""`llm-pilot loadtest import`: the published raw records in the schema of our own."""

from pathlib import Path

import click


@click.command("import")
@click.argument("path", type=click.Path(path_type=Path))
@click.option("--out", type=click.Path(path_type=Path), default=Path(), help="Folder for the files.  [default: here]")
@click.option("--llm", "llms", multiple=True, help="Only this LLM, e.g. google/flan-t5-xl; repeatable.")
@click.option("--gpu-profile", "gpu_profiles", multiple=True, help="Only this one, e.g. 1xA100-40GB; repeatable.")
@click.option("--users", default="", metavar="NUMBERS", help="Only these numbers of users, between commas.")
def import_(*, path: Path, out: Path, llms: tuple[str, ...], gpu_profiles: tuple[str, ...], users: str) -> None:
    """Import the raw records that IBM published, a folder or tar archive at PATH: a file per LLM and GPU profile.

    The files are for `llm-pilot loadtest report` and `compare`.
    """
    import time  # noqa: PLC0415 the compilers take half a second
    from importlib.metadata import version  # noqa: PLC0415

    from llmpilot_contracts.errors import InvalidInputError, Violation  # noqa: PLC0415
    from llmpilot_loadtester.outputs.run_facts import RunFacts  # noqa: PLC0415
    from llmpilot_loadtester.published_records import NOTES, PROTOCOL, Case, import_records  # noqa: PLC0415
    from llmpilot_servicekit.file_output import make_folder  # noqa: PLC0415
    from llmpilot_servicekit.progress import shown_progress  # noqa: PLC0415

    levels = [part.strip() for part in users.split(",") if part.strip()]
    if wrong := [level for level in levels if not level.isdecimal()]:
        raise InvalidInputError(Violation("--users", f"must be whole numbers, has {level!r}") for level in wrong)

    def is_wanted(case: Case) -> bool:
        return (
            (not llms or case.llm in llms)
            and (not gpu_profiles or case.gpu_profile in gpu_profiles)
            and (not levels or str(case.users_count) in levels)
        )

    facts = RunFacts(
        requests="one fixed list of 929 requests, replayed",
        protocol=PROTOCOL,
        tool_version=version("llm-pilot-loadtester"),
        created_unix_nanos=time.time_ns(),
        notes=NOTES,
    )
    make_folder(out)
    targets: dict[Path, int] = {}
    with shown_progress("load tests imported") as advance:
        for target in import_records(path, out, is_wanted, facts):
            targets[target] = targets.get(target, 0) + 1
            advance(sum(targets.values()), None)
    if not targets:
        raise InvalidInputError([Violation(str(path), "has no load test that was asked for; see --llm and the others")])
    for target, count in sorted(targets.items()):
        click.echo(f"{target}: {count} load tests")
