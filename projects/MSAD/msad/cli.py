"""What all command lines share, and the command ``msad``, which runs them by name.

Overrides of config keys are ``KEY VALUE ...``, as in detectron2, anywhere in the line: options may follow them, and an
option of many values may precede them. ``--opts``, which detectron2's demo wants in front of them, and ``--`` are
accepted and not needed. A wrong call or input ends in one line and status 2, Ctrl-C in status 130.
"""

from __future__ import annotations

import argparse
import ast
import difflib
import importlib
import os
import re
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import yaml
from detectron2.config import CfgNode

from .config import default_config, load_config, nearest, valid_keys
from .files import require_checkpoint
from .finding import error_text

# What bad input raises; anything else is a defect of the program and keeps its traceback.
BAD_INPUT = (OSError, KeyError, ValueError, FloatingPointError, yaml.YAMLError)
# Subcommands whose names are not those of their files.
SHORT = {"train": "train_net", "export": "export_model", "sweep": "sweep_resolution"}
_KEY = re.compile(r"[A-Z][A-Z0-9_]*(\.[A-Z0-9_]+)*")


def parse(parser: argparse.ArgumentParser, argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse a command line; overrides of config keys become ``opts``, [KEY, VALUE, ...].

    What is neither an option nor an override ends the program with the nearest option or key, and so does a whole
    number below 0.
    """
    rest, opts, wrong = split_overrides(sys.argv[1:] if argv is None else argv)
    if wrong:
        parser.error(wrong)
    args, unknown = parser.parse_known_args(rest)
    unknown = [*(getattr(args, "opts", None) or ()), *unknown]  # detectron2's parser takes all that is left as opts
    if unknown:
        options = [option for action in parser._actions for option in action.option_strings]
        first = unknown[0] if unknown[0].startswith("-") else unknown[0].upper()
        near = nearest(first, [*options, *valid_keys(_DEFAULTS)])
        parser.error(f"unrecognized arguments: {' '.join(unknown)}{near} (config keys are overridden by KEY VALUE)")
    for action in parser._actions:  # numbers of things and sizes, of which none is negative
        values = getattr(args, action.dest, None)
        for value in values if isinstance(values, list) else [values]:
            if action.type is int and isinstance(value, int) and value < 0:
                parser.error(f"argument {'/'.join(action.option_strings) or action.dest}: {value} is negative")
    args.opts = opts
    return args


def add_slot_options(parser: argparse.ArgumentParser, jobs: int | None = 1, usual: str = "1") -> None:
    """``--jobs``, ``--threads`` and ``--devices``, for :func:`msad.experiments.jobs.make_slots`.

    Args:
        jobs: what is meant without ``--jobs``, which help calls ``usual``.
    """
    parser.add_argument("--jobs", type=int, default=jobs, metavar="N",
                        help=f"runs at a time on the CPU, 0: in this process; default: {usual}")  # fmt: skip
    parser.add_argument("--threads", type=int, default=0, metavar="N", help="CPU threads a run; default: cores / jobs")
    parser.add_argument("--devices", nargs="+", default=[], metavar="cuda:N", help="a run at a time on each")


def positive(text: str) -> int:
    """The type of an option: a whole number of at least 1."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {text}")
    return int(text)


def positive_float(text: str) -> float:
    """The type of an option: a number above 0."""
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not value > 0:
        raise argparse.ArgumentTypeError(f"must be above 0, got {text}")
    return value


def split_overrides(argv: Sequence[str]) -> tuple[list[str], list[str], str]:
    """(the command line without overrides, the overrides, what is wrong with them or "")."""
    rest, opts = [], []
    tokens = iter(argv)
    for token in tokens:
        key, equals, _ = token.partition("=")
        if equals and _is_key(key):
            return rest, opts, f"{token}: overrides are written KEY VALUE, with a blank"
        if _is_key(token):
            value = next(tokens, None)
            if value is None or value.startswith("--") or _is_key(value):
                return rest, opts, f"overrides must be KEY VALUE pairs: {token} has no value"
            opts += [token, value]
        elif token not in ("--", "--opts"):
            rest.append(token)
    return rest, opts, ""


def _is_key(token: str) -> bool:
    """Whether this is a config key, or one with a slip; a file of such a name (TEST.PNG) is none."""
    if not _KEY.fullmatch(token) or os.path.exists(token):
        return False
    section, dot, _ = token.partition(".")
    if not dot:  # a section as a whole is never overridden: TEST may be a folder that is to be written
        return token in _SECTIONS and not isinstance(_DEFAULTS[token], CfgNode)
    return section in _SECTIONS or bool(difflib.get_close_matches(section, _SECTIONS, n=1, cutoff=0.75))


_DEFAULTS = default_config()
_SECTIONS = tuple(_DEFAULTS.keys())


def run(name: str, work: Callable[[], int | None], interrupted: str = "interrupted") -> int:
    """The exit status of a command: ``work``'s own (None is 0), 2 for bad input, 130 after Ctrl-C.

    Args:
        name: of the command, in front of messages.
        work: does what the command is for.
        interrupted: what to say after Ctrl-C.
    """
    try:
        return work() or 0
    except KeyboardInterrupt:
        print(f"\n{name}: {interrupted}", file=sys.stderr)
        return 130
    except BAD_INPUT as error:
        print(f"{name}: error: {error_text(error, one_line=False)}", file=sys.stderr)
        return 2


def refuse_overwriting(outputs: Iterable[str | os.PathLike], inputs: Iterable[str | os.PathLike]) -> None:
    """Stop before anything is written if a file or folder that will be written is also read.

    Links are followed, so that one file under two names counts as one. A folder among the outputs is the command's
    own: neither it nor a folder above it is compared with files that are read from a folder below it.

    Raises:
        ValueError: names both.
    """
    sources = [Path(path) for path in inputs if path and "://" not in os.fspath(path)]
    for output in map(Path, outputs):
        for source in sources:
            same = os.path.samefile(output, source) if output.exists() and source.exists() else False
            if same or output.resolve() == source.resolve():
                raise ValueError(f"{output} would overwrite an input: {source}; choose another output")


def model_names(models: Sequence[Sequence[str]]) -> list[str]:
    """A name for each (yaml, weights) of a command line: the yaml's stem, of a run's config.yaml that of its folder.

    Where it is taken, that of the weights is added.

    Raises:
        ValueError: two are the same.
    """
    files = [Path(config) for config, _ in models]
    stems = [file.resolve().parent.name if file.name == "config.yaml" else file.stem for file in files]
    names = [s if stems.count(s) == 1 else f"{s}_{Path(weights).stem}" for s, (_, weights) in zip(stems, models)]
    if len(set(names)) < len(names):
        raise ValueError(f"two --model have the same name: {', '.join(names)}")
    return names


def load_models(models: Sequence[Sequence[str]], opts: Sequence[str]) -> dict[str, tuple[CfgNode, str]]:
    """name -> config and weights of each (yaml, weights) of a command line, with their data sets registered.

    Args:
        opts: KEY VALUE overrides of all of them.

    Raises:
        FileNotFoundError: no such yaml file or checkpoint.
        ValueError, KeyError: two of one name, a wrong config, or a device that this machine does not have.
    """
    from .data.register import register_datasets

    found = {}
    for name, (config, weights) in zip(model_names(models), models):
        cfg = load_config(config, opts)
        require_checkpoint(weights)
        require_device(cfg.MODEL.DEVICE)
        register_datasets(cfg)
        found[name] = cfg, weights
    return found


def require_device(device: str, where: str = "MODEL.DEVICE") -> None:
    """Raise ValueError with the way out if the device of a key or option is a GPU that this machine does not have."""
    import torch

    if device.startswith("cuda") and not torch.cuda.is_available():
        raise ValueError(f"{where} is {device}, but torch finds no GPU here: add {where} cpu")


def tools_folder() -> Path:
    """The folder of the command lines: inside an installed package, else of the checkout."""
    installed = Path(__file__).parent / "tools"
    return installed if installed.is_dir() else Path(__file__).parents[3] / "tools"


def commands() -> dict[str, Path]:
    """Subcommand -> file, in alphabetical order."""
    names = {file: name for name, file in SHORT.items()}
    files = sorted(file for file in tools_folder().glob("*.py") if not file.stem.startswith("_"))
    return {names.get(file.stem, file.stem.replace("_", "-")): file for file in files}


def _summary(file: Path) -> str:
    """The first sentence of a command's docstring, without running it."""
    text = ast.get_docstring(ast.parse(file.read_text())) or ""
    return text.split("\n\n")[0].replace("\n", " ").split(". ")[0]


def main(argv: Sequence[str] | None = None) -> int:
    """``msad COMMAND ...``: the tool of that name with the rest of the line."""
    argv = list(sys.argv[1:] if argv is None else argv)
    known = commands()
    if not argv or argv[0] in ("-h", "--help"):
        print("usage: msad COMMAND ...        (msad COMMAND --help says more)\n")
        print("\n".join(f"  {name:<20}{_summary(file)}" for name, file in known.items()))
        return 0
    name = argv[0].replace("_", "-")
    name = next((short for short, file in SHORT.items() if file.replace("_", "-") == name), name)
    if name not in known:
        print(f"msad: error: no command {argv[0]!r}{nearest(name, list(known))}; there are {', '.join(known)}",
              file=sys.stderr)  # fmt: skip
        return 2
    sys.argv = [f"msad {name}", *argv[1:]]  # the command's own name in its usage and messages
    sys.path.insert(0, str(known[name].parent))  # processes that it starts find it there, too
    return importlib.import_module(known[name].stem).main(argv[1:])


if __name__ == "__main__":
    sys.exit(main())
