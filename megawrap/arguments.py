"""Recipes and flags to a `Config`: what `--config RECIPE.yaml --optim.lr 1e-5 --no-load-optim` means.

In: the command line. Out: a frozen `Config` and the `Options` of this call. Flags win over recipes wherever they stand,
later recipes win over earlier ones; `${NAME}` in a recipe is an environment variable. The names Megatron users know are
rewritten to fields by one table. Everything that is wrong is reported together, with file and line. Imports no torch.
"""

from __future__ import annotations

import argparse
import difflib
import os
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, asdict, dataclass, fields, is_dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Union, get_args, get_origin, get_type_hints

from megawrap.config import SECTIONS, Config
from megawrap.errors import ConfigError

if TYPE_CHECKING:
    import jsonargparse
    import yaml

USAGE = "--config RECIPE.yaml [--SECTION.FIELD VALUE ...] [--dry-run] [--print_config]"

# Megatron's flag: (field, value). None: the flag takes a value; else the flag alone stands for this value.
MEGATRON_FLAGS: dict[str, tuple[str, str | None]] = {
    "--tensor-model-parallel-size": ("parallel.tp", None),
    "--pipeline-model-parallel-size": ("parallel.pp", None),
    "--num-virtual-stages-per-pipeline-rank": ("parallel.vpp", None),
    "--sequence-parallel": ("parallel.sequence_parallel", "true"),
    "--use-distributed-optimizer": ("parallel.distributed_optimizer", "true"),
    "--overlap-grad-reduce": ("parallel.overlap", "true"),
    "--micro-batch-size": ("train.micro_batch_size", None),
    "--global-batch-size": ("train.global_batch_size", None),
    "--train-iters": ("train.iterations", None),
    "--seed": ("train.seed", None),
    "--bf16": ("train.precision", "bf16"),
    "--fp16": ("train.precision", "fp16"),
    "--recompute-activations": ("train.recompute", "selective"),
    "--recompute-granularity": ("train.recompute", None),
    "--distributed-timeout-minutes": ("train.timeout_minutes", None),
    "--seq-length": ("data.seq_length", None),
    "--data-cache-path": ("data.cache_dir", None),
    "--tokenizer-model": ("data.tokenizer", None),
    "--fim-rate": ("data.fim.rate", None),
    "--fim-spm-rate": ("data.fim.spm_rate", None),
    "--lr": ("optim.lr", None),
    "--min-lr": ("optim.min_lr", None),
    "--weight-decay": ("optim.weight_decay", None),
    "--adam-beta1": ("optim.beta1", None),
    "--adam-beta2": ("optim.beta2", None),
    "--adam-eps": ("optim.eps", None),
    "--clip-grad": ("optim.clip_grad", None),
    "--loss-scale": ("optim.loss_scale", None),
    "--lr-decay-style": ("schedule.name", None),
    "--lr-warmup-iters": ("schedule.warmup", None),
    "--lr-warmup-fraction": ("schedule.warmup", None),
    "--eval-interval": ("eval.interval", None),
    "--eval-iters": ("eval.batches", None),
    "--log-interval": ("log.interval", None),
    "--save-interval": ("checkpoint.interval", None),
    "--no-load-optim": ("checkpoint.load_optim", "false"),
    "--no-load-rng": ("checkpoint.load_rng", "false"),
    "--finetune": ("checkpoint.finetune", "true"),
    "--reset-progress": ("checkpoint.reset_progress", "true"),
    "--allow-restart": ("checkpoint.allow_restart", "true"),
    "--no-verify": ("checkpoint.verify", "false"),
    "--on-corrupt": ("checkpoint.on_corrupt", None),
    "--trust": ("checkpoint.trust", "true"),
    "--load": ("model.init_from", None),
    "--pretrained-checkpoint": ("model.init_from", None),
    "--num-layers": ("model.num_layers", None),
    "--hidden-size": ("model.hidden_size", None),
    "--ffn-hidden-size": ("model.ffn_hidden_size", None),
    "--num-attention-heads": ("model.num_attention_heads", None),
    "--num-query-groups": ("model.num_query_groups", None),
    "--max-position-embeddings": ("model.max_position_embeddings", None),
    "--make-vocab-size-divisible-by": ("model.make_vocab_size_divisible_by", None),
    "--untie-embeddings-and-output-weights": ("model.tie_word_embeddings", "false"),
    "--init-method-std": ("model.init_method_std", None),
    "--attention-dropout": ("model.attention_dropout", None),
    "--hidden-dropout": ("model.hidden_dropout", None),
}
_SWITCHES = {"--dry-run": "dry_run", "--print_config": "print_config", "--print-config": "print_config"}


@dataclass(frozen=True, kw_only=True)
class Options:
    """What this call is asked to do, beside the run that the configuration describes."""

    dry_run: bool = False
    """Print what would be done, and stop before the first iteration."""
    print_config: bool = False
    """Print the resolved configuration as a recipe, and stop; the configuration may be incomplete."""


def parse(argv: Sequence[str], *, prog: str = "megawrap finetune") -> tuple[Config, Options]:
    """The configuration that a command line describes, checked as far as it can be without data or device.

    Args:
        argv: arguments without the program's name; `--help` prints and exits.
        prog: name shown by `--help`.

    Raises:
        ConfigError: one error that lists every problem found in recipes, flags and their combination.
    """
    switches, recipes, rest, problems = _take_apart(list(argv))
    parser = _parser(prog)
    if "help" in switches:
        parser.print_help()
        raise SystemExit(0)
    values: dict[str, Any] = {}
    origin: dict[str, str] = {}
    for path in recipes:
        read, lines, found = read_recipe(path)
        problems += found
        values.update(read)
        origin.update({key: f"{path}:{lines[key]}" for key in read})
    for key, value in rest:
        values[key], origin[key] = value, f"--{key}"
    for key in [key for key in values if not origin[key].startswith("--")]:
        values[key] = _expanded(values[key], f"{origin[key]}: {key}", problems)
    checked, found = _typed(parser, values, origin)
    config = _build(checked)
    problems += found
    options = Options(**dict.fromkeys(switches, True))
    if not options.print_config:
        told = " ".join(problems) + " "
        problems += [sentence for sentence in config.problems() if f" {sentence.split()[0]} " not in f" {told}"]
    if problems:
        raise ConfigError(_together(problems))
    return config, options


def to_yaml(config: Config) -> str:
    """The whole configuration as a recipe that `parse` reads back to the same values."""
    import yaml

    return yaml.safe_dump(asdict(config), sort_keys=False, allow_unicode=True, width=120)


def read_recipe(path: str | Path) -> tuple[dict[str, Any], dict[str, int], list[str]]:
    """Values of a YAML recipe by dotted key, the line of each key, and what is wrong with it, a sentence each.

    Plain scalars follow YAML 1.2 (`1e-5` is a number, `on` is text). Tags, anchors and repeated keys are refused.

    Raises:
        ConfigError: the file cannot be read, or is not YAML.
    """
    import yaml

    try:
        text = Path(path).read_text(encoding="utf-8")
        _refuse_unsafe(text, path)
        root = yaml.compose(text, Loader=_loader())
    except OSError as error:
        raise ConfigError(f"recipe {path} cannot be read: {error.strerror}", hint="Give a YAML file with --config") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"recipe {path} is not UTF-8 text: byte {error.start} cannot be decoded") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f"{path}:{mark.line + 1}:{mark.column + 1}" if mark else str(path)
        raise ConfigError(f"{where}: not YAML: {getattr(error, 'problem', None) or error}") from None
    if root is None:
        return {}, {}, [f"{path} is empty; a recipe has the sections {', '.join(SECTIONS)}"]
    if not isinstance(root, yaml.MappingNode):
        return {}, {}, [f"{path}:1: a recipe is a mapping of sections, not a list or a single value"]
    recipe = _Recipe(str(path))
    recipe.walk(root, "")
    return recipe.values, recipe.lines, recipe.problems


class _Recipe:
    """Flattens a composed YAML document to dotted keys, remembering lines and collecting problems."""

    def __init__(self, path: str) -> None:
        self.path = path
        self.values: dict[str, Any] = {}
        self.lines: dict[str, int] = {}
        self.problems: list[str] = []
        self.constructor = _loader()("")

    def walk(self, mapping: yaml.MappingNode, prefix: str) -> None:
        seen: set[str] = set()
        for key_node, node in mapping.value:
            key = f"{prefix}{getattr(key_node, 'value', '?')}"
            where = f"{self.path}:{key_node.start_mark.line + 1}"
            if key in seen:
                self.problems.append(f"{where}: {key} is given twice")
            seen.add(key)
            if key in _sections():
                self._section(key, node, where)
            elif key in _types():
                self.lines[key] = key_node.start_mark.line + 1
                self.values[key] = self.constructor.construct_object(node, deep=True)
            else:
                self.problems.append(f"{where}: unknown key {key}{_nearest(key)}")

    def _section(self, name: str, node: Any, where: str) -> None:
        import yaml

        if isinstance(node, yaml.MappingNode):
            self.walk(node, f"{name}.")
        elif self.constructor.construct_object(node, deep=True) is not None:
            self.problems.append(f"{where}: {name} is a section; it needs fields below it, for example {_example(name)}")


def _expanded(value: Any, where: str, problems: list[str]) -> Any:
    """Text of a recipe with ${NAME} replaced; a field that a flag overrides never comes here."""
    if isinstance(value, list):
        return [_expanded(item, where, problems) for item in value]
    if not isinstance(value, str):
        return value

    def replace(match: re.Match[str]) -> str:
        if match[1] not in os.environ:
            problems.append(f"{where} uses the environment variable {match[1]}, which is not set")
        return os.environ.get(match[1], "")

    return re.sub(r"\$\{(\w+)\}", replace, value)


def _refuse_unsafe(text: str, path: str | Path) -> None:
    """Raise at the first tag, anchor or alias, before anything is constructed or expanded."""
    import yaml

    for event in yaml.parse(text, Loader=_loader()):
        tag, anchor = getattr(event, "tag", None), getattr(event, "anchor", None)
        line = event.start_mark.line + 1 if event.start_mark else "?"
        if anchor is not None:
            raise ConfigError(f"{path}:{line}: anchors and aliases are not allowed in a recipe; write the value out")
        if tag is not None:
            raise ConfigError(f"{path}:{line}: the YAML tag {tag} is not allowed; a recipe holds plain values only")


@cache
def _loader() -> type[yaml.SafeLoader]:
    """PyYAML's safe loader with the scalars of YAML 1.2, where 1e-5 is a number and neither `on` nor 1:30 is special."""
    import yaml

    class Loader(yaml.SafeLoader):
        yaml_implicit_resolvers: dict[str, Any] = {}  # noqa: RUF012 - the base class keeps its rules here

    number = r"[-+]?(?:\d+\.\d*|\.\d+|\d+)(?:[eE][-+]?\d+)?|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)"
    Loader.add_implicit_resolver("tag:yaml.org,2002:null", re.compile(r"^(?:~|null|Null|NULL|)$"), ["~", "n", "N", ""])
    Loader.add_implicit_resolver("tag:yaml.org,2002:bool", re.compile(r"^(?:true|True|TRUE|false|False|FALSE)$"), list("tTfF"))
    Loader.add_implicit_resolver("tag:yaml.org,2002:int", re.compile(r"^[-+]?(?:0|[1-9]\d*)$"), list("-+0123456789"))
    Loader.add_implicit_resolver("tag:yaml.org,2002:float", re.compile(f"^(?:{number})$"), list("-+.0123456789"))
    return Loader


def _take_apart(argv: list[str]) -> tuple[set[str], list[str], list[tuple[str, str]], list[str]]:
    """Switches, recipe paths, (field, text) pairs in order, and problems of a command line."""
    switches: set[str] = set()
    recipes: list[str] = []
    pairs: list[tuple[str, str]] = []
    problems: list[str] = []
    position = 0
    while position < len(argv):
        flag, has_value, value = argv[position].partition("=")
        position += 1
        if flag in ("-h", "--help"):
            switches.add("help")
            continue
        if flag in _SWITCHES:
            switches.add(_SWITCHES[flag])
            continue
        field, fixed = MEGATRON_FLAGS.get(flag, (flag.removeprefix("--"), None))
        if flag != "--config" and (not flag.startswith("--") or field not in _types()):
            problems.append(f"unknown argument {flag}{_nearest(flag)}")
            if not has_value and position < len(argv) and not argv[position].startswith("--"):
                position += 1  # the value of the unknown flag
            continue
        if fixed is None and not has_value:
            if position == len(argv) or argv[position].startswith("--"):
                if bool in _members(_types().get(field)):
                    value = "true"
                else:
                    problems.append(f"{flag} needs a value")
                    continue
            else:
                value = argv[position]
                position += 1
        elif fixed is not None and has_value:
            problems.append(f"{flag} takes no value, but was given {value!r}; write --{field} VALUE")
            continue
        if flag == "--config":
            recipes.append(value)
        else:
            pairs.append((field, value if fixed is None else fixed))
    return switches, recipes, pairs, problems


def _typed(parser: jsonargparse.ArgumentParser, values: dict[str, Any], origin: Mapping[str, str]) -> tuple[dict[str, Any], list[str]]:
    """Values with their field's type, and a sentence for each that has another type; those are left out."""
    import jsonargparse

    def refuse(key: str) -> None:
        where = f"on the command line ({origin[key]})" if origin[key].startswith("--") else f"in {origin[key]}"
        problems.append(f"{key} is {values.pop(key)!r} {where}; it must be {_described(key)}")

    values = dict(values)
    problems: list[str] = []
    for key in list(values):
        if not _plausible(values[key], _members(_types()[key])):
            refuse(key)
    while True:
        try:
            parsed = parser.parse_object(_nested(values), defaults=False) if values else {}
            return {key: parsed[key] for key in values}, problems
        except (jsonargparse.ArgumentError, TypeError, ValueError) as error:
            match = re.search(r'key "([\w.]+)"', str(error))
            if match is None or match[1] not in values:
                raise ConfigError(f"the configuration cannot be read: {' '.join(str(error).split())}") from None
            refuse(match[1])


def _plausible(value: Any, members: tuple[Any, ...]) -> bool:
    """Whether a YAML value can have one of these types at all; jsonargparse turns any value into text, and true into 1."""
    if isinstance(value, list):
        return any(get_origin(member) is list for member in members) and all(isinstance(item, str) for item in value)
    if isinstance(value, bool):
        return bool in members
    if isinstance(value, int | float):
        return bool({int, float} & set(members))
    return type(None) in members if value is None else isinstance(value, str)


def _build(values: dict[str, Any]) -> Config:
    given: dict[str, Any] = {"run": "", **_nested(values)}
    for section, kind in reversed(_sections().items()):  # the innermost first
        *above, name = section.split(".")
        holder = given
        for outer in above:
            holder = holder.setdefault(outer, {})
        holder[name] = kind(**holder.get(name, {}))
    return Config(**given)


@cache
def _parser(prog: str) -> jsonargparse.ArgumentParser:
    """The typed fields of `Config`, with their docstrings as help."""
    import jsonargparse

    jsonargparse.set_parsing_settings(docstring_parse_attribute_docstrings=True)
    parser = jsonargparse.ArgumentParser(prog=prog, usage=f"{prog} {USAGE}", exit_on_error=False, description=_DESCRIPTION)
    parser.add_argument("--config", metavar="RECIPE.yaml", help="Recipe; given more than once, later ones win.")
    parser.add_argument("--dry-run", action="store_true", help="Print configuration, layout, data plan and memory, then stop.")
    parser.add_argument("--print_config", action="store_true", help="Print the resolved configuration as a recipe, then stop.")
    parser.add_argument("--run", type=str, default="", help="Run directory: config.yaml, environment.json, logs/, checkpoints/, plots/.")
    for section in SECTIONS:
        parser.add_class_arguments(get_type_hints(Config)[section], section)
    for action in parser._actions:
        if action.dest in _sections():  # jsonargparse would read a section from a file of its own; recipes are read above
            action.help = argparse.SUPPRESS
    by_field: dict[str, list[str]] = {}
    for flag, (key, value) in MEGATRON_FLAGS.items():
        by_field.setdefault(key, []).append(f"{flag} ({value})" if value else flag)
    for action in parser._actions:
        if action.dest in by_field:
            action.help = f"{action.help or ''} Also {', '.join(by_field[action.dest])}."
    return parser


_DESCRIPTION = """Every field of a recipe is a flag, --SECTION.FIELD VALUE, and flags win over recipes. The names Megatron
users know work too; they are listed with their field. `megawrap finetune --nproc N ...` starts N ranks on this machine."""


def field_names() -> list[str]:
    """Dotted names of all fields of a recipe, in the order of `Config`."""
    return list(_types())


@cache
def _types() -> dict[str, Any]:
    """Type of every field of a recipe by dotted key."""
    found: dict[str, Any] = {"run": str}
    for section, kind in _sections().items():
        hints = get_type_hints(kind).items()
        found.update({f"{section}.{name}": hint for name, hint in hints if not is_dataclass(hint)})
    return found


@cache
def _sections() -> dict[str, type]:
    """Dataclass of every section of a recipe by dotted key, each before the sections inside it."""
    found: dict[str, type] = {}

    def walk(kind: type, prefix: str) -> None:
        for name, hint in get_type_hints(kind).items():
            if is_dataclass(hint):
                found[prefix + name] = hint  # type: ignore[assignment]
                walk(hint, f"{prefix}{name}.")  # type: ignore[arg-type]

    walk(Config, "")
    return found


def _members(hint: Any) -> tuple[Any, ...]:
    return get_args(hint) if get_origin(hint) in (Union, type(int | None)) else (hint,)


def _described(key: str) -> str:
    names = {int: "a whole number", float: "a number", bool: "true or false", str: "text", type(None): "null"}
    parts = []
    for member in _members(_types()[key]):
        if get_origin(member) is Literal:
            parts.append("one of " + ", ".join(map(str, get_args(member))))
        elif get_origin(member) is list:
            parts.append("a list of text")
        else:
            parts.append(names.get(member, str(member)))
    return " or ".join(parts)


def _nearest(given: str) -> str:
    """`; did you mean X?` for an unknown key or flag: Megatron's name, the same field of another section, or the nearest spelling."""
    name = given.lstrip("-")
    leaf = name.rsplit(".", 1)[-1]
    flag = "--" + leaf.replace("_", "-")
    flags = given.startswith("-")
    known = list(_types())
    if flag in MEGATRON_FLAGS:
        near = [MEGATRON_FLAGS[flag][0]]
    else:
        near = [key for key in known if key.rsplit(".", 1)[-1] == leaf]
    if not near and flags:
        near = difflib.get_close_matches(given, [*MEGATRON_FLAGS, *_SWITCHES, "--config", *(f"--{key}" for key in known)], n=1)
    elif not near:
        near = difflib.get_close_matches(name, [*known, *SECTIONS], n=1, cutoff=0.5)
    if not near and flags:
        return "; --help lists the known ones"
    if not near:
        return "; the sections of a recipe are " + ", ".join(("run", *SECTIONS))
    dashes = "--" if flags and not near[0].startswith("--") else ""
    return f"; did you mean {dashes}{near[0]}?"


def _example(section: str) -> str:
    item = fields(_sections()[section])[0]
    section = section.rpartition(".")[2]
    return f"{section}: {{{item.name}: {'...' if item.default in (MISSING, None) else item.default}}}"


def _nested(values: Mapping[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in values.items():
        *sections, name = key.split(".")
        holder = found
        for section in sections:
            holder = holder.setdefault(section, {})
        holder[name] = value
    return found


def _together(problems: list[str]) -> str:
    if len(problems) == 1:
        return problems[0]
    return f"{len(problems)} problems in the configuration:\n" + "\n".join(f"  - {sentence}" for sentence in problems)


def main(argv: Sequence[str] | None = None) -> int:
    """Print the configuration that a command line describes: `python -m megawrap.arguments --config RECIPE.yaml`."""
    from megawrap.cli import run_command

    def run(arguments: Sequence[str]) -> int:
        print(to_yaml(parse(arguments)[0]), end="")
        return 0

    return run_command(run, list(sys.argv[1:] if argv is None else argv))


if __name__ == "__main__":
    sys.exit(main())
