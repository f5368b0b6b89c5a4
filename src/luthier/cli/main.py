"""The commands and their exit codes. Results go to standard output, progress to standard error."""

from __future__ import annotations

import json
import os
import shlex
import sys
import time
import traceback
from pathlib import Path
from typing import Annotated, Any

from luthier.support import machine
from luthier.support.cache import cache_folder
from luthier.support.version import __version__

machine.prepare()
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")  # threads; nothing here forks a worker
if "--debug" not in sys.argv:
    os.environ.setdefault("TQDM_DISABLE", "1")  # switches off progress bars of libraries; read when tqdm is imported

import typer  # noqa: E402

from luthier.cli.collaborate import app as collaborate  # noqa: E402
from luthier.cli.shared import (  # noqa: E402
    HELP,
    AllowCode,
    AllowOurs,
    Debug,
    Fields,
    Json,
    Overrides,
    RecipePath,
    folder_of,
    hint,
    load,
    method_named,
    to_json,
)
from luthier.support.environment import quiet  # noqa: E402
from luthier.support.errors import LuthierError  # noqa: E402

app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings=HELP,
    epilog="Environment: LUTHIER_LOG=debug, info, warning or error writes what luthier does to standard error; "
    "LUTHIER_CACHE names the folder of the cache.",
)

Fresh = Annotated[bool, typer.Option(help="Work in a new folder, even if a run could be continued.")]
MaxTime = Annotated[str | None, typer.Option(help="Save and stop after this time: 90, 30m, 2h.")]


app.add_typer(collaborate, name="collaborate")

# The errors that typer raises for mistakes in the command line. Since 0.26 it has its own copy of click; the classes that it
# exports are subclasses of these in every version.
Mistake: type[Any] = next(c for c in typer.BadParameter.__mro__ if c.__name__ == "ClickException")


def _show_version(wanted: bool) -> None:
    if wanted:
        print(f"luthier {__version__}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[bool, typer.Option("--version", callback=_show_version, help="Print the version.")] = False,
) -> None:
    """Fine-tune language models with less."""


def main() -> None:
    """Entry point."""
    debug = "--debug" in sys.argv
    try:
        code = app(standalone_mode=False, prog_name="luthier")
        if code == 130:  # typer turns Ctrl-C into this number
            raise KeyboardInterrupt
    except LuthierError as error:
        _fail(str(error), 2, debug)
    except KeyboardInterrupt:
        _fail("interrupted", 130, debug)
    except OSError as error:
        _fail(f"{error.filename or 'the machine'}: {error.strerror or error}", 1, debug)
    except Exception as error:
        _fail(*_told(error), debug)


class Fault(Exception):
    """An unexpected error in the work on a folder, which gets the traceback."""

    def __init__(self, error: Exception, folder: Path) -> None:
        super().__init__(str(error))
        self.error, self.folder = error, folder


def _told(error: Exception) -> tuple[str, int]:
    """(message, exit code) for an unexpected error. The traceback goes to a file, in the run's folder or in the cache."""
    if isinstance(error, Mistake):
        return error.format_message() + hint(error, sys.argv[1:]), 2
    if type(error).__name__ == "Interrupted":  # of training.loop, which would load torch
        return str(error), 130
    folder = error.folder if isinstance(error, Fault) else cache_folder() / "errors"
    error = error.error if isinstance(error, Fault) else error
    file = folder / f"error-{time.strftime('%Y%m%d-%H%M%S')}.txt"
    folder.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(traceback.format_exception(error)), encoding="utf-8")
    return f"{type(error).__name__}: {error} (this is a bug in luthier; the traceback is in {file})", 1


def _fail(message: str, code: int, debug: bool) -> None:
    if debug and code not in (0, 130):
        traceback.print_exc()
    if message:
        print(f"luthier: {message}", file=sys.stderr)
    raise SystemExit(code)


def _seconds(text: str | None) -> float | None:
    """Parse a time: "90", "30m", "2h"."""
    if text is None:
        return None
    units = {"s": 1.0, "m": 60.0, "h": 3600.0}
    try:
        return float(text[:-1]) * units[text[-1]] if text[-1:] in units else float(text)
    except ValueError as error:
        raise LuthierError(f"--max-time {text!r}: write seconds, or 30m, or 2h") from error


@app.command()
def run(
    recipe: RecipePath, overrides: Overrides = None, fresh: Fresh = False, max_time: MaxTime = None, as_json: Json = False,
    allow_code: AllowCode = False, debug: Debug = False,
) -> None:  # fmt: skip
    """Tune a model as a recipe says, with scores before and after and a report."""
    name = "run" if str(recipe) == "-" else recipe.stem
    _carry_out(load(recipe, overrides, allow_code), name, folder_of(recipe), fresh, max_time, as_json, debug)


app.command("train", hidden=True)(run)  # another name, which other tools use


def _carry_out(
    recipe: Any, name: str, base: Path, fresh: bool, max_time: str | None, as_json: bool, debug: bool
) -> None:
    limit = _seconds(max_time)
    quiet(debug)
    from luthier.cli.progress import Bar
    from luthier.run.execute import run as carry_out
    from luthier.run.folder import choose_folder, shared_folder
    from luthier.training.loop import Interrupted

    machine.settle()
    folder = shared_folder(lambda: choose_folder(recipe, name, fresh, base))
    first = os.environ.get("RANK", "0") == "0"
    with Bar() as bar:
        try:
            result = carry_out(recipe, folder, base, say=bar.say, on_step=bar.step, max_seconds=limit, tick=bar.tick)
        except Interrupted as stopped:
            if first:
                bar.say(f"{stopped}; the state is saved in {folder}")
                bar.say(f"continue with: {_again(sys.argv[1:], folder)}")
            raise SystemExit(_code(folder)) from stopped
        except (LuthierError, OSError):
            raise
        except Exception as error:
            raise Fault(error, folder) from error
    if first:
        print(to_json(result) if as_json else folder / "report.html")


def _again(words: list[str], folder: Path) -> str:
    """The command that continues a stopped run. After --fresh it must name the run's folder."""
    if "--fresh" in words:
        words = [w for w in words if w != "--fresh"]
        words.append(f"--output-dir={folder.resolve()}" if words[0] == "demo" else f"output_dir={folder.resolve()}")
    return shlex.join(["luthier", *words])


def _code(folder: Path) -> int:
    """130 after Ctrl-C, 143 after SIGTERM, 0 after --max-time."""
    state = json.loads((folder / "run.json").read_text(encoding="utf-8"))
    return {2: 130, 15: 143}.get(state.get("signal"), 0)


@app.command()
def demo(
    output_dir: Annotated[str, typer.Option(help="Folder of the run.")] = "runs/demo",
    steps: Annotated[int, typer.Option(min=1, help="Optimiser steps; 63 is one pass.")] = 63,
    fresh: Fresh = False, as_json: Json = False, debug: Debug = False,
) -> None:  # fmt: skip
    """Tune SmolLM2-135M to turn spoken requests into JSON calls, and see what it learnt."""
    from importlib.resources import files

    from luthier import recipe as recipes

    text = files("luthier.demos").joinpath("demo.yaml").read_text(encoding="utf-8")
    recipe = recipes.load(text, "demo.yaml", [f"output_dir={json.dumps(output_dir)}", f"max_steps={steps}"])
    _carry_out(recipe, "demo", Path("."), fresh, None, as_json, debug)


@app.command()
def compare(
    words: Annotated[list[str], typer.Argument(help="A recipe with --vary, recipes, or a file with arms; then a.b=value.")],
    vary: Annotated[list[str] | None, typer.Option(help="key=value,value: one arm for each value; repeatable.")] = None,
    seeds: Annotated[str | None, typer.Option(help="How many, or which: 5, or 0,1,2.")] = None,
    budget: Annotated[str | None, typer.Option(help="Budget of one run: flops=1e13, tokens=..., seconds=..., bytes=...")] = None,
    baseline: Annotated[str | None, typer.Option(help="The arm that others are compared with.")] = None,
    primary: Annotated[str | None, typer.Option(help="The measure that decides.")] = None,
    output_dir: Annotated[Path | None, typer.Option(help="Folder; runs/compare-NAME by default.")] = None,
    processes: Annotated[int | None, typer.Option(min=0, help="Runs at the same time; 0: in this process.")] = None,
    search: Annotated[bool, typer.Option(help="Search each arm's learning rate.")] = True,
    search_rows: Annotated[int | None, typer.Option(min=10, help="Training rows set aside for it; 100 by default.")] = None,
    dry_run: Annotated[bool, typer.Option(help="Only forecast the comparison, from a few steps of each arm.")] = False,
    so_far: Annotated[bool, typer.Option("--so-far", help="Judge the runs that are finished; train nothing.")] = False,
    retry: Annotated[bool, typer.Option(help="Try failed runs again.")] = False,
    keep: Annotated[bool, typer.Option(help="Keep the weights of every run.")] = False,
    strict: Annotated[bool, typer.Option(help="Exit with 1 if an arm failed.")] = False,
    as_json: Json = False, allow_code: AllowCode = False, debug: Debug = False,
) -> None:  # fmt: skip
    """Which of these is better at equal cost? Every arm gets the same search for its learning rate, the same seeds and rows."""
    quiet(debug)
    from luthier.cli import compare as ours
    from luthier.cli.progress import Bar
    from luthier.comparison.execute import compare as carry_out
    from luthier.comparison.execute import ready, stoppable
    from luthier.comparison.execute import so_far as finished
    from luthier.comparison.judge import as_dict
    from luthier.comparison.page import write_comparison
    from luthier.comparison.steps import forecast
    from luthier.training.loop import Interrupted

    options = {
        "seeds": ours.seeds_from(seeds), "budget": ours.budget_from(budget), "baseline": baseline, "primary": primary,
    }  # fmt: skip
    plan, base, name = ours.planned(words, vary or [], options)
    plan = plan.model_copy(update={"search": ours.searching(plan.search, search, search_rows)})
    folder = output_dir or Path("runs") / f"compare-{name}"
    with Bar() as bar:
        bench = ready(plan, folder, base, base if allow_code else None, bar.say, keep)
        if retry:
            bench.forget_failures()
        signals: list[int] = []
        try:
            with stoppable() as signals:
                standings = finished(bench) if so_far else carry_out(bench, processes, dry_run)
        except (Interrupted, KeyboardInterrupt) as stopped:
            bar.say(f"stopped; finished work is kept in {folder}")
            bar.say(f"continue with: {shlex.join(['luthier', *sys.argv[1:]])}")
            raise SystemExit(143 if signals[-1:] == [15] else 130) from stopped
    if dry_run:
        if as_json:
            print(to_json({"forecast": forecast(bench.plan, bench.arms, bench.done)}))
        return
    page = write_comparison(bench, standings, ["luthier", *sys.argv[1:]])
    if as_json:
        print(to_json({"report": str(page), "arms": as_dict(standings)}))
    else:
        ours.show(bench, standings)
        print(page)
    if ours.nothing_compared(plan, standings) or (strict and any(s.errors for s in standings)):
        raise SystemExit(1)


@app.command()
def curate(
    recipe: RecipePath,
    overrides: Overrides = None,
    output_dir: Annotated[Path | None, typer.Option(help="A new folder; runs/curate-NAME by default.")] = None,
    as_json: Json = False,
    allow_code: AllowCode = False,
    debug: Debug = False,
) -> None:
    """Carry out the recipe's curate steps, with a reason for every row, and train nothing."""
    loaded = load(recipe, overrides, allow_code)
    quiet(debug)
    from luthier.cli.progress import Bar
    from luthier.run.curate import curate as change
    from luthier.run.rows import told

    with Bar() as bar:
        result = change(loaded, folder_of(recipe), output_dir or Path("runs") / f"curate-{recipe.stem}", bar.tick)
    if as_json:
        print(to_json(result))
        return
    for step in result["steps"]:
        print("\n".join(told(**step)))
    print(Path(result["folder"]) / "report.html")


@app.command()
def claim(
    name: Annotated[str | None, typer.Argument(help="A claim; see claims/.")] = None,
    tier: Annotated[str | None, typer.Option(help="All claims of a tier: tiny, small or gpu.")] = None,
    folder: Annotated[Path, typer.Option(help="Where claims are.")] = Path("claims"),
    record: Annotated[bool, typer.Option(help="Write what was measured into the claim's file.")] = False,
    fresh: Annotated[bool, typer.Option(help="Measure again what was measured before.")] = False,
    processes: Annotated[int, typer.Option(min=1, help="Seeds at the same time; use 1 if a condition is about seconds.")] = 1,
    as_json: Json = False, debug: Debug = False,
) -> None:  # fmt: skip
    """Does a claim of a paper hold here? Measures it with several seeds. After a stop, the same command continues."""
    from luthier.claims import claim as claims

    if (name is None) == (tier is None):
        raise LuthierError("claim: name one, or give --tier tiny, small or gpu")
    if tier is not None and tier not in claims.TIERS:
        raise LuthierError(f"--tier {tier!r}: there are {', '.join(claims.TIERS)}")
    quiet(debug)
    results = {}
    for one in [name] if name is not None else claims.of_tier(str(tier), folder):
        results[one] = claims.run(one, folder, fresh=fresh, processes=processes)
        if record:
            claims.record(one, results[one], folder)
        if not as_json:
            print(f"{one}: {results[one]['verdict']}")
            for c in results[one]["conditions"]:
                print(f"  {c['outcome']}: {c['says']}: {c['mean']} ({c['low']} to {c['high']})")
    if as_json:
        print(to_json(results))
        return
    from luthier.claims.page import write_claims

    shown = {n: claims.load(folder / f"{n}.yaml").model_copy(update={"measured": r}) for n, r in results.items()}
    print(write_claims(Path("runs/claims/report.html"), shown, shlex.join(["luthier", *sys.argv[1:]])))


@app.command()
def pictures(
    folder: Annotated[Path, typer.Argument(help="A finished run or comparison.")],
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Draw PNG files of a run (and put them into its model card), or of a comparison."""
    from luthier.report.pictures import pictures as draw

    made = [str(p) for p in draw(folder)]
    print(to_json(made) if as_json else "\n".join(made))


@app.command()
def check(
    recipe: RecipePath,
    overrides: Overrides = None,
    forecast: Annotated[bool, typer.Option(help="Forecast memory and time with a small copy of the model.")] = True,
    as_json: Json = False,
    allow_code: AllowCode = False,
    debug: Debug = False,
) -> None:
    """Is the recipe consistent, is the data what you expect, and will it fit? Loads no weights."""
    loaded = load(recipe, overrides, allow_code)
    quiet(debug)
    from luthier.cli.check import check_recipe, show
    from luthier.cli.progress import Bar

    with Bar() as bar:
        result = check_recipe(loaded, folder_of(recipe), bar.tick, forecast)
    if as_json:
        print(to_json(result))
    else:
        show(result)


RunPath = Annotated[Path, typer.Argument(help="The folder of a finished run, or of a collaboration's result.")]


@app.command()
def generate(
    folder: RunPath,
    prompts: Annotated[
        list[str] | None,
        typer.Argument(help="What to ask; without it, every line of standard input.", show_default=False),
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1)] = 128,
    base: Annotated[bool, typer.Option("--base", help="Show the base model's answer too.")] = False,
    chat: Annotated[
        bool, typer.Option("--chat", help="Talk with it: each line is a turn that sees the earlier ones.")
    ] = False,
    temperature: Annotated[
        float | None,
        typer.Option(min=0, help="Draw the answers; 0 takes the most likely tokens. By default as in the recipe."),
    ] = None,
    top_p: Annotated[
        float | None, typer.Option(help="Draw from the most likely tokens with this probability together.")
    ] = None,
    seed: Annotated[int | None, typer.Option(min=0, help="Another seed gives other draws.")] = None,
    as_json: Json = False,
    allow_code: AllowCode = False,
    debug: Debug = False,
) -> None:
    """Ask a tuned model: prompts in the command, lines of standard input, or a conversation."""
    from luthier.cli import asking

    if chat and (prompts or base):
        raise LuthierError("--chat: reads standard input and asks the tuned model only; leave out prompts and --base")
    changes = asking.changes(temperature, top_p, seed)
    quiet(debug)
    from luthier.tuned.open import answers

    if chat or (prompts is None and sys.stdin.isatty()):
        asking.converse(folder, max_new_tokens, allow_code, changes, as_json)
        return
    asked = asking.lines(prompts)
    result = answers(folder, asked, max_new_tokens, base, allow_code, **changes)
    if as_json:
        print(to_json(result))
        return
    for entry in result:
        if base:
            print(f"base:  {entry['base']}")
        print(f"tuned: {entry['answer']}" if base else entry["answer"])


@app.command()
def evaluate(
    folder: RunPath,
    data: Annotated[str | None, typer.Option(help="Rows to score; those of the recipe's data.eval by default.")] = None,
    base: Annotated[bool, typer.Option(help="Score the base model beside it.")] = True,
    as_json: Json = False,
    allow_code: AllowCode = False,
    debug: Debug = False,
) -> None:
    """Score a tuned model on held-out rows, with 95% intervals and the base model beside it."""
    from luthier.run.evaluations import known

    result = known(folder, data, base)
    if result is None:
        quiet(debug)
        from luthier.tuned.open import scores

        result = scores(folder, data, Path("."), allow_code, base)
    if as_json:
        print(to_json(result))
    else:
        from luthier.cli.listing import table_of_measures

        table_of_measures(result)


@app.command()
def export(
    folder: RunPath,
    output: Annotated[Path, typer.Argument(help="A new folder.")],
    to: Annotated[str, typer.Option(help="hf (merged folder), peft (adapter), gguf (Llama, Mistral, Qwen).")] = "hf",
    push: Annotated[
        str | None, typer.Option(help="Upload it to this Hub id (org/name), as a private repository.")
    ] = None,
    as_json: Json = False,
    allow_code: AllowCode = False,
    debug: Debug = False,
) -> None:
    """Write a tuned model in another form, read it back and compare. Nothing is uploaded without --push."""
    quiet(debug)
    from luthier.tuned.export import export as write
    from luthier.tuned.export import push_to_hub

    result = write(folder, to, output, allow_code)
    if push is not None:
        result["pushed"] = push_to_hub(output, push)
    print(to_json(result) if as_json else f"{result['folder']}, read back: logits differ by {result['difference']:.1e}")


Runs = Annotated[list[Path], typer.Argument(help="Folders of finished runs, merges or adapters, of one base.")]


@app.command()
def merge(
    runs: Runs,
    output: Annotated[Path, typer.Option("--output", "-o", help="A new folder.")],
    method: Annotated[str, typer.Option(help="How; see luthier methods.")] = "linear",
    fields: Fields = None,
    as_json: Json = False,
    allow_code: AllowOurs = False,
    debug: Debug = False,
) -> None:
    """Make one model of several finished runs of one base; it is read back and compared."""
    chosen = method_named("merge", method, fields, allow_code)
    quiet(debug)
    from luthier.tuned.merge import merge as join

    result = join(runs, output, chosen, allow_code)
    print(to_json(result) if as_json else f"{result['folder']}, read back: logits differ by {result['difference']:.1e}")


@app.command()
def inspect(
    runs: Runs,
    method: Annotated[str, typer.Option(help="The question; see luthier methods.")] = "norms",
    fields: Fields = None,
    html: Annotated[Path | None, typer.Option(help="Write the answer with its picture into this page.")] = None,
    as_json: Json = False,
    allow_code: AllowOurs = False,
    debug: Debug = False,
) -> None:
    """What did tuning do to a model? A sentence, the numbers behind it, and how sure it is."""
    chosen = method_named("inspect", method, fields, allow_code)
    if html is not None and html.is_dir():
        raise LuthierError(f"--html {html}: is a folder; name a file in it")
    quiet(debug)
    from luthier.cli.finding import as_dict, show
    from luthier.report.page import write_finding
    from luthier.tuned.inspect import inspect as look

    finding = look(runs, chosen, allow_code)
    page = None if html is None else write_finding(html, finding, shlex.join(["luthier", *sys.argv[1:]]))
    if as_json:
        print(to_json(as_dict(finding) | {"html": None if page is None else str(page)}))
        return
    show(finding)
    if page is not None:
        print(page)


@app.command()
def methods(
    name: Annotated[str | None, typer.Argument(help="A method, or a kind of methods: curate, inspection, ...")] = None,
    matrix: Annotated[
        bool, typer.Option("--matrix", help="What combines with what, by the checks of luthier check.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Which methods are there, where do they come from, what do they need, and what combines with what?"""
    from luthier.cli.listing import one_method, table_of_methods
    from luthier.method import registry as manifest
    from luthier.method.kinds import KINDS, kind_called

    every = manifest.listed()
    entries = every if name is None else [e for e in every if e["name"] == name]
    kind = None if entries else kind_called(str(name))
    if kind is not None:
        entries = [e for e in every if e["kind"] == kind.key]
    if not entries:
        from luthier.method.building import nearest

        close = nearest(str(name), [*KINDS, *sorted({e["name"] for e in every})])
        raise LuthierError(f"there is no method or kind called {name!r}; {close}; kinds are {', '.join(KINDS)}")
    if matrix:
        from luthier.cli import matrix as combined

        pairs = combined.matrix(every, [(e["kind"], e["name"]) for e in entries])
        if not pairs:
            raise LuthierError(f"--matrix: no recipe names {name}, so there is nothing to combine it with")
        if as_json:
            print(to_json([p.as_dict() for p in pairs]))
        else:
            combined.show(pairs)
    elif as_json:
        print(to_json(entries))
    elif name is None or kind is not None:
        table_of_methods(entries)
    else:
        for entry in entries:  # a task and an evaluator may have the same name
            one_method(entry)


@app.command()
def schema() -> None:
    """The recipe's JSON Schema, for editors."""
    from luthier.recipe.schema import recipe_schema

    print(json.dumps(recipe_schema(), indent=1))


@app.command()
def env(as_json: Json = False) -> None:
    """Versions and machine, to paste into a bug report."""
    from luthier.support.environment import environment

    text = environment()
    print(
        to_json(dict(line.split(" ", 1) for line in text.splitlines())) if as_json else text,
        end="\n" if as_json else "",
    )
