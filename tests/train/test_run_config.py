"""Configs: JSON and back, overrides, mistakes."""

import dataclasses
import json
from pathlib import Path

import pytest

from mm_jax.cli.main import main
from mm_jax.errors import UserError
from mm_jax.serialize import from_json, to_json
from mm_jax.train.config import RunConfig, check_same_run, load_config, read_config, save_config

CONFIGS = Path(__file__).parents[2] / "configs"


def test_json_round_trip(config_path: Path) -> None:
    config = load_config(config_path)
    assert from_json(RunConfig, json.loads(json.dumps(to_json(config)))) == config


def test_overrides_reach_into_stages_and_mixtures(config_path: Path) -> None:
    arguments = [
        "--stages.align.steps",
        "100",
        "--stages.align.mixture.sounds=5",
        "--model.vision.num-layers",
        "2",
    ]
    config = load_config(config_path, arguments)
    assert config.stages["align"].steps == 100
    assert config.stages["align"].mixture == {"pictures": 2.0, "sounds": 5.0}
    assert config.model.vision.num_layers == 2
    assert config.stages["towers"] == load_config(config_path).stages["towers"]


@pytest.mark.parametrize(
    "arguments, message",
    [
        (
            ["--stages.align.stepz", "3"],
            'unknown option "--stages.align.stepz"; did you mean "stages.align.steps"?',
        ),
        (["--stages.align.stepz=3"], 'did you mean "stages.align.steps"?'),
        (["--stages.align.steps", "0"], "stages.align.steps is 0, at least 1 is needed"),
        (["--stages.align.mixture.sounds", "-1"], "stages.align.mixture.sounds is -1.0"),
        (
            ["--stages.align.optimizer.decay_fraction", "40"],
            "decay_fraction is 40.0, a share from 0 to 1 is needed",
        ),
    ],
)
def test_a_wrong_override_is_one_line(
    config_path: Path, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(UserError) as caught:
        load_config(config_path, arguments)
    assert message in str(caught.value)
    assert main(["train", str(config_path), "--run", "/nowhere", *arguments]) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1 and message in lines[0]


def test_a_wrong_value_exits_with_2(config_path: Path) -> None:
    with pytest.raises(SystemExit) as caught:
        load_config(config_path, ["--stages.align.steps", "many"])
    assert caught.value.code == 2


def test_a_missing_config_offers_the_nearest(config_path: Path) -> None:
    with pytest.raises(UserError, match=r'there is no config .*tinny.py"; did you mean .*tiny.py"'):
        load_config(config_path.with_name("tinny.py"))


@pytest.mark.parametrize(
    "change, message",
    [
        ({"stepz": 3}, 'config.stages.align has an unknown field "stepz"; did you mean "steps"?'),
        ({"steps": "3"}, "config.stages.align.steps is '3', int is needed"),
        ({"loss": "next_tokens"}, 'config.stages.align.loss is "next_tokens"; did you mean "next_token"?'),
        ({"optimizer": {"beta3": 1}}, 'config.stages.align.optimizer has an unknown field "beta3"'),
    ],
)
def test_bad_json_names_the_field(config_path: Path, change: dict, message: str) -> None:
    value = to_json(load_config(config_path))
    value["stages"]["align"] |= change
    with pytest.raises(UserError) as caught:
        from_json(RunConfig, value)
    assert message in str(caught.value)


def test_a_run_directory_of_another_config_names_the_field(config_path: Path, tmp_path: Path) -> None:
    config = load_config(config_path)
    save_config(config, tmp_path)
    assert read_config(tmp_path) == config
    check_same_run(dataclasses.replace(config, workers=2, log_every=7), tmp_path)  # does not change results
    with pytest.raises(UserError, match="stages.align.steps is 4 there and 9 here"):
        check_same_run(load_config(config_path, ["--stages.align.steps", "9"]), tmp_path)


def test_unknown_source_in_a_mixture(config_path: Path) -> None:
    text = config_path.read_text().replace('mixture={"pictures": 1.0}', 'mixture={"picture": 1.0}')
    path = config_path.with_name("wrong.py")
    path.write_text(text)
    with pytest.raises(UserError, match='stages.prefer.mixture names "picture"; did you mean "pictures"?'):
        load_config(path)
    path.unlink()


def test_unknown_command_offers_the_nearest(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["trian"]) == 2
    assert capsys.readouterr().err == 'mm_jax trian: unknown command "trian"; did you mean "train"?\n'


@pytest.mark.parametrize("arguments", [["train", "--help"], ["data", "--help"], ["--help"]])
def test_help_has_an_example(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments) == 0
    assert "example: python -m mm_jax" in capsys.readouterr().out


@pytest.mark.parametrize("name", sorted(path.stem for path in CONFIGS.glob("*.py")))
def test_shipped_configs_are_consistent(name: str) -> None:
    """As far as that can be seen without the checkpoints that they name."""
    from mm_jax.train.setup import check_model

    config = load_config(CONFIGS / f"{name}.py")
    assert config.name == name
    if config.processor is not None:
        check_model(config)


@pytest.mark.parametrize(
    "name, parameters", [("internvl2_5_26b", 25_514_186_112), ("qwen2_vl_72b", 73_405_560_320)]
)
def test_sizes_in_configs_are_those_of_the_hub(name: str, parameters: int) -> None:
    """As the hub shows them for the released checkpoints."""
    import jax

    from mm_jax.train.setup import abstract_params

    model = load_config(CONFIGS / f"{name}.py").model
    assert sum(x.size for x in jax.tree.leaves(abstract_params(model))) == parameters
