"""Recipes and flags: what they mean, what is refused and how it is said. The oracle is the text of the recipe itself."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import get_type_hints

import pytest
import yaml

from megawrap import arguments
from megawrap.arguments import MEGATRON_FLAGS, parse, to_yaml
from megawrap.config import SECTIONS, Config
from megawrap.errors import ConfigError

ROOT = Path(__file__).resolve().parents[1]
BASE = """
run: runs/one
model: {family: gpt_bigcode, num_layers: 2, hidden_size: 64, num_attention_heads: 4}
data: {splits: ["train: 1.0 0:1 corpus"]}
"""


@pytest.fixture
def write(tmp_path: Path):
    def write(text: str, name: str = "recipe.yaml") -> str:
        path = tmp_path / name
        path.write_text(text)
        return str(path)

    return write


@pytest.fixture
def base(write) -> str:
    return write(BASE)


def refused(*argv: str) -> str:
    with pytest.raises(ConfigError) as caught:
        parse(argv)
    assert caught.value.exit_code == 2
    return str(caught.value)


def test_recipe_and_defaults(base: str) -> None:
    config, options = parse(["--config", base])
    assert (config.run, config.model.hidden_size, config.data.splits) == ("runs/one", 64, ["train: 1.0 0:1 corpus"])
    assert config.optim == Config(run="x").optim, "what a recipe does not name has the default"
    assert options == arguments.Options()


def test_flags_win_wherever_they_stand(base: str) -> None:
    for argv in (["--optim.lr", "3e-4", "--config", base], ["--config", base, "--optim.lr=3e-4"], ["--config", base, "--lr", "3e-4"]):
        assert parse(argv)[0].optim.lr == 3e-4


def test_later_recipes_win(base: str, write) -> None:
    later = write("optim: {lr: 2e-5}\nmodel: {hidden_size: 128}\n", "later.yaml")
    config, _ = parse(["--config", base, "--config", later])
    assert (config.optim.lr, config.model.hidden_size, config.model.num_layers) == (2e-5, 128, 2)


@pytest.mark.parametrize("text", ["1e-5", "1E-5", "0.00001", "1.0e-5", "10.e-6", '"1e-5"'])
def test_every_spelling_of_a_small_number(base: str, write, text: str) -> None:
    path = write(f"optim: {{lr: {text}, min_lr: 0}}", "lr.yaml")
    assert arguments.read_recipe(path)[0]["optim.lr"] == yaml.safe_load('"1e-5"' if '"' in text else "0.00001")
    config, _ = parse(["--config", base, "--config", path])
    assert config.optim.lr == 1e-5 and isinstance(config.optim.min_lr, float)


@pytest.mark.parametrize("flag", sorted(MEGATRON_FLAGS))
def test_megatron_flag_sets_its_field(base: str, flag: str) -> None:
    """Against the table read by hand: the field has the flag's value, every other field the one without it."""
    key, fixed = MEGATRON_FLAGS[flag]
    sample = {"schedule.name": "linear", "train.recompute": "full", "checkpoint.on_corrupt": "fallback"}.get(key, "4")
    if key in ("optim.beta1", "optim.beta2", "model.attention_dropout", "model.hidden_dropout", "optim.min_lr"):
        sample = "0.0000001"
    sample = {"data.fim.rate": "0.25", "data.fim.spm_rate": "0.25"}.get(key, sample)
    base_flags = ["--config", base, *(["--data.tokenizer", "t"] if key == "data.fim.rate" else [])]
    config, _ = parse([*base_flags, flag, *([] if fixed else [sample])])
    plain, _ = parse(base_flags)
    section, name, *deeper = key.split(".")
    found = getattr(getattr(config, section), name)
    for inner in deeper:
        found = getattr(found, inner)
    expected = yaml.safe_load(fixed or sample)
    assert found == expected or found == str(expected)
    for other in SECTIONS:
        for item in fields(getattr(config, other)):
            if (other, item.name) != (section, name):
                assert getattr(getattr(config, other), item.name) == getattr(getattr(plain, other), item.name), item.name


def test_round_trip(base: str, write) -> None:
    config, _ = parse(["--config", base, "--lr", "1e-5", "--no-load-rng", "--data.splits", '["train: 1 0:1 a b", "valid: 1 0:1 c"]'])
    assert config.data.splits == ["train: 1 0:1 a b", "valid: 1 0:1 c"]
    assert parse(["--config", write(to_yaml(config), "again.yaml")])[0] == config


def test_sections_inside_sections(base: str, write) -> None:
    path = write("data: {tokenizer: t, fim: {rate: 0.5, loss: middle}}\n", "fim.yaml")
    config, _ = parse(["--config", base, "--config", path, "--data.fim.spm_rate", "0.1"])
    assert (config.data.fim.rate, config.data.fim.spm_rate, config.data.fim.loss) == (0.5, 0.1, "middle")
    assert parse(["--config", write(to_yaml(config), "again.yaml")])[0] == config
    said = refused("--config", base, "--config", write("data:\n  fim:\n    rat: 1\n", "bad.yaml"))
    assert "bad.yaml:3: unknown key data.fim.rat" in said and "data.fim.rate" in said
    assert "fim is a section" in refused("--config", base, "--config", write("data: {fim: 1}\n", "flat.yaml"))
    assert "data.fim.loss" in refused("--config", base, "--data.fim.loss", "most")
    assert "data.fim.rate is 0.5 without data.tokenizer" in refused("--config", base, "--data.fim.rate", "0.5")
    assert "with data.packing concat" in refused("--config", base, "--data.fim.rate", "0.5", "--data.packing", "concat")
    assert "data.fim.rate is 2.0; it must be in [0, 1]" in refused("--config", base, "--data.fim.rate", "2")
    said = refused("--config", base, "--data.seq_length", "100", "--data.pad_to_multiple", "16")
    assert "data.seq_length 100 is not a multiple of data.pad_to_multiple 16" in said


def test_environment_variables(base: str, write, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CORPUS", "/somewhere")
    monkeypatch.delenv("NOWHERE", raising=False)
    path = write('data: {splits: ["train: 1.0 0:1 ${CORPUS}/a"]}\nmodel:\n  init_from: ${NOWHERE}/x', "env.yaml")
    told = refused("--config", base, "--config", path)
    assert f"{path}:3: model.init_from uses the environment variable NOWHERE, which is not set" in told
    config, _ = parse(["--config", base, "--config", path, "--model.init_from", "here"])
    assert config.data.splits == ["train: 1.0 0:1 /somewhere/a"], "a field that a flag overrides is not asked for"


@pytest.mark.parametrize(
    ("text", "facts"),
    [
        ("optim:\n  lrr: 3", [":2: unknown key optim.lrr; did you mean optim.lr?"]),
        ("optimm: {lr: 3}", ["unknown key optimm; did you mean optim?"]),
        ("train: {lr: 3}", ["unknown key train.lr; did you mean optim.lr?"]),
        ("train: {tensor_model_parallel_size: 2}", ["did you mean parallel.tp?"]),
        ("train:\n\n  iterations: many", ["train.iterations is 'many' in ", ":3; it must be a whole number"]),
        ("train: {iterations: 1.5}", ["train.iterations is 1.5", "a whole number"]),
        ("log: {plots: 3}", ["log.plots is 3", "true or false"]),
        ("data: {overlong: cut}", ["data.overlong is 'cut'", "truncate-inputs-left, truncate-outputs, split, drop, error"]),
        ("data: {splits: {a: b}}", ["data.splits is {'a': 'b'}", "text or a list of text"]),
        ("optim: {lr: null}", ["optim.lr is None", "a number"]),
        ("optim: {lr: .nan}", ["optim.lr is nan; it must be above 0"]),
        ("model: {hidden_size: true}", ["model.hidden_size is True", "a whole number or null"]),
        ("optim: 3", ["optim is a section", "lr"]),
        ("optim: {lr: 1, lr: 2}", ["optim.lr is given twice"]),
        ("- run", ["a recipe is a mapping of sections"]),
        ("", ["is empty; a recipe has the sections model, data"]),
        ("a: [", [":1:5: not YAML"]),
        ("run: &x a", ["anchors and aliases are not allowed"]),
    ],
)
def test_wrong_recipes_are_refused_with_the_place(base: str, write, text: str, facts: list[str]) -> None:
    path = write(text, "wrong.yaml")
    told = refused("--config", base, "--config", path)
    assert path in told or "nan" in told
    assert all(fact in told for fact in facts), told


@pytest.mark.fault
@pytest.mark.parametrize(
    "value",
    [
        "!!python/object/apply:os.system ['touch {canary}']",
        "!!python/name:os.system",
        "!!python/object/new:subprocess.Popen [['touch', '{canary}']]",
        "!!str text",
        "!custom {{class_path: os.system}}",
    ],
)
def test_yaml_tags_are_refused(base: str, write, tmp_path: Path, value: str) -> None:
    canary = tmp_path / "canary"
    path = write(f"run: x\nlog:\n  interval: {value.format(canary=canary)}\n", "tag.yaml")
    assert f"{path}:3: the YAML tag " in refused("--config", base, "--config", path)
    assert not canary.exists()


@pytest.mark.parametrize(
    ("argv", "facts"),
    [
        (["--no-load-optimizer"], ["unknown argument --no-load-optimizer; did you mean --no-load-optim?"]),
        (["--optim.lrr", "1"], ["did you mean --optim.lr?"]),
        (["--tp", "2"], ["did you mean --parallel.tp?"]),
        (["stray"], ["unknown argument stray"]),
        (["--optim", "other.yaml"], ["unknown argument --optim"]),
        (["--optim.lr"], ["--optim.lr needs a value"]),
        (["--optim.lr", "--bf16"], ["--optim.lr needs a value"]),
        (["--optim.lr", "fast"], ["optim.lr is 'fast' on the command line (--optim.lr); it must be a number"]),
        (["--bf16=1"], ["--bf16 takes no value", "--train.precision VALUE"]),
        (["--config", "/no/such.yaml"], ["recipe /no/such.yaml cannot be read"]),
        (["--finetune", "--reset-progress"], ["checkpoint.finetune and checkpoint.reset_progress"]),
    ],
)
def test_wrong_flags_are_refused(base: str, argv: list[str], facts: list[str]) -> None:
    told = refused("--config", base, *argv)
    assert all(fact in told for fact in facts), told


def test_all_problems_are_told_together(write) -> None:
    path = write("optim: {lrr: 3, beta1: 1.5, lr: abc}\ntrain: {micro_batch_size: 0}\ndata: {splits: 3}")
    told = refused("--config", path, "--nope", "--hidden-size", "-1")
    for fact in ("optim.lrr", "optim.beta1 is 1.5", "optim.lr is 'abc'", "micro_batch_size is 0", "data.splits is 3", "--nope",
                 "run is empty", "neither model.init_from nor model.family", "9 problems"):  # fmt: skip
        assert fact in told, told
    assert told.count("data.splits") == 1, "a field of the wrong type is not told to be empty as well"


def test_print_config_of_an_incomplete_recipe(write) -> None:
    config, options = parse(["--print_config", "--config", write("optim: {lr: 1e-5}")])
    assert options.print_config and config.optim.lr == 1e-5


def test_help_shows_every_field_its_docstring_and_megatron_names(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        parse(["--help"])
    assert ended.value.code == 0
    out = " ".join(capsys.readouterr().out.split())
    for section in SECTIONS:
        for item in fields(get_type_hints(Config)[section]):
            assert is_dataclass(item.default_factory) or f"--{section}.{item.name} " in out
    assert "--data.fim.rate " in out and "Share of training samples" in out
    assert "Peak learning rate." in out and "Also --tensor-model-parallel-size." in out and "--no-load-optim (false)" in out


def test_help_imports_no_torch() -> None:
    command = [sys.executable, "-X", "importtime", "-m", "megawrap.arguments", "--help"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=60)
    modules = {line.rsplit("|", 1)[-1].strip() for line in done.stderr.splitlines()}
    assert done.returncode == 0 and "jsonargparse" in modules
    assert not modules & {"torch", "megatron", "transformers", "numpy"}
