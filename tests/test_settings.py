"""Settings: what is read, what is refused and with which words, and the training methods' own choices."""

from __future__ import annotations

import typing
from pathlib import Path

import pytest

from mstar_mega import settings
from mstar_mega.config import Config, EvolveConfig
from mstar_mega.data.written_out import bare_answer
from mstar_mega.recipe.method import METHODS, ResolvedMethod, resolve_method
from mstar_mega.settings import rules, tree

EXAMPLES = Path(__file__).parents[1] / "examples"


def write(path: Path, text: str) -> str:
    path.write_text(text, encoding="utf-8")
    return str(path)


def message(argv: list[str]) -> str:
    """The one line that a mistake in ``argv`` gets."""
    with pytest.raises(ValueError) as caught:
        rules.validate(settings.parse(argv))
    text = str(caught.value)
    assert "\n" not in text
    return text


def test_nothing_given_is_the_tree_of_defaults() -> None:
    assert settings.parse([]) == Config()
    rules.validate(Config())


def test_the_command_line_goes_over_files_and_later_files_over_earlier(tmp_path: Path) -> None:
    one = write(tmp_path / "one.yaml", "seed: 1\nevolve:\n  interval: 1e-1\n  optimizer: {lr: 1e-3}\nprompts:\n")
    two = write(tmp_path / "two.yaml", "evolve:\n  optimizer: {lr: 2e-3}\ntemperature:\n  grid: [1, 5e-1]\n")
    config = settings.parse(["--seed", "7", f"--config={one}", "--config", two, "--run.dir", "a b=c"])
    assert (config.seed, config.run.dir) == (7, "a b=c")
    assert (config.evolve.interval, config.evolve.optimizer.lr) == (0.1, 0.002)
    assert config.temperature.grid == [1.0, 0.5]
    assert config.warmup.optimizer.lr == Config().warmup.optimizer.lr
    assert settings.parse(["--evolve.interval", "null"], base=config).evolve.interval is None
    assert settings.parse([], base=config) == config


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["--sed", "1"], "unknown setting '--sed' on the command line; did you mean '--seed'?"),
        (["--evolve.intervall=1"], "unknown setting '--evolve.intervall' on the command line; did you mean"),
        (["--interval", "1"], "did you mean '--evolve.interval'?"),
        (["--optimizer.lr", "1"], "'--evolve.optimizer.lr' or '--prm.optimizer.lr' or '--warmup.optimizer.lr'?"),
        (["--frobnicate", "1"], "unknown setting '--frobnicate' on the command line; --help lists all settings"),
        (["stray"], "unexpected argument 'stray'"),
        (["--warmup.set", "x"], "unknown setting '--warmup.set' on the command line; it is now data.warmup_file"),
        (["--seed"], "--seed on the command line has no value"),
        (["--seed", "--run.dir", "x"], "--seed on the command line has no value"),
        (["--seed", "x"], "seed is 'x' on the command line: expected int"),
        (["--evolve.interval", "x"], "evolve.interval is 'x' on the command line: expected float or null"),
        (["--evolve.method", "ppo"], "expected one of continuous, iterative_rft, rest_em, sft"),
        (["--temperature.grid", "0.5"], "temperature.grid is '0.5' on the command line: expected a list of float"),
        (["--parallel.sequence", "maybe"], "expected true or false"),
    ],
)
def test_a_mistake_on_the_command_line_is_named(argv: list[str], said: str) -> None:
    assert said in message(argv)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("evolve:\n  intervall: 1\n", "unknown setting 'evolve.intervall' in {file}; did you mean 'evolve.interval'?"),
        ("evolv:\n  interval: 1\n", "unknown setting 'evolv' in {file}; "),
        ("warmup: {set: x}\n", "unknown setting 'warmup.set' in {file}; it is now data.warmup_file"),
        ("evolve: 3\n", "evolve is 3 in {file}: expected a group of settings"),
        ("evolve:\n  responses: many\n", "evolve.responses is 'many' in {file}: expected int"),
        ("seed: {a: 1}\n", "seed is "),
        ("seed:\n", "seed is null in {file}: expected int"),
        ("seed: 1\nseed: 2\n", "{file} is not valid YAML: line 2: 'seed' stands twice"),
        ("seed: [1\n", "{file} is not valid YAML: line 2: "),
        ("- 1\n", "{file} holds [1]"),
    ],
)
def test_a_mistake_in_a_file_names_the_file(tmp_path: Path, text: str, said: str) -> None:
    file = write(tmp_path / "mine.yaml", text)
    assert said.format(file=file) in message(["--config", file])


def test_a_setting_that_is_gone_may_stand_unused_in_an_older_file(tmp_path: Path) -> None:
    assert (
        settings.parse(["--config", write(tmp_path / "old.yaml", "warmup: {set: null, epochs: 3}\n")]).warmup.epochs
        == 3
    )


def test_unreadable_files_are_named(tmp_path: Path) -> None:
    (tmp_path / "bytes.yaml").write_bytes(b"\xff\xfe\xff")
    assert "bytes.yaml is not UTF-8" in message(["--config", str(tmp_path / "bytes.yaml")])
    assert "none.yaml: No such file" in message(["--config", str(tmp_path / "none.yaml")])


def test_help_shows_types_defaults_and_docs_of_every_setting(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as leaving:
        settings.parse(["--seed", "1", "--help"])
    assert leaving.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    for leaf in tree.leaves():
        assert f"--{leaf.name} " in text or f"--{leaf.name}," in text
        assert leaf.doc in text
    assert "K of Reward-Pass@K (or Pass@K) in the sweep. (type: int, default: 2)" in text
    assert "Self-evolving training (paper section 3)." in text


def test_dump_and_load_return_the_same_tree(tmp_path: Path) -> None:
    argv = ["--evolve.optimizer.lr=1e-7", "--evolve.method=rest_em", "--data.dir=déjà vu", "--temperature.grid=[0.1]"]
    config = settings.parse(argv)
    write(tmp_path / "config.yaml", settings.dump(config))
    assert settings.load(tmp_path) == settings.load(tmp_path / "config.yaml") == config
    assert settings.parse(["--config", str(tmp_path / "config.yaml")]) == config


def test_a_damaged_run_directory_is_named(tmp_path: Path) -> None:
    file = tmp_path / "config.yaml"
    whole = settings.dump(Config())
    for end in range(0, len(whole), 97):
        write(file, whole[:end])
        with pytest.raises(ValueError, match=r"config\.yaml"):
            settings.load(tmp_path)
    write(file, whole.replace("seed: 0", "seeed: 0"))
    with pytest.raises(ValueError, match="'seeed' in .*config.yaml; did you mean 'seed'"):
        settings.load(tmp_path)
    file.unlink()
    for path, missing in ((tmp_path, file), (tmp_path / "none", tmp_path / "none")):
        with pytest.raises(ValueError, match=f"^{path} is not the directory of a run: there is no {missing}"):
            settings.load(path)


def test_every_number_and_text_has_a_rule_and_every_rule_a_setting() -> None:
    for leaf in tree.leaves():
        kinds = typing.get_args(leaf.type) or (leaf.type,)
        if leaf.type is not bool and {int, float, str} & set(kinds):
            assert rules._rule(leaf.name) is not None, f"{leaf.name} needs a rule in settings/rules.py"
    names = set(tree.flatten(Config()))
    for name in rules._RULES:
        assert name in names or f"evolve.{name}" in names, name


@pytest.mark.parametrize(
    ("setting", "allowed"),
    [
        ("--seed=-1", "seed is -1: it must be at least 0"),
        ("--evolve.interval=0", "evolve.interval is 0.0: it must be above 0 and at most 1"),
        ("--evolve.interval=1.01", "evolve.interval is 1.01"),
        ("--evolve.interval=.nan", "evolve.interval is nan"),
        ("--generation.top_p=0", "generation.top_p is 0.0: it must be above 0 and at most 1"),
        ("--temperature.value=0", "temperature.value is 0.0: it must be a finite number above 0"),
        ("--temperature.value=.inf", "temperature.value is inf"),
        ("--temperature.grid=[]", "temperature.grid is []: it must be a list of at least one temperature above 0"),
        ("--temperature.grid=[0.5,0]", "temperature.grid is [0.5, 0.0]"),
        ("--selection.k=0", "selection.k is 0: it must be at least 1"),
        ("--selection.threshold=2", "selection.threshold is 2.0: it must be between 0 and 1"),
        ("--warmup.optimizer.beta2=1", "warmup.optimizer.beta2 is 1.0: it must be at least 0 and below 1"),
        ("--prm.optimizer.batch_size=0", "prm.optimizer.batch_size is 0: it must be at least 1"),
        ("--annotate.held_out=1", "annotate.held_out is 1.0: it must be above 0 and below 1"),
        ("--run.dir= ", "run.dir is ' ': it must be a text that is not empty"),
        ("--prm.optimizer.min_lr=1", "prm.optimizer.min_lr is 1.0: it must be at most prm.optimizer.lr"),
        ("--parallel.sequence=true", "parallel.sequence is True: it needs parallel.tensor of at least 2"),
        ("--evolve.max_steps=0", "evolve.max_steps and evolve.passes are both 0"),
        ("--temperature.k=17", "temperature.k is 17: it must be at most temperature.responses, 16"),
        ("--evolve.interval=0.4", "evolve.interval is 0.4: a pass must be a whole number of iterations"),
        ("--evaluation.reward_k=17", "evaluation.reward_k is 17: it must be at most evaluation.k, 16"),
    ],
)
def test_senseless_values_are_refused(setting: str, allowed: str) -> None:
    assert allowed in message([setting])


def test_a_falling_learning_rate_needs_the_number_of_steps() -> None:
    argv = ["--evolve.optimizer.schedule=cosine", "--evolve.passes=2"]
    assert message([*argv, "--evolve.max_steps=0"]).startswith("evolve.optimizer.schedule is 'cosine'")
    rules.validate(settings.parse(argv))
    for restarts in (["--evolve.method=rest_em"], ["--evolve.optimizer_state=reset"]):  # falls in each iteration
        rules.validate(settings.parse([*argv, "--evolve.max_steps=0", *restarts]))
    assert message([*argv, "--evolve.max_steps=0", "--evolve.method=rest_em", "--evolve.optimizer_state=inherit"])
    assert {name for name, method in METHODS.items() if not method.inherit_optimizer} == set(rules.RESETTING)


def test_unlabelled_prompts_need_unlabelled_queries() -> None:
    argv = ["--prompts.unlabelled=voting", "--data.unlabelled_queries=0"]
    assert "it needs data.unlabelled_queries above 0" in message(argv)
    argv = ["--data.name=mathv360k", "--data.labelled_share=1"]
    rules.validate(settings.parse(argv))
    assert "it needs data.labelled_share below 1" in message([*argv, "--prompts.unlabelled=voting"])
    assert "data.labelled_share is 0.0: it must be above 0 and at most 1" in message(["--data.labelled_share=0"])


def test_differences_name_what_changes_results_and_nothing_else() -> None:
    old = Config()
    free = ["--run.dir=x", "--run.keep_checkpoints=9", "--run.allow_changed_settings=true", "--parallel.tensor=2"]
    assert settings.differences(old, settings.parse([*free, "--report.samples_per_iteration=1"])) == []
    new = settings.parse(
        [*free, "--evolve.interval=0.5", "--warmup.optimizer.lr=0.1", "--run.checkpoint_every_steps=3"]
    )
    assert settings.differences(old, new) == [
        "run.checkpoint_every_steps: 200 -> 3",
        "warmup.optimizer.lr: 1e-06 -> 0.1",
        "evolve.interval: None -> 0.5",
    ]


def test_the_shipped_configs_are_valid() -> None:
    files = sorted((EXAMPLES / "configs").glob("*.yaml"))
    assert files
    for file in files:
        rules.validate(settings.parse(["--config", str(file)]))


def test_each_method_brings_its_own_choices() -> None:
    resolved = {name: resolve_method(settings.parse([f"--evolve.method={name}"]).evolve) for name in METHODS}
    assert resolved == {
        "continuous": ResolvedMethod(0.25, True, "last"),
        "iterative_rft": ResolvedMethod(1.0, False, "last"),
        "rest_em": ResolvedMethod(1.0, False, "warmup"),
        "sft": ResolvedMethod(1.0, True, "base", starts_once=True),
    }


def test_settings_go_over_the_methods_choices() -> None:
    evolve = EvolveConfig(method="rest_em", interval=0.0625, optimizer_state="inherit", start_from="last")
    assert resolve_method(evolve) == ResolvedMethod(0.0625, True, "last")
    assert resolve_method(EvolveConfig(optimizer_state="reset")).inherit_optimizer is False


def test_sft_trains_on_an_answer_block_that_the_extractor_reads() -> None:
    from mstar_mega.rewards.answers import extract_answer

    assert bare_answer("3/4") == "# Answer\n\n3/4"
    assert extract_answer(bare_answer("3/4")) == "3/4"


@pytest.mark.parametrize(
    "name",
    [
        "annotate.responses", "annotate.rollouts", "warmup.responses", "warmup.keep", "evolve.responses", "selection.k",
        "evaluation.k", "evaluation.reward_k", "temperature.k", "temperature.responses", "temperature.queries",
    ],
)  # fmt: skip
def test_lists_in_memory_are_bounded(name: str) -> None:
    most = rules.MOST_RESPONSES
    wide = ["--temperature.responses", str(most), "--evaluation.k", str(most)]  # what two of them must not exceed
    rules.validate(settings.parse([*wide, f"--{name}", str(most)]))
    with pytest.raises(ValueError, match=f"{name} is {most + 1}: it must be at least 1 and at most 1,000,000"):
        rules.validate(settings.parse([*wide, f"--{name}", str(most + 1)]))


@pytest.mark.parametrize("name", ["warmup_examples", "labelled_queries", "unlabelled_queries", "test_queries"])
def test_the_built_in_task_makes_a_bounded_number(name: str) -> None:
    most = rules.MOST_MADE
    rules.validate(settings.parse([f"--data.{name}", str(most)]))
    with pytest.raises(ValueError, match=f"data.{name} is {most + 1}: the built-in task makes at most 1,000,000"):
        rules.validate(settings.parse([f"--data.{name}", str(most + 1)]))
    rules.validate(settings.parse([f"--data.{name}", str(most + 1), "--data.name", "easy_vqa"]))
