"""The command line: parses arguments and calls functions. Only commands that need torch import it."""

import contextlib
import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from pera_fast import __version__, cli_finetune
from pera_fast.cli_data import data_app
from pera_fast.cli_embed import embed, points_as_arguments, similar
from pera_fast.cli_eval import evaluate
from pera_fast.cli_plot import plot
from pera_fast.cli_profile import profile_app
from pera_fast.cli_weights import convert, export
from pera_fast.errors import UserError
from pera_fast.paths import refuse_urls
from pera_fast.storage import NO_THREAD, cannot_start

app = typer.Typer(
    name="pera-fast",
    help="Pretrain a vision transformer on remote-sensing images with PerA.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # plain help comes in half the time
)
app.add_typer(data_app, name="data")
app.add_typer(profile_app, name="profile", help="Memory and speed against batch size; traces.")
app.command()(plot)

# What typer raises for wrong usage. Newer versions of typer carry their own click, so click cannot be asked for it.
_UsageError: type[Exception] = typer.BadParameter.__mro__[2]


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"pera-fast {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", help="Show the version and exit.", callback=_print_version, is_eager=True)
    ] = False,
) -> None:
    pass


@app.command()
def pretrain(
    data: Annotated[Path, typer.Option(help="Folder of images, searched recursively.", show_default=False)],
    out: Annotated[Path, typer.Option(help="Run folder: log, metrics, checkpoints, teacher.", show_default=False)],
    recipe: Annotated[
        str | None,
        typer.Option(
            help="vit_b16, vit_g16, vit_s16, vit_l16, tiny, or a YAML file.",
            show_default="vit_b16; resuming: the run's",
        ),
    ] = None,
    resume: Annotated[
        str | None,
        typer.Option(
            "--resume",
            metavar="[auto]",
            help="Resume from the newest checkpoint in --out; auto: start where --out holds no run.",
            show_default="off",
        ),
    ] = None,
    overrides: Annotated[
        list[str] | None,
        typer.Argument(metavar="SECTION.KEY=VALUE", help="Settings, such as train.steps=60 train.batch_size=8."),
    ] = None,
) -> None:
    """Pretrain on a folder of images. Under torchrun: data-parallel.

    Exit status: 0 done; 2 wrong usage, settings or data; interrupted, with a checkpoint: 130 SIGINT, 143 SIGTERM, 138
    SIGUSR1, 129 SIGHUP.
    """
    from pera_fast import pretrain as run

    how = "auto" if resume == "auto" else resume is not None
    result = run(data=data, out=out, recipe=recipe, resume=how, overrides=overrides or [])
    raise typer.Exit(result.exit_code)


app.command("eval")(evaluate)
app.command()(embed)
app.command()(similar)
app.command()(cli_finetune.finetune)
app.command()(cli_finetune.predict)


@app.command()
def config(
    recipe: Annotated[
        str,
        typer.Option(
            help="vit_b16, vit_g16, vit_s16, vit_l16, tiny; of fine-tuning finetune, authors; or a YAML file such as"
            " RUN/config.yaml."
        ),
    ] = "vit_b16",
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="SECTION.KEY=VALUE", help="Settings on top, such as train.epochs=20.")
    ] = None,
) -> None:
    """Every setting with its value, meaning and range. The output is a recipe file: `pera-fast config > my.yaml`."""
    from pera_fast.config import Config, load_config
    from pera_fast.config.finetune import is_finetune_recipe, load_finetune
    from pera_fast.config.listing import listing

    if is_finetune_recipe(recipe):
        cfg = load_finetune(Config(), None, recipe, overrides or [])
    else:
        cfg = load_config(recipe, overrides or [])
    typer.echo(listing(cfg), nl=False)


@app.command()
def info() -> None:
    """Device, versions, and for each op which implementation would run and why not a faster one."""
    from pera_fast.info import collect, show

    show(collect())


@app.command()
def bench(
    benches: Annotated[
        list[str] | None,
        typer.Argument(metavar="[OP[/CASE]]...", help="Benchmarks to run, such as attention, koleo, block, step/none."),
    ] = None,
    device: Annotated[str | None, typer.Option(help="cpu or cuda.", show_default="cuda if there is one")] = None,
    recipe: Annotated[
        str | None,
        typer.Option(help="Recipe whose shapes are used, or several separated by commas.", show_default="vit_b16"),
    ] = None,
    images: Annotated[
        str | None,
        typer.Option(help="Images per step, or several numbers separated by commas.", show_default="4, on a GPU 16"),
    ] = None,
    precision: Annotated[
        str | None,
        typer.Option(help="Precision of matrix products: bf16, fp16 or fp32.", show_default="fp32, on a GPU bf16"),
    ] = None,
    sweep: Annotated[
        bool, typer.Option("--sweep", help="vit_s16, vit_b16, vit_g16 at three numbers of images.")
    ] = False,
    every: Annotated[
        bool,
        typer.Option("--all", help="Time every implementation, not only eager PyTorch and the one that would run."),
    ] = False,
    only: Annotated[
        str | None, typer.Option(help="Implementations to time, such as reference,compiled,triton.", show_default=False)
    ] = None,
    json: Annotated[Path | None, typer.Option(help="JSON file for the results.")] = None,
    compare: Annotated[
        Path | None, typer.Option(metavar="OLD.json", help="Earlier results; show changes larger than the spread.")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Folder for bench.json and bench.png.")] = None,
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads.", show_default="one per core")] = None,
    seconds: Annotated[
        float | None, typer.Option(min=0, help="Seconds of timed calls per benchmark.", show_default="0.5, loaders 8")
    ] = None,
    passes: Annotated[
        int | None, typer.Option(min=1, help="Passes over all benchmarks.", show_default="3, on a GPU 1")
    ] = None,
    processor_time: Annotated[
        bool,
        typer.Option(
            "--processor-time", help="Time the process rather than the clock, for a busy CPU; with --threads 1."
        ),
    ] = False,
    remeasure: Annotated[
        bool, typer.Option("--remeasure", help="Measure bandwidth and matrix rate of this machine again.")
    ] = False,
    formats: Annotated[
        str | None, typer.Option(help="File formats of `bench data`.", show_default="jpeg,png,tiff")
    ] = None,
    sizes: Annotated[
        str | None, typer.Option(help="Image sizes of `bench data`, in pixels a side.", show_default="512")
    ] = None,
    data: Annotated[
        Path | None,
        typer.Option(help="Images that `bench data` makes its files from.", show_default="procedural scenes"),
    ] = None,
) -> None:
    """Time ops, blocks, steps and the loader, and say how near each comes to what the machine can do.

    `pera-fast bench data` compares loaders: a Pillow and PyTorch pipeline, this one on a folder and on shards.

    Exit status: 0 done; 1 a bench failed; 2 wrong usage.
    """
    from pera_bench.command import Wish, run

    wish = Wish(
        benches=benches or (),
        device=device,
        recipes=recipe,
        images=images,
        precision=precision,
        sweep=sweep,
        only="all" if every else only,
        threads=threads,
        seconds=seconds,
        passes=passes,
        processor_time=processor_time,
        remeasure=remeasure,
    )
    if benches == ["data"]:
        from pera_bench.loaders import compare_loaders

        raise typer.Exit(compare_loaders(wish, formats, sizes, data, old=compare, files=(json, out)))
    if formats or sizes or data:
        raise UserError("--formats, --sizes and --data are of `pera-fast bench data`, which compares loaders")
    raise typer.Exit(run(wish, json=json, old=compare, out=out))


app.command()(export)
app.command()(convert)


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Folder for the run and its report.", show_default=False)],
    data: Annotated[
        Path | None, typer.Option(help="Images, one folder a class.", show_default="procedural scenes")
    ] = None,
) -> None:
    """Pretrain `tiny` within minutes and write an HTML report with pictures."""
    from pera_fast.demo.run import run

    run(out=out, data=data)


def run(arguments: Sequence[str] | None = None) -> int:
    """Runs a command line and returns its exit status; wrong usage, settings or data give one line on stderr."""
    args = points_as_arguments(_with_resume(list(sys.argv[1:] if arguments is None else arguments)))
    try:
        refuse_urls(args)
        _refuse_empty(args)
        _refuse_repeats(args)
        status: Any = app(args, prog_name="pera-fast", standalone_mode=False)
        return int(status or 0)
    except UserError as error:
        return _fail(str(error), error.exit_code)
    except _UsageError as error:
        if type(error).__name__ == "NoArgsIsHelpError":
            typer.echo(str(error), err=True)
            return 2
        return _fail(_usage(error), 2)
    except RuntimeError as error:
        if NO_THREAD not in str(error):
            raise
        return _fail(cannot_start("a thread", error), UserError.exit_code)
    except ValueError as error:
        if not str(error).startswith("PERA_BACKEND="):  # which pera_kernels refuses when it is first asked
            raise
        return _fail(str(error), 2)
    except BrokenPipeError:  # `pera-fast info | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1


def _with_resume(args: list[str]) -> list[str]:
    """Join ``--resume auto`` to one argument; a bare ``--resume`` takes no value, although settings may follow it."""
    joined: list[str] = []
    for arg in args:
        if arg == "auto" and joined and joined[-1] == "--resume=newest":
            joined[-1] = "--resume=auto"
        else:
            joined.append("--resume=newest" if arg == "--resume" else arg)
    return joined


def _refuse_empty(args: Sequence[str]) -> None:
    """Raises UserError for an empty value, of a shell variable that is not set: as a path it would be this folder."""
    for before, arg in zip(["", *args], args, strict=False):
        name = arg[:-1] if arg.startswith("--") and arg.endswith("=") and arg.count("=") == 1 else None
        if name is None and arg == "":
            name = before if before.startswith("-") and "=" not in before else "an argument"
        if name is not None:
            raise UserError(f"{name}: is empty; give a value, or leave it out (is a shell variable not set?)")


def _refuse_repeats(args: Sequence[str]) -> None:
    """Raises UserError for an option of one value that is given twice: the parser would take the last and say nothing.

    Settings may repeat: the last of equal keys counts, so that a script can end in "$@".
    """
    args = list(args[: args.index("--")] if "--" in args else args)
    names = [arg.partition("=")[0] for arg in args if arg.startswith("--")]
    repeated = [name for name in dict.fromkeys(names) if names.count(name) > 1]
    if not repeated:
        return
    command: Any = typer.main.get_command(app)
    for arg in args:
        command = getattr(command, "commands", {}).get(arg, command)
    defaults = getattr(command, "commands", {}).values()  # `profile` may stand for one of its commands
    for option in [*command.params, *(option for default in defaults for option in default.params)]:
        single = option.param_type_name == "option" and not (option.multiple or option.is_flag)
        if single and (name := next((name for name in repeated if name in option.opts), None)):
            raise UserError(f"{name} is given {names.count(name)} times; it takes one value")


def _usage(error: Any) -> str:
    """Typer's message about wrong usage, in one line."""
    message = " ".join(error.format_message().split()).rstrip(".").replace("Value error, ", "")
    if choice := re.search(r"'([^']*)' is not one of (.+)$", message):
        from pera_fast.config.keys import did_you_mean

        message += did_you_mean(choice[1], re.findall(r"'([^']*)'", choice[2]))
    if (
        hasattr(error, "possibilities") and not error.possibilities
    ):  # no such option, and none like it: perhaps a setting is meant
        from pera_fast.config.keys import option_hint

        hint = option_hint(error.option_name)
        message += f"; {hint}" if hint else ""
    context = getattr(error, "ctx", None)
    return f"{message} (see {context.command_path} --help)" if context else message


def _fail(message: str, status: int) -> int:
    if os.environ.get("RANK", "0") == "0":  # torchrun starts equal processes: one of them speaks
        with contextlib.suppress(OSError):  # the exit status is left to say it
            print(f"error: {' '.join(message.split())}", file=sys.stderr)
    return status


def main() -> None:
    """The program `pera-fast`."""
    _open_standard_streams()
    sys.exit(run())


def _open_standard_streams() -> None:
    """Give what the shell closed (`>&-`) to /dev/null.

    Else sys.stdout is None, and the next file that is opened gets number 1, so that what libraries print lands in it.
    """
    for number, name, mode in ((0, "stdin", "r"), (1, "stdout", "w"), (2, "stderr", "w")):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # gets the lowest free number, which is this one
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode))  # noqa: SIM115 - for as long as the process lives
