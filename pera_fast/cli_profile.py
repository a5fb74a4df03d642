"""`pera-fast profile ...`: memory and speed against batch size, and traces. Parses arguments and calls functions."""

from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup


class _BatchesFirst(TyperGroup):
    """`pera-fast profile ARGS` is `batches`, whose name is not shown, unless ARGS begin with another command's name."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        return super().parse_args(ctx, args if args and args[0] in self.commands else ["batches", *args])

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        name, command, rest = super().resolve_command(ctx, args)
        return "" if name == "batches" else name, command, rest


profile_app = typer.Typer(cls=_BatchesFirst, rich_markup_mode=None)


@profile_app.callback()
def _options() -> None:
    pass  # with one, typer makes a group even of a single command


_Recipes = Annotated[
    list[str] | None,
    typer.Option("--recipe", help="Recipe or YAML file; may be given several times.", show_default="vit_b16"),
]


@profile_app.command("batches", epilog="`pera-fast profile trace --help`: where a step's time goes.")
def batches(
    out: Annotated[Path, typer.Option(help="Folder for tables, plots and report.html.", show_default=False)],
    recipe: _Recipes = None,
    device: Annotated[
        str, typer.Option(help="simulate (no GPU needed), cuda, cpu; auto: cuda if there is one, else simulate.")
    ] = "auto",
    batch_sizes: Annotated[
        str, typer.Option(help="Batch sizes; two or more allow a prediction for others.")
    ] = "8,16,32",
    policies: Annotated[
        str | None, typer.Option(help="Values of model.recompute to compare: none,cheap,block.", show_default="all")
    ] = None,
    dense: Annotated[bool, typer.Option("--dense/--no-dense", help="Compare with dense (unmasked) training.")] = True,
    sweep_ratios: Annotated[bool, typer.Option("--sweep-ratios", help="Compare mask ratios.")] = False,
    steps: Annotated[int, typer.Option(min=1, help="Timed steps per point (cuda, cpu).")] = 10,
    compare_simulated: Annotated[
        bool | None,
        typer.Option(
            "--compare-simulated/--no-compare-simulated",
            help="Simulate the measured points too, to compare.",
            show_default="on cuda",
        ),
    ] = None,
    jobs: Annotated[
        int | None, typer.Option(min=1, help="Simulations that run in parallel.", show_default="one a core")
    ] = None,
    world_size: Annotated[
        int, typer.Option(min=1, help="Number of GPUs in data parallelism, for the predicted times (simulate).")
    ] = 1,
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="SECTION.KEY=VALUE", help="Settings, such as model.prototypes=65536.")
    ] = None,
) -> None:
    """Memory and speed of training steps against batch size: which batch fits which card."""
    from pera_fast.profile.points import plan

    plan(recipe or ["vit_b16"], overrides or [])  # checks the settings before PyTorch is loaded
    from pera_fast.profile.run import profile

    profile(
        recipe or ["vit_b16"], out, device, batch_sizes, overrides or [], policies=policies, dense=dense,
        sweep_ratios=sweep_ratios, steps=steps, compare=compare_simulated, jobs=jobs,
        world_size=world_size,
    )  # fmt: skip


@profile_app.command()
def trace(
    out: Annotated[Path, typer.Option(help="Folder for trace.json.gz and tables.", show_default=False)],
    recipe: Annotated[str, typer.Option(help="vit_b16, vit_g16, vit_s16, vit_l16, tiny, or a YAML file.")] = "vit_b16",
    device: Annotated[str, typer.Option(help="cuda or cpu; auto: cuda if there is one.")] = "auto",
    steps: Annotated[int, typer.Option(min=1, help="Steps to record, after warm-up.")] = 3,
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="SECTION.KEY=VALUE", help="Settings, such as train.batch_size=8.")
    ] = None,
) -> None:
    """Some steps through torch's profiler: a trace for Perfetto, top kernels, named ranges, a memory snapshot."""
    from pera_fast.config import load_config

    load_config(recipe, overrides or [])  # before PyTorch is loaded
    from pera_fast.profile.trace import trace as run

    run(recipe, out, device, steps, overrides or [])
